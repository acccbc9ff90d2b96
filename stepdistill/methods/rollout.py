"""The student's own steps in training: to the input of one of them, as sampling makes it from pure noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill.config.kinds import Count
from stepdistill.core.denoise import Denoise
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, check_range, few_step
from stepdistill.methods.base import Batch, StepContext, check_effect


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Numbers of sampling steps, one of which is drawn for each training step: one student for all of them.

    With deterministic steps, one map of (x_t, t) is right for all starts and all numbers of steps, so that they do not
    compete: for Gaussian data `x0 = m + s (x_t - alpha_t m) / (alpha_t s + sigma_t)`.

    References:
        Continuous-time distribution matching, Liu et al. 2026, https://arxiv.org/abs/2605.06376, section 3.2, for
        random starts.

    Args:
        steps: the numbers of steps, each as likely; one that is given twice is drawn twice as often.
        spacing: "even" starts the steps where sampling in that number does; "random" starts the first step there, and
            the others at one random time in each of equally many parts of `t_range`.
        t_range: lowest and highest timestep of random starts. They are spread as the solver's grid is.
    """

    steps: tuple[Count, ...] = (1, 2, 4)
    spacing: Literal["even", "random"] = "random"
    t_range: tuple[float, float] = (20.0, 980.0)

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("lengths.steps is empty: expected numbers of sampling steps, such as [1, 2, 4]")
        check_range(self.t_range)
        check_effect(self, "t_range", self.spacing == "random", "spacing 'random'")

    def drawn(self, context: StepContext, sampler_in: Callable[[int | None], Sampler]) -> Sampler:
        """The sampler of a training step, the same for all samples and processes.

        Args:
            sampler_in: the student's sampler in a number of steps, or in that of its contract.
        """
        n = self.steps[int(context.shared("length") * len(self.steps))]
        if self.spacing == "even":
            return sampler_in(n)
        sampler = sampler_in(None)
        first, (low, high) = sampler.timesteps[0], self.t_range
        shares = [(i + context.shared(f"start {i}")) / (n - 1) for i in range(n - 1)]
        parts = torch.tensor(shares, dtype=torch.float64)
        times = context.student_schedule.random_times(parts, low, min(high, first - 1))
        return replace(sampler, timesteps=(first, *times.flip(0).tolist()))


class Reached(NamedTuple):
    """The input of one of the student's steps.

    Args:
        x_t: (B, C, H, W).
        t: (B,).
        taken: how many steps were taken before it.
    """

    x_t: Tensor
    t: Tensor
    taken: int


def simulate(context: StepContext, batch: Batch, sampler: Sampler, start: Tensor, first: int = 0) -> Reached:
    """The input of one of the student's steps from `first` on, as sampling reaches it from pure noise (B, C, H, W).

    Backward simulation (DMD2, section 4.4). The step is drawn once for all samples and processes.
    """
    taken = first + int(context.shared("step") * (len(sampler.timesteps) - first))
    return reached(context.denoiser("student"), context, batch, sampler, start, taken)


def reached(
    denoise: Denoise, context: StepContext, batch: Batch, sampler: Sampler, start: Tensor, taken: int
) -> Reached:
    """The input of the step after `taken` ones, which are sampled without a graph from noise `start`."""
    with torch.no_grad():
        x_t = few_step(
            denoise,
            context.schedule,
            sampler,
            start,
            batch.cond,
            lambda i: context.noise(batch, f"again {i}"),
            taken=taken,
        )
    return Reached(x_t, per_sample(sampler.timesteps[taken], x_t), taken)


def default_eta(schedule: NoiseSchedule, eta: float | None) -> float:
    """`eta`, or what stands for none: 0 on a straight path, 1 on a table."""
    return (0.0 if schedule.straight else 1.0) if eta is None else eta
