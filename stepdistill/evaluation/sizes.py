"""Evaluations at several sizes, each a report of its own: distances between shapes would be distances of resizing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.core.files import write_text
from stepdistill.evaluation.compare import compare_evaluations
from stepdistill.evaluation.inputs import OVER_SIZES, SIZES
from stepdistill.evaluation.plan import contract_of, family_of
from stepdistill.evaluation.results import summary_lines
from stepdistill.evaluation.run import evaluate
from stepdistill.evaluation.spec import EvalRun

Size = tuple[int, int]


def evaluate_at_sizes(spec: EvalRun) -> dict[str, Any]:
    """As `evaluate`, at each of several sizes with the same prompts and seeds; `sizes/HxW` holds each report.

    Returns:
        The contents of `eval.json`; of several sizes those of `sizes.json`: `sizes`, each size's contents by name, and
        `over_sizes`, the mean and the worst excess of each row. Of other processes than the first an empty mapping.

    Raises:
        StepdistillError: as `evaluate` does, and before anything is drawn for a size that the pipeline refuses.
    """
    check_eval_sizes(spec)
    if len(spec.sizes) < 2:
        return evaluate(spec)
    folders = {size: spec.output_dir / SIZES / size_name(size) for size in spec.sizes}
    done = {size_name(size): evaluate(replace(spec, sizes=(size,), output_dir=to)) for size, to in folders.items()}
    if not all(done.values()):
        return {}
    contents = {"sizes": done, "over_sizes": over_sizes(done)}
    write_text(spec.output_dir / OVER_SIZES, json.dumps(contents, indent=1))
    compare_evaluations(list(folders.values()), spec.output_dir / "report.html", spec.output_dir / "rows.csv")
    return contents


def check_eval_sizes(spec: EvalRun) -> None:
    """Raise ConfigError for a size that the pipeline refuses, and EvaluationError for a folder with one size's report
    where several are asked for."""
    if not spec.sizes:
        return
    if len(spec.sizes) > 1 and (spec.output_dir / "eval.json").exists():
        got, why = f"{spec.output_dir}, an evaluation at one size", "each of several sizes has a report of its own"
        raise EvaluationError(problem(got, "another folder", why, "name another output folder, or pass --overwrite"))
    family = family_of(spec.teacher, spec.family, [contract_of(place) for place in spec.students])
    pipe = family.load(("text", "vae", "denoiser"))  # their configs are enough
    for size in spec.sizes:
        family.latent_shape(pipe, *size)


def size_name(size: Size) -> str:
    """A size as a folder's name."""
    return f"{size[0]}x{size[1]}"


def over_sizes(done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each row that every size has: the mean of its excess over the sizes, and the largest with its interval.

    Args:
        done: the contents of `eval.json` by size.
    """
    key = next(iter(done.values()))["features"]["key"]
    excesses = {
        size: {row["name"]: row["metrics"].get("delta_vs_teacher", {}).get(key) for row in contents["rows"]}
        for size, contents in done.items()
    }
    rows = []
    for name in next(iter(excesses.values())):
        each = {size: known[name] for size, known in excesses.items() if known.get(name)}
        if len(each) == len(done):
            worst = max(each, key=lambda size: each[size]["value"])
            values = [value["value"] for value in each.values()]
            rows.append({"name": name, "mean": mean(values), "worst": {"size": worst, **each[worst]}})
    return rows


def report_lines(contents: Mapping[str, Any]) -> list[str]:
    """The rows of `eval.json` or `sizes.json` for a terminal."""
    if "sizes" not in contents:
        return summary_lines(contents)
    lines: list[str] = []
    for size, one in contents["sizes"].items():
        lines += [f"{size} pixels (height x width)", *(f"  {line}" for line in summary_lines(one))]
    for row in contents["over_sizes"]:
        low, high = row["worst"]["ci95"]
        worst = f"worst {row['worst']['value']:.4g} [{low:.4g}, {high:.4g}] at {row['worst']['size']}"
        lines.append(f"{row['name']}: excess over all sizes: mean {row['mean']:.4g}, {worst}")
    return lines


def rows_of_all(contents: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The rows of all sizes."""
    each = contents["sizes"].values() if "sizes" in contents else [contents]
    return [row for one in each for row in one["rows"]]
