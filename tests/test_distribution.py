"""DMD2 and VSD against closed forms: gradients, fixed points, the fake score's optimum, modes, simulated inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import close
from oracles.context import Drawn, Flow, drawn, stable_diffusion
from oracles.gaussian import GaussianTeacher, guided_mean, levels
from oracles.mixture import Mixture
from torch import Tensor

from stepdistill.core.losses import divergence_weight, surrogate
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.methods.base import Batch
from stepdistill.methods.dmd2 import DMD2, normalised
from stepdistill.methods.gan import Gan
from stepdistill.methods.rollout import simulate
from stepdistill.methods.vsd import VSD
from stepdistill.networks.roles import TEACHER

SD, FLOW = stable_diffusion(), Flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
ONE = DMD2(num_inference_steps=1, guidance_scale=1.0, critic_steps=1)


def prompts(size: int, mean: float, shape: tuple[int, ...] = (1, 1, 1)) -> Batch:
    """A batch of one prompt, without data."""
    return Batch(tuple(range(size)), {"mean": torch.full((size, 1, 1, 1), mean, dtype=torch.float64)}, shape)


class Linear:
    """A student that makes `b + a x_t` of any input, or a fake score that is exact for such a student."""

    def __init__(self, b: float, a: float) -> None:
        self.b, self.a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (b, a))

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        return Estimate(self.b + self.a * x_t, torch.zeros_like(x_t))

    def score(self, schedule: NoiseSchedule) -> Callable:
        """The denoiser of what the student makes of pure noise."""

        def fake(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
            exact = GaussianTeacher(schedule, abs(self.a.item()))
            return exact(x_t, t, {"mean": self.b.detach().reshape(1, 1, 1, 1)})

        return fake


def gradient(method: DMD2 | VSD, context: Drawn, batch: Batch) -> Tensor:
    """The direction that each element of a sample is given, from the student's update (its first)."""
    found: list[Tensor] = []
    student = context.denoiser("student")

    def watched(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        est = student(x_t, t, cond)  # pyright: ignore[reportArgumentType]
        if torch.is_grad_enabled():
            est.x0.retain_grad()
            found.append(est.x0)
        return est

    roles = {"student": watched, "fake": context.denoiser("fake"), TEACHER: context.denoiser(TEACHER)}
    if isinstance(method, DMD2) and method.gan is not None:
        roles["head"] = context.module("head")
    first = next(method.updates(replace(context, denoiser=roles.__getitem__), batch, 0))
    assert first.roles == ("student",)
    first.loss.backward()
    (x0,) = found
    return x0.grad * x0.numel()


def test_the_surrogate_has_the_gradient_and_half_its_square():
    x, g = torch.randn(3, 4, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 2, 2).double()
    loss = surrogate(x, g)
    loss.backward()
    close(x.grad * x.numel(), g, 1e-12)
    close(loss, g.square().mean() / 2, 1e-12)


@SCHEDULES
def test_equal_scores_give_no_gradient_and_guidance_only_its_own(schedule):
    """O1: with the fake score at the teacher, DMD2 sees guidance alone, and VSD nothing whatever w is."""
    teacher, batch = GaussianTeacher(schedule, 0.6), prompts(16, 0.7, (1, 8, 8))
    roles = {"student": Linear(-0.5, 0.3), "fake": teacher, TEACHER: teacher}
    assert not gradient(ONE, drawn(schedule, roles), batch).any()
    for w in (1.0, 3.0, 7.5, (0.5, 4.0)):
        assert not gradient(VSD(guidance_scale=w), drawn(schedule, roles), batch).any()
    context = drawn(schedule, roles, score_t=0.4)
    found = gradient(replace(ONE, guidance_scale=3.0), context, batch)
    s = schedule.random_times(torch.full((16,), 0.4).double(), 20.0, 980.0)
    x0 = -0.5 + 0.3 * context.seen["start"]
    x_s = schedule.add_noise(x0, context.seen["score eps"], s)
    cond, uncond = (teacher(x_s, s, {"mean": torch.full((16, 1, 1, 1), m).double()}).x0 for m in (0.7, 0.0))
    n = (x0 - (uncond + 3 * (cond - uncond))).abs().mean((1, 2, 3), keepdim=True)
    close(found, -2 * (cond - uncond) / n, 1e-7)


@SCHEDULES
def test_the_gradient_is_that_of_the_divergence(schedule):
    """O7: E[g] = sigma^3 alpha (b - m) / C and E[g z] = sigma^3 alpha a (1/C - 1/C'), for VSD's weight."""
    m, std, student = 0.7, 0.6, Linear(-0.4, 0.9)
    roles = {"student": student, "fake": student.score(schedule), TEACHER: GaussianTeacher(schedule, std)}
    for share in (0.4, 0.7):
        context = drawn(schedule, roles, score_t=share)
        g = gradient(VSD(guidance_scale=1.0), context, prompts(200_000, m)).flatten()
        alpha, sigma = levels(schedule, schedule.random_times(torch.tensor([share]).double(), 20.0, 980.0).item())
        c, q = (alpha * std) ** 2 + sigma**2, (alpha * 0.9) ** 2 + sigma**2
        z = context.seen["start"].flatten()
        for values, expected in (
            (g, sigma**3 * alpha * (-0.4 - m) / c),
            (g * z, sigma**3 * alpha * 0.9 * (1 / c - 1 / q)),
        ):
            assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5
            assert abs(expected) > 10 * values.std() / len(values) ** 0.5  # else nothing would be seen


def test_the_normaliser_is_the_mean_distance_to_the_guided_target():
    """O6: `E |x - real|` of Gaussians, and scale does not matter."""
    generator = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(4, 4, 64, 64, generator=generator).double() for _ in range(3))
    close(normalised(x, fake, real, {}), (fake - real) / math.sqrt(4 / math.pi), 0.2)
    close(normalised(7 * x, 7 * fake, 7 * real, {}), normalised(x, fake, real, {}), 1e-12)
    assert not normalised(x, x, x, {}).any()


