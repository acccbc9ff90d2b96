"""Base of the families that hold an image as the first latent frame of a video."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.denoise import HELD, Condition
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.families.video import Video


@dataclass(frozen=True, kw_only=True)
class HeldImageToVideo(Video, ImageToVideo):
    """A family of image to video whose first latent frame is that of the image at every step.

    The network is told time 0 for its tokens, see `held_times`. The autoencoder is causal: the latents of the image
    alone are the first latent frame of the video.
    """

    @torch.no_grad()
    def first_frames(self, pipe: DiffusionPipeline, frames: Tensor) -> Condition:
        return {HELD: self.encode_frames(pipe, frames)}

    def first_frame_of(self, parts: LazyPipeline, latents: Tensor, images: Tensor | None) -> Condition:
        return {HELD: latents[:, :, :1]}


def held_times(t: Tensor, cond: Condition, frames: int, tokens: int) -> Tensor:
    """The times (B, frames tokens) of each token of a video: 0 in the frames that are held, t (B,) in the others.

    Args:
        frames: latent frames.
        tokens: of a frame.
    """
    times = t[:, None, None].expand(-1, frames, tokens).clone()
    times[:, : cond[HELD].shape[2]] = 0
    return times.flatten(1)
