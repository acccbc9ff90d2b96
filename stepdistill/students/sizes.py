"""The sizes that a student was trained at: what its card and workflow say of them, and which sizes are outside."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from stepdistill.students.contract import Contract

logger = logging.getLogger(__name__)

SLACK = 1.05  # how far the area or the aspect ratio may lie outside of those in training


def shown_sizes(first: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """A few of the sizes that a student is trained at: the first, and the most elongated (of two alike the first).

    What a pipeline gets wrong about sizes, such as rows for columns, is wrong away from the square alone.
    """
    elongated = max((first, *sizes), key=lambda size: abs(math.log(size[0] / size[1])))
    return (first,) if elongated == first else (first, elongated)


def at_size(contract: Contract, size: tuple[int, int]) -> Contract:
    """The contract as it is for a call of this height and width, whose noise levels are the same."""
    height, width = size
    return replace(contract, resolution=size, call={**contract.call, "height": height, "width": width})


def sizes_in_words(sizes: Sequence[tuple[int, int]]) -> str:
    """Heights and widths in the order of pipelines' names for them: `1216 x 832, 832 x 1216`."""
    return ", ".join(f"{width} x {height}" for height, width in sizes)


def size_rows(contract: Contract) -> list[tuple[str, str]]:
    """The rows of a card about sizes. The levels stay one list, which a base that shifts its own must not move."""
    rows = [("resolution", f"{sizes_in_words([contract.resolution])} pixels")]
    if len(contract.sizes) > 1:
        sizes = sizes_in_words(contract.sizes)
        rows.append(("trained sizes", f"{sizes} pixels (width x height); the noise levels are the same at every size"))
    return rows


def is_outside(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether a height and width have an area or a ratio that is more than 5 % outside of the range of `sizes`."""
    kinds = ([height * width for height, width in (size, *sizes)], [height / width for height, width in (size, *sizes)])
    return any(not min(known) / SLACK <= value <= max(known) * SLACK for value, *known in kinds)


def warn_of_size(contract: Contract, size: tuple[int, int]) -> None:
    """Log a warning for images of a height and width in pixels that are unlike those in training."""
    if contract.sizes and is_outside(size, contract.sizes):
        logger.warning(
            "images of %s pixels (width x height), but the student was trained at %s: their area or aspect ratio is "
            "more than 5 %% outside of these, so objects may be doubled or cut",
            *(sizes_in_words([size]), sizes_in_words(contract.sizes)),
        )
