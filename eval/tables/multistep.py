"""What an option changes: students of several steps that differ in it alone, drawn from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from tables.recipes import recipes, seconds, trained

WITHOUT = {"anchor": "four", "warm": "cold"}  # by student, the one without its option
STEPS = 4


def measure_differences(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Diversity over the teacher's and excess in 4 steps, each less that of the student without the option."""
    for method, plain in WITHOUT.items():
        files = recipes(name, "multistep")
        if (not rows or method in rows) and {method, plain} <= files.keys():
            runs = [load_config(Run, files[each], []) for each in (method, plain)]
            folders = [trained(files[each]) for each in (method, plain)]
            facts = {"teacher": name, "configs": [config_digest(run) for run in runs], "than": plain}
            facts["train_seconds"] = [round(seconds(folder)) for folder in folders]
            made = partial(compared, runs, folders, reference(name, runs[0], work))
            results.once(f"{name}/{method}/than {plain}", made, **facts, steps=STEPS)


def compared(runs: Sequence[Run], folders: Sequence[Path], ref: StoredFeatures) -> dict[str, Any]:
    """What is different of the images of two students."""
    ours, others = (features(run, out, ref) for run, out in zip(runs, folders, strict=True))
    return difference(ours, others, ref)


def features(run: Run, out: Path, ref: StoredFeatures) -> Tensor:
    """Features of a student's images in 4 steps."""
    pipe = run.family.load()
    (call,) = student_calls(run.family, run.method, pipe, (STEPS,)).values()
    load_student(pipe, out)
    pipe.fuse_lora()
    return drawn(pipe, call, ref)[0]


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
