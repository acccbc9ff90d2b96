"""Wan 2.2 TI2V: image to video, with the image held as the first latent frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, with_held
from stepdistill.families.held_image import HeldImageToVideo, held_times
from stepdistill.families.parts import Needs
from stepdistill.families.wan_base import CHUNK, WanBase, wan_needs

CONCATENATED = "its network takes the image as further channels, as stepdistill.families.wan_concat gives it"


@dataclass(frozen=True, kw_only=True)
class WanImageToVideo(WanBase, HeldImageToVideo):
    """Image-to-video pipelines of Wan 2.2 with one network (TI2V-5B). Their folders are those of text to video.

    The first latent frame is that of the image at every step, and the network is told time 0 for its tokens.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanImageToVideoPipeline
    needs: ClassVar[Needs] = replace(wan_needs(("WanPipeline",), expand_timesteps=(True, CONCATENATED)), package="ftfy")

    def overlaps(self, pipe: DiffusionPipeline, frames: int) -> Sequence[int]:
        return range(1, frames, max(CHUNK, pipe.vae_scale_factor_temporal))

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        config: Any = net.config
        _, rows, columns = (side // patch for side, patch in zip(x_t.shape[2:], config["patch_size"], strict=True))
        return net(
            with_held(x_t, cond),
            timestep=held_times(t, cond, x_t.shape[2], rows * columns),
            encoder_hidden_states=cond["states"],
            return_dict=False,
        )[0]
