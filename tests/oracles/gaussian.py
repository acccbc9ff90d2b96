"""Closed forms for data `x0 ~ N(mean, std^2)` per coordinate, on any noise schedule, in float64.

The marginal at t is `N(alpha_t mean, S_t^2)` with `S_t^2 = alpha_t^2 std^2 + sigma_t^2`, so the teacher,
its ODE, its solver and all that least squares distils from it are affine in `x_t - alpha_t mean`; a *gain* is
that factor. The embedding of a prompt is its mean, `cond["mean"]`, so that guidance and the routing of
prompts have closed forms too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand


def levels(schedule: NoiseSchedule, t: float | None) -> tuple[float, float]:
    """`(alpha_t, sigma_t)` in double precision; None is clean data."""
    if t is None:
        return 1.0, 0.0
    alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
    return alpha_t.item(), sigma_t.item()


def marginal_std(schedule: NoiseSchedule, std: float, t: float | None) -> float:
    """`S_t`."""
    alpha_t, sigma_t = levels(schedule, t)
    return math.hypot(alpha_t * std, sigma_t)


@dataclass(frozen=True)
class GaussianTeacher:
    """The exact denoiser."""

    schedule: NoiseSchedule
    std: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t.double()))
        centred = (x_t - alpha_t * cond["mean"]) / ((alpha_t * self.std) ** 2 + sigma_t**2)
        return Estimate(cond["mean"] + alpha_t * self.std**2 * centred, sigma_t * centred)


def ode_map(schedule: NoiseSchedule, mean: float, std: float, x_t: Tensor, t: float, s: float | None) -> Tensor:
    """The probability-flow ODE's exact map from t to s (None: to clean data)."""
    alpha_t, alpha_s = levels(schedule, t)[0], levels(schedule, s)[0]
    gain = marginal_std(schedule, std, s) / marginal_std(schedule, std, t)
    return alpha_s * mean + gain * (x_t - alpha_t * mean)


def ddim_gain(schedule: NoiseSchedule, std: float, times: Sequence[float]) -> float:
    """The gain of the deterministic solver along descending `times`: a product of one factor a step."""
    gain = 1.0
    for t, s in pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
        gain *= (alpha_s * alpha_t * std**2 + sigma_s * sigma_t) / marginal_std(schedule, std, t) ** 2
    return gain


def solver_gain(schedule: NoiseSchedule, std: float, n: int) -> float:
    """The gain of the n-step solver on its own grid: what LCM and PCM converge to."""
    return ddim_gain(schedule, std, schedule.grid(n).flip(0).tolist())


def guided_mean(uncond: float, cond: float, scale: float) -> float:
    """Guidance between two Gaussians of equal std is exactly the denoiser of a third one with this mean."""
    return uncond + scale * (cond - uncond)


def trajectory_slopes(schedule: NoiseSchedule, std: float, n: int, segments: int) -> Tensor:
    """(n + 1,) slopes of the student `x0 = mean + kappa_i (x - alpha_i mean)` that TCD and TSCD converge to.

    The jump of such a student from i to s multiplies by `Gamma_i(s) = r + b kappa_i`, with
    `r = sigma_s / sigma_i` and `b = alpha_s - alpha_i r`. Its target multiplies by `gamma_i Gamma_{i-1}(s)`,
    where gamma_i is the teacher's step and `Gamma_{i-1}(i-1) = 1`. kappa_i is the least-squares slope over s,
    uniform on the grid from the lower edge of i's segment to i - 1.
    """
    alpha, sigma = schedule(schedule.grid(n).double())
    slopes = torch.zeros(n + 1, dtype=torch.float64)
    for i in range(1, n + 1):
        s = torch.arange((i - 1) * segments // n * (n // segments), i)

        def parts(j: int, s: Tensor = s) -> tuple[Tensor, Tensor]:
            r = sigma[s] / sigma[j]
            return r, alpha[s] - alpha[j] * r

        r, b = parts(i - 1)
        onward = torch.where(s == i - 1, 1.0, r + b * slopes[i - 1])
        variance = (alpha[i] * std) ** 2 + sigma[i] ** 2
        step = (alpha[i - 1] * alpha[i] * std**2 + sigma[i - 1] * sigma[i]) / variance
        r, b = parts(i)
        slopes[i] = (b * (step * onward - r)).sum() / b.square().sum()
    return slopes


def trajectory_gain(schedule: NoiseSchedule, std: float, n: int, segments: int) -> float:
    """The gain of that student's deterministic sampling in one jump a segment."""
    alpha, sigma = schedule(schedule.grid(n).double())
    slopes, gain = trajectory_slopes(schedule, std, n, segments), 1.0
    for i in range(n, 0, -(n // segments)):
        s = i - n // segments
        r = (sigma[s] / sigma[i]).item()
        gain *= r + (alpha[s].item() - alpha[i].item() * r) * slopes[i].item()
    return gain
