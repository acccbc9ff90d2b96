"""How straight a sampler's paths are, and how far they carry: what reflow lowers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import each_step, share_of_noise, time_of_share


class Paths(NamedTuple):
    """Paths from noise to data, each value a mean over latent dimensions and samples.

    Args:
        share: (N,) share of noise in the middle of each step, from 1 down.
        deviation: (N,) `|v_i - u|^2`, of each step's velocity v_i from the whole way's mean u.
        cost: `|u|^2`, the transport cost `E |z - x0|^2`.
    """

    share: Tensor
    deviation: Tensor
    cost: float

    @property
    def straightness(self) -> float:
        """`S = E |v - u|^2` over the path; 0 is straight (Liu et al. 2022, https://arxiv.org/abs/2209.03003, eq. 7)."""
        return self.deviation.mean().item()

    @property
    def relative(self) -> float:
        """S over the transport cost; nan where nothing is transported."""
        return self.straightness / self.cost if self.cost else math.nan


@torch.no_grad()
def paths(denoise: Denoise, schedule: NoiseSchedule, x_t: Tensor, cond: Condition, steps: int = 32) -> Paths:
    """Follow the first-order solver from pure noise `x_t` (B, ...) in `steps` steps, even in the share of noise.

    S of a curved path is estimated too low, the more so the fewer the steps: compare at equal numbers only. The
    transport cost falls with reflow only where the teacher was not guided.
    """
    bottom, top = (share_of_noise(schedule, torch.tensor(time, dtype=torch.float64)) for time in schedule.span)
    shares = top + (bottom - top) * torch.arange(steps + 1, dtype=torch.float64) / steps
    times = [schedule.span[1], *time_of_share(schedule, shares[1:-1]).tolist(), schedule.span[0]]
    levels = [sum(schedule(torch.tensor(time, dtype=torch.float64))) for time in times]
    states = [x_t / levels[0]]
    for (t, s), level in zip(each_step(x_t.new_tensor(times), x_t), levels[1:], strict=True):
        x_t = schedule.add_noise(*denoise(x_t, t, cond), s)
        states.append(x_t / level)
    path = torch.stack(states).double()
    speed = path.diff(dim=0) / expand(shares.diff().to(path.device), path[1:])
    mean = (path[-1] - path[0]) / (bottom - top).to(path.device)
    deviation = (speed - mean).square().flatten(1).mean(1)
    return Paths((shares[:-1] + shares[1:]) / 2, deviation.cpu(), mean.square().mean().item())
