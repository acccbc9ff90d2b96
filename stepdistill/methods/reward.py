"""Rewards as terms of a student's loss: clamped by a margin, in units of the reward's spread over teacher samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Positive
from stepdistill.methods.base import Batch, StepContext
from stepdistill.networks.rewards.base import MeasureReward, Reward, RewardScale, rewards_by_name


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """A reward that a student climbs up to a margin.

    Equation:
        loss = weight mean relu(margin - (r(image, prompt) - mean) / std)

    A sample that reaches the margin has no gradient. `mean`, `std` and `slope` describe the reward on samples of the
    teacher, so that a margin or a weight means the same for every reward. They are measured at the start of training.

    References:
        ImageReward, Xu et al. 2023, https://arxiv.org/abs/2304.05977, section 4.
        Hyper-SD, Ren et al. 2024, https://arxiv.org/abs/2404.13686, section 3.3.

    Args:
        reward: by the dotted path of its class.
        weight: of this term.
        margin: standard deviations above the mean of the teacher's samples at which the term ends.
        mean: mean score of the teacher's samples; none measures all three.
        std: standard deviation of their scores.
        slope: root mean square of the score's gradient over the elements of a sample's latents, times their number.
    """

    reward: Reward
    weight: Amount = 1.0
    margin: float = 1.0
    mean: float | None = None
    std: Positive | None = None
    slope: Amount | None = None

    def __post_init__(self) -> None:
        known = [name for name in RewardScale._fields if vars(self)[name] is not None]
        if len(known) not in (0, 3):
            raise ValueError(f"only {' and '.join(known)} given: expected mean, std and slope, or none of them")

    @property
    def scale(self) -> tuple[float, float, float]:
        """`mean`, `std` and `slope`; ValueError where they are not measured yet."""
        if self.mean is None or self.std is None or self.slope is None:
            raise ValueError(f"{self.reward.identity} has no mean, std and slope: call `Method.calibrate` first")
        return self.mean, self.std, self.slope

    def term(self, context: StepContext, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The loss of images (B, 3, H, W) in about [0, 1], and their mean score in standard deviations."""
        mean, std, _ = self.scale
        score = (self.reward.load(context.device)(images, prompts) - mean) / std
        return self.weight * (self.margin - score).relu().mean(), score.mean().detach()


def calibrated(terms: Sequence[RewardTerm], measure: MeasureReward) -> tuple[RewardTerm, ...]:
    """The terms with their rewards' scales, each measured unless it is given."""
    return tuple(
        one if one.mean is not None else replace(one, **measure(one.reward, slope=True)._asdict()) for one in terms
    )


def reward_loss(
    terms: Sequence[RewardTerm], context: StepContext, batch: Batch, x0: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the terms at samples x0 (B, C, H, W), which are decoded, and each one's score in the logs."""
    loss, logs = torch.zeros((), device=x0.device), {}
    if terms:
        images = context.decode(x0) / 2 + 0.5
        for name, one in zip(rewards_by_name(one.reward for one in terms), terms, strict=True):
            value, logs[f"reward/{name}"] = one.term(context, images, batch.prompts)
            loss = loss + value
    return loss, logs
