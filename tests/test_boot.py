"""BOOT in closed forms: it converges to the teacher's rollout from the noise, started from D(eps, T)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import close
from oracles.context import Network, Scripted, Tabular, column, stable_diffusion
from oracles.dirac import Dirac
from oracles.gaussian import GaussianTeacher, levels, marginal_std
from oracles.mixture import Mixture
from oracles.planted import Bug, planted
from test_trigflow import CASES, SCHEDULES
from tiny import FAMILIES, pipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.prediction import Estimate, Kind, estimate_at_levels
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule
from stepdistill.methods import boot
from stepdistill.methods.base import Batch, Update
from stepdistill.methods.boot import Boot

MEAN, STD, SD = 0.7, 0.6, stable_diffusion()
FLOW = SCHEDULES["flow"]


def plain(n: int, **more: Any) -> Boot:
    """Without guidance, unless it is given."""
    return Boot(**{"num_ddim_timesteps": n, "guidance_scale": 1.0, **more})


class Queried(Tabular):
    """A student that says `offset_j + slope_j x` of pure noise when it is told the mirror of the j-th grid time."""

    def __init__(self, schedule: NoiseSchedule, n: int, kind: Kind) -> None:
        super().__init__(schedule, n, kind)
        self.told: list[float] = []
        self.inputs: list[Tensor] = []

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        self.told += t.tolist()
        self.inputs.append(x_t)
        gaps = (self.times[None] - (sum(self.schedule.span) - t.double())[:, None]).abs()
        assert gaps.min(1).values.max() < 1e-3, "the student is told a time that is no mirror of the grid's"
        j = gaps.argmin(1)
        y = self.offset[j].reshape(-1, 1, 1, 1) + self.slope[j].reshape(-1, 1, 1, 1) * x_t
        return estimate_at_levels(self.kind, y, x_t, alpha_t, sigma_t)

    def signal(self, eps: Tensor, j: int) -> Tensor:
        """y at the j-th grid time, by the student's own prediction type at the noisiest time."""
        alpha, sigma = (v.expand(len(eps)) for v in self.schedule(torch.tensor(self.schedule.span[1]).double()))
        return estimate_at_levels(self.kind, self.offset[j] + self.slope[j] * eps, eps, alpha, sigma).x0.detach()


def update(
    method: Boot, schedule: NoiseSchedule, teacher: Any, student: Any, eps: Tensor, i: Tensor, step: int = 0, null=0.0
) -> Update:
    """The method's own update for noise (B, 1, 1, 1) and grid steps i (B,): from time i + 1 to time i."""
    scene = Scripted(
        schedule=schedule,
        null={"mean": column(null)},
        denoiser={"teacher": teacher, "student": student}.__getitem__,
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
        draws={"t": (i + 0.5) / method.num_ddim_timesteps},
        eps=eps,
    )
    part = Batch(tuple(range(len(eps))), {"mean": torch.full_like(eps, MEAN)}, (1, 1, 1))
    (only,) = method.updates(scene, part, step)
    assert only.roles == ("student",)
    return only


def converged(method: Boot, schedule: NoiseSchedule, teacher: Any, kind: Kind, null: float = 0.0) -> Queried:
    """Train a tabular student exactly: targets look up the grid alone, so one downward sweep does it."""
    n, eps = method.num_ddim_timesteps, column(-1.0, 1.0)
    student = Queried(schedule, n, kind)
    for j in range(n, -1, -1):
        if j < n or method.boundary_weight:
            i = torch.full((2,), min(j, n - 1))
            student.fit(j, update(method, schedule, teacher, student, eps, i, null=null).loss)
    return student


