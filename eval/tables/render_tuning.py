"""The pages' tables of tuning: rewards, new images, and the stages of Hyper-SD."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tables.cells import excess_cell, span_cell


def feedback_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a student: what is trained, what is held out, what may be lost. Then the rises of a reward of 0 or 1."""
    lines = ["| | reward [95 %] | held-out [95 %] | excess [95 %] | diversity | fine detail | trained |"]
    lines += ["| --- " * 7 + "|"]
    for key in sorted(rows, key=lambda key: (key.split("/")[0], not key.endswith("/before"))):
        if "held_out" in (row := rows[key]):
            detail = row["detail"] / rows[f"{key.split('/')[0]}/before"]["detail"]
            taken = f"{row['train_steps']} steps, {row['train_seconds'] / 60:.1f} min" if "train_steps" in row else ""
            cells = [
                *(span_cell(row, name, 3) for name in ("reward", "held_out")),
                excess_cell(row),
                f"{row['diversity']:.2f}",
            ]
            lines.append(f"| {key.replace('/', ': ')} | {' | '.join(cells)} | {detail:.2f} | {taken} |")
    risen = {key: row for key, row in rows.items() if "reached" in row}
    return "\n".join(lines + (rises(rows, risen) if risen else []))


def rises(rows: Mapping[str, Mapping[str, Any]], risen: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Two tables of a reward of 0 or 1: how far its log-odds rose, and what became of the images of either kind."""
    shares = ["", "| share with a white border, % [95 %] | before | optimum | trained | rise reached | linear |"]
    kinds = ["", "| excess [95 %] | with a white border | without | between the two, before |", "| --- " * 4 + "|"]
    shares.append("| --- " * 6 + "|")
    for key, row in risen.items():
        cells = [span_cell(row, name, 1, 100) for name in ("before", "wanted", "after")]
        cells += [span_cell(row, "reached", 2), span_cell(rows[f"{key.split('/')[0]}/linear share"], "share", 2)]
        shares.append(f"| {key.replace('/', ': ')} | {' | '.join(cells)} |")
        cells = [span_cell(row, name, 0) for name in ("excess_white", "excess_other", "apart")]
        kinds.append(f"| {key.replace('/', ': ')} | {' | '.join(cells)} |")
    return shares + kinds


def new_images_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a model, with the share of its few-step advantage that fine-tuning took."""
    lines = ["| | excess [95 %] | steps | diversity | advantage lost | trained |"]
    lines += ["| --- " * 6 + "|"]
    for key, row in rows.items():
        name, _, label = key.partition("/")
        before, plain = (rows[f"{name}/{other}"]["excess"] for other in ("before", "teacher"))
        trained = "train_seconds" in row
        lost = f"{(row['excess'] - before) / (plain - before):.0%}" if trained else ""
        taken = f"{row['train_seconds'] / 60:.1f} min" if trained else ""
        if "assistant_seconds" in row:
            taken += f", and {row['assistant_seconds'] / 60:.1f} of the assistant"
        cells = [f"{row['calls']:.0f}", f"{row['diversity']:.2f}", lost, taken]
        lines.append(f"| {name}: {label} | {excess_cell(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hyper_sd_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    counts = sorted({row["steps"] for row in rows.values()})
    heads = [f"{n} step{'s' * (n > 1)}" for n in counts]
    stages = dict.fromkeys(key.rpartition("/")[0] for key in sorted(rows, key=lambda key: rows[key]["train_seconds"]))
    lines = []
    for title, cell in (
        ("excess [95 %]", excess_cell),
        ("reward [95 %]", partial(span_cell, name="reward", digits=3)),
        ("held-out [95 %]", partial(span_cell, name="held_out", digits=3)),
    ):
        lines += ["", f"| {title} | {' | '.join(heads)} | training so far |", "| --- " * (len(heads) + 2) + "|"]
        for stage in stages:
            cells = [rows[f"{stage}/{n}"] for n in counts]
            name, taken = stage.replace("/", ": "), f"{cells[0]['train_seconds'] / 60:.1f} min"
            lines.append(f"| {name} | {' | '.join(cell(each) for each in cells)} | {taken} |")
    return "\n".join(lines[1:])
