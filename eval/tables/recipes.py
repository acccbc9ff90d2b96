"""The students of the README's tables: the configs of `configs/tables/*/`, and their training."""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill.config.load import load_config
from stepdistill.data import Partition
from stepdistill.decoding.run import read_run
from stepdistill.students.contract import CONTRACT
from stepdistill.students.several import join_students
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "tables"


def recipes(name: str, table: str) -> dict[str, Path]:
    """The student configs of one teacher in one table, by method."""
    files = sorted((CONFIGS / table).glob(f"{name.replace('-', '_')}_*.yaml"))
    if not files:
        raise SystemExit(f"no config {CONFIGS / table}/{name.replace('-', '_')}_*.yaml")
    return {file.stem.removeprefix(name.replace("-", "_") + "_"): file for file in files}


def trained(file: Path) -> Path:
    """The student folder of a config, made where it is missing, after the one that it starts from."""
    run = load_config(Run, file, [])
    out = Path(run.train.output_dir)
    if not (out / CONTRACT).exists():
        warm_start(run)
        if not isinstance(run.data, Partition):
            distill(load_config(Run, file, ["train.resume_from_checkpoint=latest"]))
            return out
        parts = [Path(f"{out}-part-{k}") for k in range(run.data.students)]
        for k, part in enumerate(parts):
            overrides = [f"data.student={k}", f"train.output_dir={part}", "train.resume_from_checkpoint=latest"]
            if not (part / CONTRACT).exists():
                distill(load_config(Run, file, overrides))
        join_students(out, parts)
    return out


def warm_start(run: Run) -> None:
    """Train the student that a run starts from, where a table's config makes it and it is missing."""
    starts = {run.lora.init_from, run.start_from, run.train.assistant} - {None}
    for other in CONFIGS.glob("*/*.yaml") if starts else ():
        if read_run(other).train.output_dir in starts:
            trained(other)


def step_seconds(folder: Path) -> list[float]:
    """What each step of a run, or of the runs of several students, took."""
    lines = [line for file in folder.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    return [row["seconds"] for row in map(json.loads, lines) if "seconds" in row]


def seconds(folder: Path) -> float:
    """What the steps of a run, or of the runs of several students, took in all."""
    return sum(step_seconds(folder))
