"""Online PSO against closed forms, by its own updates: where the optimum is, what a step trains, what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import close
from oracles.context import drawn
from oracles.fakes import Fake, Stage, batch
from test_pso_offline import LCM, SAMPLERS, SD, STARTS, prompts, roles
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.losses import preference_loss
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, Transition, few_step, transition
from stepdistill.methods.base import Update
from stepdistill.methods.pso_online import PSOOnline, divergence, log_ratio, sample_paths
from stepdistill.networks.rewards.base import Reward, RewardScale, Score


@dataclass(frozen=True, kw_only=True)
class Mean(Reward):
    """`slope` times the mean of a decoded sample."""

    slope: float = 1.0

    def build(self, device: torch.device) -> Score:
        return lambda images, prompts: self.slope * (2 * images - 1).flatten(1).mean(1)


ONLINE = PSOOnline(reward=Mean(), sampling=LCM, beta=2.0, clip_range=None, std=1.0)


@dataclass(frozen=True)
class Affine:
    """A network whose x0 is affine in its input, and shifted by a number of its own at each start of a step."""

    schedule: NoiseSchedule
    times: tuple[float, ...]
    shifts: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        assert set(t.tolist()) <= set(self.times), "asked at a time at which sampling starts no step"
        i = torch.tensor([self.times.index(one) for one in t.tolist()])
        x0 = 0.6 * x_t + 0.2 + expand(self.shifts[i], x_t)
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t.double()))
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)


def chain(
    method: PSOOnline, schedule: NoiseSchedule, shifts: Tensor, count: int = 16, shape: tuple[int, ...] = (1, 1, 1)
) -> list[Update]:
    """The updates of a step, with the student shifted by these numbers, (N,), and the teacher not at all."""
    assert method.sampling is not None
    times = method.sampling.timesteps
    networks = {
        "student": Affine(schedule, times, shifts),
        "teacher": Affine(schedule, times, torch.zeros_like(shifts)),
    }
    return list(method.updates(drawn(schedule, networks), prompts(count, shape), 0))


def optimum(schedule: NoiseSchedule, sampler: Sampler, slope: float, beta_per_nat: float) -> Tensor:
    """(N,) the shifts of x0 with which each transition's mean moves by `slope (d x_end / d x_k) std_k^2 / beta`.

    The means are affine in the shift, and the end in each state, so differences of two are derivatives.
    """
    n, zero = len(sampler.timesteps), torch.zeros(1, 1, 1, 1).double()
    teacher = Affine(schedule, sampler.timesteps, torch.zeros(n).double())

    def made(k: int, x: Tensor, shift: float = 0.0) -> Transition:
        shifted = replace(teacher, shifts=torch.full((n,), shift).double())
        return transition(schedule, sampler, k, shifted(x, torch.tensor([sampler.timesteps[k]]).double(), {}))

    shifts, onward = torch.zeros(n).double(), 1.0
    for k in reversed(range(n)):
        mean, std = made(k, zero)
        if std is not None:
            per_shift = (made(k, zero, 1.0).mean - mean).item()
            shifts[k] = slope * onward * std.item() ** 2 / beta_per_nat / per_shift
        onward *= (made(k, zero + 1).mean - mean).item()
    return shifts


# --- online: the optimum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_optimum_is_that_of_the_reward_beside_the_divergence(name, dimensions):
    """At `p ~ p_teacher exp(r / beta)` the logits are the labels' own, whatever was drawn: no sample has a gradient."""
    (schedule, sampler), slope = SAMPLERS[name], 1.7
    method = replace(ONLINE, sampling=sampler, reward=Mean(slope=slope))
    best = optimum(schedule, sampler, slope / dimensions, method.beta / dimensions)
    assert best[:-1].abs().min() > 1e-3 and best[-1] == 0
    for factor in (0.0, 1.0, 2.0):
        shifts = (factor * best).requires_grad_()
        updates = chain(method, schedule, shifts, shape=(dimensions, 1, 1))
        pull = torch.stack([torch.autograd.grad(u.loss, shifts, retain_graph=True)[0] for u in updates])
        trained = pull[:, :-1].diagonal()  # each update trains its own transition
        close(pull, torch.cat([trained.diag(), torch.zeros(len(pull), 1)], 1), 0)
        if factor == 1:
            close(trained, torch.zeros_like(trained), 1e-6)
        else:
            assert trained.abs().min() > 1e-4 and (trained @ best[:-1]) * (factor - 1) > 0


