"""`report.html`: evaluations on one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stepdistill.evaluation.report import table, words
from stepdistill.evaluation.report.chart import Point, against_clip, against_cost
from stepdistill.evaluation.report.fields import TITLES
from stepdistill.evaluation.report.table import Evaluation, Row, flat_rows

NORMAL = 1.96  # half a 95 % interval in standard errors


def page(evaluations: Sequence[Evaluation], title: str) -> str:
    """HTML of one or more evaluations, without scripts or anything to load; the same for the same folders.

    Distances of different comparison keys have columns and plots of their own. Raises ValueError for no evaluation.

    Args:
        title: heading of the page.
    """
    if not evaluations:
        raise ValueError("page got no evaluation, expected one or more: there is nothing to show; name a folder")
    rows = flat_rows(evaluations)
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
        summary=[words.summary(key, table.with_key(key, rows)) for key in table.comparison_keys(rows)],
        tables=table.tables(rows),
        rows=len(rows),
        figures=_figures(rows),
        grids=[(one, file.stem, _uri(file)) for one in evaluations for file in one.grids],
        moving=any(file.suffix == ".webp" for one in evaluations for file in one.grids),
        against=against,
        reading=reading,
    )


def _figures(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Title, what it is measured on, and SVG of every plot that has a point."""
    figures = []
    for place, key in enumerate(table.comparison_keys(rows)):
        mine, label = table.with_key(key, rows), TITLES[key.key]
        measured = f"N {key.n}, features {key.features_id}"
        if points := _points(mine, "nfe"):
            svg = against_cost(points, label, f"cost{place}")
            figures.append((f"{label} against network evaluations", measured, svg))
        for turn, model in enumerate(table.clip_models(row for row in mine if row)):
            if points := _points(table.with_model(model, mine), "clip_score"):
                svg = against_clip(points, label, f"clip{place}-{turn}")
                figures.append((f"{label} against CLIP score", f"{measured}, CLIP {model}", svg))
    return figures


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
    return f"data:image/{file.suffix[1:]};base64," + base64.b64encode(file.read_bytes()).decode()
