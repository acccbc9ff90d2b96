"""Reflow, PeRFlow and SlimFlow against closed forms: lines, floors of the loss, straightness, ends of windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import close
from oracles.context import Flow, drawn, stable_diffusion
from oracles.gaussian import GaussianTeacher, ddim_gain, guided_mean, levels, ode_map
from tables.plots import draw_paths
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.losses import sample_distances
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, Rectified, expand
from stepdistill.core.solvers import (
    chord,
    even_sampler,
    few_step,
    follow,
    share_of_noise,
    solve,
    time_of_share,
    u_shaped,
)
from stepdistill.evaluation.metrics.straightness import paths
from stepdistill.methods import reflow
from stepdistill.methods.base import Batch
from stepdistill.methods.perflow import PeRFlow
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.slimflow import FlowGuided
from stepdistill.networks.lpips import Lpips
from stepdistill.networks.roles import TEACHER, Copy, Lora

SD, FLOW = stable_diffusion(), Flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
MEAN, STD = 0.7, 0.6


def noises(size: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(size, *(shape or (1, 1, 1)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts(size: int, mean: float = MEAN) -> Condition:
    return {"mean": torch.full((size, 1, 1, 1), mean, dtype=torch.float64)}


def pairs(schedule: NoiseSchedule, z: Tensor) -> Batch:
    """Noise, and where the Gaussian teacher's ODE carries it."""
    x0 = ode_map(schedule, MEAN, STD, z, *reversed(schedule.span))
    return Batch(tuple(range(len(z))), prompts(len(z)), tuple(z.shape[1:]), x0, z)


@dataclass(frozen=True)
class Lines:
    """The exact denoiser of the lines from z at t, `x = a + g z` at s: which line `x_t` lies on, then its (x0, eps)."""

    schedule: NoiseSchedule
    t: float
    s: float
    offset: float
    gain: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        start, end = (torch.full_like(t, time) for time in (self.t, self.s))
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t))

        def state(z: Tensor) -> Tensor:
            line = chord(self.schedule, z, start, self.offset + self.gain * z, end)
            return alpha_t * line.x0 + sigma_t * line.eps

        zero, one = state(torch.zeros_like(x_t)), state(torch.ones_like(x_t))
        z = (x_t - zero) / (one - zero)  # a state is affine in z
        return chord(self.schedule, z, start, self.offset + self.gain * z, end)


def straightened(schedule: NoiseSchedule) -> Lines:
    """What reflow on `pairs` converges to."""
    low, high = schedule.span
    zero, one = (ode_map(schedule, MEAN, STD, torch.tensor(v, dtype=torch.float64), high, low).item() for v in (0, 1))
    return Lines(schedule, high, low, zero, one - zero)


def losses(method, schedule, student, batch: Batch, seed: int = 0, **others) -> Tensor:
    context = drawn(schedule, {"student": student, **others}, seed)
    (update,) = method.updates(context, batch, 0)
    assert update.roles == ("student",)
    return update.loss


# --- lines -----------------------------------------------------------------------------------------------------------


@SCHEDULES
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_a_solver_that_is_told_the_line_ends_at_its_end(schedule, n):
    """PeRFlow's target, with any number of steps."""
    x_t, x_s = noises(3, seed=1), noises(3, seed=2)
    t, s = (torch.full((3,), time, dtype=torch.float64) for time in (749.0, 499.0))
    line = chord(schedule, x_t, t, x_s, s)
    close(solve(lambda *_: line, schedule, x_t, t, s, n, {}), x_s, 1e-12)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, 749.0), levels(schedule, 499.0)
    ratio = alpha_s / alpha_t
    close(line.eps, (x_s - ratio * x_t) / (sigma_s - ratio * sigma_t), 1e-12)


@SCHEDULES
def test_a_line_is_straight_in_flow_coordinates(schedule):
    line = chord(schedule, noises(1, seed=1), torch.tensor([990.0]), noises(1, seed=2), torch.tensor([10.0]))
    share = torch.linspace(0.9, 0.1, 9, dtype=torch.float64)
    t = time_of_share(schedule, share)
    close(share_of_noise(schedule, t), share, 1e-12)
    alpha_t, sigma_t = schedule(t)
    x = (alpha_t * line.x0.flatten() + sigma_t * line.eps.flatten()) / (alpha_t + sigma_t)
    close(x.diff() / share.diff(), (line.eps - line.x0).flatten().expand(8), 1e-10)


