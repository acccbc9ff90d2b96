"""Base of the families of videos: flow transformers over frames, rows and columns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.config.kinds import Count, Tokens
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.solvers import teacher_sampler
from stepdistill.families.base import Stock
from stepdistill.families.flow import Flow
from stepdistill.families.sizes import check_frames, check_size

HEAD_SIDE = 4  # tokens a side that a discriminator's head judges at once; the networks' configs have no native size


@dataclass(frozen=True, kw_only=True)
class Video(Flow):
    """A pipeline of videos, and with one frame of images. Its latents are (B, C, F, h, w).

    Args:
        num_frames: frames of a video.
        sample_size: height and width in pixels that the network was trained at, which its config does not say.
        max_sequence_length: number of tokens of a prompt, the padding included.
    """

    seeds_steps: ClassVar[bool] = False

    num_frames: Count
    sample_size: tuple[Count, Count]
    max_sequence_length: Tokens

    @abstractmethod
    def unit(self, pipe: DiffusionPipeline) -> int:
        """Sides of videos, in pixels, are multiples of it."""

    @abstractmethod
    def time_factor(self, pipe: DiffusionPipeline) -> int:
        """Frames of a latent frame after the first, which stands for one frame."""

    @abstractmethod
    def encode_frames(self, pipe: DiffusionPipeline, video: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) of videos (B, 3, frames, H, W) of one frame and whole chunks."""

    def native_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        return self.sample_size

    def latent_shape(self, pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, ...]:
        """(C, F, h, w) of a video's latents. Raises ConfigError for sizes and numbers of frames that do not fit."""
        space, time = self.scale_factor(pipe), self.time_factor(pipe)
        check_size(height, width, self.unit(pipe), 10**9)
        check_frames(self.num_frames, time)
        channels = pipe.transformer.config["out_channels"]
        return (channels, (self.num_frames - 1) // time + 1, height // space, width // space)

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def solver(self, pipe: DiffusionPipeline, steps: int, tokens: int | None = None) -> Stock:
        return self.scheduler(pipe, teacher_sampler(self.schedule(pipe.scheduler), steps))

    @torch.no_grad()
    def encode(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) from pixels (B, 3, num_frames, H, W) in [-1, 1], or from images (B, 3, H, W)."""
        video = pixels if pixels.ndim == 5 else pixels[:, :, None]
        if video.shape[2] != self.num_frames:
            got, expected = f"samples of {video.shape[2]} frames", f"{self.num_frames}, as family.num_frames says"
            todo = "set family.num_frames to the number of the data's frames, or choose other data"
            raise ConfigError(problem(got, expected, "the student is trained for one number of frames", todo))
        return self.encode_frames(pipe, video)


def check_chunks(frames: int, chunk: int, encoder: str) -> None:
    """Raise ConfigError for a number of frames that an encoder does not take as one and whole chunks."""
    if frames % chunk != 1:
        got, why = f"{frames} frames to encode", f"{encoder}'s encoder takes one, and then {chunk} at a time"
        raise ConfigError(problem(got, f"a multiple of {chunk}, and one", why, "choose another number"))
