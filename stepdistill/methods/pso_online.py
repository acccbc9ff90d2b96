"""Online pairwise sample optimization (PSO): a few-step model learns to prefer the better one of its own samples.

A step of stochastic few-step sampling draws from a normal distribution, so a sample's path has a density. Two paths
from one noise are scored at their ends, and the density of the better one rises, relative to the model as it was. The
reward needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.config.kinds import Positive
from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.losses import preference_loss
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, Transition, few_step, transition
from stepdistill.methods.base import Batch, StepContext, Tuning, Update, check_effect
from stepdistill.networks.rewards.base import MeasureReward, Reward
from stepdistill.networks.rewards.clip_score import ClipScore
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class PSOOnline(Tuning):
    """Online PSO on the transitions of a stochastic few-step sampler.

    Equation:
        two paths x_0, x_1, ... of the student from one starting noise, with fresh noises apart
        a_k = mean over dimensions of (|x_{k+1} - m_teacher|^2 - |x_{k+1} - m_student|^2) / (2 std_k^2),
              of the first path, minus that of the second, each clamped to [log(1 - c), log(1 + c)]
        loss = -y log sigmoid(beta sum_k a_k) - (1 - y) log sigmoid(-beta sum_k a_k),
               y = sigmoid((r_first - r_second) / (temperature std))

    The transition from `x_k` has the mean `m(x_k)` and `std_k` of the sampler (`stepdistill.core.solvers.transition`).
    Each is an update of its own: its gradient is that of the whole loss, with the memory of one transition. The last
    step is deterministic, and is not trained.

    Without the clamp, the optimum for samples of D numbers is `p ~ p_teacher exp(D r / (beta temperature std))`. So
    each nat of divergence from the few-step model weighs `beta / D`, which is logged beside the divergence.

    References:
        Tuning timestep-distilled diffusion model using pairwise sample optimization, Miao et al. 2024,
        https://arxiv.org/abs/2410.03190.

    Args:
        reward: the score that is raised, by the dotted path of its class.
        beta: factor of the log-ratios, which are means over dimensions (50 as published).
        clip_range: c of the clamp of each transition's ratio to [1 - c, 1 + c] (0.1 as published); a ratio beyond it
            has no gradient. None has no clamp.
        labels: `soft`, the probability y that the first is better; `hard`, whether it is, as published. Hard labels
            have no optimum: only the clamp and the end of training bound them.
        temperature: difference in reward, in standard deviations of the few-step model's samples, that makes y differ
            clearly from a half.
        std: the standard deviation of the reward over these samples; none measures it at the start of training.
        held_out: a reward that is never trained on, which scores the student at every validation. Where it falls three
            times running while the trained one rises, the run ends after a checkpoint.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    reward: Reward = field(default_factory=ClipScore)
    beta: Positive = 50.0
    clip_range: float | None = 0.1
    labels: Literal["soft", "hard"] = "soft"
    temperature: Positive = 1.0
    std: Positive | None = None
    held_out: Reward | None = None

    def __post_init__(self) -> None:
        Tuning.__post_init__(self)
        if self.clip_range is not None and not 0 < self.clip_range < 1:
            raise ValueError(
                f"clip_range is {self.clip_range}: expected a number between 0 and 1, such as 0.1, or none"
            )
        for name in ("temperature", "std"):
            check_effect(self, name, self.labels == "soft", "labels 'soft'")
        if self.held_out == self.reward:
            raise ValueError("held_out is the reward that is trained on: expected another one")

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        return (self.reward,)

    def check(self, schedule: NoiseSchedule) -> None:
        Tuning.check(self, schedule)
        sampler = self.sampler(schedule)
        if len(sampler.timesteps) == 1 or sampler.eta == 0:
            what = "one step" if len(sampler.timesteps) == 1 else "eta 0"
            raise ValueError(
                f"sampling with {what} has no stochastic transition: expected several steps and an eta above 0, since "
                "the probability of a transition is trained; use pso_offline.PSOOffline, or feedback.Feedback"
            )

    def calibrate(self, measure: MeasureReward) -> PSOOnline:
        return self if self.labels == "hard" or self.std else replace(self, std=measure(self.reward).std)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        schedule, sampler = context.schedule, self.sampler(context.student_schedule)
        student, teacher = (self.sampled(context, role) for role in ("student", TEACHER))
        cond = {key: torch.cat([value, value]) for key, value in batch.cond.items()}
        with torch.no_grad():
            states, policy = sample_paths(student, context, batch, cond, sampler)
            times = [per_sample(t, states[0]) for t in sampler.timesteps[:-1]]
            reference = [transition(schedule, sampler, k, teacher(states[k], t, cond)) for k, t in enumerate(times)]
            both = list(zip(policy, reference, strict=True))
            ratios = [log_ratio(states[k + 1], *each) for k, each in enumerate(both)]
            ahead, reward = self.judged(context, batch, states[-1])
        apart = [self.apart(ratio) for ratio in ratios]
        logs = {
            "reward": reward,
            "kl": torch.stack([divergence(*each) for each in both]).sum(),
            "beta_per_nat": torch.full_like(reward, self.beta / states[0][0].numel()),
            "clipped": torch.stack([self.clipped(ratio) != ratio for ratio in ratios]).float().mean(),
        }
        for k, t in enumerate(times):
            made = transition(schedule, sampler, k, student(states[k], t, cond))
            own = self.apart(log_ratio(states[k + 1], made, reference[k]))
            logit = self.beta * (own + sum(other for j, other in enumerate(apart) if j != k))
            yield Update("student", self.loss(logit, ahead), **logs)

    def judged(self, context: StepContext, batch: Batch, ends: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the first of each pair of samples (2B, C, H, W) is better, (B,), and the mean reward."""
        score = self.reward.load(context.device)
        first, second = (score(context.decode(part) / 2 + 0.5, batch.prompts) for part in ends.chunk(2))
        return first - second, torch.stack([first, second]).mean()

    def clipped(self, ratio: Tensor) -> Tensor:
        """Log-ratios, clamped so that the ratio is within `clip_range` of 1."""
        c = self.clip_range
        return ratio if c is None else ratio.clamp(math.log(1 - c), math.log(1 + c))

    def apart(self, ratio: Tensor) -> Tensor:
        """The clamped log-ratios of the first paths minus those of the second, (B,), of both in (2B,)."""
        first, second = self.clipped(ratio).chunk(2)
        return first - second

    def loss(self, logit: Tensor, ahead: Tensor) -> Tensor:
        """The loss of logits (B,) of the first paths, which are better by `ahead` (B,)."""
        if self.labels == "hard":
            return preference_loss(ahead.sign() * logit)
        if self.std is None:
            raise ValueError(f"{self.reward.identity} has no std: call `Method.calibrate` first")
        return preference_loss(logit, torch.sigmoid(ahead / (self.temperature * self.std)))


def sample_paths(
    denoise: Denoise, context: StepContext, batch: Batch, cond: Condition, sampler: Sampler
) -> tuple[list[Tensor], list[Transition]]:
    """Two paths of each prompt from one starting noise, with fresh noises apart.

    Args:
        cond: of the first paths, then of the second.

    Returns:
        The N inputs of a sampler of N steps and the samples, (2B, C, H, W) each, and the N - 1 transitions.
    """
    states, transitions = list[Tensor](), list[Transition]()

    def recorded(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        est = denoise(x_t, t, cond)
        if (k := len(states)) + 1 < len(sampler.timesteps):
            transitions.append(transition(context.schedule, sampler, k, est))
        states.append(x_t)
        return est

    def fresh(k: int) -> Tensor:
        return torch.cat([context.noise(batch, f"again {k} {path}") for path in ("first", "second")])

    start = context.noise(batch, "start")
    ends = few_step(recorded, context.schedule, sampler, torch.cat([start, start]), cond, fresh)
    return [*states, ends], transitions


def log_ratio(x: Tensor, policy: Transition, reference: Transition) -> Tensor:
    """`log p_policy(x) - log p_reference(x)` (B,) of a transition's results (B, C, H, W), as a mean over dimensions."""
    assert reference.std is not None
    # the difference of the two squares, without its rounding: exactly 0 where both are one
    apart = (policy.mean - reference.mean) * (2 * x - policy.mean - reference.mean)
    return apart.flatten(1).mean(1) / (2 * reference.std**2)


def divergence(policy: Transition, reference: Transition) -> Tensor:
    """KL(policy || reference) of one transition in nats, the mean over a batch."""
    assert reference.std is not None
    return ((policy.mean - reference.mean).square().flatten(1).sum(1) / (2 * reference.std**2)).mean()
