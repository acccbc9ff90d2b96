"""TrigFlow's coordinates and the derivative along the ODE: closed forms, and real networks in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from oracles import close
from oracles.context import Flow, Network, column, stable_diffusion
from oracles.gaussian import GaussianTeacher
from oracles.planted import Bug, planted
from tiny import FAMILIES, awake, backbone, batch, pipeline
from torch import Tensor, nn

from stepdistill.core import trigflow
from stepdistill.core.denoise import Condition, guided
from stepdistill.core.prediction import Estimate, Kind
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.core.trigflow import central_difference, scale_of, tangent, trig_network, trig_output
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Lora

SCHEDULES: dict[str, NoiseSchedule] = {"table": stable_diffusion(), "flow": Flow(1.0), "shifted": Flow(3.0)}
VP: tuple[Kind, ...] = ("epsilon", "v_prediction", "sample")
CASES: list[tuple[str, Kind]] = [*(("table", kind) for kind in VP), ("flow", "flow"), ("shifted", "flow")]
MEAN, STD = 0.7, 0.6
ANGLES = torch.tensor([0.05, 0.3, 0.8, 1.2, 1.45], dtype=torch.float64)


def time_of(schedule: NoiseSchedule, angle: Tensor) -> Tensor:
    """The times whose levels have these angles, by the definition of either process."""
    if isinstance(schedule, Rectified):
        return 1000 * angle.sin() / (angle.sin() + angle.cos())
    snr = 2 * (angle.cos() / angle.sin()).log()  # of powers
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    table = (alphas / (1 - alphas)).log()
    low = (table[None] >= snr[:, None]).sum(1) - 1
    return low + (snr - table[low]) / (table[low + 1] - table[low])


def state_of(schedule: NoiseSchedule, x: Tensor, angle: Tensor) -> Tensor:
    """A TrigFlow state in the schedule's own scale."""
    if isinstance(schedule, Rectified):
        return x / (angle.cos() + angle.sin()).reshape(-1, 1, 1, 1)
    return x


def along_ode(x: Tensor, start: Tensor, end: Tensor, mean: float, std: float) -> Tensor:
    """The exact map of Gaussian data's ODE between angles."""
    a, b = (v.reshape(-1, 1, 1, 1) for v in (start, end))
    spread_a, spread_b = (((v.cos() * std) ** 2 + v.sin() ** 2).sqrt() for v in (a, b))
    return b.cos() * mean + spread_b / spread_a * (x - a.cos() * mean)


def velocity(x: Tensor, angle: Tensor, mean: float, std: float) -> Tensor:
    """The teacher's F by its closed form, S1 of the tests' derivation: `dx / da` of the ODE."""
    a = angle.reshape(-1, 1, 1, 1)
    power = (a.cos() * std) ** 2 + a.sin() ** 2
    return -a.sin() * mean + (1 - std**2) * a.sin() * a.cos() / power * (x - a.cos() * mean)


@dataclass(frozen=True)
class ConsistencyMap:
    """The ODE's map to clean data for Gaussian data, as an estimate: differentiable in state and time."""

    schedule: NoiseSchedule
    std: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in self.schedule(t.double()))
        spread = ((alpha * self.std) ** 2 + sigma**2).sqrt()
        x0 = cond["mean"] + self.std / spread * (x_t - alpha * cond["mean"])
        return Estimate(x0, (x_t - alpha * x0) / sigma)


def gaussian_state(kind_of: Kind, schedule: NoiseSchedule, denoise: Callable = GaussianTeacher, std: float = STD):
    """A network in closed form, states of data at some angles, and their prompts."""
    torch.manual_seed(0)
    cond = {"mean": torch.full((len(ANGLES), 1, 1, 1), MEAN, dtype=torch.float64)}
    return Network(denoise(schedule, std), kind_of, schedule), torch.randn(5, 2, 1, 1).double(), cond


