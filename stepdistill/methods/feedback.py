"""Human feedback for a few-step student (ReFL): its samples climb rewards, beside an anchor to what they were.

A student of few steps can be scored after any of them. One step is drawn, those before it are taken without a graph,
and the sample that this one call predicts is decoded and scored. Without an anchor a reward has no end, and its margin
ends the climb only where nearly all samples are beyond it, which narrows the distribution. The anchor is paired: each
sample is held to what the few-step model makes of the same input, which moves the distribution without narrowing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from stepdistill.config.kinds import Positive
from stepdistill.methods.base import Batch, StepContext, Tuning, Update
from stepdistill.methods.reward import RewardTerm, calibrated, reward_loss
from stepdistill.methods.rollout import reached
from stepdistill.networks.rewards.base import MeasureReward, Reward
from stepdistill.networks.rewards.clip_score import ClipScore
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class Feedback(Tuning):
    """Reward feedback learning on a few-step model, with an anchor to that model.

    Equation:
        x0 = student(x_t, t).x0, where the student's own steps lead from noise to x_t, without a graph
        loss = sum_d w_d mean relu(margin_d - (r_d(decode(x0)) - mean_d) / std_d)
               + lambda mean |x0 - teacher(x_t, t).x0|^2,   lambda = sum_d w_d slope_d / std_d / (2 anchor_shift)

    For a reward that is linear in the latents, and below its margin, the optimum is the few-step model's samples, each
    moved by `anchor_shift`.

    References:
        ImageReward, Xu et al. 2023, https://arxiv.org/abs/2304.05977, section 4 (ReFL).
        Hyper-SD, Ren et al. 2024, https://arxiv.org/abs/2404.13686, section 3.3, which has no anchor.

    Args:
        rewards: terms of the loss, of one reward each. Several are harder to deceive than one.
        exits: steps of the sampler after which samples are scored: `all`, or the `last` alone; none is the last half
            of the steps, since the samples of earlier steps are blurred.
        anchor_shift: root mean square distance, in units of the latents, at which the anchor balances the rewards; none
            trains without an anchor.
        held_out: a reward that is never trained on. It scores the student at every validation; where it falls three
            times running while a trained one rises, the run ends after a checkpoint. `best/` is then the student that
            it scores highest.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    rewards: tuple[RewardTerm, ...] = (RewardTerm(reward=ClipScore()),)
    exits: Literal["all", "last"] | None = None
    anchor_shift: Positive | None = 0.1
    held_out: Reward | None = None

    def __post_init__(self) -> None:
        Tuning.__post_init__(self)
        if not self.rewards:
            raise ValueError("rewards is empty: expected at least one, since nothing else moves the student")
        if self.held_out in self.trained_rewards:
            raise ValueError("held_out is among the rewards: expected one that is never trained on")

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        return tuple(one.reward for one in self.rewards)

    def calibrate(self, measure: MeasureReward) -> Feedback:
        return replace(self, rewards=calibrated(self.rewards, measure))

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        sampler = self.sampler(context.student_schedule)
        student, before = (self.sampled(context, role) for role in ("student", TEACHER))
        first = self.first_exit(count := len(sampler.timesteps))
        exit_at = first + int(context.shared("exit") * (count - first))
        x_t, t, _ = reached(student, context, batch, sampler, context.noise(batch, "start"), exit_at)
        x0 = student(x_t, t, batch.cond).x0
        loss, logs = reward_loss(self.rewards, context, batch, x0)
        if self.anchor_shift is not None:
            with torch.no_grad():
                held = before(x_t, t, batch.cond).x0
            logs["anchor"] = (x0 - held).square().mean()
            pull = sum(one.weight * slope / std for one in self.rewards for _, std, slope in (one.scale,))
            loss = loss + pull / (2 * self.anchor_shift) * logs["anchor"]
        yield Update("student", loss, **logs)

    def first_exit(self, count: int) -> int:
        """The first step, from 0, of a sampler of `count` steps after which samples are scored."""
        return {"all": 0, "last": count - 1, None: count - max(1, count // 2)}[self.exits]