def test_more_shares_lie_at_both_ends():
    """`p(s) ~ e^{4s} + e^{4 (1 - s)}`: its distribution function, exactly, and its variance."""
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    s, a = u_shaped(u), 4.0
    cdf = ((a * s).exp() - (a * (1 - s)).exp() + math.exp(a) - 1) / (2 * (math.exp(a) - 1))
    close(cdf, u, 1e-12)
    assert s.var().item() == pytest.approx(0.11567, abs=1e-5)
    assert (s < 0.1).double().mean().item() == pytest.approx(0.1725, abs=1e-4)


# --- reflow ----------------------------------------------------------------------------------------------------------


@SCHEDULES
@pytest.mark.parametrize("density", ["uniform", "u_shaped"])
@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_the_lines_are_the_fixed_point(schedule, density, loss_type):
    method, batch = Reflow(density=density, loss_type=loss_type), pairs(schedule, noises(64))
    student = straightened(schedule)
    assert losses(method, schedule, student, batch) < 1e-20
    off = Lines(schedule, student.t, student.s, student.offset + 0.1, student.gain)
    assert losses(method, schedule, off, batch) > 1e-4
    assert losses(method, schedule, GaussianTeacher(schedule, STD), batch) > 1e-3  # curved


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_any_number_end_where_the_teacher_does(schedule, steps):
    batch = pairs(schedule, noises(16))
    assert batch.noise is not None and batch.latents is not None
    method = Reflow(num_inference_steps=steps)
    made = few_step(straightened(schedule), schedule, method.sampler(schedule), batch.noise, batch.cond)
    close(made, batch.latents, 1e-10)
    one = few_step(GaussianTeacher(FLOW, STD), FLOW, Reflow().sampler(FLOW), batch.noise, batch.cond)
    close(one, torch.full_like(one, MEAN), 1e-12)  # before reflow: the mean of the data


def test_the_end_of_a_table_is_no_pure_noise():
    """Stable Diffusion starts from z at 999, where alpha is 0.068: mean 2 and std 0.5 come out as 1.9316."""
    z = noises(4)
    batch = Batch((0, 1, 2, 3), prompts(4, 2.0), (1, 1, 1), ode_map(SD, 2.0, 0.5, z, 999, None), z)
    assert batch.latents is not None
    (alpha, sigma), middle = levels(SD, 999.0), ode_map(SD, 2.0, 0.5, torch.zeros(1), 999, None)
    assert middle.item() == pytest.approx(1.9316, abs=1e-4)
    line = chord(SD, z, torch.full((4,), 999.0), batch.latents, torch.zeros(4))
    close(alpha * line.x0 + sigma * line.eps, z, 1e-12)  # so the line starts at what sampling starts at


def annealed_floor(beta: float) -> float:
    """`s beta arcsin beta`, the least loss of the annealed coupling on a flow."""
    return STD * beta * math.asin(beta)


@dataclass(frozen=True)
class Annealed:
    """The best velocity on a flow for noise `sqrt(1 - beta^2) z + beta z'` and data `mean + s z`."""

    beta: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        rho, share = math.sqrt(1 - self.beta**2), expand(t, x_t) / 1000
        d = (1 - share) ** 2 * STD**2 + share**2 + 2 * share * (1 - share) * STD * rho
        slope = -2 * (1 - share) * STD**2 + 2 * share + 2 * (1 - 2 * share) * STD * rho
        v = -cond["mean"] + slope / (2 * d) * (x_t - (1 - share) * cond["mean"])
        return Estimate(x_t - share * v, x_t + (1 - share) * v)


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.6])
def test_an_annealed_coupling_has_its_own_floor(beta):
    """At beta 1 it is `pi s / 2`, that of flow matching; and one step's spread is `s sqrt(1 - beta^2)`."""
    count = 40_000
    steps = 1000
    step = round((1 - beta) * steps)
    method, batch = Reflow(annealing_steps=steps), pairs(FLOW, noises(count))
    assert method.beta(step) == pytest.approx(beta)
    context = drawn(FLOW, {"student": Annealed(beta)}, 3)
    (update,) = method.updates(context, batch, step)
    assert update.loss.item() == pytest.approx(annealed_floor(beta), rel=0.03)
    worse = drawn(FLOW, {"student": Annealed(max(0.1, beta - 0.3))}, 3)
    (other,) = method.updates(worse, batch, step)
    assert other.loss > update.loss
    one = few_step(Annealed(beta), FLOW, method.sampler(FLOW), noises(count, seed=5), batch.cond)
    assert one.std().item() == pytest.approx(STD * math.sqrt(1 - beta**2), abs=0.01)


