"""A folder of clips with captions: videos, animations, and folders of frames."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt
from PIL import Image

from stepdistill.core.clip_files import (
    CLIP_SUFFIXES,
    VIDEO_SUFFIXES,
    ClipFile,
    FrameFolder,
    clips_below,
    open_clip,
    require_av,
    suffix_of,
)
from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import ImageFiles
from stepdistill.data.base import BadSample, Sample
from stepdistill.data.folder import ImageFolder

logger = logging.getLogger(__name__)
UNEVEN = 2  # largest over smallest gap between frames, beyond which a file has no one frame rate


@dataclass(frozen=True, kw_only=True)
class Clips(ImageFolder):
    """The clips below a folder: mp4, mkv, webm and mov files (`pip install 'stepdistill[video]'`), gif, webp and apng
    files, and each folder in it that holds images and no clip, its frames in the order of the numbers in their names.

    A sample is a random part of its clip: `num_frames` frames, `1 / frame_rate` seconds apart, all with one crop. Each
    frame is the last one that has appeared by then, whatever the frame rate of the file and however uneven it is.

    Args:
        train_data_dir: the folder. If it contains `metadata.jsonl` or `metadata.csv`, its rows name the clips
            (`file_name`, relative to the folder; for frames that of their folder) and their captions
            (`caption_column`). Otherwise `walk.txt` is the caption of `walk.mp4`, or of the folder `walk`.
        num_frames: frames of a sample.
        frame_rate: frames a second; none keeps that of each file. Folders of frames have none: all their frames are
            taken one after another.
        random_flip: flip half of the samples horizontally. A caption such as "moving left" is wrong in a flipped clip.
    """

    noun: ClassVar[str] = "clip"
    suffixes: ClassVar[tuple[str, ...]] = CLIP_SUFFIXES
    num_frames: Annotated[int, Ge(1)]
    frame_rate: Annotated[float, Gt(0)] | None = None
    random_flip: bool = False

    def files(self, folder: Path) -> ImageFiles:
        files = clips_below(folder)
        if any(suffix_of(name) in VIDEO_SUFFIXES for name in files.images):
            require_av()
        return files

    def clip(self, i: int) -> ClipFile:
        """Item i, of which nothing is read yet."""
        return open_clip(Path(self.name(i)))

    def image(self, i: int) -> Image.Image:
        """The first frame of item i, at its own size."""
        with self._guarded(i):
            return next(self.clip(i).frames([0]))

    def size(self, i: int) -> tuple[int, int] | None:
        """(H, W) of the first frame; None where it does not read."""
        try:
            image = self.image(i)
        except BadSample:
            return None
        return image.height, image.width

    def length(self, i: int) -> tuple[int, float] | None:
        clip = self.clip(i)
        return len(clip), clip.rate

    def stored(self, i: int) -> list[Path]:
        clip = self.clip(i)
        return [clip.path, *(clip.files if isinstance(clip, FrameFolder) else ())]

    def sample(self, i: int, rng: random.Random) -> Sample:
        # the draws of an image first, then the clip's own
        prompt, crop, share = self.prompt(i, rng), self.crop(i, rng), rng.random()
        with self._guarded(i):
            clip = self.clip(i)
            # cropped one by one: whole frames of a sample may be larger than memory
            frames = [crop(image) for image in clip.frames(self._picked(i, clip, share))]
            return Sample(prompt=prompt, pixels=torch.stack(frames, 1), item=i)

    def check_lengths(self) -> None:
        """Raise DataError where no clip holds `num_frames` frames. Clips are read up to the first that does."""
        first = None
        for i in range(len(self)):
            try:
                with self._guarded(i):
                    self._starts(i, self.clip(i))
            except BadSample as error:
                first = first or error
            else:
                return
        rate = "" if self.frame_rate is None else f" at {self.frame_rate:g} a second"
        got, why = f"{len(self)} clips, none of which can be used, the first {first}", "a sample has so many"
        todo = "use longer clips, lower data.num_frames and family.num_frames, or raise data.frame_rate"
        raise DataError(problem(got, f"clips of {self.num_frames} frames{rate}", why, todo))

    def _starts(self, i: int, clip: ClipFile) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Times of item i's frames, the numbers of those where a sample can begin, seconds between the frames of a
        sample, and what a time may be off by. Raises BadSample where the clip is too short."""
        own = clip.rate or 1.0
        rate, times = (own, np.arange(len(clip))) if clip.times is None else (self.frame_rate or own, clip.times)
        apart = 1 / rate
        slack = min(apart, 1 / own) / 4  # a file may round its times to 1 or even 10 ms
        starts = np.flatnonzero(times + (self.num_frames - 1) * apart <= times[-1:] + slack)
        if not len(starts):
            raise BadSample(self.name(i), self._too_short(clip, times, apart))
        return times, starts, apart, slack

    def _picked(self, i: int, clip: ClipFile, share: float) -> list[int]:
        """The numbers of the frames of a sample of item i that begins at a share, in [0, 1), of the possible starts."""
        times, starts, apart, slack = self._starts(i, clip)
        wanted = times[starts[int(share * len(starts))]] + apart * np.arange(self.num_frames)
        picked = np.searchsorted(times, wanted + slack, side="right") - 1
        self._note(i, times, picked)
        return picked.tolist()

    def _too_short(self, clip: ClipFile, times: np.ndarray, apart: float) -> str:
        if clip.times is None:
            return f"{len(times)} frames, fewer than num_frames {self.num_frames}"
        last, needed = times[-1] if len(times) else 0.0, (self.num_frames - 1) * apart
        got = f"{len(times)} frames, the last at {last:.2f} s; {self.num_frames} at {1 / apart:.4g} a second"
        cut = (
            f"; its header gives {clip.declared:.2f} s: it may be cut short" if clip.declared > 2 * apart + last else ""
        )
        return f"{got} end at {needed:.2f} s{cut}"

    def _note(self, i: int, times: np.ndarray, picked: np.ndarray) -> None:
        """Warn once of each kind of clip whose motion may not be what one expects."""
        gaps = np.diff(times)
        notes = {
            "its frames are unevenly spaced": len(gaps) > 0 and gaps.max() > UNEVEN * gaps.min(),
            "frames repeat, as they are fewer than data.frame_rate a second": len(set(picked)) < len(picked),
        }
        for note in (note for note, holds in notes.items() if holds and note not in self._noted):
            self._noted.add(note)
            logger.warning("%s: %s; frames are taken by time, here and in other such clips", self.name(i), note)

    @cached_property
    def _noted(self) -> set[str]:
        return set()
