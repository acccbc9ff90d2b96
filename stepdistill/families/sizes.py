"""Sizes of images that a pipeline takes."""

from __future__ import annotations

from stepdistill.core.errors import ConfigError, problem


def check_size(height: int, width: int, unit: int, most: int) -> None:
    """Raise ConfigError for images, in pixels, whose sides are no multiples of `unit` or longer than `most`."""
    if height % unit or width % unit or max(height, width) > most:
        got, why = f"images of {height} x {width} pixels", "the pipeline or its network refuses other sizes"
        expected = f"sides that are multiples of {unit}" + (f", at most {most}" if most < 10**9 else "")
        raise ConfigError(problem(got, expected, why, "choose another size"))


def check_frames(frames: int, factor: int) -> None:
    """Raise ConfigError for a number of frames that an autoencoder with a temporal factor does not take whole."""
    if factor < 2:
        got, why = f"an autoencoder with a temporal factor of {factor}", "the pipeline then adds a frame"
        raise ConfigError(problem(got, "2 or more", why, "choose another teacher"))
    if frames % factor != 1:
        below = max(1, (frames - 1) // factor * factor + 1)
        got, expected = f"family.num_frames {frames}", f"{below} or {below + factor}"
        why = f"the autoencoder codes one frame, and then {factor} at a time; the pipeline drops the rest"
        raise ConfigError(problem(got, expected, why, "choose one of them"))