@SCHEDULES
def test_guidance_on_one_side_moves_the_fixed_point(schedule):
    """O9: `m_c + (w - 1)(m_c - m_u)` for DMD2, fake score unguided; for VSD the prompt's distribution (O10)."""
    teacher, batch = GaussianTeacher(schedule, 0.6), prompts(64, 0.7, (1, 8, 8))

    def pull(method: DMD2 | VSD, b: float) -> Tensor:
        student = Linear(b, 0.6)
        roles = {"student": student, "fake": student.score(schedule), TEACHER: teacher}
        return gradient(method, drawn(schedule, roles), batch)

    beyond = guided_mean(0.0, 0.7, 3.0)
    close(pull(replace(ONE, guidance_scale=3.0), beyond), torch.zeros(64, 1, 8, 8), 1e-9)
    assert pull(replace(ONE, guidance_scale=3.0), 0.7).mean() < -0.1  # descent goes up from the unguided mean

    def vsd(b: float, w: float) -> Tensor:
        student = Linear(b, 0.6)
        learned = student.score(schedule)

        def fake(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Estimate:
            """The student's distribution for the prompt, the teacher's own without one."""
            own, known = learned(x_t, t, cond), teacher(x_t, t, cond)
            pairs = zip(own, known, strict=True)
            return Estimate(*(torch.where(cond["mean"] == 0, other, mine) for mine, other in pairs))

        return gradient(
            VSD(guidance_scale=w), drawn(schedule, {"student": student, "fake": fake, TEACHER: teacher}), batch
        )

    for w in (3.0, 7.5):
        close(vsd(0.7, w), torch.zeros(64, 1, 8, 8), 1e-9)
        assert vsd(0.2, w).mean() < -1e-3 and vsd(1.2, w).mean() > 1e-3


class Critic:
    """A fake score in the family of Gaussians, learned: mean `m` and log-variance `v`."""

    def __init__(self, schedule: NoiseSchedule, m: float, std: float) -> None:
        self.schedule = schedule
        self.m, self.v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (m, 2 * math.log(std)))

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t.double()))
        centred = (x_t - alpha_t * self.m) / (alpha_t**2 * self.v.exp() + sigma_t**2)
        return Estimate(self.m + alpha_t * self.v.exp() * centred, sigma_t * centred)


