"""Clips made in code, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9"}


def grey(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames (H, W, 3) of one level each, which `level` reads back."""
    return [np.full((height, width, 3), 10 + 5 * k, np.uint8) for k in range(count)]


def level(pixels) -> list[int]:
    """The numbers of frames of `grey`, from pixels (3, F, H, W) in [-1, 1] or from images."""
    means = (
        [np.asarray(image).mean() for image in pixels]
        if isinstance(pixels, list)
        else ((pixels + 1) * 127.5).mean((0, 2, 3)).tolist()
    )
    return [round((mean - 10) / 5) for mean in means]


def moving(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames of a soft pattern that moves to the right."""
    rough = np.random.RandomState(0).randint(0, 256, (4, 6, 3)).astype(np.uint8)
    pattern = np.asarray(Image.fromarray(rough).resize((width, height)))
    return [np.roll(pattern, 2 * k, 1) for k in range(count)]


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: int = 16,
    times: Sequence[float] | None = None,
    turned: int = 0,
    aspect: Fraction | None = None,
    pixel_format: str = "yuv420p",
    sound: bool = False,
) -> Path:
    """A video whose frame k appears at `times[k]` seconds, or after k / rate."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(CODECS[path.suffix[1:]], rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = pixel_format, 8
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turned:
            stream.set_display_rotation(turned)
        audio = file.add_stream("aac", rate=8000) if sound else None
        for k, content in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(content, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = round(1000 * (k / rate if times is None else times[k]))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio is not None:
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 8000, 0
            file.mux(audio.encode(tone))
            file.mux(audio.encode())
    return path


def write_animation(path: Path, frames: Sequence[np.ndarray], durations: int | list[int] = 60) -> Path:
    """A gif, webp or apng file; durations are in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(frame) for frame in frames]
    kind = "PNG" if path.suffix == ".apng" else path.suffix[1:].upper()
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(path, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return path


def write_frames(place: Path, frames: Sequence[np.ndarray], name: str = "{}.png") -> Path:
    """A folder of frames, numbered from 0."""
    place.mkdir(parents=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(place / name.format(k))
    return place


def caption(path: Path, text: str = "a clip") -> Path:
    """Write the caption beside a clip."""
    (path.parent / f"{path.name if path.is_dir() else path.stem}.txt").write_text(text)
    return path
