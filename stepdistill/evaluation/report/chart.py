"""The two plots of a report as SVG: distance against network evaluations, and against the CLIP score."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"teacher": ("D", "#444444"), "student": ("o", "#1f5fa8"), "images": ("s", "#9a5b00")}
SIZE = (4.6, 3.4)  # inches; at a phone's width the letters are still ten pixels high
CORNERS = ((6, 6), (-6, 6), (6, -6), (-6, -6))  # where a number may stand beside its mark, in points
CLEAR = 9  # points between a number's middle and other marks or numbers


@dataclass(frozen=True)
class Point:
    """A row in a plot: its number in the table, its role, and a value with its 95 % interval on each axis."""

    number: int
    role: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, lower being better in both, from the smallest first coordinate on.

    A point is on it where no other is at least as good in both coordinates and better in one. Equal points are on
    it together.
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    return [i for i in order if not any(_better(other, points[i]) for other in points)]


def against_cost(points: Sequence[Point], label: str, prefix: str) -> str:
    """SVG of a distance (y) against network evaluations per image (x > 0, logarithmic); `prefix` makes its ids unique.

    Args:
        label: name of the distance.
    """
    figure, axes = _axes()
    axes.set_xscale("log")
    axes.minorticks_off()
    ticks: list[float] = []
    for x in sorted(point.x for point in points):
        if not ticks or x > 1.2 * ticks[-1]:  # else the numbers would run into one another
            ticks.append(x)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlim(ticks[0] / 1.4, max(point.x for point in points) * 1.4)
    axes.set_xlabel("network evaluations per image (log scale; fewer is better)")
    axes.set_ylabel(f"{label} (lower is better)")
    best = front([(point.x, point.y) for point in points])
    return _drawn(figure, axes, points, best, prefix)


def against_clip(points: Sequence[Point], label: str, prefix: str) -> str:
    """SVG of a distance (y) against the CLIP score (x); arguments as in `against_cost`."""
    figure, axes = _axes()
    axes.margins(x=0.1)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("CLIP score (higher is better)")
    axes.set_ylabel(f"{label} (lower is better)")
    best = front([(-point.x, point.y) for point in points])
    return _drawn(figure, axes, points, best, prefix)


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state; a third of a second to import

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _drawn(figure: Figure, axes: Any, points: Sequence[Point], best: Sequence[int], prefix: str) -> str:  # noqa: ANN401
    """The SVG element of the points, their intervals and their front."""
    from matplotlib import rc_context

    axes.plot([points[i].x for i in best], [points[i].y for i in best], color="0.6", linewidth=1.2, zorder=1)
    for point in points:
        shape, colour = MARKS[point.role]
        if point.x_range:
            axes.hlines(point.y, *point.x_range, color=colour, linewidth=1.2)
        if point.y_range:
            axes.vlines(point.x, *point.y_range, color=colour, linewidth=1.2)
        axes.plot(point.x, point.y, shape, color=colour, markersize=7, markeredgecolor="white", zorder=3)
    _number(figure, axes, points)
    svg = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "stepdistill"}):
        # a file with the hour in it would differ on every run
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = svg.getvalue()
    element = element[element.index("<svg") :]
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}-", element)


def _number(figure: Figure, axes: Any, points: Sequence[Point]) -> None:  # noqa: ANN401
    """Write each point's number at the corner of its mark that other marks and numbers leave free."""
    figure.draw_without_rendering()  # the layout is known only then
    taken = [axes.transData.transform((point.x, point.y)) * 72 / figure.dpi for point in points]
    for point, centre in zip(points, list(taken), strict=True):
        room = {
            corner: min(hypot(*(centre + [1.5 * part for part in corner] - spot)) for spot in taken)
            for corner in CORNERS
        }
        corner = next((corner for corner in CORNERS if room[corner] >= CLEAR), max(room, key=lambda c: room[c]))
        taken.append(centre + [1.5 * part for part in corner])
        axes.annotate(
            str(point.number),
            (point.x, point.y),
            corner,
            textcoords="offset points",
            horizontalalignment="left" if corner[0] > 0 else "right",
            verticalalignment="bottom" if corner[1] > 0 else "top",
            color=MARKS[point.role][1],
            fontweight="bold",
        )
