"""Clips as pictures: contact sheets with time from left to right, animations, and video files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import OutputError, problem
from stepdistill.core.files import written_whole
from stepdistill.core.outputs import MARK
from stepdistill.families.base import Family
from stepdistill.students.draw.sheet import SheetRow, image_grid, image_sheet, signature

FRAME_RATE = 16  # frames a second where a network is told none, as Wan 2.1's clips are shown
CRF = "10"  # of x264, from 0, lossless, to 51
ANIMATIONS = {".webp": 1, ".gif": 10}  # with the unit in milliseconds of how long a frame is shown


def frame_rate_of(family: Family) -> float:
    """Frames a second at which a family's videos are shown: those that its network is told, if it is told any."""
    return family.arguments().get("frame_rate", FRAME_RATE)


def clip_sheet(
    rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], columns: int = 6, scale: int = 1
) -> Image.Image:
    """For each prompt a row of frames, evenly spaced from the first to the last, for each way to sample.

    Args:
        rows: label and clips (n, F, 3, H, W) uint8.
        captions: the prompt of each of the n clips.
        columns: frames of a row, where a clip has as many.
        scale: factor by which the frames are enlarged.
    """
    frames = rows[0][1].shape[1]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    numbers = [f"frame {f}" for f in shown.tolist()]
    lines = [
        SheetRow(label, clips[k, shown], () if k or j else numbers, "" if j else caption)
        for k, caption in enumerate(captions)
        for j, (label, clips) in enumerate(rows)
    ]
    return image_sheet(lines, scale)


def animated_grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 1) -> list[Image.Image]:
    """The frames of `image_grid` of moving clips. Arguments as those of `clip_sheet`."""
    frames = range(rows[0][1].shape[1])
    return [image_grid([(label, clips[:, f]) for label, clips in rows], captions, scale) for f in frames]


def images_of_clip(clip: Tensor) -> list[Image.Image]:
    """The frames of a clip (F, 3, H, W) uint8."""
    return [image_of(frame) for frame in clip]


def image_of(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) uint8 as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_animation(frames: Sequence[Image.Image], file: Path, frame_rate: float = FRAME_RATE) -> Path:
    """Write frames as `.webp` (lossless), `.gif`, or `.mp4` (H.264, nearly lossless, by PyAV); returns `file`.

    Animations repeat for ever, and hold equal frames in a row as one that is shown longer. The parents of `file` are
    made.

    Raises:
        OutputError: the format is another, or a video whose sides are odd or that nothing here can encode.
    """
    suffix = file.suffix.lower()
    if suffix != ".mp4" and suffix not in ANIMATIONS:
        expected = f"a name that ends in {', '.join([*ANIMATIONS, '.mp4'])}"
        raise OutputError(problem(f"output {file}", expected, "the suffix names the format", "rename it"))
    with written_whole(file) as part:
        if suffix == ".mp4":
            _encode(frames, part, frame_rate)
        else:
            unit = ANIMATIONS[suffix]
            ends = [unit * round(1000 * k / (frame_rate * unit)) for k in range(len(frames) + 1)]
            shown = [after - before for before, after in pairwise(ends)]
            signed = {"exif": signature(), "lossless": True} if suffix == ".webp" else {"comment": MARK}
            frames[0].save(part, suffix[1:], save_all=True, append_images=frames[1:], duration=shown, loop=0, **signed)
    return file


def require_encoder() -> None:
    """Raise OutputError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        why, todo = "it encodes videos", "pip install 'stepdistill[video]', or write .webp files"
        raise OutputError(problem("an .mp4 file without the package `av`", "PyAV", why, todo)) from None


def _encode(frames: Sequence[Image.Image], file: Path, frame_rate: float) -> None:
    require_encoder()
    import av

    width, height = frames[0].size
    if width % 2 or height % 2:
        got, todo = f"frames of {width} x {height} pixels for an .mp4 file", "write .webp files, or resize the frames"
        raise OutputError(problem(got, "even sides", "its colours are stored for pairs of pixels", todo))
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options, container.metadata["comment"] = {"crf": CRF}, MARK.decode()
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
