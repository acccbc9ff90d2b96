"""The plots of the documentation, made from the files of `eval/results/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.evaluation.metrics.straightness import Paths
from tables.render import EARLY


def plot_paths(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw where the paths of the unguided teacher and of its reflowed student bend."""
    (row,) = (row for key, row in rows.items() if key.endswith("unguided/paths"))
    pairs = ((name, row[name]) for name in ("teacher", "student"))
    paths = {
        name: Paths(torch.tensor(each["share"]), torch.tensor(each["deviation"]), each["cost"]) for name, each in pairs
    }
    draw_paths(paths, file)


def draw_paths(samplers: Mapping[str, Paths], file: Path) -> None:
    """Draw where along the way each sampler's paths bend, into a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, each in samplers.items():
        axes.plot(each.share, each.deviation / each.cost, label=f"{label}: S / cost = {each.relative:.3g}")
    axes.set(xlabel="share of noise", ylabel="deviation from the line / transport cost", yscale="log", xlim=(1, 0))
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def plot_time(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw excess against minutes of training, with intervals, into a PNG: a line a method and number of steps."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, Sequence[float]]]] = {}
    for key, row in rows.items():
        teacher, method, count = key.split("/")
        if count == "pace":
            continue
        pace = rows[f"{teacher}/{method}/pace"]
        minutes = (pace["start_seconds"] + int(count) * pace["step_seconds"]) / 60
        lines.setdefault(method, []).append((minutes, row["excess"], row["ci95"]))
        if row.get("early", row["excess"]) != row["excess"]:  # a student whose own start is another
            line = lines.setdefault(f"{method}, from {EARLY['distribution']:g}", [])
            line.append((minutes, row["early"], row["early_ci95"]))
        for steps, other in row.get("several", {}).items():
            line = lines.setdefault(f"{method}, {steps} steps", [])
            line.append((minutes, other["excess"], other["ci95"]))
    for label, points in sorted(lines.items()):
        minutes, values, spans = zip(*sorted(points), strict=True)
        errors = [[v - low for v, (low, _) in zip(values, spans, strict=True)]]
        errors += [[high - v for v, (_, high) in zip(values, spans, strict=True)]]
        axes.errorbar(minutes, values, errors, marker="o", markersize=4, capsize=2, label=label)
    axes.set(
        xscale="log",
        xlabel="minutes of training, one core",
        ylabel="excess",
        ylim=(0, None),
    )
    axes.set_xticks([2.5, 5, 10, 20, 40], ["2.5", "5", "10", "20", "40"], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(file, dpi=110)


PLOTS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {"reflow": plot_paths, "time": plot_time}
