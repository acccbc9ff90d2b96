"""A plot of the collapse monitor: the distance of each statistic from the teacher's, and the gradient norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.training.watch.rules import BAND, GAPS, IMAGE, MOTION, PREFIX, SCORE, deviation, title


def plot_drift(rows: Sequence[Mapping[str, float]], spread: Mapping[str, float], file: Path) -> None:
    """Draw the rows of `metrics.jsonl` with the teacher's relative `spread` of each statistic into a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state; half a second to import

    figure = Figure(figsize=(8, 9), layout="constrained")
    above: Any = figure.subplots(3, 1, sharex=True)
    looks = [row for row in rows if SCORE in row]
    steps = [row["step"] for row in looks]
    for axes, names in zip(above[:2], ([*IMAGE, *[MOTION] * (MOTION in spread)], GAPS), strict=True):
        axes.axhspan(-BAND, BAND, color="0.92")
        axes.axhline(0, color="0.6", linewidth=0.8)
        for name in names:
            values = [deviation(row[PREFIX + name], spread[name]) for row in looks]
            axes.plot(steps, values, marker=".", label=title(name))
        axes.set_yscale("symlog", linthresh=2 * BAND)
        axes.set_ylabel("from the teacher,\nin its spreads")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    norms = sorted({key for row in rows for key in row if key.startswith("grad_norm/")})
    for key in norms:
        pairs = [(row["step"], row[key]) for row in rows if key in row]
        above[2].plot(*zip(*pairs, strict=True), linewidth=0.8, label=key)
    if norms:
        above[2].set_yscale("log")
        above[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    above[2].set_ylabel("gradient norm")
    above[2].set_xlabel("step")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110)
