"""Image preprocessing: decode, orient, flatten, resize, crop, flip; and aspect-ratio buckets."""

from __future__ import annotations

import random
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import log
from multiprocessing.pool import ThreadPool
from typing import IO, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from stepdistill.config.kinds import Count
from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import upright
from stepdistill.data.base import BadSample, Sample, Source

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
LARGEST = 2**22  # pixels of a resized image that is made to be cropped
ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap the sides


def header_size(file: IO[bytes]) -> tuple[int, int] | None:
    """(H, W) of an encoded image, upright, from its header alone; None where it does not read."""
    try:
        with Image.open(file) as image:
            # a PNG may keep its EXIF behind the pixels, and reading it would decode them; TIFF's is applied already
            turned = image.format not in ("PNG", "TIFF") and image.getexif().get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # as many kinds as there are decoders
        return None


def window(
    image: Image.Image, size: tuple[int, int], down: float, across: float, interpolation: Interpolation
) -> Image.Image:
    """The (H, W) window of the image resized, keeping the aspect, to the smallest that holds it; it lies at shares
    `down` and `across`, in [0, 1), of the offsets that there are."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    whole = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = int(across * (whole[0] - width + 1)), int(down * (whole[1] - height + 1))
    part = (left, top, left + width, top + height)
    return resized_part(image, whole, part, Image.Resampling[interpolation.upper()])


def resized_part(
    image: Image.Image, whole: tuple[int, int], part: tuple[int, int, int, int], resampling: Image.Resampling
) -> Image.Image:
    """`image.resize(whole, resampling).crop(part)`. Where the whole is large, as of a strip, the part alone is made,
    and may differ in what PIL rounds between its two passes."""
    if whole == image.size:
        return image.crop(part)
    if whole[0] * whole[1] <= LARGEST:
        return image.resize(whole, resampling).crop(part)
    x, y = image.width / whole[0], image.height / whole[1]
    left, top, right, bottom = part
    box = left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)
    return image.resize((right - left, bottom - top), resampling, box)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def bucket_shapes(resolution: int, step: int) -> list[tuple[int, int]]:
    """(H, W) of every bucket: multiples of `step`, area at most `resolution**2`, aspect at most 4.

    Raises:
        DataError: `step` does not divide `resolution`.
    """
    if resolution % step:
        got = f"resolution {resolution} and bucket_step {step}"
        why = "the square is one of the buckets"
        raise DataError(problem(got, "a step that divides the resolution", why, "change data.bucket_step"))
    wide = [(resolution**2 // width // step * step, width) for width in range(resolution, 2 * resolution + 1, step)]
    # at equal height the wider one uses more of the area
    widest = {height: (height, width) for height, width in wide if height}
    return sorted({*widest.values(), *((width, height) for height, width in widest.values())})


def listed_shapes(resolution: int | tuple[int, int] | tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """(H, W) of the buckets that a resolution names: a square's side, height and width, or a list of such pairs.

    Raises:
        DataError: the list is empty, or two of its sizes have one aspect ratio, of which every image would take one.
    """
    if isinstance(resolution, int):
        return [(resolution, resolution)]
    pairs: Any = resolution if not resolution or isinstance(resolution[0], tuple) else (resolution,)
    aspects = [Fraction(height, width) for height, width in pairs]
    if not pairs or len(set(aspects)) < len(aspects):
        got, why = f"data.resolution {[list(pair) for pair in pairs]}", "an image goes to the nearest aspect ratio"
        raise DataError(problem(got, "one or more sizes, each of another ratio", why, "change the list"))
    return list(pairs)


def nearest_shape(shapes: Sequence[tuple[int, int]], size: tuple[int, int]) -> int:
    """Index of the shape (H, W) whose aspect is closest to that of `size`, by ratio."""
    aspect = log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda b: abs(log(shapes[b][0] / shapes[b][1]) - aspect))


class Crop(NamedTuple):
    """A window of an image, as `window` has it, and whether it is flipped."""

    size: tuple[int, int]
    down: float
    across: float
    mirrored: bool
    interpolation: Interpolation

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) float32 in [-1, 1]."""
        part = window(image, self.size, self.down, self.across, self.interpolation)
        return to_tensor(ImageOps.mirror(part) if self.mirrored else part)


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Images with captions, in any storage format.

    An image is rotated by its EXIF orientation, composited over white, resized until its shorter side is `resolution`
    (or until it covers its bucket), cropped and optionally flipped.

    Args:
        resolution: side of the square crop in pixels, or its height and width, or a list of such pairs, the buckets: an
            image is cropped to the one with the nearest aspect ratio. With `aspect_buckets`, the side of a square with
            the same area.
        caption_column: column of the captions, for sources with a table.
        center_crop: crop the centre instead of a random window.
        random_flip: flip half of the samples horizontally.
        interpolation: resampling filter of the resize.
        aspect_buckets: crop to the nearest of several aspect ratios instead of a square; reads every header
            at start.
        bucket_step: multiple of every bucket's sides in pixels; divides `resolution`.
        max_train_samples: number of samples to use, from the first on; none uses all.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "images"})
    resolution: Count | tuple[Count, Count] | tuple[tuple[Count, Count], ...]
    caption_column: str = "text"
    center_crop: bool = False
    random_flip: bool = False
    interpolation: Interpolation = "lanczos"
    aspect_buckets: bool = False
    bucket_step: Annotated[int, Ge(1)] = 64
    max_train_samples: Annotated[int, Ge(1)] | None = None

    @abstractmethod
    def open(self, i: int) -> IO[bytes]:
        """The encoded image of item i, to be closed by the caller."""

    def image(self, i: int) -> Image.Image:
        """Item i upright in RGB, at its own size.

        Raises:
            BadSample: it does not decode.
        """
        with self._guarded(i), self.open(i) as file:
            return upright(file)

    @contextmanager
    def _guarded(self, i: int) -> Iterator[None]:
        """Whatever fails inside is a fault of item i alone, such as an image that is larger than memory."""
        try:
            yield
        except BadSample:
            raise
        except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, EOFError
            raise BadSample(self.name(i), f"{type(error).__name__}: {error}") from error

    def size(self, i: int) -> tuple[int, int] | None:
        """(H, W) from the header alone, upright; None where it does not read."""
        try:
            with self.open(i) as file:
                return header_size(file)
        except (OSError, BadSample):
            return None

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(H, W) of each bucket id."""
        size = self.resolution
        if not self.aspect_buckets:
            return listed_shapes(size)
        if not isinstance(size, int):
            got, why = f"resolution {list(size)} with aspect_buckets", "a bucket has the area of a square"
            raise DataError(problem(got, "one number", why, "set one, or set data.aspect_buckets to false"))
        return bucket_shapes(size, self.bucket_step)

    @cached_property
    def _bucket_of(self) -> Sequence[int]:
        count = len(self)
        if len(self.shapes) == 1:
            return bytes(count)
        with ThreadPool(8) as pool:
            sizes = pool.imap(self.size, range(count), chunksize=64)
            sizes = tqdm(sizes, "reading image sizes", total=count, delay=2)
            buckets = [nearest_shape(self.shapes, size) if size else -1 for size in sizes]
        # an image without a header joins the fullest bucket, where a good one can stand in for it
        counts = Counter(b for b in buckets if b >= 0) or Counter([0])
        fullest = counts.most_common(1)[0][0]
        return array("i", [fullest if b < 0 else b for b in buckets])

    def buckets(self) -> Sequence[int]:
        return self._bucket_of

    def sample(self, i: int, rng: random.Random) -> Sample:
        prompt, crop = self.prompt(i, rng), self.crop(i, rng)
        with self._guarded(i):
            return Sample(prompt=prompt, pixels=crop(self.image(i)), item=i)

    def crop(self, i: int, rng: random.Random) -> Crop:
        """The crop and flip of item i that `rng` draws: three numbers, whatever the options are."""
        # always drawn, so that switching an option off moves no other draw
        down, across, mirrored = rng.random(), rng.random(), rng.random() < 0.5
        if self.center_crop:
            down = across = 0.5
        size = self.shapes[self._bucket_of[i]]
        return Crop(size, down, across, self.random_flip and mirrored, self.interpolation)
