"""The table of sizes: a student that is trained at one size and one that is trained at three, at each of the three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.evaluation.measure import Reference, Sampled, measured
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.draw.call import generate, student_call, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from stepdistill.training.sizes import Size, listed_sizes
from tables.benchmark import Results, extractor, judged, prompts
from tables.recipes import recipes, seconds, trained
from tables.render_sizes import STUDENTS

N = 512


def measure_sizes(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Both students of a teacher, and the one that they start from, at each of the sizes."""
    files = recipes(name, "sizes")
    runs = {arm: load_config(Run, file, []) for arm, file in files.items()}
    sizes = listed_sizes(runs["many"].train.resolution or 0)
    refs = {size: reference_at(name, runs["many"], size, work / "sizes") for size in sizes}
    places = {arm: trained(file) for arm, file in files.items()}
    places["start"] = Path(str(runs["one"].lora.init_from))
    facts = {"teacher": name, "config": config_digest(runs["many"]), "steps": runs["many"].train.max_train_steps}
    for size, ref in refs.items():
        if not rows or called(size) in rows:
            measure = partial(at_size, runs["many"], places, size, ref)
            results.once(f"{name}/{called(size)}", measure, **facts, size=list(size))


def called(size: Size) -> str:
    """A size in a row's key."""
    return f"{size[0]}x{size[1]}"


def reference_at(name: str, run: Run, size: Size, work: Path) -> StoredFeatures:
    """Features of the teacher's images of a size, seeds A and B; measured once."""
    file = work / f"{name}-{called(size)}.safetensors"
    if not file.exists():
        pipe, captions = run.family.load(), prompts(N)
        steps, scale = run.train.teacher_steps, run.teacher_guidance_scale
        row = teacher_call(run.family, pipe, steps, scale, f"{name}, {called(size)}", size)
        features = {
            key: extractor()(generate(pipe, row, captions, seed, progress=True, size=size)[0])
            for key, seed in (("reference", SEED_A), ("floor", SEED_B))
        }
        work.mkdir(parents=True, exist_ok=True)
        StoredFeatures(features, captions, {"teacher": name, "size": called(size)}).save(file)
    return StoredFeatures.load(file)


def drawn_at(run: Run, place: Path, size: Size, captions: list[str]) -> tuple[Tensor, Cost]:
    """Features of a student's images of a size, drawn as the contract of the run's method says, and their cost."""
    pipe = run.family.load()
    sampler = run.method.sampler(run.family.schedule(pipe.scheduler))
    call = student_call(run.family, run.method, pipe, len(sampler.timesteps))
    load_student(pipe, place)
    pipe.fuse_lora()
    images, cost = generate(pipe, call, captions, SEED_B, progress=True, size=size)
    return extractor()(images), cost


def at_size(run: Run, places: Mapping[str, Path], size: Size, ref: StoredFeatures) -> dict[str, Any]:
    """What each student's images of a size are like, and the excess of the one of one size over that of several."""
    found = {arm: drawn_at(run, places[arm], size, ref.prompts) for arm in STUDENTS}
    each = {arm: judged(features, cost, ref) for arm, (features, cost) in found.items()}
    stored, key = ref.features["reference"], extractor().identity.key
    many, one = (
        Sampled(name=arm, role=role, features=found[arm][0]) for arm, role in (("many", "teacher"), ("one", ""))
    )
    against = Reference(stats=Stats.of(stored), features=stored, paired=True, facts={})
    gain = measured([many, one], against, key, ())[1]["metrics"]["delta_vs_teacher"][key]
    trained_in = {arm: round(seconds(place)) for arm, place in places.items()}
    return {"n": N, **each, "gain": gain["value"], "gain_ci95": gain["ci95"], "train_seconds": trained_in}
