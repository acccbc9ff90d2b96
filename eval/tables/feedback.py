"""The table of tuning: what feedback and PSO do to a few-step student, for better and for worse.

Every method climbs one reward, how white the border of an image is, from one student in its own number of steps. The
table shows that reward beside what may be lost by it: a reward that nobody trained on, the distance to the teacher,
diversity, and the energy of fine detail.

`binary` is a reward of 0 or 1. For that PSO has a known optimum: the log-odds of 1 rise by 1 / beta, and the images of
either kind stay what they were.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from stepdistill.core.progress import progress
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import few_step
from stepdistill.data import ImageFolder
from stepdistill.evaluation.metrics.jackknife import mean_interval, ratio_of_means
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.base import Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.rewards.custom import Custom
from stepdistill.networks.rewards.quality import logistic_head
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.students.contract import CONTRACT, read_contract
from stepdistill.students.draw.call import PipelineCall, generate, teacher_call
from stepdistill.students.load import load_student
from stepdistill.students.single import in_memory
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, judged, prompts, reference
from tables.recipes import recipes, seconds, trained, warm_start

CPU = torch.device("cpu")
WHITE = WhiteBorder()
WHITE_ENOUGH = 0.7  # of the border, for an image that offline PSO moves to
BEFORE = "before"
RISES = (1.0, 2.0)  # of the log-odds of a white border, which PSO's beta is set for
ONE_STEP = 512  # images in one step
STARTS, AGAIN = 256, 8  # starting noises, and images of each


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
    for rise in RISES if not rows or "binary" in rows else ():
        measure_rise(name, rise, results, work)


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
    for key, values in scores.items():
        mean = mean_interval(values)
        row |= {key: mean.value, f"{key}_ci95": [mean.low, mean.high]}
    return row


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


def is_white(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 or 0 (B,) for each image: whether more than half of its border is white."""
    return (WHITE.load(CPU)(images, prompts) > 0.5).float()


def measure_rise(name: str, rise: float, results: Results, work: Path) -> None:
    """PSO on the reward `is_white`, with the beta for which its log-odds rise by `rise` for each starting noise."""
    run = load_config(Run, recipes(name, "feedback")["pso_online"], [])
    pipe, out = run.family.load(), work / "feedback" / f"{name}-rise-{rise:g}"
    numbers = math.prod(run.family.latent_shape(pipe, *run.family.native_size(pipe)))
    method: Any = run.method  # a difference of 1 in a reward of standard deviation 1: the rise is D / beta
    reward = Custom(function="tables.feedback.is_white")
    method = replace(method, reward=reward, std=1.0, beta=numbers / rise, clip_range=None)
    run = replace(run, method=method, train=replace(run.train, output_dir=str(out)))
    results.once(f"{name}/rise {rise:g}", partial(risen, run, rise), config=config_digest(run))


def risen(run: Run, rise: float) -> dict[str, Any]:
    """How often `is_white` is 1 before and after, and how often it should be, over `STARTS` noises, `AGAIN` times each.

    The paths of a pair share their starting noise, so the optimum is one for each noise: of odds p / (1 - p) before,
    p e^rise / (1 - p) after.
    """
    out = Path(run.train.output_dir)
    if not (out / CONTRACT).exists():
        distill(replace(run, train=replace(run.train, resume_from_checkpoint="latest")))
    assert run.start_from is not None
    p, after = (whites(run.family, Path(folder)) for folder in (run.start_from, out))
    odds = p * math.exp(rise)
    shares = {"before": p, "wanted": odds / (1 - p + odds), "after": after}
    spans = {key: mean_interval(share) for key, share in shares.items()}
    row: dict[str, Any] = {"n": STARTS * AGAIN, "rise": rise, "train_steps": run.train.max_train_steps}
    for key, span in spans.items():
        row |= {key: span.value, f"{key}_ci95": [span.low, span.high]}
    reached = ratio_of_means(shares["after"] - p, shares["wanted"] - p)
    return row | {"reached": reached.value, "reached_ci95": [reached.low, reached.high]}


@torch.no_grad()
def whites(family: Family, folder: Path) -> Tensor:
    """The share of images with a white border (STARTS,) of a student, for each starting noise."""
    contract = read_contract(folder)
    pipe, backbone = in_memory(folder, contract, family)
    schedule = family.schedule(pipe.scheduler)
    denoise = Denoiser(backbone, "student", schedule, family.kind(pipe), family.call, grad=False)
    shape, captions = family.latent_shape(pipe, *contract.resolution), prompts(STARTS)
    shares = []
    for i in progress(range(STARTS), title=folder.name, unit="noise", shown=True):
        x_t = noise_of(SEED_B, i, shape).expand(AGAIN, *shape)
        fresh = torch.Generator().manual_seed(i)
        ends = few_step(
            denoise,
            schedule,
            contract.sampler(),
            x_t,
            family.condition(pipe, [captions[i]] * AGAIN),
            lambda _, fresh=fresh: torch.randn(AGAIN, *shape, generator=fresh),
        )
        shares.append(is_white(family.decode(pipe, ends) / 2 + 0.5, []).mean())
    return torch.stack(shares)