def test_annealing_runs_from_one_to_none_and_keeps_the_noise_s_size():
    method = Reflow(annealing_steps=300)
    falling = [method.beta(step) for step in (0, 100, 200, 300, 400)]
    assert falling == [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0, 0.0]
    assert Reflow().beta(0) == 0
    seen = []

    def student(x_t, t, cond):
        seen.append((x_t, t))
        return Annealed(0.5)(x_t, t, cond)

    z = noises(40_000)
    batch = Batch(tuple(range(len(z))), prompts(len(z), 0.0), (1, 1, 1), torch.zeros_like(z), z)
    next(Reflow(annealing_steps=2).updates(drawn(FLOW, {"student": student}, 7), batch, 1))
    ((x_t, t),) = seen
    noise = x_t / expand(t, x_t) * 1000  # the data are zero
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert (noise * z).mean().item() == pytest.approx(math.sqrt(0.75), abs=0.02)


def test_a_pair_is_mirrored_as_a_whole():
    seen = []

    def student(x_t, t, cond):
        seen.append((x_t, t))
        return Estimate(x_t, x_t)

    z = noises(64, 1, 1, 2)
    batch = Batch(
        tuple(range(64)), {}, (1, 1, 2), 10 + z, z
    )  # data and noise differ by 10 in each pixel, mirrored or not
    next(Reflow(random_flip=True).updates(drawn(FLOW, {"student": student}, 0), batch, 0))
    ((x_t, t),) = seen
    own = x_t - 10 * (1 - expand(t, x_t) / 1000)
    same, mirrored = (own - z).abs().amax((1, 2, 3)) < 1e-9, (own - z.flip(-1)).abs().amax((1, 2, 3)) < 1e-9
    assert (same ^ mirrored).all() and 16 < mirrored.sum() < 48


def test_the_smaller_student_is_a_network_of_its_own():
    assert Reflow().roles()["student"] == Lora()
    assert Reflow(width=0.5).roles()["student"] == Copy(width=0.5) == FlowGuided(width=0.5).roles()["student"]


# --- premetrics ------------------------------------------------------------------------------------------------------


def huber(error):
    return sample_distances("huber", error, torch.zeros_like(error))


def test_the_huber_is_of_the_whole_sample():
    d = 3 * 4 * 5
    error = noises(2, 3, 4, 5).requires_grad_()
    c = 0.00054 * d
    value = huber(error)
    close(value, ((error.square().sum((1, 2, 3)) + c**2).sqrt() - c) / d, 1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), error)
    assert (gradient.flatten(1).norm(dim=1) <= 1 / d).all()  # element by element it could reach 1 / sqrt(d)
    assert huber(torch.zeros(1, 3)).item() == 0
    small, large = 1e-6 * error.detach(), 1e6 * error.detach()
    close(huber(small), small.square().sum((1, 2, 3)) / (2 * c * d), 1e-3 * 1e-12)
    close(huber(large) / (large.square().sum((1, 2, 3)).sqrt() / d), torch.ones(2), 1e-6)


