"""The page's tables of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.cells import span_cell
from tables.windows import WINDOWS, windows_table

DISTANCES = {"frames": "fd_frames", "motion": "fd_motion", "by_motion": "fd_by_motion"}  # of a row, of a report
DIGITS = {"frames": 0, "motion": 1, "by_motion": 1}
TITLES = {"video": "From text", "image_to_video": "From a first frame and text"}


def video_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each kind of pipeline."""
    kinds = {kind: {key: row for key, row in rows.items() if f", {kind}/" in key} for kind in TITLES}
    pages = [f"{TITLES[kind]}:\n\n{kind_table(found)}" for kind, found in kinds.items() if found]
    if long := {key: row for key, row in rows.items() if ", windows/" in key}:
        pages.append(f"{WINDOWS} windows from a first frame:\n\n{windows_table(long)}")
    return "\n\n".join(pages)


def kind_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each way to sample and number of steps."""
    first = next(iter(rows.values()))
    heads = ["frames [95 %]", "motion [95 %]", "within each motion [95 %]", "motion ratio [95 %]"]
    begun = "image_distance" in first
    heads += [*(["from the image"] if begun else []), "nfe", "trained"]
    lines = [f"| excess of | steps | {' | '.join(heads)} |", "| --- " * (len(heads) + 2) + "|"]
    for key, row in rows.items():
        cells = [span_cell(row, name, digits) for name, digits in DIGITS.items()]
        cells += [span_cell(row, "ratio", 2), *([f"{row['image_distance']:.1f}"] if begun else []), f"{row['nfe']:.0f}"]
        taken = f"{row['train_steps']} steps, {row['train_seconds'] / 60:.1f} min" if "train_seconds" in row else "none"
        lines.append(f"| {key.split('/')[1]} | {row['steps']} | {' | '.join(cells)} | {taken} |")
    parts = [f"{first[f'{name}_floor']:.0f} ({name.replace('_', ' ')})" for name in DISTANCES]
    return "\n".join([*lines, "", f"The teacher's own distances at full steps: {', '.join(parts)}; N {first['n']}."])
