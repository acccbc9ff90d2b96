"""PixArt-sigma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers import DiffusionPipeline, PixArtSigmaPipeline

from stepdistill.config.kinds import Count
from stepdistill.families.pixart import PixArt


@dataclass(frozen=True, kw_only=True)
class PixArtSigma(PixArt):
    """PixArt-Sigma pipelines.

    Args:
        max_sequence_length: maximum number of tokens of a prompt.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtSigmaPipeline
    takes_size = False  # pyright: ignore[reportAssignmentType]

    max_sequence_length: Count = 300
