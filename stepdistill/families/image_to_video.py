"""Base of the families that continue an image as a video."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.families.base import Family
from stepdistill.families.lazy_pipeline import LazyPipeline


@dataclass(frozen=True, kw_only=True)
class ImageToVideo(Family):
    """A family whose pipeline takes an image beside the prompt. The image is the first frame of the video.

    In training it is the first frame of a sample: of an image, of a clip, or of latents that are there already. What
    the network sees of it is a part of the condition, and stays in the unconditional call.
    """

    def takes_base_of(self, family: Family) -> bool:
        """Whether the networks of another family's pipeline are all that this one's needs: see `around`."""
        return family.pipeline_class.__name__ in (self.pipeline_class.__name__, *self.needs.relatives)

    def around(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """A pipeline of this family around the networks of another one, see `takes_base_of`: none is copied or cast.

        Diffusers' `from_pipe` would cast them to float32, or to one precision.
        """
        make: Any = self.pipeline_class
        parts, options = make._get_signature_keys(make)
        settings = {name: pipe.config[name] for name in options if name in pipe.config}
        return make(**{name: pipe.components.get(name) for name in parts}, **settings)

    @torch.no_grad()
    def first_frame(self, pipe: DiffusionPipeline, images: Tensor) -> Condition:
        """What the network sees of images (B, 3, H, W) in [-1, 1]."""
        return self.first_frames(pipe, images[:, :, None])

    @abstractmethod
    def first_frames(self, pipe: DiffusionPipeline, frames: Tensor) -> Condition:
        """What the network sees of the first frames (B, 3, o, H, W) of videos, in [-1, 1], o one of `overlaps`."""

    @abstractmethod
    def first_frame_of(self, parts: LazyPipeline, latents: Tensor, images: Tensor | None) -> Condition:
        """What the network sees of the first frame of videos that are there as latents (B, C, F, h, w).

        Args:
            images: (B, 3, H, W), that they were made from; None where these are not known.
        """

    def started(self, pipe: DiffusionPipeline, noise: Tensor, images: Tensor) -> Tensor:
        """The latents (B, C, F, h, w) that the pipeline is given, of noise and images (B, 3, H, W) in [-1, 1]."""
        return noise

    @abstractmethod
    def overlaps(self, pipe: DiffusionPipeline, frames: int) -> Sequence[int]:
        """How many frames, ascending, a window of `frames` frames can begin with."""
