"""Straight lines between noise and data, on any schedule.

In flow coordinates, `x / (alpha + sigma)` over `sigma / (alpha + sigma)`, the states with one constant (x0, eps) lie on
a straight line, the DDIM step is the Euler step, and the velocity is `eps - x0`.
"""

from __future__ import annotations

import math

from torch import Tensor

from stepdistill.denoiser import Condition, Denoise
from stepdistill.prediction import Estimate
from stepdistill.sampling import Sampler
from stepdistill.schedule import NoiseSchedule, expand

U_SHAPE = 4.0  # a of `p(s) ~ e^{as} + e^{a (1 - s)}`


def share_of_noise(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`sigma / (alpha + sigma)` (B,): the time of flow coordinates, in which 1 is noise."""
    alpha_t, sigma_t = schedule(t)
    return sigma_t / (alpha_t + sigma_t)


def time_of_share(schedule: NoiseSchedule, share: Tensor) -> Tensor:
    """The inverse of `share_of_noise`; between a table's entries where the share is."""
    return schedule.time(((1 - share) / share).log())


def chord(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Estimate:
    """The (x0, eps) of the straight line through `x_t` at t and `x_s` at s: at both `x = alpha x0 + sigma eps`.

    States (B, ...), times (B,), t noisier than s. Solver steps of any number that are told this constant end in `x_s`;
    it is PeRFlow's `(x_s - lambda x_t) / eta` (https://arxiv.org/abs/2405.07510, section 3.2).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([expand(v, x_t) for v in schedule(time)] for time in (t, s))
    det = alpha_t * sigma_s - alpha_s * sigma_t
    return Estimate((sigma_s * x_t - sigma_t * x_s) / det, (alpha_t * x_s - alpha_s * x_t) / det)


def solve(
    denoise: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, n: int, cond: Condition
) -> Tensor:
    """n first-order solver steps (DDIM; Euler for a flow) from x (B, ...) at t (B,) to s (B,), even in time."""
    for i in range(n):
        now, then = (t + (s - t) * (j / n) for j in (i, i + 1))
        x = schedule.add_noise(*denoise(x, now, cond), then)
    return x


def u_shaped(u: Tensor, a: float = U_SHAPE) -> Tensor:
    """Shares with density `~ e^{a s} + e^{a (1 - s)}` from uniform u, by the inverse of its distribution function.

    `s = 1/2 + asinh((2u - 1) sinh(a / 2)) / a`; rf++, https://arxiv.org/abs/2405.20320, section 4.1.
    """
    return 0.5 + ((2 * u - 1) * math.sinh(a / 2)).asinh() / a


def evenly(schedule: NoiseSchedule, steps: int, guidance_scale: float = 1.0, first_noise: bool = False) -> Sampler:
    """Deterministic steps, evenly spaced in the scheduler's time, to the schedule's lowest time."""
    times = schedule.even(schedule.span[1], steps)
    return Sampler(times, clean=False, guidance_scale=guidance_scale, first_noise=first_noise)
