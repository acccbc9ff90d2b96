"""The index of one tar shard: made once from its headers, so that samples are read by offset."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepdistill.data.images import IMAGE_SUFFIXES
from stepdistill.errors import DataError, problem

logger = logging.getLogger(__name__)
CAPTION_SUFFIXES = ("txt", "caption", "json")
VERSION = 1
Span = tuple[int, int]


@dataclass(frozen=True)
class ShardIndex:
    """Where the n samples of a shard that have a picture lie.

    Args:
        stamp: version, size and date (ns) of the shard that was indexed.
        strays: keys without a picture.
        keys: n sample keys.
        pictures: (n, 2) offset and size in bytes.
        captions: (n, 2), likewise.
        kinds: (n,) number of the caption's suffix in CAPTION_SUFFIXES, -1 where there is no caption.
    """

    stamp: list[int]
    strays: list[str]
    keys: list[str]
    pictures: np.ndarray
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
        logger.warning("cannot write the index of %s to %s: it is made again in every run", shard, places)
    return ShardIndex(
        stamp=stamp,
        strays=content["strays"],
        keys=content["keys"],
        pictures=np.asarray(content["pictures"], dtype=np.int64).reshape(-1, 2),
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
    """Atomic, since several processes may index one shard at once."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            os.replace(name, place)
        except OSError:
            os.unlink(name)
            raise
    except OSError:
        return False
    return True


def _scan(shard: Path, stamp: list[int]) -> dict:
    content: dict[str, list] = {
        "stamp": stamp,
        "strays": [],
        "keys": [],
        "pictures": [],
        "captions": [],
        "kinds": [],
    }
    for key, spans in _samples(shard):
        picture = next((spans[suffix] for suffix in IMAGE_SUFFIXES if suffix in spans), None)
        if picture is None:
            content["strays"].append(key)
            continue
        kind = next((n for n, suffix in enumerate(CAPTION_SUFFIXES) if suffix in spans), -1)
        content["keys"].append(key)
        content["pictures"].append(picture)
        content["captions"].append(spans[CAPTION_SUFFIXES[kind]] if kind >= 0 else (0, 0))
        content["kinds"].append(kind)
    return content


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, Span]]]:
    """Neighbouring members of one key, by suffix: webdataset's rule."""
    key, spans = "", dict[str, Span]()
    for name, span in _members(shard):
        match = re.match(r"((?:.*/|)[^./][^.]*)\.([^/]*)$", name)
        if not match:
            continue
        suffix = match[2].lower()
        if match[1] != key:
            if spans:
                yield key, spans
            key, spans = match[1], {}
        if suffix in spans:
            got = f"{shard} with {name} twice"
            raise DataError(
                problem(got, "each member once", "one of them would be lost", "write the shard again")
            )
        spans[suffix] = span
    if spans:
        yield key, spans


def _members(shard: Path) -> Iterator[tuple[str, Span]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                    yield member.name, (member.offset_data, member.size)
    except tarfile.TarError as error:
        todo = "decompress it, or fetch it again"
        raise DataError(
            problem(f"{shard}: {error}", "an uncompressed tar file", "it is read by offset", todo)
        ) from None
