"""Sizes of images that a pipeline takes."""

from __future__ import annotations

from stepdistill.core.errors import ConfigError, problem


def check_size(height: int, width: int, unit: int, most: int) -> None:
    """Raise ConfigError for images, in pixels, whose sides are no multiples of `unit` or longer than `most`."""
    if height % unit or width % unit or max(height, width) > most:
        got, why = f"images of {height} x {width} pixels", "the pipeline or its network refuses other sizes"
        expected = f"sides that are multiples of {unit}" + (f", at most {most}" if most < 10**9 else "")
        raise ConfigError(problem(got, expected, why, "choose another size"))