def rollout(
    schedule: NoiseSchedule, teacher: Denoise, n: int, eps: Tensor, start: Tensor | None = None, mean: float = MEAN
) -> list[Tensor]:
    """The signals of the teacher's n DDIM steps along its states, noisiest first; `start` is D(eps, T) if not given.

    By DDIM in the states themselves, `x_s = alpha_s D + sigma_s (x - alpha_t D) / sigma_t`.
    """
    times, cond = schedule.grid(n).double().flip(0).tolist(), {"mean": torch.full_like(eps, mean)}

    def clean(x: Tensor, t: float) -> Tensor:
        return teacher(x, torch.full((len(eps),), t, dtype=torch.float64), cond).x0

    signals = [clean(eps, times[0]) if start is None else start]
    alpha, sigma = levels(schedule, times[0])
    x = alpha * signals[0] + sigma * eps
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
        x0 = clean(x, t)
        x = alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t
        signals.append((x - sigma_s * eps) / alpha_s)
    return signals


# --- the fixed point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "golden"), [(1, 0.7), (2, 1.0441176), (8, 1.3547692), (32, 1.4468269)])
def test_it_converges_to_the_solver_s_steps(n, golden):
    """B2: on a flow, data N(.7, .6^2), from eps = 1.3; the ODE ends at 1.48."""
    student = converged(plain(n), FLOW, Network(GaussianTeacher(FLOW, STD), "flow", FLOW), "flow")
    close(student.signal(column(1.3), 0), column(golden), 1e-6)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_every_time_s_signal_is_that_of_the_rollout(name, kind, n):
    """B2 for every process and prediction type: not the end alone, but y at each time of the grid."""
    schedule = SCHEDULES[name]
    teacher = GaussianTeacher(schedule, STD)
    student = converged(plain(n), schedule, Network(teacher, kind, schedule), kind)
    eps = column(-2.0, 0.0, 1.3)
    for j, signal in enumerate(reversed(rollout(schedule, teacher, n, eps))):
        close(student.signal(eps, j), signal, 1e-9)


@pytest.mark.parametrize("name", ["flow", "shifted"])
def test_more_steps_come_nearer_to_the_ode_at_every_time(name):
    """B1: `y*(eps, t) = m + ((S_t - sigma_t) / alpha_t) eps`; the error falls as 1 / N."""
    schedule, errors = SCHEDULES[name], []
    for n in (20, 80):
        student = converged(plain(n), schedule, Network(GaussianTeacher(schedule, STD), "flow", schedule), "flow")
        gaps = []
        for j in range(0, n, n // 4):
            t = schedule.grid(n)[j].item()
            alpha, sigma = levels(schedule, t)
            y = MEAN + (marginal_std(schedule, STD, t) - sigma) / alpha * 1.3
            gaps.append((student.signal(column(1.3), j) - y).abs().item())
        errors.append(max(gaps))
    assert errors[1] < errors[0] / 3 and errors[1] < 0.03


def test_the_boundary_term_mends_the_mean_that_pure_noise_loses():
    """On Stable Diffusion's table the teacher's own sampler starts at x_T = eps, and ends at the mean .671 for .7."""
    n, zero = 125, column(-1.0, 0.0, 1.0)
    teacher = GaussianTeacher(SD, STD)
    student = converged(plain(n), SD, Network(teacher, "v_prediction", SD), "v_prediction")
    low, middle, high = student.signal(zero, 0).flatten().tolist()
    close([middle, (high - low) / 2], [0.7, 0.563], 1.5e-3)
    close(
        student.signal(zero, n), teacher(zero, torch.full((3,), 999.0), {"mean": torch.full_like(zero, MEAN)}).x0, 1e-9
    )
    # without it, from a student whose y_T is the signal of x_T = eps
    alpha, sigma = levels(SD, 999.0)
    method, lost = plain(n, boundary_weight=0.0), Queried(SD, n, "sample")
    with torch.no_grad():
        lost.slope[n] = (1 - sigma) / alpha
    for j in range(n - 1, -1, -1):
        lost.fit(
            j, update(method, SD, Network(teacher, "sample", SD), lost, column(-1.0, 1.0), torch.full((2,), j)).loss
        )
    exact = rollout(SD, teacher, n, zero, start=(1 - sigma) / alpha * zero)[-1]
    close(lost.signal(zero, 0), exact, 1e-9)
    low, middle, high = exact.flatten().tolist()
    close([middle, (high - low) / 2], [0.6714, 0.563], 1.5e-3)


def test_a_wrong_start_is_seen_at_the_start_alone():
    """B4: y(., T) off by 0.8 moves the end by a hundredth of it; so the boundary is asserted where it is."""
    n, teacher = 100, GaussianTeacher(SD, STD)
    eps = column(1.3)
    start = rollout(SD, teacher, n, eps)[0]
    ends = [rollout(SD, teacher, n, eps, start=start + d)[-1] for d in (0.0, 0.8)]
    assert (ends[1] - ends[0]).abs() < 0.05 * 0.8
    student = converged(plain(n), SD, Network(teacher, "epsilon", SD), "epsilon")
    close(student.signal(eps, n), start, 1e-9)


@dataclass(frozen=True)
class Rolled:
    """The student that is the teacher's rollout, for any teacher."""

    schedule: NoiseSchedule
    teacher: Denoise
    n: int
    gain: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64, requires_grad=True))

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        times = self.schedule.grid(self.n).double().flip(0)
        signals = rollout(self.schedule, self.teacher, self.n, x_t)
        rows = [(times - (sum(self.schedule.span) - each)).abs().argmin().item() for each in t.double()]
        y = self.gain * torch.stack([signals[row][k] for k, row in enumerate(rows)])
        return Estimate(y, x_t)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_rollout_of_a_mixture_is_a_fixed_point(name, kind):
    """B3: with two modes; the loss and its gradient are zero at every step of the grid."""
    schedule, n = SCHEDULES[name], 10
    mixture = Mixture(schedule)
    student = Rolled(schedule, mixture, n)
    eps, i = column(*torch.linspace(-2.5, 2.5, n).tolist()), torch.arange(n)
    made = update(plain(n), schedule, Network(mixture, kind, schedule), student, eps, i)
    close(made.loss, 0.0, 1e-20)
    close(made.logs["loss_boundary"], 0.0, 1e-20)
    close(torch.autograd.grad(made.loss, student.gain)[0], 0.0, 1e-9)