def run(critic_steps: int, updates: int = 250) -> tuple[float, float, float]:
    """Final mean, final std and highest mean of a student of N(0.8, 0.5) that starts at N(-0.5, 0.3^2)."""
    student, critic = Linear(-0.5, 0.3), Critic(FLOW, 0.8, math.sqrt(0.5))
    roles = {"student": student, "fake": critic, TEACHER: GaussianTeacher(FLOW, math.sqrt(0.5))}
    context, batch = drawn(FLOW, roles), prompts(24, 0.8, (1, 8, 8))
    method = replace(ONE, critic_steps=critic_steps)
    optimizers = {
        "student": torch.optim.SGD([student.b, student.a], 0.1),
        "fake": torch.optim.SGD([critic.m, critic.v], 0.08),
    }
    path, last = [], []
    for step in range(updates * critic_steps):
        for update in method.updates(context, batch, step):
            update.loss.backward()
            for role in update.roles:
                optimizers[role].step()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
        path.append(student.b.item())
        last.append(student.a.item())
    tail = slice(-20 * critic_steps, None)
    return sum(path[tail]) / len(path[tail]), sum(last[tail]) / len(last[tail]), max(path)


def test_a_learned_fake_score_recovers_mean_and_spread_and_more_steps_overshoot_less():
    """O7b: signs, weights, fake score, normaliser and the two time scales at once."""
    peaks = []
    for critic_steps in (1, 4):
        mean, std, peak = run(critic_steps)
        assert abs(mean - 0.8) < 0.05 and abs(std - math.sqrt(0.5)) < 0.05
        peaks.append(peak - 0.8)
    assert peaks[1] < 0.7 * peaks[0]


@SCHEDULES
@pytest.mark.parametrize("method", [ONE, VSD(proportion_empty_prompts=0.0)], ids=["dmd2", "vsd"])
def test_the_fake_score_has_its_floor_at_the_students_distribution(method, schedule):
    """O8: the least loss is `alpha^2 Q / C'` for the noise, `Q (alpha + sigma)^2 / C'` for a flow's velocity."""
    student, batch = Linear(-0.4, 0.9), prompts(100_000, 0.7)

    def loss(fake: Callable) -> float:
        roles = {"student": student, "fake": fake, TEACHER: GaussianTeacher(schedule, 0.6)}
        *_, last = method.updates(drawn(schedule, roles, fake_t=0.4), batch, 0)
        assert last.roles == ("fake",)
        return last.loss.item()

    t = schedule.random_times(torch.tensor([0.4]).double(), *schedule.span).item()
    alpha, sigma = levels(schedule, t)
    q = 0.9**2 / ((alpha * 0.9) ** 2 + sigma**2)
    floor = q * alpha**2 if isinstance(method, VSD) or schedule is SD else q * (alpha + sigma) ** 2
    floor *= alpha**2 if isinstance(method, VSD) else 1
    found = loss(student.score(schedule))
    assert abs(found / floor - 1) < 0.02
    for b, a in ((-0.3, 0.9), (-0.5, 0.9), (-0.4, 1.0), (-0.4, 0.8)):
        assert loss(Linear(b, a).score(schedule)) > found


