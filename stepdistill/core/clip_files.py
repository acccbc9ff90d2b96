"""Which files of a folder are clips, when their frames are shown, and frames in RGB: training and evaluation alike."""

from __future__ import annotations

import mimetypes
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import IMAGE_SUFFIXES, NO_CLIP, ImageFiles, files_below, flatten, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "mov")
ANIMATION_SUFFIXES = ("gif", "webp", "apng")
CLIP_SUFFIXES = VIDEO_SUFFIXES + ANIMATION_SUFFIXES
FRAME_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in ANIMATION_SUFFIXES)
ALONE, UNREAD = "an image outside a folder of frames", "a format that is not read"
UNSAID = 100  # milliseconds of an animation's frame that gives none, as browsers show it


class ClipFile(ABC):
    """A clip on disk.

    Args:
        path: a video, an animation, or a folder of frames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def times(self) -> np.ndarray | None:
        """(n,) seconds from the first frame at which each frame appears, ascending; None where there are no times."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames that are there."""

    @abstractmethod
    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Frames in upright RGB, by ascending numbers, which may repeat.

        Raises:
            ValueError: a frame does not decode, or decodes with errors. Decoders raise other errors, too.
        """

    @property
    def declared(self) -> float:
        """Seconds that the file's header gives; 0 where it gives none."""
        return 0.0

    @property
    def rate(self) -> float:
        """Mean number of frames a second; 0 where there are no times."""
        last = 0 if self.times is None or not len(self) else self.times[-1]
        return (len(self) - 1) / float(last) if last > 0 else 0.0


class FrameFolder(ClipFile):
    """A folder of images, in the order of the numbers in their names."""

    @property
    def times(self) -> None:
        return None

    @cached_property
    def files(self) -> list[Path]:
        """The images: `frame9.png` before `frame10.png`."""
        return sorted((file for file in self.path.iterdir() if suffix_of(file.name) in FRAME_SUFFIXES), key=_natural)

    def __len__(self) -> int:
        return len(self.files)

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        sizes = set()
        for number in numbers:
            image = upright(self.files[number])
            sizes.add(image.size)
            if len(sizes) > 1:
                raise ValueError(f"frames of several sizes: {sorted(sizes)}")
            yield image


class AnimationFile(ClipFile):
    """A gif, webp or apng file."""

    @cached_property
    def times(self) -> np.ndarray:
        with Image.open(self.path) as image:
            shown = [_seek(image, k).info.get("duration") or UNSAID for k in self._numbers(image)]
        return np.concatenate([[0], np.cumsum(shown[:-1])]) / 1000

    def __len__(self) -> int:
        return len(self.times)

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        with Image.open(self.path) as image:
            every = self._numbers(image)
            for number in numbers:
                yield flatten(_seek(image, every[number]).copy())

    @staticmethod
    def _numbers(image: Image.Image) -> range:
        # the default image of an APNG may be what is shown instead of the animation
        return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))


class VideoFile(ClipFile):
    """A video, read by PyAV.

    Raises:
        DataError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        require_av()

    def _open(self) -> InputContainer:
        import av

        return av.open(str(self.path), metadata_errors="ignore")

    @cached_property
    def _packets(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        """For each frame its time stamp and whether decoding may start there; the stamps' unit in seconds, and the
        seconds that the header gives. Nothing is decoded."""
        with self._open() as container:
            stream = _video(container)
            found = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None and not p.is_discard]
            assert stream.time_base is not None
            unit = float(stream.time_base)
            declared = stream.duration * unit if stream.duration else (container.duration or 0) / 1e6
        stamps, starts = np.array(sorted(found), dtype=np.int64).reshape(-1, 2).T
        return stamps, starts.astype(bool), unit, declared

    @property
    def times(self) -> np.ndarray:
        stamps, _, unit, _ = self._packets
        return (stamps - stamps[:1]) * unit

    def __len__(self) -> int:
        return len(self._packets[0])

    @property
    def declared(self) -> float:
        return self._packets[3]

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        stamps, starts, _, _ = self._packets
        wanted = stamps[list(numbers)].tolist()
        start = max(stamps[starts & (stamps <= wanted[0])], default=stamps[0])
        with self._open() as container:
            stream = _video(container)
            decoded = _decoded_from(int(start), container, stream)
            first = next(decoded, None)
            if first is not None and (first.pts or 0) > wanted[0]:  # the index of the file misleads
                decoded = _decoded_from(int(stamps[0]), container, stream)
            elif first is not None:
                decoded = chain([first], decoded)
            for frame in decoded:
                stamp = frame.pts or 0
                if frame.is_corrupt and stamp >= start:
                    raise ValueError(f"the frame with time stamp {stamp} decodes with errors")
                while wanted and stamp == wanted[0]:
                    yield _shown(frame, stream)
                    del wanted[0]
                if not wanted:
                    return
        raise ValueError(f"the frame with time stamp {wanted[0]} does not decode")


def open_clip(path: Path) -> ClipFile:
    """The clip at a path. Its frames are read when they are asked for.

    Raises:
        DataError: it is a video, and PyAV is not installed.
    """
    if path.is_dir():
        return FrameFolder(path)
    return VideoFile(path) if suffix_of(path.name) in VIDEO_SUFFIXES else AnimationFile(path)


def clips_below(folder: Path) -> ImageFiles:
    """The clips below a folder: videos, animations, and each folder in it that holds images and no clip."""
    found = dict(files_below(folder))
    clips = {name for name, reason in found.items() if not reason and suffix_of(name) in CLIP_SUFFIXES}
    stills = {name for name, reason in found.items() if not reason and suffix_of(name) in FRAME_SUFFIXES}
    beside = {_folder_of(name) for name in clips} | {"."}
    frames = {name for name in stills if _folder_of(name) not in beside}
    rest = {name: reason or _why_not(name, name in stills) for name, reason in found.items()}
    left_out = {name: rest[name] for name in sorted(rest) if name not in clips | frames}
    return ImageFiles(sorted(clips | {_folder_of(name) for name in frames}), left_out)


def require_av() -> None:
    """Raise DataError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        got, why = "no package `av`", "it decodes videos; gif, webp and apng files and folders of frames need nothing"
        raise DataError(problem(got, "PyAV", why, "pip install 'stepdistill[video]'")) from None


def suffix_of(name: str) -> str:
    """A file name's ending in lower case, without the dot."""
    return name.lower().rpartition(".")[2]


def _folder_of(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _why_not(name: str, still: bool) -> str:
    kind = mimetypes.guess_type(name)[0] or ""
    return ALONE if still else UNREAD if kind.startswith(("image/", "video/")) else NO_CLIP


def _natural(file: Path) -> str:
    """A name that sorts as people count."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), file.name)


def _seek(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    image.load()  # only then a webp says how long it is shown
    return image


def _video(container: InputContainer) -> VideoStream:
    stream: Any = container.streams.best("video")
    if stream is None:
        raise ValueError("it holds no video")
    return stream


def _decoded_from(stamp: int, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    container.seek(stamp, stream=stream)
    return container.decode(stream)


def _shown(frame: VideoFrame, stream: VideoStream) -> Image.Image:
    """The frame with square pixels, turned as its file says."""
    wide = round(frame.width * (stream.sample_aspect_ratio or 1))
    image = frame.to_image(width=wide, height=frame.height)
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