# --- the coordinates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_teacher_s_output_is_the_velocity_of_the_ode(name, kind):
    """S1 and S5: of whatever prediction type and noise process, with nothing trained."""
    schedule = SCHEDULES[name]
    network, x, cond = gaussian_state(kind, schedule)
    t = time_of(schedule, ANGLES)
    close(schedule.angle(t), ANGLES, 1e-12)
    close(trig_network(network, schedule, x, ANGLES, t, cond), velocity(x, ANGLES, MEAN, STD), 1e-12)
    h = 1e-5
    ends = [along_ode(x, ANGLES, ANGLES + step, MEAN, STD) for step in (h, -h)]
    close((ends[0] - ends[1]) / (2 * h), velocity(x, ANGLES, MEAN, STD), 1e-9)  # the closed form itself


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_clean_data_are_the_same_in_both_coordinates(name, kind):
    """`cos(a) x - sin(a) F` is the x0 of the network in its own coordinates; so is eps."""
    schedule = SCHEDULES[name]
    network, x, cond = gaussian_state(kind, schedule)
    t, a = time_of(schedule, ANGLES), ANGLES.reshape(-1, 1, 1, 1)
    own = network(state_of(schedule, x, ANGLES), t, cond)
    out = trig_network(network, schedule, x, ANGLES, t, cond)
    close(a.cos() * x - a.sin() * out, own.x0, 1e-12)
    close(a.sin() * x + a.cos() * out, own.eps, 1e-11)
    close(trig_output(own, ANGLES), out, 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_scale_is_the_length_of_the_levels(name):
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(time_of(schedule, ANGLES))
    close(scale_of(schedule, ANGLES), torch.hypot(alpha, sigma), 1e-12)


def test_the_output_of_a_flow_is_the_published_one():
    """`F = ((1 - 2s) x_s + (1 - 2s + 2s^2) v) / sqrt(s^2 + (1 - s)^2)`, SANA-Sprint's equation."""
    schedule = SCHEDULES["shifted"]
    network, x, cond = gaussian_state("flow", schedule)
    s = (ANGLES.sin() / (ANGLES.sin() + ANGLES.cos())).reshape(-1, 1, 1, 1)
    length = (s**2 + (1 - s) ** 2).sqrt()
    x_s, t = x * length, 1000 * s.flatten()
    est = network(x_s, t, cond)
    published = ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * (est.eps - est.x0)) / length
    close(trig_network(network, schedule, x, ANGLES, t, cond), published, 1e-12)


def test_guidance_before_and_after_the_change_of_coordinates_is_one():
    schedule = SCHEDULES["flow"]
    network, x, cond = gaussian_state("flow", schedule)
    t, null = time_of(schedule, ANGLES), {"mean": column(-0.4)}
    both = [trig_network(network, schedule, x, ANGLES, t, {"mean": c}) for c in (column(*[-0.4] * 5), cond["mean"])]
    mixed = trig_output(guided(network, null, 3.0)(state_of(schedule, x, ANGLES), t, cond), ANGLES)
    close(mixed, both[0] + 3 * (both[1] - both[0]), 1e-11)