@pytest.mark.parametrize("divide", [False, True])
def test_the_perceptual_term_compares_ends(monkeypatch, divide):
    """`(1 - s) l2 + weight LPIPS / s`, here with the mean distance as LPIPS and nothing to decode."""
    asked = []

    def perceptual(net, device):
        asked.append(net)
        return lambda a, b: (a - b).abs().flatten(1).mean(1)

    monkeypatch.setattr(reflow, "lpips", perceptual)
    batch, truth = pairs(FLOW, noises(8)), straightened(FLOW)
    student = Lines(FLOW, truth.t, truth.s, truth.offset + 0.1, truth.gain)
    term = Lpips(weight=3.0, net="alex", samples=5, divide=divide)
    found = losses(Reflow(lpips=term), FLOW, student, batch)
    share = drawn(FLOW, {}, 0).draw(batch, "t")
    x_t = (1 - share) * batch.latents.flatten() + share * batch.noise.flatten()
    est = student(x_t.reshape(-1, 1, 1, 1), 1000 * share, batch.cond)
    velocity, true = (est.eps - est.x0).flatten(), (batch.noise - batch.latents).flatten()
    seen = 3 * (est.x0 - batch.latents).flatten().abs()[:5]
    expected = (1 - share) * (velocity - true).square()
    close(found, expected.mean() + (seen / share[:5] if divide else seen).mean(), 1e-12)
    assert asked == ["alex"]


# --- PeRFlow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The lines of every window, each from where the one before ends."""

    lines: tuple[Lines, ...]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        parts = [line(x_t, t.clamp(line.s, line.t), cond) for line in self.lines]
        x0, eps = (torch.zeros_like(x_t) for _ in range(2))
        for line, part in zip(self.lines, parts, strict=True):  # a time on an edge begins the lower window
            inside = expand((t <= line.t) & (t > line.s), x_t)
            x0, eps = torch.where(inside, part.x0, x0), torch.where(inside, part.eps, eps)
        return Estimate(x0, eps)


def chain(schedule: NoiseSchedule, windows: int, m: int, mean: float) -> tuple[Windows, list[float]]:
    """The teacher's m steps in each window, as affine maps."""
    edges = [*schedule.even_starts(schedule.span[1], windows), schedule.span[0]]
    lines = []
    for t, s in zip(edges, edges[1:], strict=False):
        gain = ddim_gain(schedule, STD, [t + (s - t) * j / m for j in range(m + 1)])
        offset = levels(schedule, s)[0] * mean - gain * levels(schedule, t)[0] * mean
        lines.append(Lines(schedule, t, s, offset, gain))
    return Windows(tuple(lines)), edges


@SCHEDULES
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_windows_become_the_teacher_s_own_chain(schedule, scale):
    k, m = 4, 5
    method = PeRFlow(windows=k, solver_steps=m, guidance_scale=scale)
    student, edges = chain(schedule, k, m, guided_mean(0.0, MEAN, scale))
    z = noises(64)
    batch = Batch(tuple(range(64)), prompts(64), (1, 1, 1), 0.3 + noises(64, seed=9))
    teacher = GaussianTeacher(schedule, STD)
    assert losses(method, schedule, student, batch, **{TEACHER: teacher}) < 1e-18
    wrong, _ = chain(schedule, k, m + 1, guided_mean(0.0, MEAN, scale))
    assert losses(method, schedule, wrong, batch, **{TEACHER: teacher}) > 1e-8
    x = few_step(student, schedule, method.sampler(schedule), z, batch.cond)
    for t, s in zip(edges, edges[1:], strict=False):
        times = [torch.full((64,), time, dtype=torch.float64) for time in (t, s)]
        z = solve(GaussianTeacher(schedule, STD), schedule, z, *times, m, prompts(64, guided_mean(0.0, MEAN, scale)))
    close(x, z, 1e-10)


@SCHEDULES
def test_the_noisiest_window_begins_at_pure_noise_and_the_others_at_noised_data(schedule):
    starts = []

    def teacher(x_t, t, cond):
        starts.append((x_t, t))
        return Estimate(torch.zeros_like(x_t), torch.zeros_like(x_t))

    z = noises(64)
    batch = Batch(tuple(range(64)), prompts(64), (1, 1, 1), 5 + noises(64, seed=9))
    context = drawn(schedule, {"student": teacher, TEACHER: teacher}, 0)
    next(PeRFlow(windows=2, solver_steps=1, guidance_scale=1.0).updates(context, batch, 0))
    x_t, t = starts[0]
    z = context.seen["eps"]
    first = t == schedule.span[1]
    assert 16 < first.sum() < 48 and t.unique().tolist() == [
        schedule.even_starts(schedule.span[1], 2)[1],
        schedule.span[1],
    ]
    close(x_t[first], z[first], 1e-15)
    close(x_t[~first], schedule.add_noise(batch.latents, z, t)[~first], 1e-12)


