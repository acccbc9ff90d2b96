"""Diffusers' own schedulers, in double precision where they allow it: the other side of every comparison."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from torch import Tensor

from oracles.context import Table, spoken
from stepdistill.core.denoise import Denoise
from stepdistill.core.prediction import Kind
from stepdistill.core.schedule import NoiseSchedule, expand

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
END = {"set_alpha_to_one": False}


def double(scheduler):
    """The scheduler with its float32 table read as float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def ddim(kind: Kind = "epsilon") -> DDIMScheduler:
    return double(DDIMScheduler(**BETAS, **END, timestep_spacing="trailing", prediction_type=kind))


def lcm(kind: Kind = "epsilon", timestep_scaling: float = 10.0) -> LCMScheduler:
    return double(LCMScheduler(**BETAS, **END, prediction_type=kind, timestep_scaling=timestep_scaling))


def tcd(kind: Kind = "epsilon") -> TCDScheduler:
    return double(TCDScheduler(**BETAS, **END, prediction_type=kind))


def euler(n: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    """With its n levels set as a pipeline sets them, from `sigmas = linspace(1, 1 / n, n)`."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / n, n).tolist())
    return scheduler


def table() -> Table:
    """The schedule of `ddim()`, `lcm()` and `tcd()`."""
    return Table(ddim().alphas_cumprod)


def loop(scheduler: SchedulerMixin, denoise: Denoise, kind: Kind, schedule: NoiseSchedule, x: Tensor, **step) -> Tensor:
    """A pipeline's sampling loop: a network's output at each of the scheduler's timesteps, then its step."""
    for t in scheduler.timesteps:
        time = t.double().expand(len(x))
        y = spoken(kind, denoise(x, time, {}), *(expand(v, x) for v in schedule(time)))
        x = scheduler.step(y, t, x, **step).prev_sample
    return x
