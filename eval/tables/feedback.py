"""The table of tuning: what feedback and PSO do to a few-step student, for better and for worse.

Every method climbs one reward, how white the border of an image is, from one student in its own number of steps. The
table shows that reward beside what may be lost by it: a reward that nobody trained on, the distance to the teacher,
diversity, and the energy of fine detail.

`binary` is a reward of 0 or 1, see `tables.rise`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.core.pixels import high_frequency, to_uint8
from stepdistill.data import ImageFolder
from stepdistill.evaluation.metrics.jackknife import (
    mean_interval,
)
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.base import Family
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.rewards.quality import logistic_head
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.students.draw.call import PipelineCall, generate, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, judged, reference, spans
from tables.recipes import recipes, seconds, trained, warm_start
from tables.rise import measure_rises

CPU = torch.device("cpu")
WHITE = WhiteBorder()
WHITE_ENOUGH = 0.7  # of the border, for an image that offline PSO moves to
BEFORE = "before"
ONE_STEP = 512  # images in one step


def measure_feedback(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Tune the student of each config, and draw it beside the one that it started from."""
    for method, file in recipes(name, "feedback").items():
        if rows and method not in rows:
            continue
        run = load_config(Run, file, [])
        assert run.start_from is not None
        warm_start(run)
        ref, before = reference(name, run, work), Path(run.start_from)
        if isinstance(run.data, ImageFolder) and not Path(run.data.train_data_dir).exists():
            sample_images(name, run, Path(run.data.train_data_dir), WHITE_ENOUGH)
        judge = partial(scored, run.family, ref, cache(partial(quality, run.family, ref)))
        results.once(f"{name}/{BEFORE}", partial(judge, before), start=before.name)
        out = trained(file)
        facts = {"config": config_digest(run), "train_steps": run.train.max_train_steps}
        facts |= {"train_seconds": round(seconds(out))}
        results.once(f"{name}/{method}", partial(judge, out), **facts)
    if not rows or "binary" in rows:
        measure_rises(name, results, work)


def scored(
    family: Family,
    ref: StoredFeatures,
    held_out: Callable[[], Callable[[Tensor], Tensor]],
    folder: Path,
    call: PipelineCall | None = None,
) -> dict[str, Any]:
    """Rewards, fine detail, distance and diversity of a student's images, in its contract's steps or by `call`."""
    images, cost = drawn_by(family, folder, ref, call)
    features = extractor()(images)
    row, detail = judged(features, cost, ref), high_frequency(images.float() / 255)
    scores = {"reward": whiteness(images, ref.prompts), "held_out": held_out()(features), "detail": detail}
    return row | spans(**{key: mean_interval(values) for key, values in scores.items()})


def drawn_by(
    family: Family, folder: Path, ref: StoredFeatures, call: PipelineCall | None = None
) -> tuple[Tensor, Cost]:
    """Images (N, 3, H, W) uint8 of a student at the reference's prompts, and what they cost."""
    pipe = family.load()
    arguments = load_student(pipe, folder)
    fuse_loras(pipe)  # the same student in two thirds of the time
    call = call or PipelineCall(folder.name, pipe.scheduler, arguments, family)
    return generate(pipe, call, ref.prompts, SEED_B, progress=True)


def quality(family: Family, ref: StoredFeatures) -> Callable[[Tensor], Tensor]:
    """A reward that nobody trains on: the log-odds that features (N, D) are the teacher's at full steps, not in one."""
    pipe = family.load()
    call = teacher_call(family, pipe, 1, float(ref.facts["teacher_guidance_scale"]), "teacher, 1 step")
    bad = extractor()(generate(pipe, call, ref.prompts[:ONE_STEP], SEED_A, progress=True)[0])
    weight, bias = logistic_head(ref.features["reference"], bad)
    return lambda features: features @ weight + bias


def whiteness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The trained reward (N,) of uint8 images."""
    return WHITE.load(CPU)(images.float() / 255, prompts)


def sample_images(name: str, run: Run, folder: Path, least: float = -1.0) -> None:
    """Write those of the teacher's samples whose border is whiter than `least`, with their prompts."""
    source = load_config(Run, recipes(name, "consistency")["regression"], []).data
    pipe, rng, lines = run.family.load(), random.Random(0), []
    samples = [source.sample(i, rng) for i in range(len(source))]
    folder.mkdir(parents=True)
    for start in range(0, len(samples), 64):
        some = samples[start : start + 64]
        latents = torch.stack([one.latents for one in some if one.latents is not None])
        with torch.no_grad():
            images = to_uint8((run.family.decode(pipe, latents) / 2 + 0.5).clamp(0, 1))
        for i in (whiteness(images, []) > least).nonzero().flatten().tolist():
            file = f"{start + i:05d}.png"
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": some[i].prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} of {len(samples)} samples of {name} have a border above {least:g}")
