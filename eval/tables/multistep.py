"""What an option changes: students of several steps that differ in it alone, drawn from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.evaluation.metrics.diversity import diversity_replicates
from stepdistill.evaluation.metrics.jackknife import block_sizes, interval, replicates
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.draw.call import student_calls
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, drawn, places, reference, spans
from tables.cells import span_cell
from tables.recipes import recipes, trained

WITHOUT = {"anchor": "four", "warm": "cold"}  # by student, the one without its option
STEPS = 4


def measure_differences(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Diversity over the teacher's and excess in 4 steps, each less that of the student without the option."""
    for method, plain in WITHOUT.items():
        files = recipes(name, "multistep")
        if (rows and method not in rows) or not {method, plain} <= files.keys():
            continue
        runs = {each: load_config(Run, files[each], []) for each in (method, plain)}
        facts = {"teacher": name, "configs": [config_digest(run) for run in runs.values()], "than": plain}
        ref = reference(name, runs[method], work)

        def made() -> dict[str, Any]:
            kept = work / "multistep"
            return difference(*(features(runs[each], trained(files[each]), ref, kept) for each in runs), ref)  # noqa: B023

        results.once(f"{name}/{method}/than {plain}", made, **facts, steps=STEPS)


def features(run: Run, out: Path, ref: StoredFeatures, kept: Path) -> Tensor:
    """Features of the student's images in 4 steps, once for each of its configs."""
    file = kept / f"{out.name}-{config_digest(run)}.safetensors"
    if not file.exists():
        pipe = run.family.load()
        (call,) = student_calls(run.family, run.method, pipe, (STEPS,)).values()
        load_student(pipe, out)
        pipe.fuse_lora()
        save_file({"features": drawn(pipe, call, ref)[0]}, file)
    return load_file(file)["features"]


def difference(ours: Tensor, others: Tensor, ref: StoredFeatures) -> dict[str, Any]:
    """Diversity over the teacher's and distance to it of images with the features `ours`, less those of `others`."""
    sizes, index = block_sizes(len(ours)), places(ref)
    one, other, taught = (diversity_replicates(each, index) for each in (ours, others, ref.features["floor"]))
    near, far = replicates([ours, others], ref.features["reference"])
    return spans(
        diversity=interval(one / taught, sizes),
        diversity_without=interval(other / taught, sizes),
        gain=interval((one - other) / taught, sizes),
        excess_change=interval(near - far, sizes),
    )


def differences_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each student that was compared with another."""
    heads = ("diversity [95 %]", "of the other", "change of the diversity", "change of the excess")
    lines = [f"| in {STEPS} steps | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for key, row in rows.items():
        name, method, _ = key.split("/")
        cells = [span_cell(row, part, 3) for part in ("diversity", "diversity_without", "gain")]
        cells += [span_cell(row, "excess_change", 0)]
        lines.append(f"| {name}: {method}, beside {row['than']} | {' | '.join(cells)} |")
    return "\n".join(lines)