def test_windows_have_edges_that_are_steps():
    assert PeRFlow().sampler(SD).timesteps == (999.0, 749.0, 499.0, 249.0)
    assert PeRFlow(num_inference_steps=8).sampler(FLOW).timesteps == tuple(1000 - 125.0 * i for i in range(8))
    assert PeRFlow().sampler(Rectified(3.0)).timesteps == (
        1000.0,
        750.0,
        500.0,
        250.0,
    )  # not the teacher's shifted ones
    with pytest.raises(ValueError, match=r"num_inference_steps is 6: expected a multiple of the 4 windows"):
        PeRFlow(num_inference_steps=6)
    for wrong in ({"windows": 0}, {"solver_steps": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            PeRFlow(**wrong)


# --- SlimFlow's second stage -----------------------------------------------------------------------------------------


@SCHEDULES
def test_a_straight_flow_leads_to_itself(schedule):
    exact, batch = straightened(schedule), pairs(schedule, noises(64))
    assert losses(FlowGuided(), schedule, exact, batch, flow=exact) < 1e-18
    off = Lines(schedule, exact.t, exact.s, exact.offset + 0.1, exact.gain)
    assert losses(FlowGuided(), schedule, off, batch, flow=exact) > 1e-3


def test_the_flow_takes_over_where_the_student_stands():
    """A curved flow's two steps end at `mean + s (1 - s) std^2 / D(s) z`; no gradient goes by way of the first."""
    batch, fresh = pairs(FLOW, noises(64)), {}
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def student(x_t, t, cond):
        return Estimate(*(scale * value for value in GaussianTeacher(FLOW, STD)(x_t, t, cond)))

    def flow(x_t, t, cond):
        assert not x_t.requires_grad and not torch.is_grad_enabled()
        fresh["x"], fresh["t"] = x_t, t
        return GaussianTeacher(FLOW, STD)(x_t, t, cond)

    context = drawn(FLOW, {"student": student, "flow": flow}, 0)
    method = FlowGuided(flow_weight=2.0, turn_range=(0.2, 0.5))
    (update,) = method.updates(context, batch, 0)
    z, share = context.seen["fresh"], expand(fresh["t"] / 1000, batch.noise)
    assert 0.5 <= share.min() < 0.55 and 0.75 < share.max() <= 0.8
    close(fresh["x"], (1 - share) * MEAN + share * z, 1e-12)  # the student's first step leads to the mean
    d = (1 - share) ** 2 * STD**2 + share**2
    led = MEAN + share * (1 - share) * STD**2 / d * z
    close(update.logs["loss_flow"], (MEAN - led).square().mean(), 1e-12)
    close(update.loss, (MEAN - batch.latents).square().mean() + 2 * (MEAN - led).square().mean(), 1e-12)
    (gradient,) = torch.autograd.grad(update.loss, scale)
    close(gradient, 2 * MEAN * ((MEAN - batch.latents).mean() + 2 * (MEAN - led).mean()), 1e-10)


def test_the_second_stage_keeps_its_flow():
    flow = FlowGuided().roles()["flow"]
    assert (flow.of, flow.decay, flow.until) == ("student", 0.0, 0)
    assert FlowGuided().sampler(SD).timesteps == (999.0,) == even_sampler(SD, 1).timesteps


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reflow(annealing_steps=-1), "annealing_steps is -1"),
        (lambda: Reflow(width=0.0), "width is 0.0"),
        (lambda: FlowGuided(turn_range=(0.8, 0.2)), "turn_range"),
        (lambda: FlowGuided(width=1.5), "width is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(ValueError, match="needs pairs"):
        next(Reflow().updates(drawn(FLOW, {}, 0), Batch((0,), {}, (1, 1, 1)), 0))
    with pytest.raises(ValueError, match="needs pairs"):
        next(FlowGuided().updates(drawn(FLOW, {}, 0), Batch((0,), {}, (1, 1, 1)), 0))


# --- straightness ----------------------------------------------------------------------------------------------------


def test_straightness_of_a_gaussian_is_known():
    """`S = s (2 - pi / 2)` in the limit; the cost falls by S plus the least loss `pi s / 2`, that is by 2 s."""
    z, cond = noises(100_000), prompts(100_000)
    estimates = {n: paths(GaussianTeacher(FLOW, STD), FLOW, z, cond, n) for n in (10, 50, 200)}
    found = {n: each.straightness for n, each in estimates.items()}
    assert found == {
        10: pytest.approx(0.212, abs=3e-3),
        50: pytest.approx(0.248, abs=3e-3),
        200: pytest.approx(0.256, abs=3e-3),
    }
    before = 1 + STD**2 + MEAN**2  # of independent noise and data
    after = paths(GaussianTeacher(FLOW, STD), FLOW, z[:2000], prompts(2000), 800).cost
    assert after == pytest.approx(MEAN**2 + (1 - STD) ** 2, rel=0.05)
    assert before - (MEAN**2 + (1 - STD) ** 2) == pytest.approx(STD * (2 - math.pi / 2) + math.pi * STD / 2)


@SCHEDULES
def test_reflow_s_fixed_point_is_straight(schedule):
    z = noises(32)
    curved = paths(GaussianTeacher(schedule, STD), schedule, z, prompts(32))
    assert curved.relative > 0.1
    assert paths(straightened(schedule), schedule, z, prompts(32)).straightness < 1e-20


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 4, 32])
def test_the_first_noise_is_as_good_as_any_on_straight_paths_only(schedule, steps):
    """rf++'s rule: exact in any number of steps on lines, the Euler step where there is one, and else off the flow."""
    x = noises(5)
    plain, kept = even_sampler(schedule, steps), even_sampler(schedule, steps, first_noise=True)
    lines = straightened(schedule)
    close(few_step(lines, schedule, kept, x, prompts(5)), few_step(lines, schedule, plain, x, prompts(5)), 1e-10)
    bent = GaussianTeacher(schedule, STD)
    euler, ours = (few_step(bent, schedule, sampler, x, prompts(5)) for sampler in (plain, kept))
    exact = ode_map(schedule, MEAN, STD, x, schedule.span[1], schedule.span[0])
    if steps == 1:
        close(ours, euler, 1e-12)
    elif steps == 32:  # where Euler's error has become small, this one's grows
        assert (ours - exact).norm() > 5 * (euler - exact).norm()


