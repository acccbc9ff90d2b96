"""Base of the families that continue an image as a video."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.denoise import HELD, Condition
from stepdistill.families.base import Family


@dataclass(frozen=True, kw_only=True)
class ImageToVideo(Family):
    """A family whose pipeline takes an image beside the prompt. The image is the first frame of the video.

    In training it is the first frame of a sample: of an image, of a clip, or of latents that are there already.
    """

    @abstractmethod
    def chunk(self, pipe: DiffusionPipeline) -> int:
        """Frames that are encoded at once after the first, which is encoded alone."""

    @abstractmethod
    def encode_frames(self, pipe: DiffusionPipeline, video: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) of videos (B, 3, frames, H, W) of one frame and whole chunks."""

    @torch.no_grad()
    def first_frame(self, pipe: DiffusionPipeline, images: Tensor) -> Condition:
        """What the network sees of images (B, 3, H, W) in [-1, 1]."""
        return {HELD: self.encode_frames(pipe, images[:, :, None])}
