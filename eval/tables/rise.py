"""PSO on a reward of 0 or 1, for which the optimum is known.

The log-odds of 1 rise by 1 / beta, and the images of either kind stay what they were. A student of few steps comes as
near to it as its reward is linear in the noises of its steps, which is measured, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.pixels import to_uint8
from stepdistill.core.progress import progress
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import few_step
from stepdistill.evaluation.metrics.jackknife import (
    Interval,
    block_sizes,
    interval,
    mean_interval,
    ratio_of_means,
    replicates,
)
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.families.base import Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.rewards.custom import Custom
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.students.contract import CONTRACT, read_contract
from stepdistill.students.single import in_memory
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, prompts, spans
from tables.linear_share import student_share
from tables.recipes import recipes

WHITE = WhiteBorder()
RISES = (1.0, 2.0)  # of the log-odds of a white border, which beta is set for
STEPS, LEARNING_RATE = 300, 5e-4
STARTS, AGAIN = 256, 8  # starting noises, and images of each


def measure_rises(name: str, results: Results, work: Path) -> None:
    """PSO with the beta of each rise, and the most that could be reached."""
    for rise in RISES:
        measure_rise(name, rise, results, work)


def is_white(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 or 0 (B,) for each image: whether more than half of its border is white."""
    return (WHITE.load(torch.device("cpu"))(images, prompts) > 0.5).float()


def measure_rise(name: str, rise: float, results: Results, work: Path) -> None:
    """PSO on the reward `is_white`, with the beta for which its log-odds rise by `rise` for each starting noise."""
    run = load_config(Run, recipes(name, "feedback")["pso_online"], [])
    pipe, out = run.family.load(), work / "feedback" / f"{name}-rise-{rise:g}"
    numbers = math.prod(run.family.latent_shape(pipe, *run.family.native_size(pipe)))
    method: Any = run.method  # a difference of 1 in a reward of standard deviation 1: the rise is D / beta
    reward = Custom(function="tables.rise.is_white")
    method = replace(method, reward=reward, std=1.0, beta=numbers / rise, clip_range=None)
    train = replace(run.train, max_train_steps=STEPS, learning_rate=LEARNING_RATE, output_dir=str(out))
    run = replace(run, method=method, train=train)
    results.once(f"{name}/rise {rise:g}", partial(risen, run, rise), config=config_digest(run))
    results.once(f"{name}/linear share", partial(linear, run))


def linear(run: Run) -> dict[str, Any]:
    """The most that training can reach of a small rise, see `tables.linear_share`."""
    assert run.start_from is not None
    return spans(share=student_share(run.family, Path(run.start_from), is_white))


def risen(run: Run, rise: float) -> dict[str, Any]:
    """How often `is_white` is 1 before and after, and how often it should be, over `STARTS` noises, `AGAIN` times each.

    The paths of a pair share their starting noise, so the optimum is one for each noise: of odds p / (1 - p) before,
    p e^rise / (1 - p) after. The images with and without a white border keep their laws: the excess of either is the
    distance from other images of the student before, less that of the student before itself.
    """
    out = Path(run.train.output_dir)
    if not (out / CONTRACT).exists():
        distill(replace(run, train=replace(run.train, resume_from_checkpoint="latest")))
    assert run.start_from is not None
    start = Path(run.start_from)
    before, after, again = (paths(run.family, *one) for one in ((start, SEED_A), (out, SEED_A), (start, SEED_B)))
    p, reached = before.white.mean(1), after.white.mean(1)
    odds = p * math.exp(rise)
    wanted = odds / (1 - p + odds)
    shares = {"before": p, "wanted": wanted, "after": reached}
    found = {key: mean_interval(share) for key, share in shares.items()}
    found["reached"] = ratio_of_means(reached - p, wanted - p)
    for key, white in (("excess_white", 1), ("excess_other", 0)):
        found[key] = excess_within(*(one.features[one.white == white] for one in (after, before, again)))
    found["apart"] = apart(before.features[before.white == 1], again.features[again.white == 0])
    return {"n": STARTS * AGAIN, "rise": rise, "train_steps": run.train.max_train_steps} | spans(**found)


def excess_within(after: Tensor, before: Tensor, again: Tensor) -> Interval:
    """Frechet distance of features (N, D) after training from other ones before it, less that of those before it.

    The first ones of all three are taken, of equal number.
    """
    n = min(map(len, (after, before, again)))
    student, floor = replicates([after[:n], before[:n]], again[:n])
    return interval(student - floor, block_sizes(n))


def apart(white: Tensor, other: Tensor) -> Interval:
    """Frechet distance of the images with a white border from those without, as a scale."""
    n = min(len(white), len(other))
    return interval(replicates([white[:n]], other[:n])[0], block_sizes(n))


class Paths(NamedTuple):
    """Several images of each starting noise: `is_white` (STARTS, AGAIN), and features (STARTS, AGAIN, D)."""

    white: Tensor
    features: Tensor


@torch.no_grad()
def paths(family: Family, folder: Path, seed: int) -> Paths:
    """Images of a student, which share their starting noises whatever the seed of its steps."""
    contract = read_contract(folder)
    pipe, backbone = in_memory(folder, contract, family)
    schedule = family.schedule(pipe.scheduler)
    denoise = Denoiser(backbone, "student", schedule, family.kind(pipe), family.call, grad=False)
    shape, captions, made = family.latent_shape(pipe, *contract.resolution), prompts(STARTS), []
    for i in progress(range(STARTS), title=folder.name, unit="noise", shown=True):
        x_t, fresh = noise_of(SEED_B, i, shape).expand(AGAIN, *shape), torch.Generator().manual_seed(STARTS * seed + i)
        ends = few_step(
            denoise,
            schedule,
            contract.sampler(),
            x_t,
            family.condition(pipe, [captions[i]] * AGAIN),
            lambda _, fresh=fresh: torch.randn(AGAIN, *shape, generator=fresh),
        )
        images = (family.decode(pipe, ends) / 2 + 0.5).clamp(0, 1)
        made.append(Paths(is_white(images, []), extractor()(to_uint8(images))))
    return Paths(*(torch.stack(part) for part in zip(*made, strict=True)))
