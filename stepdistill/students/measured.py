"""What was measured of a student at the end of its training, for its model card and for the summary of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTE = """\
Each row is measured on {n} images. Excess is the Frechet distance from the teacher's images, on the features
`{features}`, minus the distance that the teacher's own images have under other seeds. Lower is better."""
VARIETY = """\
Diversity is how much the images of one prompt differ from one another, over the teacher's. 1 is the teacher's variety.
Without an interval a prompt has too few images for one."""


def measured_section(folder: Path) -> str:
    """The section of a student folder's card with the figures of its `eval.json`; nothing without that file."""
    file = folder / "eval.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if "delta_vs_teacher" in row["metrics"]]
    various = any("diversity_vs_teacher" in row["metrics"] for row in rows)
    heads = ["", "network evaluations", "excess [95 %]", *["diversity [95 %]"] * various]
    lines = ["## Beside the teacher", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        excess = with_interval(row["metrics"]["delta_vs_teacher"][found["features"]["key"]], 1)
        cells = [row["name"], f"{row['cost']['nfe']:.0f}", excess]
        if various:
            cells.append(with_interval(row["metrics"]["diversity_vs_teacher"], 3))
        lines.append(_line(cells))
    note = NOTE.format(n=found["reference"]["n"], features=found["features"]["id"])
    return "\n".join([*lines, "", note, *[VARIETY] * various, "", ""])


def with_interval(value: Mapping[str, Any], decimals: int) -> str:
    """A value of `eval.json` and its interval, if it has one."""
    if value["value"] is None:  # over a teacher that does not vary
        return "–"
    text = f"{value['value']:.{decimals}f}"
    low, high = value["ci95"] or (None, None)
    return text if None in (low, high) else f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
