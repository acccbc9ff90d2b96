"""sCM in closed forms: its tangent is zero at the ODE's own map, and its step leads there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import SCMScheduler
from oracles import close
from oracles.context import Network, Scripted, column, drawn, stable_diffusion
from oracles.gaussian import GaussianTeacher
from oracles.mixture import Mixture
from oracles.planted import Bug, planted
from test_trigflow import CASES, SCHEDULES, ConsistencyMap, along_ode
from tiny import FAMILIES, awake, backbone, batch, context, pipeline
from torch import Tensor, nn

from stepdistill.core import trigflow
from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, Rectified
from stepdistill.core.solvers import few_step
from stepdistill.methods.base import Batch, StepContext, Update
from stepdistill.methods.scm import SCM, STARTS, time_of_angle
from stepdistill.networks.time_weight import TimeWeight

MEAN, STD = 0.7, 0.6
U = torch.tensor([0.02, 0.2, 0.5, 0.7, 0.87], dtype=torch.float64)
ANGLES = torch.atan(torch.exp(1.6 * torch.special.ndtri(U)) / 0.5)  # tan t = e^tau / 0.5, tau ~ N(0, 1.6^2)
PLAIN = SCM(guidance_scale=1.0, warmup_steps=1000)


def col(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Shifted:
    """A network whose F is moved by `shift` (B, ...): the gradient of a loss by F is that by the shift."""

    network: Any
    shift: Tensor
    prompts: Callable[[Tensor], Tensor] = lambda mean: mean

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        est = self.network.queried(x_t, t, {"mean": self.prompts(cond["mean"])}, alpha_t, sigma_t)
        alpha, sigma = (col(v / torch.hypot(alpha_t, sigma_t)) for v in (alpha_t, sigma_t))
        shift = self.shift.repeat(len(x_t) // len(self.shift), 1, 1, 1)  # a difference is one call at two times
        return Estimate(est.x0 - sigma * shift, est.eps + alpha * shift)


@dataclass(frozen=True)
class Step:
    """One update, and the tangents g (B, ...) that its gradient by F stands for."""

    update: Update
    shift: Tensor
    weight: TimeWeight
    offset: float

    @property
    def g(self) -> Tensor:
        """From `dL/dF = -2 exp(-w) / tan(t) g / (|g| + c) / B`: so F moves along +g, S6."""
        (pull,) = torch.autograd.grad(self.update.loss, self.shift, retain_graph=True)
        w = self.weight(ANGLES).double().detach()
        unit = -pull * len(pull) * col(ANGLES.tan() * w.exp()) / 2
        length = unit.flatten(1).norm(dim=1)
        assert length.max() < 1
        return unit * col(self.offset / (1 - length))


def step_of(
    schedule: NoiseSchedule,
    teacher: Any,
    student: Any,
    method: SCM = PLAIN,
    step: int = 1000,
    mean: Tensor | float = MEAN,
    prompts: Callable[[Tensor], Tensor] = lambda mean: mean,
    null: float = 0.0,
    chance: Tensor | None = None,
) -> tuple[Step, Tensor]:
    """The method's own update at the times of `U`; and the states in TrigFlow's coordinates."""
    torch.manual_seed(1)
    x0, eps = torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    shift, weight = torch.zeros_like(x0, requires_grad=True), TimeWeight()
    roles = {"teacher": teacher, "student": Shifted(student, shift, prompts)}
    mean = torch.as_tensor(mean, dtype=torch.float64).expand(5)
    scene = Scripted(
        schedule=schedule,
        null={"mean": column(null)},
        denoiser=roles.__getitem__,
        module={"weight": weight}.__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
        draws={"t": U, "guidance_scale": U if chance is None else chance},
        eps=eps,
    )
    (update,) = method.updates(scene, Batch(tuple(range(5)), {"mean": col(mean)}, (2, 1, 1), latents=x0), step)
    assert update.roles == ("student", "weight")
    state = col(ANGLES.cos()) * x0 + col(ANGLES.sin()) * eps
    return Step(update, shift, weight, method.tangent_offset), state


def networks(name: str, kind: Any, std: float = STD) -> tuple[NoiseSchedule, Network, Network]:
    """A schedule, the teacher of Gaussian data and the ODE's map, as networks of this kind."""
    schedule = SCHEDULES[name]
    return schedule, *(Network(make(schedule, std), kind, schedule) for make in (GaussianTeacher, ConsistencyMap))


