"""The table of Hyper-SD: what each of its three stages adds to the one LoRA that is sampled in 1, 2, 4 and 8 steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.students.draw.call import student_call
from stepdistill.training.recipe import Run
from tables.benchmark import Results, reference
from tables.feedback import quality, scored
from tables.recipes import CONFIGS, seconds, trained

STAGES = {"tscd": "distribution", "feedback": "hyper_sd", "one_step": "hyper_sd"}  # and where their configs are
COUNTS = (1, 2, 4, 8)


def measure_hyper_sd(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Each stage's student, drawn by the sampler of the first stage."""
    if name != "tiny-sd":
        return
    first = load_config(Run, CONFIGS / STAGES["tscd"] / "tiny_sd_tscd.yaml", [])
    ref, taken = reference(name, first, work), 0.0
    judge = partial(scored, first.family, ref, cache(partial(quality, first.family, ref)))
    for stage, table in STAGES.items():
        file = CONFIGS / table / f"tiny_sd_{stage}.yaml"
        out, config = trained(file), config_digest(load_config(Run, file, []))
        taken += seconds(out)
        for steps in COUNTS if not rows or stage in rows else ():
            call = student_call(first.family, first.method, first.family.load(), steps)
            facts = {"config": config, "train_seconds": round(taken), "steps": steps}
            results.once(f"{name}/{stage}/{steps}", partial(judge, out, call), **facts)
