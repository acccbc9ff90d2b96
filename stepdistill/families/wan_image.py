"""Wan 2.2 TI2V: image to video, with the image held as the first latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import HELD, Condition, with_held
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.families.parts import Needs
from stepdistill.families.wan_base import CHUNK, WanBase, wan_needs

CONCATENATED = "its network takes the image as further channels, as stepdistill.families.wan_concat gives it"


@dataclass(frozen=True, kw_only=True)
class WanImageToVideo(WanBase, ImageToVideo):
    """Image-to-video pipelines of Wan 2.2 with one network (TI2V-5B). Their folders are those of text to video.

    The first latent frame is that of the image at every step, and the network is told time 0 for its tokens.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanImageToVideoPipeline
    needs: ClassVar[Needs] = replace(wan_needs(("WanPipeline",), expand_timesteps=(True, CONCATENATED)), package="ftfy")

    @torch.no_grad()
    def first_frames(self, pipe: DiffusionPipeline, frames: Tensor) -> Condition:
        return {HELD: self.encode_frames(pipe, frames)}

    def first_frame_of(self, parts: LazyPipeline, latents: Tensor, images: Tensor | None) -> Condition:
        return {HELD: latents[:, :, :1]}

    def overlaps(self, pipe: DiffusionPipeline, frames: int) -> Sequence[int]:
        return range(1, frames, max(CHUNK, pipe.vae_scale_factor_temporal))

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        config: Any = net.config
        _, rows, columns = (side // patch for side, patch in zip(x_t.shape[2:], config["patch_size"], strict=True))
        times = t[:, None, None].expand(-1, x_t.shape[2], rows * columns).clone()
        times[:, : cond[HELD].shape[2]] = 0
        return net(
            with_held(x_t, cond),
            timestep=times.flatten(1),
            encoder_hidden_states=cond["states"],
            return_dict=False,
        )[0]
