"""Guidance distillation at one scale, with a LoRA student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from stepdistill.config.kinds import Amount, Count
from stepdistill.core.losses import distance
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, teacher_sampler
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class GuidedLora(Method):
    """Guidance distillation at one scale: a LoRA learns the teacher's guided output, so one pass replaces two.

    Equation:
        y_w(x_t, t, c) = y(x_t, t) + w (y(x_t, t, c) - y(x_t, t)), the teacher's output under guidance
        loss = E |y_student(x_t, t, c) - y_w(x_t, t, c)|^2

    References:
        On distillation of guided diffusion models, Meng et al. 2023, https://arxiv.org/abs/2210.03142, stage 1, at a
        fixed w and unweighted in the network's output. As a LoRA on the teacher itself, where the teacher is the
        network with that LoRA disabled: DeepSpeed's `train_sd_distill_lora.py` in microsoft/DeepSpeedExamples, at w =
        7.5.

    Args:
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher; the student is sampled with guidance_scale 1.
        states: `noised` latents, as in the released code, or states of guided `trajectories`, which are what the
            student sees in sampling. Of the trajectories only x_t and t are used; the teacher's output is computed at
            guidance_scale.
        num_inference_steps: default number of sampling steps, stored in the contract.
    """

    guidance_scale: Amount = 7.5
    states: Literal["noised", "trajectories"] = "noised"
    num_inference_steps: Count = 25

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents" if self.states == "noised" else "trajectories"})

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return teacher_sampler(schedule, steps or self.num_inference_steps)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        if self.states == "trajectories":
            x_t, t, _, _ = batch.guided_state
        else:
            t = context.schedule.random_times(context.draw(batch, "t"), *context.schedule.span)
            x_t = context.schedule.add_noise(batch.x0, context.noise(batch, "eps"), t)
        student = context.denoiser("student")
        with torch.no_grad():
            target = context.guided(TEACHER, self.guidance_scale)(x_t, t, batch.cond)
        y = student.native(student(x_t, t, batch.cond), t)
        yield Update("student", distance("l2", y, student.native(target, t)))
