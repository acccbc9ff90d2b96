"""Direct regression to the teacher's samples, a cheap baseline.

The teacher has turned noise into `latents` once, in N guided deterministic steps. The student starts from the same
noise and, at each of its few steps, predicts that end point; its inputs are those of its own rollout, so that what
is trained is what is sampled. A squared loss on a deterministic pairing has one fixed point, the pairing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from stepdistill.config.kinds import Amount, Count, Positive
from stepdistill.core.losses import Distance, distance
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, follow, student_starts
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect, check_steps


@dataclass(frozen=True, kw_only=True)
class Regression(Averaged):
    """Few-step regression onto the teacher's N-step output from the same noise.

    Equation:
        (z, x0) = noise, and what the teacher makes of it; x_t = the student's own steps from z to t
        loss = E d( student(x_t, t).x0, x0 )

    References:
        Knowledge distillation in iterative generative models, Luhman & Luhman 2021, https://arxiv.org/abs/2101.02388,
        is the one-step case.

    Args:
        num_inference_steps: steps of the student, evenly spaced.
        timesteps: timesteps at which the student's steps start, descending; none spaces them evenly. See
            `DMD2.timesteps`, for which this student can be the warm start.
        loss_type: `l2` or `huber`.
        huber_c: constant c of the pseudo-Huber loss, in latent units.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    loss_type: Distance = "l2"
    huber_c: Positive = 1e-3

    def __post_init__(self) -> None:
        check_steps(self)
        check_effect(self, "huber_c", self.loss_type == "huber", "loss_type 'huber'")

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(student_starts(schedule, self.timesteps, self.num_inference_steps, steps), eta=0.0, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        noise, x0 = batch.pair
        student, times = context.denoiser("student"), self.sampler(context.student_schedule).timesteps
        # one exit for the whole step, so that no sample is carried further than it is used
        exit_at = int(context.shared("exit") * len(times))
        with torch.no_grad():
            x_t = follow(student, context.schedule, times[: exit_at + 1], noise, batch.cond)
        t = per_sample(times[exit_at], x_t)
        loss = distance(self.loss_type, student(x_t, t, batch.cond).x0, x0, self.huber_c)
        yield Update("student", loss)