def trig_map(x: Tensor, angle: Tensor) -> Tensor:
    """F of the ODE's map: `(cos t x - f*) / sin t`."""
    end = along_ode(x, angle, torch.zeros_like(angle), MEAN, STD)
    return (col(angle.cos()) * x - end) / col(angle.sin())


# --- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_ode_s_map_is_a_fixed_point(name, kind):
    """S2: and not the product of a solver's steps. After the warm-up its tangent is zero at every time."""
    schedule, teacher, student = networks(name, kind)
    for mean in (MEAN, torch.tensor([0.7, -1.0, 0.0, 2.0, 0.3])):
        made, _ = step_of(schedule, teacher, student, mean=mean)
        close(made.update.logs["tangent"], 0.0, 1e-9)
        close(made.g, torch.zeros(5, 2, 1, 1), 1e-9)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_map_of_a_mixture_is_a_fixed_point(name, kind):
    """With more than one mode, where a student that seeks means is not."""
    schedule = SCHEDULES[name]
    mixture = Mixture(schedule)
    teacher, student = (Network(part, kind, schedule) for part in (mixture, mixture.consistency))
    made, _ = step_of(schedule, teacher, student)
    close(made.update.logs["tangent"], 0.0, 1e-7)
    made, _ = step_of(schedule, teacher, teacher)
    assert made.update.logs["tangent"] > 0.05


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("step", [0, 250, 999, 5000])
def test_in_the_warm_up_the_tangent_is_its_closed_form(name, kind, step):
    """At the ODE's map `g = (1 - r) cos t sin t (x + dF/dt)`, with r = min(1, step / H)."""
    schedule, teacher, student = networks(name, kind)
    made, x = step_of(schedule, teacher, student, step=step)
    h = 1e-6
    ends = [trig_map(along_ode(x, ANGLES, ANGLES + d, MEAN, STD), ANGLES + d) for d in (h, -h)]
    slope = (ends[0] - ends[1]) / (2 * h)
    r = min(1.0, step / 1000)
    close(made.g, (1 - r) * col(ANGLES.cos() * ANGLES.sin()) * (x + slope), 1e-7)
    assert step >= 1000 or made.g.abs().max() > 1e-4


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_tangent_is_the_slope_of_the_student_along_the_ode(name, kind):
    """`cos t df/dt` of any student, here the teacher itself, against a difference along the exact trajectory."""
    schedule, teacher, _ = networks(name, kind)
    made, x = step_of(schedule, teacher, teacher)

    def clean(angle: Tensor) -> Tensor:  # E[x0 | x] in TrigFlow's coordinates
        moved, a = along_ode(x, ANGLES, angle, MEAN, STD), col(angle)
        gain = a.cos() * STD**2 / ((a.cos() * STD) ** 2 + a.sin() ** 2)
        return MEAN + gain * (moved - a.cos() * MEAN)

    h = 1e-6
    g = col(ANGLES.cos()) * (clean(ANGLES + h) - clean(ANGLES - h)) / (2 * h)
    close(made.g, g, 1e-7)
    close(made.update.logs["tangent"], g.flatten(1).norm(dim=1).mean(), 1e-7)
    assert g.flatten(1).norm(dim=1).min() > 0.01


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_of_unit_data_the_map_is_known_without_the_teacher(name, kind):
    """S3: for N(0, 1) the teacher's F is 0, and that of the map is -tan(t / 2) x."""
    schedule, teacher, student = networks(name, kind, std=1.0)

    class Tangent:
        def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
            angle = schedule.angle(t)  # of the time that it is told
            scale = torch.hypot(alpha_t, sigma_t)
            x, a = x_t / col(scale), col(torch.atan2(sigma_t, alpha_t))
            out = -torch.tan(col(angle) / 2) * x
            return Estimate(a.cos() * x - a.sin() * out, a.sin() * x + a.cos() * out)

    made, _ = step_of(schedule, teacher, Tangent(), mean=0.0)
    close(made.update.logs["tangent"], 0.0, 1e-9)
    made, _ = step_of(schedule, teacher, student, mean=0.0)
    close(made.update.logs["tangent"], 0.0, 1e-9)


