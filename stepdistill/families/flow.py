"""What families on a rectified flow share: straight paths, their stock schedulers, an autoencoder with a shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.prediction import Kind
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family
from stepdistill.families.schedulers import FirstNoiseEulerScheduler


@dataclass(frozen=True, kw_only=True)
class Flow(Family):
    """A pipeline whose network predicts the velocity `eps - x0`."""

    def kind(self, pipe: DiffusionPipeline) -> Kind:
        return "flow"

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> tuple[SchedulerMixin, dict[str, Any]]:
        if sampler.eta not in (0, 1):
            raise ConfigError(
                problem(
                    f"eta {sampler.eta} for a flow student",
                    "0 (Euler) or 1 (noise again from clean data)",
                    "Diffusers has no flow scheduler that goes only part of the way back",
                    "set method.eta to 0 or 1",
                )
            )
        # shift 1: explicit sigmas are warped by the shift, and would no longer be the trained ones
        stock = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=sampler.eta == 1)
        scheduler = FirstNoiseEulerScheduler(shift=1.0) if sampler.first_noise else stock
        return scheduler, {
            "sigmas": [t / 1000 for t in sampler.timesteps],
            "num_inference_steps": len(sampler.timesteps),
        }


@torch.no_grad()
def encoded(pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
    """Latents of an autoencoder with a shift and a scale, from pixels (B, 3, H, W) in [-1, 1]."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
    return (latents.float() - config.shift_factor) * config.scaling_factor


def decoded(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The way back, not clamped; differentiable."""
    config = pipe.vae.config
    latents = latents / config.scaling_factor + config.shift_factor
    return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()
