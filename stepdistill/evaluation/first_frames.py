"""The images that the videos of an evaluation begin with, for families that continue an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.core.files import file_digest
from stepdistill.core.image_files import upright
from stepdistill.core.pixels import to_uint8
from stepdistill.data.images import Crop
from stepdistill.evaluation.metrics.motion import image_distance
from stepdistill.evaluation.records import prompts_digest

KEY = "image"  # of a prompt's record: a file, relative to that of the prompts


@dataclass(frozen=True)
class FirstFrames:
    """One image for each prompt; prompts are taken in turn.

    Args:
        files: in the order of the prompts.
        size: height and width that they are cropped to, around the centre.
    """

    files: tuple[Path, ...]
    size: tuple[int, int]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of videos with these numbers."""
        crop = Crop(self.size, 0.5, 0.5, False, "lanczos")
        return torch.stack([crop(upright(self.files[i % len(self.files)])) for i in numbers]) / 2 + 0.5

    @cached_property
    def digest(self) -> str:
        """Of all files, in their order."""
        return prompts_digest([file_digest(file) for file in self.files])

    def score(self, clips: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        """How far the first new frame of clips (B, F, 3, H, W) uint8 is from the image."""
        return {"image_distance": image_distance(clips, to_uint8(self(numbers))).tolist()}


def first_frame_files(records: Sequence[Mapping[str, object]], prompts: Path | None) -> tuple[Path, ...]:
    """The image of each record. Raises EvaluationError where one has none, or none that reads."""
    files, folder = [], Path() if prompts is None else prompts.parent
    for number, record in enumerate(records, 1):
        name = record.get(KEY)
        todo = f'pass a .jsonl file whose lines have "{KEY}": a file relative to it, beside "prompt"'
        if not isinstance(name, str):
            got, why = (
                f"prompt {number} of {prompts or 'the bundled ones'} without an image",
                "the video begins with it",
            )
            raise EvaluationError(problem(got, f"a record with {KEY!r}", why, todo))
        try:
            with Image.open(folder / name) as image:
                image.verify()
        except (OSError, ValueError, SyntaxError) as error:
            got = f"the image {folder / name} of prompt {number}"
            raise EvaluationError(problem(got, "an image file", f"it cannot be read ({error})", todo)) from error
        files.append(folder / name)
    return tuple(files)
