"""The page's table of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.cells import excess_cell, span_cell

DISTANCES = {"frames": "fd_frames", "motion": "fd_motion", "by_motion": "fd_by_motion"}  # of a row, of a report


def video_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each way to sample and number of steps."""
    heads = ["frames [95 %]", "motion [95 %]", "within each motion [95 %]", "motion ratio [95 %]", "nfe", "trained"]
    lines = [f"| excess of | steps | {' | '.join(heads)} |", "| --- " * (len(heads) + 2) + "|"]
    for key, row in rows.items():
        cells = [excess_cell({"excess": row[name], "ci95": row[f"{name}_ci95"]}) for name in DISTANCES]
        cells += [span_cell(row, "ratio", 2), f"{row['nfe']:.0f}"]
        taken = f"{row['train_steps']} steps, {row['train_seconds'] / 60:.1f} min" if "train_seconds" in row else "none"
        label = key.rpartition("/")[0].replace("/", ": ")
        lines.append(f"| {label} | {row['steps']} | {' | '.join(cells)} | {taken} |")
    floors = next(iter(rows.values()), None)
    if floors:
        parts = [f"{floors[f'{name}_floor']:.0f} ({name.replace('_', ' ')})" for name in DISTANCES]
        lines += ["", f"The teacher's own distances at full steps: {', '.join(parts)}; N {floors['n']}."]
    return "\n".join(lines)