def test_point_masses_have_no_loss():
    """B5: of every prompt, where the student that says the point is the teacher itself."""
    for name in ("table", "shifted"):
        schedule = SCHEDULES[name]
        point = Network(Dirac(schedule), "sample", schedule)
        made = update(plain(5), schedule, point, point, torch.randn(5, 1, 1, 1).double(), torch.arange(5))
        close(made.loss, 0.0, 1e-25)


def test_a_table_that_ends_at_pure_noise_needs_no_boundary_term():
    """Its first target is D(eps, T), whatever the student says there; nothing divides by alpha_T = 0."""
    table = torch.cat([SD(torch.arange(999.0))[0] ** 2, torch.zeros(1).double()])
    schedule, n = DiscreteVP(table), 5
    teacher, student = GaussianTeacher(schedule, STD), Queried(schedule, n, "v_prediction")
    method, eps = plain(n, boundary_weight=0.0), column(-1.0, 1.0)
    made = update(method, schedule, Network(teacher, "v_prediction", schedule), student, eps, torch.full((2,), n - 1))
    student.fit(n - 1, made.loss)
    close(student.signal(eps, n - 1), column(MEAN, MEAN), 1e-6)


# --- guidance, the query, the teacher's inputs -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(("name", "kind"), [("table", "v_prediction"), ("shifted", "flow")])
def test_guidance_is_in_the_target_alone(name, kind, scale):
    """O4: the rollout of data around `m0 + w (m - m0)`, from a start that is guided, too."""
    schedule, null, n = SCHEDULES[name], -0.4, 10
    teacher = GaussianTeacher(schedule, STD)
    student = converged(plain(n, guidance_scale=scale), schedule, Network(teacher, kind, schedule), kind, null)
    eps, mean = column(-1.0, 1.3), null + scale * (MEAN - null)
    for j, signal in enumerate(reversed(rollout(schedule, teacher, n, eps, mean=mean))):
        close(student.signal(eps, j), signal, 1e-9)


