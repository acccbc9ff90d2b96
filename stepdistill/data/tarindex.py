"""The index of one tar shard, built once from its headers, so that samples are read by offset."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import write_text
from stepdistill.core.image_files import IMAGE_SUFFIXES
from stepdistill.data.images import header_size

logger = logging.getLogger(__name__)
CAPTION_SUFFIXES = ("txt", "caption", "json")
VERSION = 2  # of what is indexed: another one, and IMAGE_SUFFIXES, make new indices


class _Member(NamedTuple):
    """A member: its span is offset and size in bytes, its size height and width from an image's header."""

    key: str
    suffix: str
    span: tuple[int, int]
    size: tuple[int, int] | None


@dataclass(frozen=True)
class ShardIndex:
    """Where the n samples of a shard that have an image lie.

    Args:
        stamp: version, size and date (ns) of the shard that was indexed.
        strays: keys without an image.
        keys: n sample keys.
        images: (n, 2) offset and size in bytes.
        sizes: (n, 2) height and width from the images' headers, 0 where one does not read.
        captions: (n, 2), as images.
        kinds: (n,) number of the caption's suffix in CAPTION_SUFFIXES, -1 where there is no caption.
    """

    stamp: list[int]
    strays: list[str]
    keys: list[str]
    images: np.ndarray
    sizes: np.ndarray
    captions: np.ndarray
    kinds: np.ndarray


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}.tar` and `{a,b}.tar` written out, as a shell would."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if counted:
        first, last = counted.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in expand_braces(head + choice + tail)]


def shard_index(shard: Path) -> ShardIndex:
    """The index of a shard: read where an up-to-date one is kept, else made and kept.

    Raises:
        DataError: not an uncompressed tar file, or cut short, or with two members of one name.
    """
    facts = shard.stat()
    stamp = [VERSION, facts.st_size, facts.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "stepdistill", "index")
    places = [
        shard.with_name(shard.name + ".index.json"),
        cache / f"{hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:32]}.json",
    ]
    kept = next((content for place in places if (content := _read(place, stamp))), None)
    content = kept or _scan(shard, stamp)
    if not kept and not any(_write(place, content) for place in places):
        logger.warning("cannot write the index of %s to %s: every run will build it again", shard, places)
    return ShardIndex(
        stamp=stamp,
        strays=content["strays"],
        keys=content["keys"],
        images=np.asarray(content["images"], dtype=np.int64).reshape(-1, 2),
        sizes=np.asarray(content["sizes"], dtype=np.int32).reshape(-1, 2),
        captions=np.asarray(content["captions"], dtype=np.int64).reshape(-1, 2),
        kinds=np.asarray(content["kinds"], dtype=np.int8),
    )


def _read(place: Path, stamp: list[int]) -> dict | None:
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return content if content["stamp"] == stamp else None


def _write(place: Path, content: dict) -> bool:
    """False where the disk refuses. Several processes may index one shard at once."""
    try:
        write_text(place, json.dumps(content), place.with_name(f"{place.name}.{os.getpid()}.tmp"))
    except OSError:
        return False
    return True


def _scan(shard: Path, stamp: list[int]) -> dict:
    names = ("strays", "keys", "images", "sizes", "captions", "kinds")
    content: dict[str, list] = {"stamp": stamp, **{name: [] for name in names}}
    for key, members in _samples(shard):
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is None:
            content["strays"].append(key)
            continue
        kind = next((n for n, suffix in enumerate(CAPTION_SUFFIXES) if suffix in members), -1)
        content["keys"].append(key)
        content["images"].append(image.span)
        content["sizes"].append(image.size or (0, 0))
        content["captions"].append(members[CAPTION_SUFFIXES[kind]].span if kind >= 0 else (0, 0))
        content["kinds"].append(kind)
    return content


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Neighbouring members of one key, by suffix: webdataset's rule."""
    key, members = "", dict[str, _Member]()
    for member in _members(shard):
        if member.key != key:
            if members:
                yield key, members
            key, members = member.key, {}
        if member.suffix in members:
            got = f"{shard} with {key}.{member.suffix} twice"
            why = "one of them would be lost"
            raise DataError(problem(got, "each member once", why, "write the shard again"))
        members[member.suffix] = member
    if members:
        yield key, members


def _members(shard: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                match = re.match(r"((?:.*/|)[^./][^.]*)\.([^/]*)$", info.name)
                if not match or not info.isreg() or re.match(r"__[^/]*__($|/)", info.name):
                    continue
                suffix = match[2].lower()
                file = tar.extractfile(info) if suffix in IMAGE_SUFFIXES else None
                size = header_size(file) if file else None
                yield _Member(match[1], suffix, (info.offset_data, info.size), size)
    except tarfile.TarError as error:
        got, why = f"{shard}: {error}", "samples are read by their offset in the file"
        todo = "decompress it, or download it again"
        raise DataError(problem(got, "an uncompressed tar file", why, todo)) from None
