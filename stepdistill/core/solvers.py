"""Samplers: the few steps of a student, the deterministic solver of a teacher, and straight lines between the two ends.

In flow coordinates, `x / (alpha + sigma)` over `sigma / (alpha + sigma)`, the states with one constant (x0, eps) lie on
a straight line, the DDIM step is the Euler step, and the velocity is `eps - x0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, added_std, expand, per_sample


@dataclass(frozen=True)
class Sampler:
    """How a student is sampled: the mathematical part of its sampling contract.

    A step from t to the next time s goes deterministically to `s' = floor((1 - eta) s)` and from there back up to s
    with fresh noise (strategic stochastic sampling: Zheng et al. 2024, https://arxiv.org/abs/2402.19159, algorithm 4).
    Hence eta 0 is DDIM or Euler, and eta 1 with a clean end is multi-step consistency sampling.

    Args:
        timesteps: descending, the noise levels that the student was trained to start a step from.
        eta: share of each step that is noised again, in [0, 1].
        clean: whether sampling ends at clean data; else at time 0 of the schedule, which is still noisy in a VP table.
        guidance_scale: of classifier-free guidance of the student; 1 is none.
        first_noise: deterministic steps renoise x0 with the initial noise instead of the predicted noise (rf++: Lee et
            al. 2024, https://arxiv.org/abs/2405.20320, section 4.4). The same on straight paths; on curved ones it does
            not tend to the ODE.
        adapter_scale: the default scale of guidance adapters; None where there are none.
        adapter_range: the scales that they were trained for, lowest and highest.
        ancestral: whether the deterministic part of a step ends at the noise `sigma_s^2 / sigma_t`, with sigma as a
            multiple of the signal: the ancestral sampling of SDXL-Turbo. It has eta 1 and ends at clean data.
    """

    timesteps: tuple[Annotated[float, Ge(0)], ...]
    eta: Annotated[float, Ge(0), Le(1)] = 0.0
    clean: bool = True
    guidance_scale: Annotated[float, Ge(0)] = 1.0
    first_noise: bool = False
    adapter_scale: Annotated[float, Gt(0)] | None = None
    adapter_range: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = None
    ancestral: bool = False

    def __post_init__(self) -> None:
        if self.ancestral and (self.eta != 1 or not self.clean):
            raise ValueError(f"ancestral with eta {self.eta} and clean {self.clean}: expected eta 1 and clean true")


class Transition(NamedTuple):
    """The normal distribution that a step draws its result from.

    Args:
        mean: (B, C, H, W).
        std: (B,), of each number; None where the step is deterministic, which the last one always is.
    """

    mean: Tensor
    std: Tensor | None


def check_starts(timesteps: Sequence[float] | None) -> None:
    """Raise ValueError for starts of steps that do not descend."""
    if timesteps is not None and (not timesteps or list(timesteps) != sorted(set(timesteps), reverse=True)):
        raise ValueError(f"timesteps are {list(timesteps)}: expected descending timesteps, such as [999, 499]")


def check_range(t_range: tuple[float, float]) -> None:
    """Raise ValueError for a `t_range` that does not ascend."""
    low, high = t_range
    if not 0 <= low < high:
        raise ValueError(f"t_range is {list(t_range)}: expected two ascending timesteps, such as [20, 980]")


def student_starts(
    schedule: NoiseSchedule, timesteps: Sequence[float] | None, trained: int, steps: int | None
) -> tuple[float, ...]:
    """Where the steps of a student start.

    Args:
        timesteps: the starts that it is trained for; None are those of the teacher's solver in `trained` steps.
        steps: how many are wanted; None is as many as it is trained for. Others than these are spaced evenly.
    """
    if timesteps is None:
        return schedule.starts(steps or trained)
    return tuple(timesteps) if steps in (None, len(timesteps)) else schedule.even_starts(timesteps[0], steps)


def teacher_sampler(schedule: NoiseSchedule, steps: int) -> Sampler:
    """The steps of the teacher's deterministic solver, to its end."""
    return Sampler(schedule.starts(steps), clean=False)


def even_sampler(
    schedule: NoiseSchedule, steps: int, guidance_scale: float = 1.0, first_noise: bool = False
) -> Sampler:
    """Deterministic steps, evenly spaced in the scheduler's time, to the schedule's lowest time."""
    starts = schedule.even_starts(schedule.span[1], steps)
    return Sampler(starts, clean=False, guidance_scale=guidance_scale, first_noise=first_noise)


def each_step(times: Iterable[float | Tensor], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Start and end, (B,) each, of the steps along `times`, for the samples `like` (B, ...)."""
    return pairwise(per_sample(time, like) for time in times)


def few_step(
    denoise: Denoise,
    schedule: NoiseSchedule,
    sampler: Sampler,
    x_t: Tensor,
    cond: Condition,
    noise: Callable[[int], Tensor] | None = None,
    taken: int | None = None,
) -> Tensor:
    """Sample (B, C, H, W) from pure noise `x_t` of that shape; `noise(i)` gives the fresh noise after step i.

    With `taken`, only that many steps are taken, and the input of the next step is returned.
    """
    first = x_t
    alpha, sigma = schedule(torch.tensor(sampler.timesteps[0], device=x_t.device))
    for i, t in enumerate(islice(sampler.timesteps, taken)):
        est = denoise(x_t, per_sample(t, x_t), cond)
        if sampler.first_noise:
            est = Estimate(est.x0, (first - alpha * est.x0) / sigma)
        x_t, std = transition(schedule, sampler, i, est)
        if std is not None:
            x_t = x_t + expand(std, x_t) * (torch.randn_like(x_t) if noise is None else noise(i))
    return x_t


def transition(schedule: NoiseSchedule, sampler: Sampler, i: int, est: Estimate) -> Transition:
    """What step i makes of the estimate at its start t: the input of the next step, at s.

    With the noise ratio `r = sigma / alpha`, a deterministic step leads to a ratio `r_l` below `r_s`, and the forward
    process back up: `mean = alpha_s (x0 + r_l eps)`, `std^2 = sigma_s^2 - (alpha_s r_l)^2`. Here `r_l` is that of the
    time `floor((1 - eta) s)`, 0 of clean data, or in ancestral sampling `r_s^2 / r_t`.
    """
    after, x0 = [*sampler.timesteps, 0.0][i + 1], est.x0
    s = per_sample(after, x0)
    if sampler.eta == 0 or after == 0:
        return Transition(x0 if sampler.clean and after == 0 else schedule.add_noise(x0, est.eps, s), None)
    # a number, in the precision of TCD's scheduler: to look at a tensor is to wait for the device
    low = torch.floor((1 - sampler.eta) * torch.tensor(after)).item()
    alpha_s, sigma_s = schedule(s)
    if sampler.ancestral:
        alpha_t, sigma_t = schedule(per_sample(sampler.timesteps[i], x0))
        ratio = (sigma_s / alpha_s) ** 2 * alpha_t / sigma_t
    elif sampler.clean and low == 0:
        ratio = torch.zeros_like(sigma_s)
    else:
        alpha_l, sigma_l = schedule(per_sample(low, x0))
        ratio = sigma_l / alpha_l
    std = added_std(alpha_s, sigma_s, ratio)
    return Transition(expand(alpha_s, x0) * (x0 + expand(ratio, x0) * est.eps), std)


def relay(base: Denoise, student: Denoise, timesteps: Sequence[float], base_steps: int = 1) -> Denoise:
    """The base for the first `base_steps` of the steps that start at `timesteps`, the student for the rest.

    Diversity distillation: a student settles the image's structure in its first step, and draws less various
    images than its base; a first step of the base, best without guidance, brings the variety back. Each replaces one
    of the student's. Gandikota & Bau 2025, https://arxiv.org/abs/2503.10637. All samples of a batch are at one time.
    """
    if base_steps < 0:
        raise ValueError(f"base_steps is {base_steps}: expected 0 (the student alone) or more")
    hand_over = timesteps[base_steps] if base_steps < len(timesteps) else -1.0

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return (base if t[0] > hand_over else student)(x_t, t, cond)

    return call


def follow(
    denoise: Denoise, schedule: NoiseSchedule, times: Iterable[float | Tensor], x_t: Tensor, cond: Condition
) -> Tensor:
    """The first-order solver (DDIM; Euler for a flow) from x_t (B, ...) along `times`, the last one included.

    Descending times denoise, ascending ones invert. A time is one number, or (B,).
    """
    for t, s in each_step(times, x_t):
        x_t = schedule.add_noise(*denoise(x_t, t, cond), s)
    return x_t


def solve(
    denoise: Denoise, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, s: Tensor, n: int, cond: Condition
) -> Tensor:
    """`follow` in n steps from the times t (B,) to the times s (B,), even in time."""
    return follow(denoise, schedule, [t + (s - t) * (i / n) for i in range(n + 1)], x_t, cond)


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

    States (B, ...), times (B,), t noisier than s. Any number of solver steps with this constant estimate ends in `x_s`;
    it is PeRFlow's `(x_s - lambda x_t) / eta` (https://arxiv.org/abs/2405.07510, section 3.2).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([expand(v, x_t) for v in schedule(time)] for time in (t, s))
    det = alpha_t * sigma_s - alpha_s * sigma_t
    return Estimate((sigma_s * x_t - sigma_t * x_s) / det, (alpha_t * x_s - alpha_s * x_t) / det)


def u_shaped(u: Tensor, a: float = U_SHAPE) -> Tensor:
    """Shares with density `~ e^{a s} + e^{a (1 - s)}` from uniform u, by the inverse of its distribution function.

    `s = 1/2 + asinh((2u - 1) sinh(a / 2)) / a`; rf++, https://arxiv.org/abs/2405.20320, section 4.1.
    """
    return 0.5 + ((2 * u - 1) * math.sinh(a / 2)).asinh() / a
