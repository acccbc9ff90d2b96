"""LTX-Video: image to video, with the image held as the first latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, LTXImageToVideoPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, with_held
from stepdistill.families.held_image import HeldImageToVideo, held_times
from stepdistill.families.ltx_base import LTXBase, ltx_needs
from stepdistill.families.parts import Needs


@dataclass(frozen=True, kw_only=True)
class LTXImageToVideo(LTXBase, HeldImageToVideo):
    """LTX-Video image-to-video pipelines. Their folders are those of text to video.

    The first latent frame is that of the image at every step, and the network is told time 0 for its tokens. It is the
    mean of the autoencoder's distribution for the image; the pipeline draws from this distribution, unless it is given
    `latents`, which then begin with the image's.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = LTXImageToVideoPipeline
    # the pipeline does not scale the latents of the image, and takes them for the first frame of a video
    needs: ClassVar[Needs] = replace(
        ltx_needs("LTXPipeline", "LTXConditionPipeline"), vae={"scaling_factor": 1.0, "encoder_causal": True}
    )

    def overlaps(self, pipe: DiffusionPipeline, frames: int) -> Sequence[int]:
        return range(1, frames, self.time_factor(pipe))

    def started(self, pipe: DiffusionPipeline, noise: Tensor, images: Tensor) -> Tensor:
        return with_held(noise, self.first_frame(pipe, images))

    def fresh(self, latents: Tensor) -> Tensor:
        # the scheduler steps the frames after the first alone, unpacked
        return torch.cat([latents[:, :, :1], torch.randn_like(latents[:, :, 1:].contiguous())], 2)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        frames, height, width = x_t.shape[2:]
        return self.velocity(net, with_held(x_t, cond), held_times(t, cond, frames, height * width), cond)