def test_the_student_is_not_guided():
    """Its network is asked with the prompts, and never without."""
    seen: list[Tensor] = []

    class Listening(Rolled):
        def queried(self, x_t, t, cond, alpha_t, sigma_t):
            seen.append(cond["mean"])
            return super().queried(x_t, t, cond, alpha_t, sigma_t)

    teacher = GaussianTeacher(FLOW, STD)
    update(
        plain(4, guidance_scale=5.0),
        FLOW,
        teacher,
        Listening(FLOW, teacher, 4),
        column(1.0),
        torch.tensor([1]),
        null=-3.0,
    )
    assert len(seen) == 3 and all((mean == MEAN).all() for mean in seen)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_query_is_mirrored_and_the_input_is_pure_noise(name, kind):
    """Told T - t for y at t; at the end, clean data, T itself."""
    schedule, n, eps = SCHEDULES[name], 4, column(-1.0, 1.3)
    student = Queried(schedule, n, kind)
    grid, (low, high) = schedule.grid(n), schedule.span
    for i in range(n):
        student.told.clear()
        update(
            plain(n),
            schedule,
            Network(GaussianTeacher(schedule, STD), kind, schedule),
            student,
            eps,
            torch.full((2,), i),
        )
        times = [grid[i + 1], grid[i], high]
        close(student.told, [low + high - float(t) for t in times for _ in eps], 1e-3)
        assert i or student.told[2:4] == [high, high]
    assert all(torch.equal(x, eps) for x in student.inputs)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_stock_scheduler_gives_the_last_signal_in_one_step(name):
    """As the student's pipeline runs it: the network is told T, and the estimate of clean data is y_0."""
    family, pipe = FAMILIES[name], pipeline(name)
    schedule: Any = family.schedule(pipe.scheduler)
    kind, n = family.kind(pipe), 10
    student = converged(plain(n), schedule, Network(GaussianTeacher(schedule, STD), kind, schedule), kind)
    scheduler, call = family.scheduler(pipe, Boot().sampler(schedule))
    stock: Any = scheduler
    stock.set_timesteps(**({"sigmas": call["sigmas"]} if "sigmas" in call else {"num_inference_steps": 1}))
    (t,), eps = stock.timesteps, column(-1.0, 0.2, 1.3)
    assert float(t) == schedule.span[1]
    y = student.offset[0] + student.slope[0] * eps
    made = stock.step(y.detach().float(), t, eps.float(), return_dict=False)[0]
    close(made, student.signal(eps, 0), 2e-5)


def test_another_number_of_steps_has_no_sampler():
    for steps in (2, 4):
        with pytest.raises(ValueError, match=f"{steps} sampling steps: expected 1"):
            Boot().sampler(SD, steps)
    assert Boot().sampler(SD, 1) == Boot().sampler(SD)
    assert Boot().sampler(SD).timesteps == (999.0,) and Boot().sampler(FLOW).timesteps == (1000.0,)
    with pytest.raises(ValueError, match="a grid of 7 steps"):
        Boot(num_ddim_timesteps=7).check(SD)


