"""Existing images in a folder, a zip or an array, read lazily in a fixed order, as uint8."""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import file_digest
from stepdistill.data.image_files import IMAGE_SUFFIXES, ImageFiles, images_among, images_below, say_left_out
from stepdistill.data.images import flatten

logger = logging.getLogger(__name__)
NAMED = 10  # skipped images that the warning names
SKIPPED = 0.01  # largest share of images that may be unreadable
Wanted = Callable[[int], bool]  # of an image's number


class ReadImages(NamedTuple):
    """Some images.

    Args:
        k: its number, from 0.
        numbers: places in the source's order, from 0; an image that was skipped leaves a gap.
        names: file names relative to the source.
        images: uint8 (B, 3, H, W).
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

    Attributes:
        skipped: name and reason of each unreadable image of the last pass; more than 1 % of them is an error.
    """

    def __init__(self, source: Path, eval_res: int | None = None) -> None:
        if eval_res is not None and eval_res < 1:
            raise ValueError(f"Images got eval_res={eval_res}, expected 1 or more: it is a side in pixels; use 256")
        self.source, self.eval_res = source, eval_res
        self.skipped: list[tuple[str, str]] = []
        self._stored = _stored(source)
        self._names = self._stored.names
        if len(self) < 2:
            got = f"{len(self)} images in {source}"
            todo = f"check the path and the suffixes ({', '.join(IMAGE_SUFFIXES)}), or sample more"
            raise DataError(problem(got, "two or more", "one image has no covariance", todo))
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

    def _pixels(self, name: str, image: Image.Image | Exception) -> Tensor | None:
        """(3, H, W); None where it was skipped."""
        if isinstance(image, Image.Image):
            try:
                return torch.from_numpy(np.array(fitted(image, self.eval_res))).permute(2, 0, 1).contiguous()
            except MemoryError as error:
                image = error
        self.skipped.append((name, f"{type(image).__name__}: {image}"))
        if len(self.skipped) > SKIPPED * len(self):
            got = f"{len(self.skipped)} unreadable of {len(self)} images in {self.source}, such as {name} ({image})"
            why, todo = "the set of images would change", "regenerate or remove these images"
            raise DataError(problem(got, f"at most {SKIPPED:.0%}", why, todo))
        return None

    def _unequal(self, first: str, one: Sequence[int], second: str, other: Sequence[int]) -> str:
        got = f"{first} with {one[2]} x {one[1]} pixels and {second} with {other[2]} x {other[1]} in {self.source}"
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


@dataclass(frozen=True)
class _Files:
    """Encoded images of a folder or a zip.

    `images` yields each in RGB, or the reason why it cannot be decoded, or None where its number is not wanted.
    """

    source: Path
    names: list[str]

    def images(self, wanted: Wanted) -> Iterator[Image.Image | Exception | None]:
        for number, open_it in enumerate(self._opened()):
            if not wanted(number):
                yield None
                continue
            try:
                with open_it() as file, Image.open(file) as image:
                    decoded = flatten(image)
            except Exception as error:  # as many kinds as there are decoders
                decoded = error
            yield decoded

    def sha256(self) -> str:
        whole = hashlib.sha256()
        for name, open_it in zip(self.names, self._opened(), strict=True):
            try:
                with open_it() as file:
                    content = bytes.fromhex(file_digest(file))
            except (OSError, zipfile.BadZipFile, zlib.error):  # one that will be skipped
                content = b"unreadable"
            whole.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
        return whole.hexdigest()

    def _opened(self) -> Iterator[Callable[[], IO[bytes]]]:
        if self.source.is_dir():
            yield from (partial(open, self.source / name, "rb") for name in self.names)
            return
        with zipfile.ZipFile(self.source) as archive:
            yield from (partial(archive.open, name) for name in self.names)


@dataclass(frozen=True)
class _Array:
    """A uint8 array (N, H, W, 3): of a npy file, or a member of an npz, read row by row."""

    source: Path
    member: str | None
    shape: tuple[int, ...]

    @property
    def names(self) -> Sequence[str]:
        return [f"{self.source.name}[{i}]" for i in range(self.shape[0])]

    def images(self, wanted: Wanted) -> Iterator[Image.Image | Exception | None]:
        try:
            with ExitStack() as stack:
                file = stack.enter_context(self._opened(stack))
                _header(file)
                for number in range(self.shape[0]):
                    row = file.read(prod(self.shape[1:]))
                    if len(row) < prod(self.shape[1:]):
                        raise EOFError(f"{self.member or self.source} ends in image {number} of {self.shape[0]}")
                    pixels = np.frombuffer(row, dtype=np.uint8).reshape(self.shape[1:])
                    yield Image.fromarray(pixels) if wanted(number) else None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise _broken(self.source, error) from error

    def sha256(self) -> str:
        return file_digest(self.source)

    def _opened(self, stack: ExitStack) -> IO[bytes]:
        if self.member is None:
            return self.source.open("rb")
        return stack.enter_context(zipfile.ZipFile(self.source)).open(self.member)


def _stored(source: Path) -> _Files | _Array:
    if source.is_dir():
        return _files(source, images_below(source))
    suffix = source.suffix.lower()
    if suffix not in (".zip", ".npz", ".npy") or not source.is_file():
        got = f"{source}{'' if source.exists() else ', which does not exist'}"
        raise DataError(problem(got, "a folder, .zip, .npz or .npy", "images are read from it", "check the path"))
    try:
        if suffix == ".npy":
            with source.open("rb") as file:
                return _Array(source, None, _checked(source, {source.name: _header(file)})[1])
        with zipfile.ZipFile(source) as archive:
            if suffix == ".zip":
                return _files(source, images_among(name for name in archive.namelist() if not name.endswith("/")))
            return _Array(source, *_checked(source, _headers(archive)))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _broken(source, error) from error


def _files(source: Path, files: ImageFiles) -> _Files:
    say_left_out(files.left_out, source)
    return _Files(source, files.images)


_Header = tuple[tuple[int, ...], bool, np.dtype]


def _headers(archive: zipfile.ZipFile) -> dict[str, _Header]:
    headers = {}
    for name in archive.namelist():
        with archive.open(name) as file:
            headers[name] = _header(file)
    return headers


def _header(file: IO[bytes]) -> _Header:
    """Shape, whether it is in Fortran order, and type; the file is left at the data."""
    version = npy.read_magic(file)
    return npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)


def _checked(source: Path, headers: dict[str, _Header]) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the first array that holds images."""
    for name, (shape, fortran, dtype) in headers.items():
        if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape and not fortran:
            return name, shape
    listed = ", ".join(f"{name} {dtype} {shape}" for name, (shape, _, dtype) in headers.items())
    got, expected = f"{source} with {listed or 'no array'}", "a uint8 array (N, H, W, 3) in C order"
    todo = "give statistics (mu, sigma) as the reference instead, or convert the images"
    raise DataError(problem(got, expected, "other ranges and layouts cannot be told apart safely", todo))


def _broken(source: Path, error: Exception) -> DataError:
    why, todo = f"{type(error).__name__}: {error}", "create or download it again"
    return DataError(problem(source, "a complete, readable file", why, todo))


def _batch(k: int, held: list[tuple[int, str, Tensor]]) -> ReadImages:
    images = torch.stack([each[2] for each in held]) if held else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return ReadImages(k, [each[0] for each in held], [each[1] for each in held], images)
