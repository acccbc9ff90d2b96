"""Progress bars: live on a terminal and in a notebook; in a log file, one line every 30 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress(
    items: Iterable[Any] | None = None, *, title: str, unit: str, total: int | None = None, done: int = 0, shown: bool
) -> tqdm:
    """A bar over `items`, or one that is moved by hand.

    Args:
        done: how many of `total` are done already.
        shown: as a rule only on the first process.
    """
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    every = 0.1 if live else 30.0
    return tqdm(items, title, total, initial=done, unit=unit, disable=not shown, mininterval=every, dynamic_ncols=live)