@dataclass(frozen=True)
class Exact:
    """The student that follows the ODE: y*(eps, t)."""

    schedule: NoiseSchedule

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in self.schedule(sum(self.schedule.span) - t.double()))
        spread = ((alpha * STD) ** 2 + sigma**2).sqrt()
        y = torch.where(alpha > 0, MEAN + (spread - sigma) / alpha * x_t, torch.full_like(x_t, MEAN))
        return Estimate(y, x_t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_teacher_sees_states_of_its_own(name):
    """B6: N(alpha_t m, S_t^2) at each time: with their noise, and scaled by their levels. No data are asked for."""
    schedule, n = SCHEDULES[name], 4
    asked: list[tuple[Tensor, Tensor]] = []
    teacher = GaussianTeacher(schedule, STD)

    def listening(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        asked.append((x_t, t))
        return teacher(x_t, t, cond)

    torch.manual_seed(0)
    eps, grid = torch.randn(40_000, 1, 1, 1).double(), schedule.grid(n).tolist()
    for i in range(n):
        asked.clear()
        update(plain(n), schedule, listening, Exact(schedule), eps, torch.full((len(eps),), i))
        ((x, t),) = asked  # one call for both terms
        states, noise = x.chunk(2)
        assert t[: len(eps)].unique().tolist() == pytest.approx([grid[i + 1]])
        assert torch.equal(noise, eps) and t[len(eps) :].unique().tolist() == [schedule.span[1]]
        alpha = levels(schedule, grid[i + 1])[0]
        close(states.mean(), alpha * MEAN, 0.02)
        close(states.std(), marginal_std(schedule, STD, grid[i + 1]), 0.01)


def test_targets_carry_no_graph():
    """Neither the teacher, nor the student's own y_t; alone y_s, and y_T of the boundary term."""
    n, i = 4, 1
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    teacher = GaussianTeacher(FLOW, STD)

    def gained(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return Estimate(*(gain * part for part in teacher(x_t, t, cond)))

    student = Queried(FLOW, n, "flow")
    made = update(plain(n), FLOW, gained, student, column(-1.0, 1.3), torch.full((2,), i))
    assert torch.autograd.grad(made.loss, gain, allow_unused=True, retain_graph=True) == (None,)
    (pull,) = torch.autograd.grad(made.loss, student.offset)
    assert pull.nonzero().flatten().tolist() == [i, n]


# --- weights and the curriculum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2.0, 30.0, 1e6])
@pytest.mark.parametrize("name", ["table", "shifted"])
def test_the_loss_is_its_closed_form(name, limit):
    """`min(limit, 1 / (1 - rho)^2) |y_s - target|^2`, and beta times the boundary's."""
    schedule, n = SCHEDULES[name], 20
    teacher, eps = GaussianTeacher(schedule, STD), column(1.3)
    (grid,) = [schedule.grid(n).double().tolist()]
    for i in (0, 7, n - 1):
        student = Queried(schedule, n, "sample")
        with torch.no_grad():
            student.offset += torch.linspace(0.1, 0.9, n + 1).double()
        y = {j: student.signal(eps, j).item() for j in (i, i + 1, n)}
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (levels(schedule, grid[j]) for j in (i + 1, i))
        rho = sigma_s * alpha_t / (sigma_t * alpha_s)
        cond = {"mean": column(MEAN)}
        clean, first = (
            teacher(x, torch.tensor([t]).double(), cond).x0.item()
            for x, t in ((alpha_t * y[i + 1] + sigma_t * eps, grid[i + 1]), (eps, grid[n]))
        )
        followed = min(limit, 1 / (1 - rho) ** 2) * (y[i] - rho * y[i + 1] - (1 - rho) * clean) ** 2
        made = update(
            plain(n, weight_limit=limit, boundary_weight=0.3), schedule, teacher, student, eps, torch.tensor([i])
        )
        close(made.logs["loss_boundary"], (y[n] - first) ** 2, 1e-9)
        close(made.loss, followed + 0.3 * (y[n] - first) ** 2, 1e-9 * max(1.0, followed))


def test_times_are_even_and_the_curriculum_comes_down_from_the_noisiest():
    """Each grid step equally often; within the curriculum those from its lowest on, which falls evenly to the last."""
    n, u = 20, (torch.arange(4000) + 0.5) / 4000
    assert plain(n).step_index(u, 0).bincount().tolist() == [200] * n
    slow = plain(n, curriculum_steps=100)
    for step, lowest in ((0, 19), (50, 10), (75, 5), (100, 0), (10_000, 0)):
        counts = slow.step_index(u, step).bincount(minlength=n)
        assert not counts[:lowest].any() and counts[lowest:].min() > 0
        assert counts[lowest:].max() - counts[lowest:].min() <= 1
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert plain(n).step_index(ends, 0).tolist() == [0, n - 1] and slow.step_index(ends, 0).tolist() == [n - 1, n - 1]


# --- planted bugs ----------------------------------------------------------------------------------------------------


def fixed_point() -> None:
    for name, kind in CASES:
        test_every_time_s_signal_is_that_of_the_rollout(name, kind, 5)


def guidance() -> None:
    test_guidance_is_in_the_target_alone("table", "v_prediction", 3.0)


def weights() -> None:
    for limit in (2.0, 30.0):
        test_the_loss_is_its_closed_form("shifted", limit)


def queries() -> None:
    test_the_query_is_mirrored_and_the_input_is_pure_noise("table", "v_prediction")


UPDATES: Callable = Boot.updates
BUGS = {
    "solver's step with the wrong rho": Bug(
        UPDATES, "sigma_s * alpha_t / (sigma_t * alpha_s)", "sigma_s / sigma_t", fixed_point
    ),
    "rho upside down": Bug(
        UPDATES, "share * y_t + (1 - share) * found", "(1 - share) * y_t + share * found", fixed_point
    ),
    "from clean to noise": Bug(UPDATES, "t, s = grid[i + 1], grid[i]", "s, t = grid[i + 1], grid[i]", fixed_point),
    "the noise left out of the state": Bug(
        UPDATES, "schedule.add_noise(y_t, eps, t)", "schedule.add_noise(y_t, 0 * eps, t)", fixed_point
    ),
    "the state not scaled": Bug(UPDATES, "schedule.add_noise(y_t, eps, t)", "y_t", fixed_point),
    "teacher told the end time": Bug(UPDATES, "torch.cat([t, noisiest])", "torch.cat([s, noisiest])", fixed_point),
    "solver skipped": Bug(UPDATES, "target = share * y_t + (1 - share) * found", "target = y_t", fixed_point),
    "boundary from the state": Bug(UPDATES, ").x0.chunk(2)", ").x0[:len(t)].repeat(2, 1, 1, 1).chunk(2)", fixed_point),
    "no boundary term": Bug(UPDATES, "self.boundary_weight * start", "0 * start", lambda: converged_start()),
    "target not detached": Bug(UPDATES, "torch.no_grad()", "torch.enable_grad()", test_targets_carry_no_graph),
    "no guidance": Bug(UPDATES, "self.guidance_scale)", "1.0)", guidance),
    "w for 1 + w": Bug(UPDATES, "self.guidance_scale)", "1 + self.guidance_scale)", guidance),
    "start not guided": Bug(
        UPDATES,
        "first = teacher(x_t, torch.cat([t, noisiest]), both).x0.chunk(2)",
        "first = teacher(x_t, torch.cat([t, noisiest]), both).x0.chunk(2); first = context.denoiser(TEACHER)(eps, "
        "noisiest, cond).x0",
        guidance,
    ),
    "no limit of the weight": Bug(UPDATES, ".clamp(max=self.weight_limit)", "", weights),
    "weight of the first power": Bug(UPDATES, "(1 - rho).square()", "(1 - rho)", weights),
    "query not mirrored": Bug(boot.signal, "low + high - t", "t", queries),
    "levels of the time": Bug(boot.signal, "per_sample(high, eps)", "t", fixed_point),
    "student sees a state": Bug(boot.signal, "queried(eps,", "queried(0.9 * eps,", queries),
    "the curriculum upwards": Bug(
        Boot.step_index,
        "(n - 1) * (1 - done)",
        "(n - 1) * done",
        test_times_are_even_and_the_curriculum_comes_down_from_the_noisiest,
    ),
    "the noisiest time never drawn": Bug(
        Boot.step_index,
        "u * (n - lowest)",
        "u * (n - 1 - lowest)",
        test_times_are_even_and_the_curriculum_comes_down_from_the_noisiest,
    ),
}


def converged_start() -> None:
    """y at the noisiest time is D, asserted there."""
    test_every_time_s_signal_is_that_of_the_rollout("table", "v_prediction", 1)


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_noticed(name):
    bug = BUGS[name]
    bug.test()
    with planted(bug.function, bug.old, bug.new), pytest.raises(AssertionError):
        bug.test()
