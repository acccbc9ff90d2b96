"""Base of the flows whose network takes 2 x 2 latents of all channels as one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.families.flow import Flow
from stepdistill.families.sizes import check_size


@dataclass(frozen=True, kw_only=True)
class Packed(Flow):
    """A flow pipeline whose argument `latents` is tokens, and whose network is told the time in [0, 1]."""

    def native_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        side = 128 * pipe.vae_scale_factor  # what the pipeline itself takes; no config says it
        return side, side

    def latent_shape(self, pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        check_size(height, width, 2 * scale, 10**9)
        return (pipe.transformer.config["in_channels"] // 4, height // scale, width // scale)

    def pack(self, latents: Tensor) -> Tensor:
        """Tokens (B, H / 2 x W / 2, 4 C)."""
        batch, channels, height, width = latents.shape
        places = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return places.reshape(batch, height * width // 4, 4 * channels)

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        batch, _, channels = packed.shape
        places = packed.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return places.reshape(batch, channels // 4, height, width)

    def places(self, x_t: Tensor) -> Tensor:
        """Coordinates (H / 2 x W / 2, 3) of the tokens of latents (B, C, H, W): 0, row and column."""
        sides = (torch.arange(side // 2, device=x_t.device) for side in x_t.shape[-2:])
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)

    def time(self, net: nn.Module, given: float) -> float:
        return 1000 * given
