"""The table of sizes, as the documentation shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.cells import excess_cell, span_cell

STUDENTS = ("start", "one", "many")  # what both start from, and those trained at one size and at several


def sizes_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a teacher and size; below, the worst and the mean over sizes of each student."""
    heads = ["excess [95 %]", "before", "one size", "three sizes", "one less three [95 %]", "paired: one", "three"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    ordered = sorted(rows.items(), key=lambda each: (each[1]["teacher"], each[1]["size"] != [32, 32], each[0]))
    for _, row in ordered:
        height, width = row["size"]
        cells = [f"{row['teacher']}: {width} x {height}", *(excess_cell(row[arm]) for arm in STUDENTS)]
        cells += [span_cell(row, "gain", 0), f"{row['one']['paired']:.1f}", f"{row['many']['paired']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| over the sizes: worst, mean | before | one size | three sizes |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["teacher"] for _, row in ordered):
        cells = []
        for arm in STUDENTS:
            values = [row[arm]["excess"] for row in rows.values() if row["teacher"] == name]
            cells.append(f"{max(values):.0f}, {sum(values) / len(values):.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
