"""Base of the flows in the latents of Qwen-Image's autoencoder, which is one of videos that sees single frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.families.channel_scale import channel_scale
from stepdistill.families.packed import Packed


@dataclass(frozen=True, kw_only=True)
class QwenVae(Packed):
    """A flow pipeline with an `AutoencoderKLQwenImage`. The autoencoder's (B, C, 1, h, w) are (B, C, h, w) here."""

    @torch.no_grad()
    def encode(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        frames = pixels[:, :, None].to(pipe.vae.dtype)
        latents = pipe.vae.encode(frames, return_dict=False)[0].mode().float()
        mean, std = channel_scale(pipe, latents)
        return ((latents - mean) / std)[:, :, 0]

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        mean, std = channel_scale(pipe, latents)
        # divided by the inverse, as the pipelines do, so that images are theirs to the last bit
        frames = (latents[:, :, None] / (1 / std) + mean).to(pipe.vae.dtype)
        # `vae.decode` clamps, and no gradient passes where a pixel is at an end
        return pipe.vae.decoder(pipe.vae.post_quant_conv(frames))[:, :, 0].float()
