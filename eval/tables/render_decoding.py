"""The table of Distilled Decoding as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.cells import excess_cell, span_cell


def decoding_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each way to draw, then what an image takes."""
    heads = ["log-likelihood of a token [95 %]", "gap closed, % [95 %]", "excess [95 %]", "paired", "diversity"]
    lines = [f"| | calls | {' | '.join(heads)} | equal tokens, % | trained |", "| --- " * (len(heads) + 4) + "|"]
    for key, row in rows.items():
        if not key.endswith("/pace"):
            lines.append(f"| {key.replace('/', ': ', 1)} | {' | '.join(_cells(key, row))} |")
    paces = {key.removesuffix("/pace"): row for key, row in rows.items() if key.endswith("/pace")}
    return "\n".join([*lines, "", *_pace_lines(paces)])


def _cells(key: str, row: Mapping[str, Any]) -> list[str]:
    likelihood = span_cell(row, "log_likelihood", 2)
    if key.endswith("/teacher"):
        return [f"{row['calls']}, {row['nfe']} evaluations", likelihood, "100", "0", "0", "1.00", "100", "none"]
    cells = [f"{row['calls']:.0f}", likelihood, span_cell(row, "gap_closed", 1, 100), excess_cell(row)]
    cells += [f"{row['paired']:.1f}", f"{row['diversity']:.2f}", f"{100 * row['agreement']:.0f}"]
    taken = f"{row['pairs']} pairs, {row['train_steps']} steps" if "pairs" in row else "none"
    return [*cells, taken]


def _pace_lines(paces: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Milliseconds of an image, and how many times as fast as the teacher."""
    lines = ["| milliseconds of an image | | teacher | 1 call | 2 calls | 3 calls |", "| --- " * 6 + "|"]
    for name, row in paces.items():
        for label, taken in row.items():
            if ", batch " in label:
                own = taken["teacher"]
                cells = [f"{1000 * taken[k]:.1f} ({own / taken[k]:.1f} x)" for k in ("1", "2", "3")]
                lines.append(f"| {name.replace('/', ': ')} | {label} | {1000 * own:.1f} | {' | '.join(cells)} |")
    return lines