def test_the_published_hard_labels_have_no_optimum():
    best = optimum(SD, LCM, 1.0, ONLINE.beta)
    for factor in (1.0, 3.0):
        shifts = (factor * best).requires_grad_()
        updates = chain(replace(ONLINE, labels="hard", std=None), SD, shifts, count=512)
        pull = torch.stack([torch.autograd.grad(u.loss, shifts, retain_graph=True)[0] for u in updates]).sum(0)
        assert (pull[:-1] < -1e-4).all()


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_a_bandit_learns_the_tilted_distribution(beta):
    """Six actions with one reward each, from a uniform reference; every pair of them equally often."""
    reward = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    ahead = (reward[:, None] - reward).flatten()

    def fitted(label: Tensor) -> Tensor:
        a = torch.zeros(6).double().requires_grad_()
        solver = torch.optim.LBFGS([a], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = preference_loss(beta * (a[:, None] - a).flatten(), label)
            value.backward()
            return value

        solver.step(loss)
        return torch.softmax(a.detach(), 0)

    close(fitted(torch.sigmoid(ahead)), torch.softmax(reward / beta, 0), 3e-5)
    assert (fitted((ahead.sign() + 1) / 2) - torch.softmax(reward / beta, 0)).abs().max() > 0.03  # all on the best


# --- online: one step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_fresh_lora_has_the_loss_log_2_and_a_gradient(name):
    schedule, sampler = SAMPLERS[name]
    weight = torch.tensor(0.7).double().requires_grad_()
    context = replace(Stage(schedule, {}).context(0), denoiser=roles(schedule, 0.7, weight).__getitem__)
    for labels in ("soft", "hard"):
        method = replace(ONLINE, sampling=sampler, labels=labels, std=1.0 if labels == "soft" else None, clip_range=0.1)
        updates = list(method.updates(context, batch(3, 7, 8), 0))
        assert len(updates) == len(sampler.timesteps) - 1
        for update in updates:
            close(update.loss, math.log(2), 1e-12)
            assert torch.autograd.grad(update.loss, weight)[0].abs() > 1e-9
        first = updates[0].logs
        assert first["kl"] == 0 and first["clipped"] == 0
        close(first["beta_per_nat"], 2.0 / 16, 1e-7)


def test_the_student_is_trained_at_the_contract_s_times_without_the_last():
    """O-f4 and P4."""
    asked: list[tuple[float, bool, int]] = []

    class Watched(Affine):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            asked.append((t[0].item(), torch.is_grad_enabled(), len(x_t)))
            return super().__call__(x_t, t, cond)

    shifts = torch.full((4,), 0.1).double().requires_grad_()
    networks = {"student": Watched(SD, STARTS, shifts), "teacher": Affine(SD, STARTS, torch.zeros(4).double())}
    updates = list(ONLINE.updates(drawn(SD, networks), prompts(2), 0))
    assert asked == [(t, False, 4) for t in STARTS] + [(t, True, 4) for t in STARTS[:-1]]
    (pull,) = torch.autograd.grad(torch.stack([update.loss for update in updates]).sum(), shifts)
    assert pull[:-1].all() and pull[-1] == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_stored_transitions_replay(name):
    """P2: what the reference draws is the next state, at the noise that was drawn."""
    schedule, sampler = SAMPLERS[name]
    network, context = Fake(schedule, torch.tensor(0.7).double()), Stage(schedule, {}).context(0)
    part = batch(3, 7)
    cond = {key: torch.cat([value, value]) for key, value in part.cond.items()}
    states, transitions = sample_paths(network, context, part, cond, sampler)
    assert len(states) == len(sampler.timesteps) + 1 and len(transitions) == len(sampler.timesteps) - 1
    close(states[0][:2], states[0][2:], 0)  # one starting noise
    for k, (mean, std) in enumerate(transitions):
        assert std is not None
        z = torch.cat([context.noise(part, f"again {k} {path}") for path in ("first", "second")])
        close(states[k + 1] - expand(std, mean) * z, mean, 1e-6)
        assert (z[:2] - z[2:]).abs().min() > 0  # fresh noises apart
    alone = few_step(
        network, schedule, sampler, states[0][:2], part.cond, lambda k: context.noise(part, f"again {k} first")
    )
    close(states[-1][:2], alone, 1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_ratios_are_those_of_densities(name):
    """P3: their mean over the reference's own paths is 1."""
    (schedule, sampler), count = SAMPLERS[name], 20_000
    n = len(sampler.timesteps)
    teacher = Affine(schedule, sampler.timesteps, torch.zeros(n).double())
    student = replace(teacher, shifts=torch.full((n,), 0.1).double())
    part = prompts(count)
    with torch.no_grad():
        cond = {key: torch.cat([value, value]) for key, value in part.cond.items()}
        states, transitions = sample_paths(teacher, drawn(schedule, {}), part, cond, sampler)
        total = torch.zeros(2 * count).double()
        for k, reference in enumerate(transitions):
            t = torch.full((2 * count,), sampler.timesteps[k]).double()
            made = transition(schedule, sampler, k, student(states[k], t, {}))
            total += log_ratio(states[k + 1], made, reference)
            assert divergence(made, reference) > 0
    ratio = total.exp()
    assert ratio.std() > 0.05
    close(ratio.mean(), 1.0, 3 * (ratio.std() / (2 * count) ** 0.5).item())


def test_a_tie_has_no_gradient_and_a_swap_is_the_logit():
    """P5, O-f2, O-f3."""
    logit, tie = torch.tensor([1.3, -0.4]).double().requires_grad_(), torch.zeros(2).double()
    hard = replace(ONLINE, labels="hard", std=None)
    loss = hard.loss(logit, tie)
    close(loss, math.log(2), 1e-12)
    assert not torch.autograd.grad(loss, logit)[0].any()
    for method in (hard, ONLINE):
        one, other = torch.tensor([0.5, -2.0]).double(), torch.tensor([-0.5, 2.0]).double()
        close(method.loss(logit, one), method.loss(-logit, other), 1e-12)
    close(preference_loss(logit) - preference_loss(-logit), -logit.mean(), 1e-12)
    at_zero = torch.zeros(2).double().requires_grad_()
    assert not torch.autograd.grad(ONLINE.loss(at_zero, tie), at_zero)[0].any()


def test_the_clamp_ends_at_a_tenth_of_the_transition_s_std():
    """A winner at `mean + std z`, with z of mean square 1: the mean moves along z by 0.1003 std at most. O-f8."""
    std, z = torch.tensor([0.4]).double(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    z, clipped = z / z.square().mean().sqrt(), replace(ONLINE, clip_range=0.1)
    reference = Transition(torch.zeros_like(z), std)
    for share, stopped in ((0.05, False), (0.1003, False), (0.1004, True), (0.3, True)):
        mean = (share * std * z).requires_grad_()
        ratio = clipped.clipped(log_ratio(0.4 * z, Transition(mean, std), reference))
        assert torch.autograd.grad(ratio.sum(), mean)[0].any() != stopped
        close(divergence(Transition(mean, std), reference), share**2 / 2 * z.numel(), 1e-9)
    assert replace(ONLINE, clip_range=None).clipped(torch.tensor(9.0)) == 9


def test_the_scale_of_the_reward_is_measured_once():
    method = replace(ONLINE, std=None)
    with pytest.raises(ValueError, match="no std"):
        method.loss(torch.zeros(1), torch.zeros(1))
    scales = [lambda reward, slope=False, std=std: RewardScale(3.0, std) for std in (0.5, 9.0)]
    measured = method.calibrate(scales[0])
    assert measured.std == 0.5 and measured.calibrate(scales[1]) == measured
    assert replace(ONLINE, std=None, labels="hard").calibrate(scales[1]).std is None
    ahead, logit = torch.tensor([1.0]).double(), torch.tensor([0.3]).double()
    close(measured.loss(logit, ahead), preference_loss(logit, torch.sigmoid(torch.tensor([2.0]))), 1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(ONLINE, sampling=Sampler((999.0,), eta=1.0)).check(SD), "one step .*pso_offline.PSOOffline"),
        (lambda: replace(ONLINE, sampling=Sampler(STARTS)).check(SD), "eta 0 has no stochastic transition"),
        (lambda: replace(ONLINE, sampling=None).check(SD), "sampling is none"),
        (lambda: replace(ONLINE, clip_range=1.0), "clip_range is 1.0"),
        (lambda: replace(ONLINE, labels="hard"), "std is 1.0: .* only with labels 'soft'"),
        (lambda: replace(ONLINE, held_out=Mean()), "held_out is the reward"),
    ],
)
def test_what_has_no_transition_or_no_effect_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