@pytest.mark.parametrize(("name", "kind"), [("table", "v_prediction"), ("shifted", "flow")])
def test_a_difference_comes_near_the_same_fixed_point(name, kind):
    schedule, teacher, student = networks(name, kind)
    made, _ = step_of(schedule, teacher, student, replace(PLAIN, difference=0.1))
    assert 1e-12 < made.update.logs["tangent"] < 2e-3


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.1, 2.0])
def test_the_loss_is_its_closed_form(offset):
    """`|g / (|g| + c)|^2 / tan t` under the weight at its start, 0; F moves along +g."""
    schedule, teacher, _ = networks("table", "epsilon")
    made, x = step_of(schedule, teacher, teacher, replace(PLAIN, tangent_offset=offset))
    expected, _ = step_of(schedule, teacher, teacher, replace(PLAIN, tangent_offset=1.0))
    g = expected.g
    length = g.flatten(1).norm(dim=1)
    close(made.update.loss, ((length / (length + offset)) ** 2 / ANGLES.tan()).mean(), 1e-9)
    (pull,) = torch.autograd.grad(made.update.loss, made.shift)
    cosine = torch.cosine_similarity(pull.flatten(1), g.flatten(1))
    close(cosine, -torch.ones(5), 1e-9)


def test_the_best_weight_is_the_logarithm_of_the_loss():
    """`E exp(-w) L + w` is least at `w = log E L`, and each time has one weight in the gradient then."""
    schedule, teacher, _ = networks("flow", "flow")
    made, _ = step_of(schedule, teacher, teacher)
    bias = made.weight.linear.bias
    size = made.update.loss.detach()  # the weight is 0
    (pull,) = torch.autograd.grad(made.update.loss, bias)
    close(pull[0], 1 - size, 1e-6)
    losses = [(-w).exp() * size + w for w in (size.log() - 0.1, size.log(), size.log() + 0.1)]
    assert losses[1] < min(losses[0], losses[2])
    weight = TimeWeight()
    nn.init.normal_(weight.linear.weight)
    nn.init.normal_(weight.linear.bias)
    given = {"weight": weight}
    scene = drawn(schedule, {"teacher": teacher, "student": Shifted(teacher, made.shift), **given}, t=0.3)
    x0 = torch.randn(5, 2, 1, 1).double()
    part = Batch(tuple(range(5)), {"mean": column(*[MEAN] * 5)}, (2, 1, 1), latents=x0)
    (update,) = PLAIN.updates(scene, part, 1000)
    w = weight(ANGLES[:1].new_tensor([math.atan(2 * math.exp(1.6 * torch.special.ndtri(torch.tensor(0.3)).item()))]))
    zero = TimeWeight()
    scene = drawn(schedule, {"teacher": teacher, "student": Shifted(teacher, made.shift), "weight": zero}, t=0.3)
    (plain,) = PLAIN.updates(scene, part, 1000)
    close(update.loss, ((-w).exp() * plain.loss + w)[0], 1e-4)


def test_nothing_but_the_student_s_output_has_a_gradient():
    """The tangent, the teacher and F^- are targets."""
    schedule, teacher, _ = networks("flow", "flow")
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Gained:
        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            return Estimate(*(gain * part for part in teacher(x_t, t, cond)))

    made, _ = step_of(schedule, Gained(), teacher)
    assert torch.autograd.grad(made.update.loss, gain, allow_unused=True) == (None,)
    (pull,) = torch.autograd.grad(made.update.loss, made.shift)
    assert pull.abs().sum() > 0


