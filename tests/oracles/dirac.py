"""A point mass for each prompt: `x0 = cond["mean"]`, whatever `x_t` is.

Trajectories are straight, so the teacher is every method's fixed point and its loss at the start is zero.
Only LCM's target for the first grid step, the still noisy state at time 0, leaves `sigma_0^2` there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand


@dataclass(frozen=True)
class Dirac:
    """The exact denoiser; its eps is undefined (nan) where `sigma_t` is 0."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t.double()))
        x0 = cond["mean"].expand_as(x_t)
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)
