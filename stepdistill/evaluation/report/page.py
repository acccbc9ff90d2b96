"""`report.html`: evaluations on one page that holds all it shows, for a browser, a phone and paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stepdistill.evaluation.report import columns, words
from stepdistill.evaluation.report.chart import Point, against_clip, against_cost
from stepdistill.evaluation.report.columns import TITLES, Row
from stepdistill.evaluation.report.table import Evaluation, flat

NORMAL = 1.96  # half a 95 % interval in standard errors


def page(evaluations: Sequence[Evaluation], title: str) -> str:
    """HTML of one or more evaluations, without scripts or anything to load; the same for the same folders.

    Distances of different identities have columns and plots of their own. Raises ValueError for no evaluation.

    Args:
        title: heading of the page.
    """
    if not evaluations:
        raise ValueError("page got no evaluation, expected one or more: there is nothing to show; name a folder")
    rows = flat(evaluations)
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    against, reading = words.notes(evaluations, rows)
    return env.get_template("template.html.j2").render(
        title=title,
        names=[one.name for one in evaluations],
        about=words.about(evaluations),
        summary=[words.summary(one, columns.only(one, rows)) for one in columns.identities(rows)],
        tables=columns.tables(rows),
        rows=len(rows),
        figures=_figures(rows),
        grids=[(one, file.stem, _uri(file)) for one in evaluations for file in one.grids],
        against=against,
        reading=reading,
    )


def _figures(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Title, what it is measured on, and SVG of every plot that has a point."""
    found = []
    for place, one in enumerate(columns.identities(rows)):
        mine, label = columns.only(one, rows), TITLES[one.key]
        measured = f"N {one.n}, features {one.features_id}"
        if points := _points(mine, "nfe"):
            svg = against_cost(points, label, f"cost{place}")
            found.append((f"{label} against network evaluations", measured, svg))
        for turn, model in enumerate(columns.models(row for row in mine if row)):
            if points := _points(columns.of_model(model, mine), "clip_score"):
                svg = against_clip(points, label, f"clip{place}-{turn}")
                found.append((f"{label} against CLIP score", f"{measured}, CLIP {model}", svg))
    return found


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    """The rows that have a distance and a positive value of `key`, which a logarithmic axis can show."""
    points = []
    for place, row in enumerate(rows, start=1):
        x, y = row.get(key), row.get("distance")
        if x is None or x <= 0 or y is None:
            continue
        half = NORMAL * row["clip_stderr"] if key == "clip_score" and row["clip_stderr"] is not None else None
        low, high = row["distance_low"], row["distance_high"]
        points.append(
            Point(
                place,
                row["role"],
                x,
                y,
                None if half is None else (x - half, x + half),
                None if low is None or high is None else (low, high),
            )
        )
    return points


def _uri(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