def test_guidance_is_that_of_the_teacher_alone():
    """O4: at w the fixed point is the map of data around `m0 + w (m - m0)`; the student is not guided."""
    schedule, teacher, student = networks("shifted", "flow")
    made, _ = step_of(
        schedule,
        teacher,
        student,
        replace(PLAIN, guidance_scale=3.0),
        prompts=lambda m: -0.4 + 3 * (m + 0.4),
        null=-0.4,
    )
    close(made.g, torch.zeros(5, 2, 1, 1), 1e-9)


def test_a_range_of_guidance_is_one_draw_for_each_sample():
    schedule, teacher, student = networks("table", "v_prediction")
    chance = torch.tensor([0.0, 0.9, 0.2, 0.5, 0.7], dtype=torch.float64)
    w = col(2.0 + 3.0 * chance)
    method = replace(PLAIN, guidance_scale=(2.0, 5.0))
    made, _ = step_of(schedule, teacher, student, method, prompts=lambda m: w * m, chance=chance)
    close(made.g, torch.zeros(5, 2, 1, 1), 1e-9)


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SCM(), SCM(time_mean=-0.8, time_std=0.7), SCM(time_mean=0.2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_have_the_paper_s_quantiles(name, method):
    """`tan t = e^tau / 0.5`, tau ~ N(P_mean, P_std^2), on the N = 40,000 draws of a run; a table ends earlier."""
    schedule = SCHEDULES[name]

    class Known(StepContext):
        def draw(self, batch: Batch, purpose: str) -> Tensor:
            return torch.rand(len(batch.index), generator=torch.Generator().manual_seed(0))

    scene = Known(schedule, {}, dict().__getitem__, dict().__getitem__, nn.Identity(), 0, 0, torch.device("cpu"))
    part = Batch(tuple(range(40_000)), {}, (1, 1, 1))
    t = method._times(scene, part, "t").double()
    low, high = schedule.span
    assert t.min() >= low and t.max() <= high
    angle = schedule.angle(t)
    share = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.85])
    tau = method.time_mean + method.time_std * torch.special.ndtri(share.double())
    ends = schedule.angle(torch.tensor([low, high], dtype=torch.float64))
    close(angle.quantile(share.double()), torch.atan(2 * tau.exp()).clamp(*ends), 0.015)


def test_the_share_of_a_table_s_last_time_is_what_lies_beyond_it():
    """10.7 % by default: the time at which sampling begins is trained the most."""
    schedule = SCHEDULES["table"]
    u = torch.linspace(0, 1, 100_001)[:-1]
    t = schedule.lognormal_times(u, 0.0, 1.6)
    close((t == 999).double().mean(), 0.107, 1e-3)
    close((t == 0).double().mean(), 0.004, 1e-3)


def test_tangents_are_finite_at_the_ends_of_the_draws():
    for name, kind in CASES:
        schedule, teacher, student = networks(name, kind)
        for u in (0.0, 1 - 2**-24):
            scene = drawn(
                schedule,
                {"teacher": teacher, "student": Shifted(student, torch.zeros(1, 1, 1, 1)), "weight": TimeWeight()},
                t=u,
            )
            part = Batch((0,), {"mean": column(MEAN)}, (1, 1, 1), latents=column(0.3))
            (update,) = PLAIN.updates(scene, part, 1000)
            assert update.loss.isfinite() and abs(update.loss.item()) < 1e6
            close(update.logs["tangent"], 0.0, 1e-3)


# --- settings and sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.0299, 0.31, 1.0, 10.0, 1e-3])
def test_a_difference_that_is_no_derivative_is_refused(h):
    with pytest.raises(ValueError, match=f"difference is {h} timesteps: expected 0.03 to 0.3"):
        SCM(difference=h)
    assert [SCM(difference=h).derivative for h in (0.03, 0.3)] == ["difference"] * 2
    assert SCM().derivative == "forward"


