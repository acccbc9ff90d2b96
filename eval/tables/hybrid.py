"""The README's table of diversity: students alone, and after a first step of their teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.evaluation.metrics.diversity import diversity_replicates
from stepdistill.evaluation.metrics.jackknife import block_sizes, interval
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.draw.base_first import base_first
from stepdistill.students.draw.call import student_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, drawn, judged, places, reference, spans
from tables.recipes import recipes, trained

TABLES = {"tiny-sd": {"dmd2": "distribution", "disback": "distribution", "tscd": "consistency", "lcm": "consistency"}}
STEPS = 4
WAYS = {  # steps in all, and how many of them are the teacher's
    "student": (STEPS, 0),
    "teacher's first step in place of the student's": (STEPS, 1),
    "one step more, the first the teacher's": (STEPS + 1, 1),
    "student, one step more": (STEPS + 1, 0),
}


def measure_hybrid(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Draw with each student in `STEPS` steps and in one more, with and without the teacher in the first."""
    for method, table in TABLES.get(name, {}).items():
        if rows and method not in rows:
            continue
        file = recipes(name, table)[method]
        run, out = load_config(Run, file, []), trained(file)
        facts = {"teacher": name, "config": config_digest(run), "train_steps": run.train.max_train_steps}
        for way, (steps, base_steps) in WAYS.items():
            make = partial(compared, run, out, reference(name, run, work), work / "hybrid" / out.name, way)
            results.once(f"{name}/{method}/{way}", make, **facts, steps=steps, base_steps=base_steps)


def compared(run: Run, out: Path, ref: StoredFeatures, kept: Path, way: str) -> dict[str, Any]:
    """The figures of one way, and its diversity over the teacher's and beside the student's, each with an interval.

    Args:
        kept: folder for the features of the student alone, which every other way is compared with.
    """
    student, cost = features(run, out, ref, *WAYS[way])
    file = kept / "student.safetensors"
    if way == "student":
        kept.mkdir(parents=True, exist_ok=True)
        save_file({"features": student}, file)
    elif not file.exists():
        save_file({"features": features(run, out, ref, *WAYS["student"])[0]}, file)
    sizes, index = block_sizes(len(student)), places(ref)
    diversity, alone, taught = (
        diversity_replicates(each, index) for each in (student, load_file(file)["features"], ref.features["floor"])
    )
    ratio, gain = interval(diversity / taught, sizes), interval((diversity - alone) / taught, sizes)
    return judged(student, cost, ref) | spans(diversity=ratio, gain=gain)


def features(run: Run, out: Path, ref: StoredFeatures, steps: int, base_steps: int) -> tuple[Tensor, Cost]:
    """Features of what a student draws in `steps` steps, of which its teacher takes the first ones."""
    pipe = run.family.load()
    row = student_call(run.family, run.method, pipe, steps)
    load_student(pipe, out)
    with torch.no_grad(), base_first(pipe, base_steps):
        return drawn(pipe, row, ref)
