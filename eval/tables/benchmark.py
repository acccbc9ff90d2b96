"""The embedded benchmark: its prompts and features, and what is measured about a way to sample."""

from __future__ import annotations

import fcntl
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.cost import Cost
from stepdistill.core.files import write_text
from stepdistill.data.bundled import emoji
from stepdistill.evaluation.measure import Reference, Sampled, measured
from stepdistill.evaluation.metrics.features import Extractor, efficientnet_lite0
from stepdistill.evaluation.metrics.jackknife import Interval
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.base_model import base_hash
from stepdistill.students.draw.call import PipelineCall, generate, teacher_call
from stepdistill.students.several import Students
from stepdistill.training.recipe import Run

N = 2048
SHIPPED = 256  # rows of the features that the quickstart compares with


def prompts(n: int = N) -> list[str]:
    """The benchmark's prompts: the subgroups with at least 16 drawings, in turn."""
    pool = emoji.prompts()
    return [pool[i % len(pool)] for i in range(n)]


@cache
def extractor() -> Extractor:
    """The benchmark's features, 64 pixels."""
    return efficientnet_lite0()


@cache
def data_features(seed: int) -> Tensor:
    """Features of drawings that belong to each prompt, drawn and augmented at random."""
    rng, source = random.Random(seed), emoji.packed_sheet()
    pool: dict[str, list[emoji.Drawing]] = {}
    for drawing in emoji.subjects():
        pool.setdefault(drawing.subgroup, []).append(drawing)
    pixels = emoji.pixels([emoji.image(source, rng.choice(pool[prompt]), rng) for prompt in prompts()])
    return extractor()((pixels * 127.5 + 127.5).round().to(torch.uint8))


def reference(name: str, run: Run, work: Path) -> StoredFeatures:
    """Features of the teacher at full steps, seeds A and B; measured once, a part of them shipped."""
    file = work / f"{name}-reference.safetensors"
    if not file.exists():
        stored = taught(name, run, prompts())
        work.mkdir(parents=True, exist_ok=True)
        stored.save(file)
        part = {k: v[:SHIPPED] for k, v in stored.features.items()}
        StoredFeatures(part, prompts(SHIPPED), stored.facts).save(emoji.HERE / f"{name}-reference.safetensors")
    return StoredFeatures.load(file)


def taught(name: str, run: Run, captions: list[str]) -> StoredFeatures:
    """Features of the teacher at the run's steps and guidance, seeds A and B."""
    pipe = run.family.load()
    steps, guidance_scale = run.train.teacher_steps, run.teacher_guidance_scale
    row = teacher_call(run.family, pipe, steps, guidance_scale, f"{name}, seeds")
    features = {
        key: extractor()(generate(pipe, row, captions, seed, progress=True)[0])
        for key, seed in (("reference", SEED_A), ("floor", SEED_B))
    }
    facts = {
        "teacher": name,
        "teacher_sha256": base_hash(pipe, run.family),
        "teacher_steps": str(run.train.teacher_steps),
        "teacher_guidance_scale": str(run.teacher_guidance_scale),
        "features": extractor().identity.id,
    }
    return StoredFeatures(features, captions, facts)


def figures(drawer: DiffusionPipeline | Students, row: PipelineCall, ref: StoredFeatures) -> dict[str, Any]:
    """Excess, paired distance, diversity over the teacher's, and cost of one way to sample."""
    return judged(*drawn(drawer, row, ref), ref)


def drawn(drawer: DiffusionPipeline | Students, row: PipelineCall, ref: StoredFeatures) -> tuple[Tensor, Cost]:
    """Features of the images of one way to sample, in the order of the reference, and what they cost."""
    images, cost = generate(drawer, row, ref.prompts, SEED_B, progress=True)
    return extractor()(images), cost


def places(ref: StoredFeatures) -> Tensor:
    """Which of the reference's prompts an image is of, (N,)."""
    return torch.tensor([sorted(set(ref.prompts)).index(prompt) for prompt in ref.prompts])


def judged(student_features: Tensor, cost: Cost, ref: StoredFeatures) -> dict[str, Any]:
    """What `figures` says of images with these features."""
    n = len(student_features)
    teacher, student = (
        Sampled(name=role, role=role, features=features)
        for role, features in (("teacher", ref.features["floor"]), ("student", student_features))
    )
    stored = ref.features["reference"]
    against = Reference(stats=Stats.of(stored), features=stored, paired=True, facts={})
    key = extractor().identity.key
    metrics = measured([teacher, student], against, key, ("paired", "diversity"), places(ref))[1]["metrics"]
    return {
        "n": n,
        "seeds": [SEED_A, SEED_B],
        "excess": metrics["delta_vs_teacher"][key]["value"],
        "ci95": metrics["delta_vs_teacher"][key]["ci95"],
        "paired": metrics["paired"]["features"],
        "diversity": metrics["diversity_vs_teacher"]["value"],
        "calls": cost.calls / cost.batches,
        "nfe": cost.rows / n,
        "seconds_per_image": cost.seconds / n,
    }


def spans(**intervals: Interval) -> dict[str, Any]:
    """Values and their intervals, for a row."""
    values = {key: one.value for key, one in intervals.items()}
    return values | {f"{key}_ci95": [one.low, one.high] for key, one in intervals.items()}


class Results:
    """`eval/results/NAME.json`: rows by key, added one by one by any number of processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield json.loads(self.file.read_text()) if self.file.exists() else {}

    def once(self, key: str, make: Callable[[], Mapping[str, Any]], **facts: object) -> None:
        """Measure a row unless it is there already with the same facts."""
        with self._locked() as rows:
            if key in rows and all(rows[key].get(name) == value for name, value in facts.items()):
                return
        self.put(key, {**facts, **make()})

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a row, in place of what was there."""
        with self._locked() as rows:
            rows[key] = dict(row)
            write_text(self.file, json.dumps(dict(sorted(rows.items())), indent=1))
        print(f"{key}: {json.dumps(row)}", flush=True)
