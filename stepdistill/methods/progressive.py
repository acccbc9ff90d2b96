"""Progressive distillation: each stage halves the number of sampling steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler
from stepdistill.methods.base import Batch, Method, StepContext, Update, check_effect
from stepdistill.networks.roles import Ema, Lora, Role


@dataclass(frozen=True, kw_only=True)
class ProgressiveHalving(Method):
    """Progressive distillation: each stage's student learns two steps of its teacher in one, then becomes the next
    teacher.

    One LoRA is carried on through all stages; a stage's teacher is a frozen copy of it as the stage began. With
    `lora.init_from` it starts as that student, such as a `GuidedLora`; without, as the base without guidance.

    Equation:
        x_v = two DDIM steps of the stage's teacher from x_t; x0* = the x0 with which one DDIM step lands there
        loss = E max(1, alpha_t^2 / sigma_t^2) |student(x_t, t).x0 - x0*|^2

    References:
        Progressive distillation for fast sampling of diffusion models, Salimans & Ho 2022,
        https://arxiv.org/abs/2202.00512, algorithm 2, and for guided models Meng et al. 2023,
        https://arxiv.org/abs/2210.03142, stage 2. Weight: the truncated signal-to-noise ratio, max(1, alpha^2/sigma^2).

    Args:
        steps: sampling steps of each stage's student, each half of the one before; the first teacher takes twice the
            first number.
        stage_steps: training steps of each stage; the last stage runs to the end.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    steps: tuple[int, ...] = (20, 10, 5)
    stage_steps: int = 1000

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or any(n != 2 * half for n, half in pairwise(self.steps)):
            raise ValueError(
                f"steps are {list(self.steps)}: expected each to be half of the one before, such as [20, 10, 5]"
            )
        if self.stage_steps < 1:
            raise ValueError(f"stage_steps is {self.stage_steps}: expected at least 1")
        check_effect(self, "stage_steps", len(self.steps) > 1, "several stages")

    def roles(self) -> dict[str, Role]:
        kept = {f"teacher_{k}": Ema("student", 0.0, until=k * self.stage_steps) for k in range(len(self.steps))}
        return {"student": Lora(), **kept}

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.grid(2 * self.steps[0])  # its divisors, the grids of the later stages, are grids as well

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(schedule.starts(steps or self.steps[-1]))

    def stage(self, step: int) -> int:
        """The stage (from 0) of `step` (from 0)."""
        return min(step // self.stage_steps, len(self.steps) - 1)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        k, schedule = self.stage(step), context.student_schedule  # whose grid the student is sampled on
        n = self.steps[k]
        grid = schedule.grid(2 * n).to(context.device)
        j = 2 * (context.draw(batch, "t") * n).long() + 2
        t, middle, end = grid[j], grid[j - 1], grid[j - 2]
        x_t = schedule.add_noise(batch.x0, context.noise(batch, "eps"), t)
        with torch.no_grad():
            target = two_steps(context.denoiser(f"teacher_{k}"), schedule, x_t, t, middle, end, batch.cond, j == 2)
        alpha_t, sigma_t = (expand(level, x_t) for level in schedule(t))
        weight = (alpha_t / sigma_t).square().clamp(min=1)
        x0 = context.denoiser("student")(x_t, t, batch.cond).x0
        loss = (weight * (x0 - target).square()).mean()
        yield Update("student", loss)


def two_steps(
    teacher: Denoise,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
    cond: Condition,
    last: Tensor,
) -> Tensor:
    """The x0 with which one DDIM step from t to `end` lands where the teacher's two land, over `middle`.

    Where `last` (B,) holds, the way ends at clean data, as the sampler's does.
    """
    x_middle = schedule.add_noise(*teacher(x_t, t, cond), middle)
    est = teacher(x_middle, middle, cond)
    alpha_t, sigma_t = (expand(level, x_t) for level in schedule(t))
    alpha_end, sigma_end = schedule(end)
    alpha_end = expand(torch.where(last, 1.0, alpha_end), x_t)
    sigma_end = expand(torch.where(last, 0.0, sigma_end), x_t)
    ratio = sigma_end / sigma_t
    return (alpha_end * est.x0 + sigma_end * est.eps - ratio * x_t) / (alpha_end - ratio * alpha_t)
