"""PixArt-alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers import DiffusionPipeline, PixArtAlphaPipeline

from stepdistill.config.kinds import Count
from stepdistill.families.pixart import PixArt


@dataclass(frozen=True, kw_only=True)
class PixArtAlpha(PixArt):
    """PixArt-alpha pipelines.

    Args:
        max_sequence_length: maximum number of tokens of a prompt.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtAlphaPipeline
    takes_size = True  # pyright: ignore[reportAssignmentType]

    max_sequence_length: Count = 120
