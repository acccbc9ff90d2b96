"""Wan 2.1: image to video, with the image as further channels of the network's input."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.families.parts import Needs
from stepdistill.families.wan_base import WanBase, wan_needs
from stepdistill.networks.lora.tensors import Lora

logger = logging.getLogger(__name__)
IMAGE = "image"  # the encoded video of the image and zeros, (B, C, F, h, w)
TOKENS = "image_tokens"  # of the image encoder, (B, tokens, width)
TEXT = 512  # tokens of a prompt: the network takes the last so many for the prompt's, and those before for the image's
IMAGE_LAYERS = ("add_k_proj", "add_v_proj")
HELD = "its network holds the image as the first latent frame, as stepdistill.families.wan_image gives it"


@dataclass(frozen=True, kw_only=True)
class WanConcatImageToVideo(WanBase, ImageToVideo):
    """Image-to-video pipelines of Wan 2.1, and others of one network whose input has channels for the image.

    The network sees x_t, a mask that is 1 in the first latent frame, and the encoding of the image with frames of
    zeros after it. Where its config has an `image_dim`, it also attends to the penultimate states of a CLIP of the
    image. All frames are generated: the first one may differ from the image.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanImageToVideoPipeline
    needs: ClassVar[Needs] = replace(wan_needs(expand_timesteps=(False, HELD)), package="ftfy", image_channels=True)
    image_parts: ClassVar[frozenset[str]] = frozenset({"vae", "image_encoder"})

    def check_network(self, config: Mapping[str, Any]) -> None:
        if config["image_dim"] is not None and self.max_sequence_length != TEXT:
            got, todo = f"family.max_sequence_length {self.max_sequence_length}", "leave it out"
            why = "the network takes all tokens but the last 512 for the image's"
            raise ConfigError(problem(got, str(TEXT), why, todo))

    def warn_of_lora(self, source: str, lora: Lora) -> None:
        if not any(name.endswith(IMAGE_LAYERS) for name in lora):
            logger.warning(
                "%s has no layers %s or %s, which attend to the image: it was trained for text to video, and "
                "leaves them as they are",
                source,
                *IMAGE_LAYERS,
            )

    @torch.no_grad()
    def first_frames(self, pipe: DiffusionPipeline, frames: Tensor) -> Condition:
        video = torch.cat([frames, frames.new_zeros(*frames.shape[:2], self.num_frames - 1, *frames.shape[3:])], 2)
        cond = {IMAGE: self.encode_frames(pipe, video)}
        if pipe.transformer.config["image_dim"] is None:
            return cond
        pixels = to_uint8((frames[:, :, 0] / 2 + 0.5).cpu())  # what the pipeline has of an image file
        given = pipe.image_processor(images=pixels, return_tensors="pt").to(pipe.image_encoder.device)
        return {**cond, TOKENS: pipe.image_encoder(**given, output_hidden_states=True).hidden_states[-2].float()}

    @torch.no_grad()
    def first_frame_of(self, parts: LazyPipeline, latents: Tensor, images: Tensor | None) -> Condition:
        pipe = parts.vae("the images that videos begin with are encoded")
        if images is None:  # the autoencoder is causal: the first latent frame is the first frame
            images = self.decode(pipe, latents[:, :, :1])[:, :, 0].clamp(-1, 1)
        return self.first_frame(pipe, images)

    def overlaps(self, pipe: DiffusionPipeline, frames: int) -> Sequence[int]:
        return (1,)

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        image, config = cond[IMAGE].to(x_t.dtype), cast("Any", net.config)
        mask = x_t.new_zeros(len(x_t), config["in_channels"] - 2 * x_t.shape[1], *x_t.shape[2:])
        mask[:, :, 0] = 1
        return net(
            torch.cat([x_t, mask, image], 1),
            timestep=t,
            encoder_hidden_states=cond["states"],
            encoder_hidden_states_image=cond.get(TOKENS),
            return_dict=False,
        )[0]
