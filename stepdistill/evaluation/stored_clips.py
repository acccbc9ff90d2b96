"""Clips of an evaluation as they lie in a folder: named without torch, decoded one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stepdistill.core.clip_files import CLIP_SUFFIXES, FrameFolder, clips_below, open_clip
from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import file_digest
from stepdistill.core.image_files import say_left_out
from stepdistill.evaluation.stored_images import StoredArray, StoredFiles, stored_images


@dataclass(frozen=True)
class StoredClips:
    """The clips of a folder.

    `images` yields the frames of each in RGB, or the reason why they cannot be decoded, or None where its number is not
    wanted.
    """

    source: Path
    names: list[str]
    left_out: dict[str, str]

    def images(self, wanted: Callable[[int], bool]) -> Iterator[list[Image.Image] | Exception | None]:
        for number, name in enumerate(self.names):
            yield self._frames(name) if wanted(number) else None

    def sha256(self) -> str:
        whole = hashlib.sha256()
        for name in self.names:
            clip = open_clip(self.source / name)
            for file in clip.files if isinstance(clip, FrameFolder) else [clip.path]:
                relative = str(file.relative_to(self.source))
                whole.update(relative.encode("utf-8", "surrogateescape") + b"\0" + bytes.fromhex(file_digest(file)))
        return whole.hexdigest()

    def _frames(self, name: str) -> list[Image.Image] | Exception:
        try:
            clip = open_clip(self.source / name)
            return list(clip.frames(range(len(clip))))
        except Exception as error:  # as many kinds as there are decoders
            return error


def stored_items(source: Path, clips: bool) -> StoredFiles | StoredArray | StoredClips:
    """The images of a source, see `stored_images`, or its clips."""
    return stored_clips(source) if clips else stored_images(source)


def stored_clips(source: Path) -> StoredClips:
    """The clips of a folder by name; none is decoded yet.

    Raises DataError where it is no folder, or holds fewer than two clips.
    """
    if not source.is_dir():
        got = f"{source}{'' if source.exists() else ', which does not exist'}"
        raise DataError(problem(got, "a folder", "clips are read from it", "check the path"))
    stored = StoredClips(source, *clips_below(source))
    if len(stored.names) < 2:
        say_left_out(stored.left_out, source)
        todo = f"check the path and the suffixes ({', '.join(CLIP_SUFFIXES)}; or folders of frames), or sample more"
        raise DataError(problem(f"{len(stored.names)} clips in {source}", "two or more", "one has no covariance", todo))
    return stored