@pytest.mark.parametrize(
    "angles", [(), (1.3, 1.3), (1.0, 1.3), (1.5709,), (3.0, 1.0), (1.5, 0.0), (-0.1,)], ids=lambda angles: str(angles)
)
def test_starts_that_are_no_descending_angles_are_refused(angles):
    with pytest.raises(ValueError, match=r"starts has .*expected descending angles in \(0, pi/2\]"):
        SCM(starts=(angles,))


def test_two_lists_for_one_number_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"lists of \[1, 2, 2\] angles"):
        SCM(starts=((1.5,), (1.5, 1.0), (1.5, 0.9)))


def test_half_a_turn_may_be_rounded_up():
    """Diffusers writes 1.57080, which is above pi/2: its sigma would be above 1."""
    for schedule in SCHEDULES.values():
        high = schedule.span[1]
        assert SCM(starts=((1.5708,), (1.5708, 1.3))).sampler(schedule, 1).timesteps == (high,)
        SCM(starts=((1.5708,), (1.5708, 1.3)), num_inference_steps=2).check(schedule)


def test_starts_are_the_table_s_nearest_entries():
    """In the angle; even ones begin at the table's own noisiest, 1.5025."""
    schedule = stable_diffusion()
    table = schedule.angle(torch.arange(1000).double())
    for angles in STARTS:
        wanted = [(table - angle).abs().argmin().item() for angle in angles]
        assert list(SCM().sampler(schedule, len(angles)).timesteps) == wanted
    assert SCM().sampler(schedule, 2).timesteps == (999, 719)
    even = SCM().sampler(schedule, 3).timesteps
    assert even == tuple((table - 1.5025 * k / 3).abs().argmin().item() for k in (3, 2, 1))
    for n in (8, 16, 40):
        assert len(set(SCM().sampler(schedule, n).timesteps)) == n
    assert SCM().sampler(SCHEDULES["flow"], 3).timesteps == pytest.approx(
        (1000, 1000 * math.sqrt(3) / (1 + math.sqrt(3)), 1000 / (1 + math.sqrt(3)))
    )


def test_angles_beyond_a_table_s_last_are_one_start():
    """They were two steps at one timestep."""
    method = SCM(starts=((1.57, 1.51),))
    with pytest.raises(ValueError, match=r"timesteps are \[999.0, 999.0\]"):
        method.check(stable_diffusion())
    method.check(SCHEDULES["flow"])


@pytest.mark.parametrize("steps", [1, 2, 4, 3])
def test_the_exported_scheduler_is_the_scm_scheduler(steps):
    """S11: the stock pipeline's stochastic Euler steps are those of SCM's own loop, on a random SANA."""
    family, pipe = FAMILIES["sana"], pipeline("sana")
    net, cond = family.network(pipe), family.condition(pipe, ["rose"])
    sampler = SCM().sampler(family.schedule(pipe.scheduler), steps)
    noise, sd = torch.randn(1, 4, 8, 8), 0.5
    angles = next((list(a) for a in STARTS if len(a) == steps), [math.pi / 2 * (3 - i) / 3 for i in range(3)])
    scm = SCMScheduler(sigma_data=sd)
    scm.set_timesteps(steps, timesteps=[*angles, 0.0], max_timesteps=None, intermediate_timesteps=None)
    stock, call = family.scheduler(pipe, sampler)
    stock.set_timesteps(**{key: call[key] for key in ("sigmas",)})  # pyright: ignore[reportAttributeAccessIssue]
    x, y = sd * noise, noise
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    with torch.no_grad():
        for angle in scm.timesteps[:-1]:
            s = angle.sin() / (angle.sin() + angle.cos())
            length = (s**2 + (1 - s) ** 2).sqrt()
            x_s = x / sd * length
            v = family.call(net, x_s, 1000 * s.reshape(1), cond)
            out = ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * v) / length
            x = scm.step(sd * out, angle, x, generator=theirs, return_dict=False)[0]
        for t in stock.timesteps:  # pyright: ignore[reportAttributeAccessIssue]
            v = family.call(net, y, t.reshape(1), cond)
            y = stock.step(v, t, y, generator=ours, return_dict=False)[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert (x / sd - y).abs().max() < 1e-6 * max(1.0, y.abs().max().item()) * 4


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("name", "kind"), [("table", "epsilon"), ("shifted", "flow")])
def test_the_student_s_samples_are_the_data_in_any_number_of_steps(name, kind, steps):
    """Step-adaptive: the ODE's map, renoised at the starts, keeps the distribution of the data."""
    schedule, _, student = networks(name, kind)
    sampler = SCM().sampler(schedule, steps)
    torch.manual_seed(0)
    alpha, sigma = schedule(torch.tensor(sampler.timesteps[0]))
    x = alpha * (MEAN + STD * torch.randn(200_000, 1, 1, 1).double()) + sigma * torch.randn(200_000, 1, 1, 1).double()
    cond = {"mean": torch.full((200_000, 1, 1, 1), MEAN, dtype=torch.float64)}
    made = few_step(student, schedule, sampler, x, cond)
    close(made.mean(), MEAN, 5e-3)
    close(made.std(), STD, 5e-3)