# --- the derivative --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [GaussianTeacher, ConsistencyMap])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_tangent_is_the_derivative_along_the_exact_ode(name, kind, denoise):
    """Against a difference of F between two points of the trajectory, each by the ODE's own map."""
    schedule = SCHEDULES[name]
    network, x, cond = gaussian_state(kind, schedule, denoise)
    t = time_of(schedule, ANGLES)
    ours = tangent(network, schedule, x, ANGLES, t, cond, velocity(x, ANGLES, MEAN, STD))
    h = 1e-6

    def at(angle: Tensor) -> Tensor:
        moved = along_ode(x, ANGLES, angle, MEAN, STD)
        return trig_network(network, schedule, moved, angle, time_of(schedule, angle), cond)

    close(ours, (at(ANGLES + h) - at(ANGLES - h)) / (2 * h), 2e-7)
    assert ours.abs().min() > 1e-3


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_at_whole_timesteps_the_tangent_is_that_of_the_next(name, kind):
    """A table's levels have a kink there; a difference to the right is the derivative, and it is not 0."""
    schedule = SCHEDULES[name]
    network, x, cond = gaussian_state(kind, schedule, ConsistencyMap)
    t = torch.tensor([1.0, 60.0, 400.0, 401.0, 900.0], dtype=torch.float64)
    angle = schedule.angle(t)
    dx = velocity(x, angle, MEAN, STD)
    ours = tangent(network, schedule, x, angle, t, cond, dx)
    after = schedule.angle(t + 1e-4)
    moved = along_ode(x, angle, after, MEAN, STD)
    ends = (
        trig_network(network, schedule, moved, after, t + 1e-4, cond),
        trig_network(network, schedule, x, angle, t, cond),
    )
    close(ours, (ends[0] - ends[1]) / (after - angle).reshape(-1, 1, 1, 1), 1e-4)


@dataclass(frozen=True)
class Wave:
    """A network whose v-prediction is a wave in the timestep it is told: F itself on a table."""

    frequency: float

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        y = torch.sin(self.frequency * t + cond["phase"].flatten()).reshape(-1, 1, 1, 1) + 0 * x_t
        a, s = (v.reshape(-1, 1, 1, 1) for v in (alpha_t, sigma_t))
        return Estimate(a * x_t - s * y, s * x_t + a * y)


