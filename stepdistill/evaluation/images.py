"""Existing images in a folder, a zip or an array, or clips in a folder, read lazily in a fixed order, as uint8."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import say_left_out
from stepdistill.evaluation.stored_clips import stored_items

logger = logging.getLogger(__name__)
NAMED = 10  # skipped images that the warning names
SKIPPED = 0.01  # largest share of images that may be unreadable


class ReadImages(NamedTuple):
    """Some images.

    Args:
        k: its number, from 0.
        numbers: places in the source's order, from 0; an image that was skipped leaves a gap.
        names: file names relative to the source.
        images: uint8 (B, 3, H, W), or clips (B, F, 3, H, W).
    """

    k: int
    numbers: list[int]
    names: list[str]
    images: Tensor


class Images:
    """The images of a source, sorted by name; memory does not grow with their number.

    Grey becomes RGB, transparency lies over white; EXIF orientation is ignored, as other tools do (but for TIFF, where
    PIL applies it). Raises DataError.

    Args:
        source: a folder, with all below it and the folders linked there, or a `.zip`, of images in the formats that
            training reads, of an animation the first frame; a `.npz` (ADM's and EDM's samples) whose first uint8 array
            (N, H, W, 3) is taken; or such an array as `.npy`.
        eval_res: side in pixels; the middle is cut out and resized to it by PIL's Lanczos filter, as in DMD2's COCO
            protocol.
        clips: whether it is a folder of clips, whose frames are all read.

    Attributes:
        skipped: name and reason of each unreadable image of the last pass; more than 1 % of them is an error.
    """

    def __init__(self, source: Path, eval_res: int | None = None, clips: bool = False) -> None:
        if eval_res is not None and eval_res < 1:
            raise ValueError(f"Images got eval_res={eval_res}, expected 1 or more: it is a side in pixels; use 256")
        self.source, self.eval_res = source, eval_res
        self.skipped: list[tuple[str, str]] = []
        self._stored = stored_items(source, clips)
        self._names = self._stored.names
        say_left_out(self._stored.left_out, source)
        lossy = sum(name.lower().endswith((".jpg", ".jpeg")) for name in self._names)
        if lossy:
            logger.warning("%d of %d images in %s are JPEG: its compression changes FID", lossy, len(self), source)

    def __len__(self) -> int:
        """How many there are, readable or not."""
        return len(self._names)

    def batches(self, size: int = 64, wanted: Container[int] | None = None) -> Iterator[ReadImages]:
        """Batch k has the readable ones of the images k size to (k + 1) size; one warning names what was skipped.

        Args:
            wanted: the k of batches that are read, in order; None is all.

        Raises:
            DataError: too many are unreadable, or two have different sizes after that.
        """
        self.skipped = []
        first, held, end = None, list[tuple[int, str, Tensor]](), len(self) - 1
        images = self._stored.images(lambda number: wanted is None or number // size in wanted)
        for number, (name, image) in enumerate(zip(self._names, images, strict=True)):
            pixels = None if image is None else self._pixels(name, image)
            if pixels is not None:
                first = first or (name, pixels.shape)
                if pixels.shape != first[1]:
                    raise DataError(self._unequal(first[0], first[1], name, pixels.shape))
                held.append((number, name, pixels))
            if number % size == size - 1 or number == end:
                if wanted is None or number // size in wanted:
                    yield _batch(number // size, held)
                held = []
        if self.skipped:
            named = "; ".join(": ".join(pair) for pair in self.skipped[:NAMED])
            named += " ..." if len(self.skipped) > NAMED else ""
            logger.warning("%d of %d images in %s skipped: %s", len(self.skipped), len(self), self.source, named)

    def sha256(self) -> str:
        """Hex digest of names and files, `eval_res` left aside: a folder and a zip of it have the same."""
        return self._stored.sha256()

    def _pixels(self, name: str, image: Image.Image | list[Image.Image] | Exception) -> Tensor | None:
        """(3, H, W), of a clip (F, 3, H, W); None where it was skipped."""
        if not isinstance(image, Exception):
            try:
                if isinstance(image, list):
                    return torch.stack([self._frame(frame) for frame in image])
                return self._frame(image)
            except MemoryError as error:
                image = error
        self.skipped.append((name, f"{type(image).__name__}: {image}"))
        if len(self.skipped) > SKIPPED * len(self):
            got = f"{len(self.skipped)} unreadable of {len(self)} images in {self.source}, such as {name} ({image})"
            why, todo = "the set of images would change", "regenerate or remove these images"
            raise DataError(problem(got, f"at most {SKIPPED:.0%}", why, todo))
        return None

    def _frame(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(fitted(image, self.eval_res))).permute(2, 0, 1).contiguous()

    def _unequal(self, first: str, one: Sequence[int], second: str, other: Sequence[int]) -> str:
        if len(one) == 4 and one[0] != other[0]:
            got = f"{first} with {one[0]} frames and {second} with {other[0]} in {self.source}"
            why = "features of motion are means over a clip; a gif or webp holds equal frames as one"
            return problem(got, "one number of frames", why, "cut all to one length, as mp4 files or folders of frames")
        got = f"{first} with {one[-1]} x {one[-2]} pixels and {second} with {other[-1]} x {other[-2]} in {self.source}"
        todo = "choose an eval_res, such as 256: the middle of each is cut out and resized to it"
        return problem(got, "one size", "the resizing affects the distance", todo)


def fitted(image: Image.Image, side: int | None) -> Image.Image:
    """The middle of an image, a square of its shorter side, resized to `side` by PIL's Lanczos filter; None leaves it
    whole."""
    if side is None:
        return image
    short = min(image.size)
    # round, as the protocol does: half a pixel off is another image
    left, top = (round((length - short) / 2) for length in image.size)
    square = image.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def _batch(k: int, held: list[tuple[int, str, Tensor]]) -> ReadImages:
    images = torch.stack([each[2] for each in held]) if held else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return ReadImages(k, [each[0] for each in held], [each[1] for each in held], images)
