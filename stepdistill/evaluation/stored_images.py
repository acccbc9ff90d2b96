"""Images of an evaluation as they lie in a folder, a zip or an array: named without torch, decoded one by one."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import file_digest
from stepdistill.core.image_files import IMAGE_SUFFIXES, flatten, images_among, images_below, say_left_out

Wanted = Callable[[int], bool]  # of an image's number


@dataclass(frozen=True)
class StoredFiles:
    """Encoded images of a folder or a zip.

    `images` yields each in RGB, or the reason why it cannot be decoded, or None where its number is not wanted.
    """

    source: Path
    names: list[str]
    left_out: dict[str, str]

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
class StoredArray:
    """A uint8 array (N, H, W, 3): of a npy file, or a member of an npz, read row by row."""

    source: Path
    member: str | None
    shape: tuple[int, ...]

    @property
    def left_out(self) -> dict[str, str]:
        return {}

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


def stored_images(source: Path) -> StoredFiles | StoredArray:
    """The images of a source, as `stepdistill.evaluation.images.Images` has it, by name; none is decoded yet.

    Raises DataError where the source cannot be read, or holds fewer than two images.
    """
    stored = _stored(source)
    if len(stored.names) < 2:
        say_left_out(stored.left_out, source)
        got = f"{len(stored.names)} images in {source}"
        todo = f"check the path and the suffixes ({', '.join(IMAGE_SUFFIXES)}), or sample more"
        raise DataError(problem(got, "two or more", "one image has no covariance", todo))
    return stored


def _stored(source: Path) -> StoredFiles | StoredArray:
    if source.is_dir():
        return StoredFiles(source, *images_below(source))
    suffix = source.suffix.lower()
    if suffix not in (".zip", ".npz", ".npy") or not source.is_file():
        got = f"{source}{'' if source.exists() else ', which does not exist'}"
        raise DataError(problem(got, "a folder, .zip, .npz or .npy", "images are read from it", "check the path"))
    try:
        if suffix == ".npy":
            with source.open("rb") as file:
                return StoredArray(source, None, _checked(source, {source.name: _header(file)})[1])
        with zipfile.ZipFile(source) as archive:
            if suffix == ".zip":
                files = images_among(name for name in archive.namelist() if not name.endswith("/"))
                return StoredFiles(source, *files)
            return StoredArray(source, *_checked(source, _headers(archive)))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _broken(source, error) from error


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