# --- real networks ---------------------------------------------------------------------------------------------------


def real_step(name: str, checkpointing: bool, difference: float | None = None):
    """A step on a tiny network whose LoRA has an effect: its loss, its tangent, and the student's gradient."""
    method = SCM(ema_decay=None, warmup_steps=2, difference=difference)
    pipe = pipeline(name)
    bone = backbone(name, pipe)
    for role, kind in method.roles().items():
        bone.add(role, kind)
    awake(bone, "student")
    if checkpointing:
        bone.enable_checkpointing()
    with bone.unchanged():  # as in the training loop
        (update,) = method.updates(context(name, pipe, bone), batch(name, pipe), 1)
        update.loss.backward()
    pulls = [p.grad for p in bone.parameters_of("student").values()]
    return update.loss.detach(), update.logs["tangent"], torch.cat([p.flatten() for p in pulls])


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "flux"])
def test_checkpointing_changes_neither_tangent_nor_gradient(name):
    plain, again = (real_step(name, checkpointing) for checkpointing in (False, True))
    for a, b in zip(plain, again, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert plain[2].norm() > 0 and plain[1] > 0


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "flux"])
def test_a_difference_of_a_real_network_is_near(name):
    """So the logged tangents of both ways agree within a few percent."""
    plain, short = (real_step(name, False, h) for h in (None, 0.1))
    assert abs(short[1] / plain[1] - 1) < 0.03


# --- training --------------------------------------------------------------------------------------------------------

DIM = 8
MEANS, STDS = torch.linspace(-1.2, 1.2, DIM), torch.linspace(0.3, 1.8, DIM)