@pytest.mark.parametrize("h", [0.03, 0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("frequency", [1.0, 0.2])
def test_a_difference_is_too_small_by_its_documented_share(h, frequency):
    """`1 - sin(wh) / (wh)`: 0.17 % at h = 0.1, 16 % at 1, and more than all of it at 10, for w = 1."""
    schedule = SCHEDULES["table"]
    t = torch.tensor([100.3, 500.6], dtype=torch.float64)
    angle, x, cond = schedule.angle(t), column(0.4, -1.0), {"phase": column(0.3, 1.1)}
    given = (Wave(frequency), schedule, x, angle, t, cond, column(1.0, 2.0))
    exact, ours = tangent(*given), central_difference(*given, h)  # pyright: ignore[reportArgumentType]
    wave = frequency * torch.cos(frequency * t + cond["phase"].flatten()) * schedule.time_per_angle(t)
    close(exact.flatten(), wave, 1e-8)
    bias = 1 - math.sin(frequency * h) / (frequency * h)
    close(1 - ours / exact, torch.full_like(ours, bias), 1e-8)
    known = {0.1: 0.0017, 1.0: 0.159, 10.0: 1.054}
    if frequency == 1 and h in known:
        close(bias, known[h], 6e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_short_difference_is_the_tangent(name, kind):
    """In all three inputs: with a short h it is the derivative, whose error falls with h^2."""
    schedule = SCHEDULES[name]
    network, x, cond = gaussian_state(kind, schedule, ConsistencyMap)
    t = time_of(schedule, ANGLES).floor() + 0.5  # between entries, where a table's levels are smooth
    angle = schedule.angle(t)
    given = (network, schedule, x, angle, t, cond, velocity(x, angle, MEAN, STD))
    exact = tangent(*given)
    errors = [(central_difference(*given, h) - exact).abs().max() for h in (0.3, 0.03)]
    assert errors[1] < 1e-4 and errors[1] < 0.02 * errors[0]


# --- real networks ---------------------------------------------------------------------------------------------------

NETWORKS = tuple(FAMILIES)


@cache
def roles(name: str) -> tuple[object, Backbone]:
    """A random tiny pipeline and its network with a LoRA that has an effect."""
    pipe = pipeline(name)
    bone = backbone(name, pipe)
    bone.add("student", Lora())
    awake(bone, "student")
    for key, p in bone.net.named_parameters():  # what starts at zero would hide the time
        if "lora_" not in key and p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    return pipe, bone


def inputs(name: str, dtype: torch.dtype) -> tuple[Denoiser, NoiseSchedule, Tensor, Tensor, Tensor, Condition, Tensor]:
    """What a tangent takes: a state of two samples at times that are not whole, and a direction."""
    pipe, bone = roles(name)
    family, part = FAMILIES[name], batch(name, pipe)  # pyright: ignore[reportArgumentType]
    bone.to(dtype)
    schedule = family.schedule(pipe.scheduler)  # pyright: ignore[reportAttributeAccessIssue]
    cond = {key: v.to(dtype) if v.is_floating_point() else v for key, v in part.cond.items()}
    t = torch.tensor([350.25, 820.75], dtype=dtype)
    angle = schedule.angle(t)
    kind = family.kind(pipe)  # pyright: ignore[reportArgumentType]
    student = Denoiser(bone, "student", schedule, kind, family.call)
    return student, schedule, part.x0.to(dtype), angle, t, cond, part.pair[0].to(dtype)


@pytest.fixture
def no_float32(monkeypatch):
    """Diffusers casts to float32 in times, rotary embeddings, linear attention and RMSNorm, whatever the precision."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)

    def forward(norm: RMSNorm, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    monkeypatch.setattr(RMSNorm, "forward", forward)  # LTX-Video's


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_of_a_network_is_a_difference_in_double_precision(name, no_float32):
    """S4: with a LoRA that has an effect, through the backbone."""
    given = inputs(name, torch.float64)
    network, schedule, x, angle, t, cond, dx = given
    exact = tangent(*given)
    h, rate = 1e-7, schedule.time_per_angle(t)
    with torch.no_grad():
        ends = [
            trig_network(network, schedule, x + s * h * dx, angle + s * h, t + s * h * rate, cond) for s in (1.0, -1.0)
        ]
    difference = (ends[0] - ends[1]) / (2 * h)
    assert exact.norm() > 0.1 and exact.dtype == torch.float64
    assert (exact - difference).norm() < 1e-6 * exact.norm()
    without = tangent(replace(network, role="teacher"), *given[1:])
    assert (exact - without).norm() > 1e-3 * exact.norm()  # the LoRA takes part


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32_the_tangent_is_that_of_float64(name):
    exact, ours = (tangent(*inputs(name, dtype)) for dtype in (torch.float64, torch.float32))
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32_a_difference_over_a_tenth_of_a_timestep_is_near(name):
    given = inputs(name, torch.float32)
    exact = tangent(*given)
    errors = {h: (central_difference(*given, h) - exact).norm() / exact.norm() for h in (1e-4, 0.1, 10.0)}
    assert errors[0.1] < 0.02 < errors[10.0] and errors[0.1] < errors[1e-4]


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "flux"])
def test_half_precision_is_refused_for_a_reason(name):
    """S10's mutant: autocast fails in convolutions, and is wrong by more than 1e-3 elsewhere."""
    given = inputs(name, torch.float32)
    exact = tangent(*given)
    try:
        half = tangent(replace(given[0], dtype=torch.bfloat16), *given[1:])
    except RuntimeError:
        return
    assert (half - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "flux"])
def test_the_fused_kernel_has_no_derivative(name):
    """S10's mutant: without the plain kernel nothing works, and nothing is silently wrong."""
    given = inputs(name, torch.float32)
    with planted(trigflow.tangent, "sdpa_kernel(SDPBackend.MATH), ", ""):
        with pytest.raises(NotImplementedError, match="forward AD"):
            tangent(*given)
    tangent(*given)


def test_derivatives_are_taken_without_tf32():
    """Ten bits would drown a difference over a tenth of a timestep; convolutions have TF32 by default."""
    seen: list[tuple[bool, bool]] = []
    given = inputs("sd3", torch.float32)
    call = given[0].call

    def listening(*args):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return call(*args)

    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        network = replace(given[0], call=listening)
        tangent(network, *given[1:])
        central_difference(network, *given[1:], 0.1)
        assert seen == [(False, False)] * 2 and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_no_gradient_and_no_graph_leave_the_tangent():
    """Also where the caller's gradients are on; and the choice of kernels is the caller's again."""
    given = inputs("sd3", torch.float32)
    with torch.enable_grad():
        assert not tangent(*given).requires_grad and not central_difference(*given, 0.1).requires_grad
        assert trig_network(*given[:6]).requires_grad
    assert torch.backends.cuda.flash_sdp_enabled()
    assert all(p.grad is None for p in given[0].backbone.parameters())


# --- planted bugs ----------------------------------------------------------------------------------------------------


def coordinates() -> None:
    for name, kind in CASES:
        test_the_teacher_s_output_is_the_velocity_of_the_ode(name, kind)


def derivative() -> None:
    for name, kind in CASES:
        test_the_tangent_is_the_derivative_along_the_exact_ode(name, kind, ConsistencyMap)


def whole_times() -> None:
    test_at_whole_timesteps_the_tangent_is_that_of_the_next("table", "v_prediction")


def differences() -> None:
    for name, kind in CASES:
        test_a_short_difference_is_the_tangent(name, kind)


TANGENT, LEVELS = trigflow.tangent, "cond, scale * angle.cos(), scale * angle.sin()"
BUGS = {
    "a flow's scale left out": Bug(scale_of, "1 / (angle.cos() + angle.sin())", "torch.ones_like(angle)", coordinates),
    "a flow's scale upside down": Bug(
        scale_of, "1 / (angle.cos() + angle.sin())", "angle.cos() + angle.sin()", coordinates
    ),
    "state not scaled": Bug(trig_network, "expand(scale, x) * x", "x", coordinates),
    "levels swapped": Bug(trig_network, LEVELS, "cond, scale * angle.sin(), scale * angle.cos()", coordinates),
    "levels not scaled": Bug(trig_network, LEVELS, "cond, angle.cos(), angle.sin()", coordinates),
    "sign of F": Bug(trig_output, "est.eps - expand", "est.eps + expand", coordinates),
    "parts of F swapped": Bug(
        trig_output, "expand(angle.cos(), est.eps) * est.eps", "expand(angle.sin(), est.eps) * est.eps", coordinates
    ),
    "no v_t in the network": Bug(TANGENT, "schedule.time_per_angle(t))", "0 * t)", derivative),
    "v_t backwards": Bug(TANGENT, "schedule.time_per_angle(t))", "-schedule.time_per_angle(t))", derivative),
    "v_t per timestep": Bug(TANGENT, "schedule.time_per_angle(t))", "1 / schedule.time_per_angle(t))", derivative),
    "no v_t in the levels": Bug(TANGENT, "torch.ones_like(angle)", "torch.zeros_like(angle)", derivative),
    "no v_x": Bug(TANGENT, "(dx, torch", "(0 * dx, torch", derivative),
    "v_x backwards": Bug(TANGENT, "(dx, torch", "(-dx, torch", derivative),
    "output for derivative": Bug(TANGENT, "along)[1]", "along)[0]", derivative),
    "a schedule without a derivative": Bug(
        DiscreteVP.__call__, "share = exact - low", "share = (exact - low).detach()", whole_times
    ),
    "rate of the entry before": Bug(
        DiscreteVP.time_per_angle,
        "table[low + 1] - table[low]",
        "table[low] - table[(low - 1).clamp(min=0)]",
        whole_times,
    ),
    "a difference in time alone": Bug(central_difference, "expand(step, x) * dx", "0 * dx", differences),
    "a difference without the levels": Bug(central_difference, "(angle, step)", "(angle, 0 * step)", differences),
    "a difference over h": Bug(central_difference, "(2 * expand(step, after))", "expand(step, after)", differences),
    "a difference of the other sign": Bug(central_difference, "after, before =", "before, after =", differences),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_noticed(name):
    bug = BUGS[name]
    bug.test()
    with planted(bug.function, bug.old, bug.new), pytest.raises(AssertionError):
        bug.test()
