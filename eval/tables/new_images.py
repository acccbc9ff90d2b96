"""The table of new images: a few-step model that is fine-tuned plainly, with a training assistant and without.

The images are the teacher's own samples. So there is nothing new in them, and what changes is what is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.base import Family
from stepdistill.students.contract import read_contract
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, judged, reference
from tables.feedback import drawn_by, sample_images
from tables.recipes import recipes, seconds, trained, warm_start

STARTED = ("alone", "assisted")


def measure_new_images(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """The few-step model before, after plain fine-tuning, and after the same with the assistant on."""
    for method in STARTED:
        if rows and method not in rows:
            continue
        file = recipes(name, "new_images")[method]
        run = load_config(Run, file, [])
        data: Any = run.data
        assert run.start_from is not None
        warm_start(run)
        if not Path(data.train_data_dir).exists():
            sample_images(name, run, Path(data.train_data_dir))
        ref, before = reference(name, run, work), Path(run.start_from)
        steps = len(read_contract(before).timesteps)
        results.put(f"{name}/teacher", plain_row(name, results.file.with_name("teachers.json"), steps))
        results.once(f"{name}/before", partial(row_of, run.family, before, ref), start=before.name)
        out = trained(file)
        facts = {"config": config_digest(run), "train_seconds": round(seconds(out))}
        if run.train.assistant:
            facts["assistant_seconds"] = round(seconds(Path(run.train.assistant)))
        results.once(f"{name}/{method}", partial(row_of, run.family, out, ref), **facts)


def plain_row(name: str, file: Path, steps: int) -> dict[str, Any]:
    """The best of the teacher's plain samplers in as many steps, as the table of teachers has it."""
    rows = json.loads(file.read_text())
    return min(
        (row for key, row in rows.items() if key.startswith(f"{name}/") and key.endswith(f"/{steps}")),
        key=lambda row: row["excess"],
    )


def row_of(family: Family, folder: Path, ref: StoredFeatures) -> dict[str, Any]:
    """Excess, diversity and cost of a student in its contract's steps."""
    images, cost = drawn_by(family, folder, ref)
    return judged(extractor()(images), cost, ref)