class Affine(nn.Module):
    """A flow network `a(t) + b(t) x` for each of 8 numbers, with a and b of a small network of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2 * DIM))

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        a = torch.atan2(t / 1000, 1 - t / 1000)
        features = torch.stack([a, a.sin(), a.cos(), (2 * a).sin(), (2 * a).cos(), a * a], 1)
        offset, gain = self.net(features)[..., None, None].chunk(2, 1)
        v = offset + gain * x_t
        return Estimate(x_t - col(sigma_t) * v, x_t + col(alpha_t) * v)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return self.queried(x_t, t, cond, 1 - t / 1000, t / 1000)


def normal_teacher(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
    """The exact denoiser of the 8 independent numbers."""
    alpha, sigma = col(1 - t / 1000), col(t / 1000)
    mean, std = (v.reshape(1, DIM, 1, 1) for v in (MEANS, STDS))
    x0 = mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x_t - alpha * mean)
    return Estimate(x0, (x_t - alpha * x0) / sigma)


def one_step_errors(network: Affine) -> tuple[float, float]:
    """Of a sample in one step: the mean distance from the ODE's own map, and the largest relative error of a spread."""
    noise = torch.randn(4000, DIM, 1, 1, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x0 = network(noise, torch.full((4000,), 1000.0), {}).x0[..., 0, 0]
    exact = MEANS + STDS * noise[..., 0, 0]
    return (x0 - exact).abs().mean().item(), (x0.std(0) / STDS - 1).abs().max().item()


def trained(steps: int = 700, batch_size: int = 192) -> tuple[float, float]:
    """`one_step_errors` of a student that starts as the teacher and follows the method's own updates."""
    torch.manual_seed(0)
    network, weight, schedule = Affine(), TimeWeight(), Rectified()
    method = SCM(guidance_scale=1.0, warmup_steps=steps // 10)
    optimizer = torch.optim.Adam([*network.parameters(), *weight.parameters()], 2e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
    roles = {"teacher": normal_teacher, "student": network, "weight": weight}
    for step in range(-300, steps):
        x0 = MEANS + STDS * torch.randn(batch_size, DIM)
        part = Batch(tuple(range(batch_size)), {}, (DIM, 1, 1), latents=x0[..., None, None])
        scene = Quick(schedule, {}, roles.__getitem__, roles.__getitem__, nn.Identity(), 0, step, torch.device("cpu"))
        if step < 0:  # the student begins as the teacher
            t = 1000 * torch.rand(batch_size).clamp(1e-3, 1 - 1e-3)
            x_t = schedule.add_noise(part.x0, scene.noise(part, ""), t)
            loss = (network(x_t, t, {}).x0 - normal_teacher(x_t, t, {}).x0).square().mean()
        else:
            (update,) = method.updates(scene, part, step)
            loss = update.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 0:
            decay.step()
    return one_step_errors(network)


class Quick(StepContext):
    """Draws from the global generator."""

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        return torch.rand(len(batch.index))

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        return torch.randn(len(batch.index), *batch.shape)


def reaches_the_ode() -> None:
    distance, spread = trained()
    assert distance < 0.03 and spread < 0.1


@pytest.mark.slow
def test_training_reaches_the_map_of_the_ode():
    """S7: from the teacher, whose one-step samples have next to no spread."""
    reaches_the_ode()


# --- planted bugs ----------------------------------------------------------------------------------------------------


def fixed_point() -> None:
    for name, kind in CASES:
        test_the_ode_s_map_is_a_fixed_point(name, kind)


def warm_up() -> None:
    for step in (0, 250, 999):
        test_in_the_warm_up_the_tangent_is_its_closed_form("table", "v_prediction", step)


def slopes() -> None:
    test_the_tangent_is_the_slope_of_the_student_along_the_ode("shifted", "flow")


def losses() -> None:
    for offset in (0.1, 2.0):
        test_the_loss_is_its_closed_form(offset)


def quantiles() -> None:
    test_times_have_the_paper_s_quantiles("flow", SCM(time_mean=-0.8, time_std=0.7))


UPDATES: Callable = SCM.updates
BUGS = {
    "no v_t": Bug(trigflow.tangent, "schedule.time_per_angle(t))", "0 * t)", fixed_point),
    "v_t backwards": Bug(trigflow.tangent, "schedule.time_per_angle(t))", "-schedule.time_per_angle(t))", fixed_point),
    "v_x backwards": Bug(trigflow.tangent, "(dx, torch", "(-dx, torch", fixed_point),
    "sign of the second term": Bug(UPDATES, "- r * cos * sin", "+ r * cos * sin", fixed_point),
    "sign of the slope": Bug(UPDATES, "(x + slope)", "(x - slope)", fixed_point),
    "no x in the second term": Bug(UPDATES, "(x + slope)", "slope", fixed_point),
    "sign of the teacher": Bug(UPDATES, "(F.detach() - dx)", "(F.detach() + dx)", fixed_point),
    "cos for its square": Bug(UPDATES, "-(cos**2)", "-cos", fixed_point),
    "flipped g": Bug(UPDATES, "+ g / expand", "- g / expand", slopes),
    "warm-up downwards": Bug(
        UPDATES, "min(1.0, step / self.warmup_steps)", "1 - min(1.0, step / self.warmup_steps)", warm_up
    ),
    "warm-up of both terms": Bug(UPDATES, "g = -(cos**2)", "g = -r * (cos**2)", warm_up),
    "a warm-up that does not end": Bug(
        UPDATES,
        "min(1.0, step / self.warmup_steps)",
        "step / self.warmup_steps",
        lambda: test_in_the_warm_up_the_tangent_is_its_closed_form("table", "v_prediction", 5000),
    ),
    "state not in TrigFlow's scale": Bug(UPDATES, "x_t / expand(scale_of(schedule, angle), x_t)", "x_t", fixed_point),
    "teacher at the state's scale": Bug(UPDATES, "teacher(x_t, t, cond)", "teacher(x, t, cond)", fixed_point),
    "noise twice": Bug(
        UPDATES,
        'schedule.add_noise(batch.x0, context.noise(batch, "eps"), t)',
        "schedule.add_noise(batch.x0, batch.x0, t)",
        slopes,
    ),
    "not normalised": Bug(UPDATES, "g / expand(length + self.tangent_offset, g)", "g", losses),
    "no offset": Bug(UPDATES, "length + self.tangent_offset", "length + 1e-3", losses),
    "no weight by time": Bug(UPDATES, " * angle.cos() / angle.sin()", "", losses),
    "weight of the other sign": Bug(
        UPDATES,
        "(-weight).exp() * size + weight",
        "weight.exp() * size + weight",
        test_the_best_weight_is_the_logarithm_of_the_loss,
    ),
    "weight not held back": Bug(
        UPDATES, "* size + weight)", "* size)", test_the_best_weight_is_the_logarithm_of_the_loss
    ),
    "target with a graph": Bug(UPDATES, "(F.detach() - dx)", "(F - dx)", losses),
    "no guidance": Bug(
        UPDATES, "context.guidance(self.guidance_scale, batch)", "1.0", test_guidance_is_that_of_the_teacher_alone
    ),
    "one scale for the batch": Bug(
        StepContext.guidance,
        'self.draw(batch, "guidance_scale")',
        'self.draw(batch, "guidance_scale")[:1]',
        test_a_range_of_guidance_is_one_draw_for_each_sample,
    ),
    "no 0.5": Bug(NoiseSchedule.lognormal_times, "- math.log(2)", "", quantiles),
    "mean of the other sign": Bug(NoiseSchedule.lognormal_times, "mean + std", "-mean + std", quantiles),
    "no sqrt(2)": Bug(NoiseSchedule.lognormal_times, "* math.sqrt(2)", "", quantiles),
    "starts past the table": Bug(
        SCM.sampler, "noisiest * (n - i) / n", "math.pi / 2 * (n - i) / n", test_starts_are_the_table_s_nearest_entries
    ),
    "Euler for the renoising steps": Bug(
        SCM.sampler, "eta=1.0", "eta=0.0", lambda: test_the_exported_scheduler_is_the_scm_scheduler(2)
    ),
    "sigma for the angle's sine": Bug(
        time_of_angle, "sine / (sine + cosine)", "sine", lambda: test_the_exported_scheduler_is_the_scm_scheduler(2)
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_noticed(name):
    bug = BUGS[name]
    bug.test()
    with planted(bug.function, bug.old, bug.new), pytest.raises((AssertionError, ValueError)):
        bug.test()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["no v_t", "flipped g", "sign of the second term", "warm-up downwards", "v_x backwards"]
)
def test_training_with_the_bug_reaches_something_else(name):
    bug = BUGS[name]
    with planted(bug.function, bug.old, bug.new):
        distance, _ = trained()
    assert not distance < 0.3
