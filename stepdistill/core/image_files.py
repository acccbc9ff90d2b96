"""Which files of a folder or an archive are images, which are left out and why, and how one becomes RGB: training and
evaluation alike."""

from __future__ import annotations

import logging
import mimetypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
HIDDEN, OTHER, UNREAD = "hidden", "not an image", "an image format that is not read"
NO_CLIP = "not a clip"
HARMLESS = (HIDDEN, OTHER, NO_CLIP)  # reasons that nobody has to be told of before asking
NAMED = 5  # files of each reason that a report names


class ImageFiles(NamedTuple):
    """The files of a folder or an archive, by their names relative to it.

    Args:
        images: or clips; sorted, so that item numbers are the same on every machine.
        left_out: why each other file is none of them, by name.
    """

    images: list[str]
    left_out: dict[str, str]


def images_below(folder: Path) -> ImageFiles:
    """The images below a folder, linked folders included; a link back to a folder above itself is left out."""
    return _sorted_out(files_below(folder))


def images_among(names: Iterable[str]) -> ImageFiles:
    """The images among the members of an archive, without what file managers hide or add."""
    return _sorted_out((name, HIDDEN if any(map(_is_hidden, name.split("/"))) else "") for name in sorted(names))


def files_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file below a folder by its relative name, and why it cannot be used, else an empty text.

    Links are followed, also those to folders, as `find -L` does.
    """
    return _below(folder, "", ())


def say_left_out(left_out: dict[str, str], place: Path) -> None:
    """Warn of files that one would expect to be used, by reason."""
    lines = [line for reason, line in left_out_lines(left_out).items() if reason not in HARMLESS]
    if lines:
        logger.warning("files in %s are left out: %s", place, "; ".join(lines))


def left_out_lines(left_out: dict[str, str]) -> dict[str, str]:
    """For each reason a line: how many files, and the names of the first."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    first = {reason: [*some[:NAMED], *["..."] * (len(some) > NAMED)] for reason, some in names.items()}
    return {reason: f"{reason}: {len(some)} ({', '.join(first[reason])})" for reason, some in names.items()}


def upright(file: Path | IO[bytes]) -> Image.Image:
    """A file's image as `flatten` makes it, rotated by its EXIF orientation."""
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return flatten(image)


def flatten(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB: transparency over white, 16-bit grey scaled (a convert would clip it)."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    image.load()  # whose file may be closed next
    return image if image.mode == "RGB" else image.convert("RGB")  # a convert would copy it, too


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _below(folder: str | Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, str]]:
    """The files of `folder`, named with `prefix`; `above` are device and inode of the folders that it lies in."""
    try:
        status, entries = os.stat(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield prefix.rstrip("/"), f"unreadable: {error.strerror}"
        return
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield prefix.rstrip("/"), "a link to a folder above it"
        return
    for entry in entries:
        name = prefix + entry.name
        if _is_hidden(entry.name):
            yield name, HIDDEN
        elif (kind := _kind(entry)) == "folder":
            yield from _below(entry.path, f"{name}/", (*above, here))
        else:
            yield name, "" if kind == "file" else "a link to nothing"


def _kind(entry: os.DirEntry[str]) -> str:
    """Of what is there, or what a link leads to; empty where that is neither a folder nor a file."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a link to itself
        return ""


def _sorted_out(files: Iterable[tuple[str, str]]) -> ImageFiles:
    images, left_out = [], {}
    for name, reason in files:
        if reason:
            left_out[name] = reason
        elif name.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
            images.append(name)
        else:
            kind = mimetypes.guess_type(name)[0] or ""
            left_out[name] = UNREAD if kind.startswith("image/") else OTHER
    return ImageFiles(sorted(images), dict(sorted(left_out.items())))