def test_the_first_noise_is_kept_where_paths_are_straight(caplog):
    method = Reflow(first_noise=True)
    assert method.finalize(lambda: 0.009) is method
    assert not caplog.text
    assert method.finalize(lambda: 0.02) == Reflow()
    assert "straightness over transport cost is 0.02, expected below 0.01" in caplog.text
    assert Reflow().finalize(lambda: pytest.fail("nobody asked")) == Reflow()


@SCHEDULES
def test_the_ode_is_followed_upwards(schedule):
    """Up by N steps has their own exact gain; on straight lines up and down again is nothing."""
    times, x = schedule.grid(10).tolist(), noises(5)
    top = follow(GaussianTeacher(schedule, STD), schedule, times, x, prompts(5, 0.0))
    close(top, ddim_gain(schedule, STD, times) * x, 1e-10)
    lines = straightened(schedule)
    top = follow(lines, schedule, times, x, prompts(5))
    close(follow(lines, schedule, times[::-1], top, prompts(5)), x, 1e-10)


def test_where_paths_bend_can_be_seen(tmp_path):
    found = paths(GaussianTeacher(SD, STD), SD, noises(8), prompts(8), 16)
    assert len(found.share) == len(found.deviation) == 16 and (found.share.diff() < 0).all()
    draw_paths({"teacher": found}, tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5000
