"""Guidance at a noise level of its own, apart from that at which the distributions are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.core.denoise import Denoise, without_and_with_prompt
from stepdistill.core.solvers import check_range
from stepdistill.methods.base import Batch, StepContext


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Decoupled DMD: distribution matching without guidance, and guidance at another noise level.

    Equation:
        real = c(x_s) + (w - 1) (c(x_r) - u(x_r)), s of the method's `t_range` and r of this one

    Guidance close to the image is weaker. For Gaussians of one covariance C_t, the student's mean goes beyond the
    prompt's by `(w - 1) (m_c - m_u)` times `E_r[sigma^2 / C] / E_s[sigma^2 / C]`, and the covariance is the same.

    References:
        Decoupled DMD, Liu et al. 2025, https://arxiv.org/abs/2511.22677.

    Args:
        t_range: lowest and highest timestep of guidance.
        below_start: whether r is below the time of the student's step, too, since what that step does not decide needs
            no guidance.
    """

    t_range: tuple[float, float] = (20.0, 980.0)
    below_start: bool = True

    def __post_init__(self) -> None:
        check_range(self.t_range)

    def move(
        self, context: StepContext, batch: Batch, teacher: Denoise, x0: Tensor, scale: float, start: float
    ) -> Tensor:
        """What guidance of `scale` adds to an estimate of x0 (B, C, H, W), for a student's step from `start`."""
        low, high = self.t_range
        top = max(min(high, start), low) if self.below_start else high
        r = context.schedule.random_times(context.draw(batch, "guidance t"), low, top)
        x_r = context.schedule.add_noise(x0, context.noise(batch, "guidance eps"), r)
        with torch.no_grad():
            uncond, cond = without_and_with_prompt(teacher, context.null, x_r, r, batch.cond)
            return context.combine(uncond, cond, scale, x_r, r).x0 - cond.x0
