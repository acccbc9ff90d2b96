"""The scale of latents whose autoencoder has a mean and a standard deviation for each channel."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


def channel_scale(pipe: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the autoencoder's latents, (1, C, 1, 1, 1)."""
    config = pipe.vae.config
    values = (config["latents_mean"], config["latents_std"])
    mean, std = (torch.tensor(value, device=like.device).view(1, -1, 1, 1, 1) for value in values)
    return mean, std