@dataclass
class Judge:
    """A role whose features are its own input and time, so that a head can be any function of them."""

    denoise: Callable

    def __call__(self, x_t, t, cond):
        return self.denoise(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        return torch.cat([x_t, expand(t, x_t).expand_as(x_t)], 1)

    def frozen(self) -> Judge:
        return self


def log_ratio(schedule: NoiseSchedule, real: tuple[float, float], fake: tuple[float, float]) -> Callable:
    """The optimal discriminator of two Gaussian distributions (mean, std), noised."""

    def head(features: Tensor) -> Tensor:
        x, t = features[:, 0, 0, 0], features[:, 1, 0, 0]
        alpha, sigma = schedule(t)
        logs = []
        for mean, std in (real, fake):
            variance = (alpha * std) ** 2 + sigma**2
            logs.append(-((x - alpha * mean) ** 2) / (2 * variance) - variance.log() / 2)
        return (logs[0] - logs[1])[:, None]

    return head


@SCHEDULES
def test_at_the_optimal_discriminator_the_adversarial_term_is_a_weighted_score_term(schedule):
    """O12: `grad softplus(-D) = alpha (s_fake - s_real) / (1 + r)`; where equal it is 0 and the losses log 2."""
    teacher, student, size = GaussianTeacher(schedule, 0.6), Linear(-0.4, 0.9), 64
    gan = Gan(generator_weight=1.0)
    batch = replace(prompts(size, 0.7), latents=torch.randn(size, 1, 1, 1).double())

    def pull(head: Callable) -> tuple[Tensor, Drawn]:
        roles = {"student": student, "fake": Judge(student.score(schedule)), TEACHER: Judge(teacher), "head": head}
        fixed = {"score_t": 0.3, "gan_student_t": 0.5}
        with_gan, without = (
            gradient(replace(ONE, gan=g), context := drawn(schedule, roles, **fixed), batch)
            for g in (gan, replace(gan, generator_weight=0.0))
        )
        del context
        context = drawn(schedule, roles, **fixed)
        gradient(replace(ONE, gan=gan), context, batch)
        return with_gan - without, context

    found, context = pull(log_ratio(schedule, (0.7, 0.6), (-0.4, 0.9)))
    t = schedule.random_times(torch.full((size,), 0.5).double(), *schedule.span)
    x0 = -0.4 + 0.9 * context.seen["start"]
    x_t = schedule.add_noise(x0, context.seen["gan student eps"], t)
    alpha, sigma = (expand(v, x_t) for v in schedule(t))
    real = -teacher(x_t, t, batch.cond).eps / sigma
    fake = -student.score(schedule)(x_t, t, batch.cond).eps / sigma
    r = log_ratio(schedule, (0.7, 0.6), (-0.4, 0.9))(Judge(teacher).features(x_t, t, {})).exp()
    close(found, alpha * (fake - real) / (1 + expand(r[:, 0], x_t)), 1e-9)

    roles = {"student": student, "fake": Judge(teacher), TEACHER: Judge(teacher), "head": lambda f: 0 * f[:, 0, :, 0]}
    first, second = replace(ONE, gan=gan).updates(drawn(schedule, roles), batch, 0)
    close(first.logs["loss_gan"], math.log(2))
    close(second.logs["loss_head"], 2 * math.log(2))


@pytest.mark.parametrize(
    ("kind", "f"),
    [
        ("reverse_kl", lambda r: -r.log()),
        ("forward_kl", lambda r: r * r.log()),
        ("jensen_shannon", lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log()),
        ("softened_reverse_kl", lambda r: (1 + r) * ((1 + r) / r).log()),
        ("hellinger", lambda r: (r.sqrt() - 1) ** 2),
        ("jeffreys", lambda r: (r - 1) * r.log()),
    ],
)
def test_the_weights_are_those_of_the_divergences(kind, f):
    """O13: h(r) is `f''(r) r^2` up to a factor."""
    r = torch.linspace(0.2, 15, 40, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    expected = (second * r**2).detach()
    close(divergence_weight(kind, r.detach().log()[:, None]), expected / expected.mean(), 1e-5)


def test_ratios_far_from_one_are_bounded_as_published():
    logits = torch.tensor([-1000.0, -3.0, 0.0, 2.0, 4.0, 1000.0], dtype=torch.float64)
    r = torch.tensor([0.1, 0.1, 1.0, math.exp(2.0), 20.0, 20.0], dtype=torch.float64)
    close(divergence_weight("forward_kl", logits[:, None]), r / r.mean(), 1e-6)


def test_a_weight_of_the_divergence_multiplies_the_score_term():
    """f-distill's h comes from the head at the same noised sample as the scores."""
    teacher, student, batch = GaussianTeacher(SD, 0.6), Linear(-0.4, 0.9), prompts(64, 0.7)
    head = log_ratio(SD, (0.7, 0.6), (-0.4, 0.9))
    roles = {"student": student, "fake": Judge(student.score(SD)), TEACHER: Judge(teacher), "head": head}
    batch = replace(batch, latents=torch.zeros(64, 1, 1, 1).double())
    plain, weighted = (
        gradient(replace(ONE, gan=Gan(generator_weight=0.0, divergence=kind)), drawn(SD, roles, score_t=0.5), batch)
        for kind in ("reverse_kl", "forward_kl")
    )
    context = drawn(SD, roles, score_t=0.5)
    gradient(replace(ONE, gan=Gan(generator_weight=0.0)), context, batch)
    s = SD.random_times(torch.full((64,), 0.5).double(), 20.0, 980.0)
    x_s = SD.add_noise(-0.4 + 0.9 * context.seen["start"], context.seen["score eps"], s)
    h = divergence_weight("forward_kl", head(Judge(teacher).features(x_s, s, {})))
    close(weighted, expand(h, plain) * plain, 1e-6)


class Particles:
    """A student of one free sample a row, and the denoiser of their empirical distribution."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.double().reshape(-1, 1, 1, 1).requires_grad_()

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        return Estimate(self.x * 1.0, torch.zeros_like(x_t))

    def score(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        alpha, sigma = (v[:, None] for v in SD(t.double()))
        x, y = self.x.detach().flatten(), x_t.flatten()[:, None]
        share = torch.softmax(-((y - alpha * x) ** 2) / (2 * sigma**2), 1)
        x0 = (share * x).sum(1, keepdim=True)
        return Estimate(x0.reshape_as(x_t), ((y - alpha * x0) / sigma).reshape_as(x_t))


@pytest.mark.parametrize(
    ("start", "t_range", "low", "high"),
    [("between", (20.0, 980.0), 0.35, 0.65), ("one", (20.0, 980.0), 0.1, 0.6), ("one", (20.0, 120.0), 0.0, 0.0)],
)
def test_modes_are_found_at_high_noise_only(start, t_range, low, high):
    """O15: two modes at +-4; low noise alone cannot carry mass from one to the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, generator=generator)
    particles = Particles(x if start == "between" else 4 + 0.5 * x)
    teacher = Mixture(SD, (0.5, 0.5), (-4.0, 4.0), (0.5, 0.5))
    context = drawn(SD, {"student": particles, "fake": particles.score, TEACHER: teacher})
    optimizer, batch = torch.optim.SGD([particles.x], 40.0), prompts(128, 0.0)
    method = VSD(guidance_scale=1.0, t_range=t_range)
    for step in range(600):
        optimizer.zero_grad()
        next(method.updates(context, batch, step)).loss.backward()
        optimizer.step()
    share = (particles.x < 0).double().mean().item()
    assert low <= share <= high
    if start == "between":
        assert (particles.x.abs() > 2.5).double().mean() > 0.9


@SCHEDULES
@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_simulated_inputs_have_the_distribution_that_sampling_makes(schedule, eta):
    """O18, O19: means and variances of an affine student's inputs, and pure noise at the first step."""
    size, steps, (b, a) = 200_000, 4, (0.6, 0.3)
    method = DMD2(num_inference_steps=steps, eta=eta)
    times = method.sampler(schedule).timesteps

    def student(x_t, t, cond):
        alpha, sigma = (expand(v, x_t) for v in schedule(t.double()))
        x0 = b + a * x_t
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    mean, variance = 0.0, 1.0
    for k in range(steps):
        context = drawn(schedule, {"student": student}, step=(k + 0.5) / steps)
        part = prompts(size, 0.0)
        x_t, t, _ = simulate(context, part, method.sampler(schedule), context.noise(part, "start"))
        assert set(t.tolist()) == {times[k]} and not x_t.requires_grad
        assert abs(x_t.mean() - mean) < 5 * (variance / size) ** 0.5
        assert abs(x_t.var() / variance - 1) < 5 * (2 / size) ** 0.5
        if k + 1 < steps:
            (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, times[k]), levels(schedule, times[k + 1])
            if eta == 1:
                mean, variance = alpha_s * (b + a * mean), (alpha_s * a) ** 2 * variance + sigma_s**2
            else:
                slope = alpha_s * a + sigma_s * (1 - alpha * a) / sigma
                mean = slope * mean + (alpha_s - sigma_s * alpha / sigma) * b
                variance *= slope**2
