"""Why LCM on `tiny-sd3` is worse than plain Euler: its fixed point, and students of other settings beside it.

The optimum of LCM's loss is known: at x_t it is the end of the teacher's guided solver on the training grid, from x_t.
Such a student needs no training, and its excess is what perfect training would give. A trained student's distance to it
is its gap, `|f(x_t) - end|^2 / |end|^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.core.denoise import Condition, Denoise, guided
from stepdistill.core.pixels import to_uint8
from stepdistill.core.prediction import Estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.schedule import NoiseSchedule, Rectified, per_sample
from stepdistill.core.solvers import Sampler, few_step, follow
from stepdistill.data.bundled import emoji
from stepdistill.evaluation.spec import SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, LoraSpec
from stepdistill.students.contract import CONTRACT
from stepdistill.students.draw.call import student_call
from stepdistill.students.load import load_student
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, figures, judged, prompts
from tables.recipes import recipes
from tables.render import STEPS

GAPS = 64  # noises, other than those of training, that gaps are measured on
LEVELS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the grid, from its end to its start
W = 7.0  # guidance of the teacher
GRID = 50  # of the exact student that gaps are distances to
EXACT = ((10, 1), (50, 1), (50, 4))  # steps of the solver, and of LCM's sampler
STUDENTS: dict[str, tuple[str, Sequence[str]]] = {  # recipe, and what is other than there
    "as it was": ("lcm", []),
    "lr 1e-3, N = 20": ("lcm", ["train.learning_rate=1e-3", "method.num_ddim_timesteps=20"]),
    "regression": ("regression", []),
    "from regression": ("lcm", ["lora.init_from=runs/tables/lcm/regression"]),
}


def measure_lcm(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Excess and gaps of the exact student, of the teacher and of trained ones, on the features that are shipped."""
    if name != "tiny-sd3":
        return
    files, ref = recipes(name, "consistency"), StoredFeatures.load(emoji.HERE / f"{name}-reference.safetensors")
    run, kept = load_config(Run, files["lcm"], []), work / "lcm" / "states.safetensors"
    if not rows or "exact" in rows:
        for n, steps in EXACT:
            make = partial(exact_figures, run, n, steps, ref)
            results.once(f"exact, N = {n}/{steps}", make, guidance_scale=W, grid=n)
    if not rows or "teacher" in rows:
        for steps in STEPS["consistency"]:
            make = partial(teacher_figures, run, 1.0, steps, ref)
            results.once(f"teacher, unguided/{steps}", make, guidance_scale=1.0)
        for label, w in {"teacher, unguided": 1.0, "teacher, guided": W}.items():
            results.once(f"{label}/gap", partial(teacher_gaps, run, w, kept), guidance_scale=w)
    for label, (method, overrides) in STUDENTS.items():
        if rows and label not in rows:
            continue
        out = work / "lcm" / label.replace(" ", "_")
        settings = [*overrides, f"train.output_dir={out}", "train.resume_from_checkpoint=latest"]
        run = load_config(Run, files[method], settings)
        facts = {"config": config_digest(run), "overrides": list(overrides)}
        for steps in STEPS["consistency"]:
            results.once(f"{label}/{steps}", partial(student_figures, run, steps, ref), **facts)
            if steps > 1 and run.method.sampler(Rectified(), steps).eta:  # it adds fresh noise between its steps
                results.once(f"{label}, by Euler/{steps}", partial(euler_figures, run, steps, ref), **facts)
        results.once(f"{label}/gap", partial(student_gaps, run, kept), **facts)


def alone(run: Run, pipe: DiffusionPipeline) -> Denoiser:
    """The network that a pipeline holds, with what is on it."""
    schedule, kind = run.family.schedule(pipe.scheduler), run.family.kind(pipe)
    backbone = Backbone(run.family.network(pipe), LoraSpec(), ())
    return Denoiser(backbone, TEACHER, schedule, kind, run.family.call)


def teacher_of(run: Run, pipe: DiffusionPipeline, guidance_scale: float) -> Denoise:
    """The teacher at a guidance scale."""
    return guided(alone(run, pipe), run.family.unconditional(pipe), guidance_scale)


def exact(teacher: Denoise, schedule: NoiseSchedule, n: int) -> Denoise:
    """The optimum of LCM's loss: from any time of the grid of n steps, the solver's end."""
    times = schedule.grid(n).flip(0).tolist()

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        rest = times[times.index(t[0].item()) :]
        end = follow(teacher, schedule, rest, x_t, cond)
        alpha, sigma = schedule(t[:1])
        return Estimate(end, (x_t - alpha * end) / sigma)

    return call


def exact_figures(run: Run, n: int, steps: int, ref: StoredFeatures) -> dict[str, Any]:
    """Figures of the exact student of a solver in n steps."""
    pipe, run = run.family.load(), replace(run, method=replace(run.method, num_ddim_timesteps=n))
    schedule = run.family.schedule(pipe.scheduler)
    return figures_of(run, pipe, exact(teacher_of(run, pipe, W), schedule, n), run.method.sampler(schedule, steps), ref)


def teacher_figures(run: Run, guidance_scale: float, steps: int, ref: StoredFeatures) -> dict[str, Any]:
    """Figures of the teacher in LCM's sampler; unguided it is the student before training."""
    pipe = run.family.load()
    sampler = run.method.sampler(run.family.schedule(pipe.scheduler), steps)
    return figures_of(run, pipe, teacher_of(run, pipe, guidance_scale), sampler, ref)


def euler_figures(run: Run, steps: int, ref: StoredFeatures) -> dict[str, Any]:
    """Figures of a trained student without the fresh noise between its steps."""
    pipe = student(run)
    sampler = replace(run.method.sampler(run.family.schedule(pipe.scheduler), steps), eta=0.0)
    return figures_of(run, pipe, alone(run, pipe), sampler, ref)


@torch.no_grad()
def figures_of(
    run: Run, pipe: DiffusionPipeline, denoise: Denoise, sampler: Sampler, ref: StoredFeatures
) -> dict[str, Any]:
    """Figures of an estimator, with the starting and the fresh noise of the tables."""
    schedule, features = run.family.schedule(pipe.scheduler), []
    shape = run.family.latent_shape(pipe, *run.family.native_size(pipe))
    for ids in torch.arange(len(ref.prompts)).split(64):
        fresh = [fresh_noise(SEED_B, int(i)) for i in ids]
        x_t = torch.stack([noise_of(SEED_B, int(i), shape) for i in ids])
        cond = run.family.condition(pipe, [ref.prompts[i] for i in ids])
        latents = few_step(denoise, schedule, sampler, x_t, cond, partial(noises, shape, fresh))
        features.append(extractor()(to_uint8((run.family.decode(pipe, latents) / 2 + 0.5).clamp(0, 1))))
    row = judged(torch.cat(features), Cost(batches=1), ref)
    return {key: row[key] for key in ("n", "seeds", "excess", "ci95", "paired", "diversity")}


def noises(shape: Sequence[int], fresh: Sequence[torch.Generator], step: int) -> Tensor:
    """The fresh noise of several images after a step."""
    return torch.stack([torch.randn(tuple(shape), generator=each) for each in fresh])


def student_figures(run: Run, steps: int, ref: StoredFeatures) -> dict[str, Any]:
    """Figures of a trained student in a plain pipeline."""
    pipe = student(run)
    return figures(pipe, student_call(run.family, run.method, pipe, steps), ref)


def student(run: Run) -> DiffusionPipeline:
    """A pipeline with the student of a config, which is trained unless it is there."""
    out = Path(run.train.output_dir)
    if not (out / CONTRACT).exists():
        distill(run)
    pipe: Any = run.family.load()
    scheduler = pipe.scheduler
    load_student(pipe, out)
    pipe.scheduler = scheduler  # the teacher's, which sets the noise process
    pipe.fuse_lora()
    return pipe


def student_gaps(run: Run, file: Path) -> dict[str, Any]:
    """Gaps of a trained student."""
    pipe = student(run)
    return gaps(run, alone(run, pipe), file)


def teacher_gaps(run: Run, guidance_scale: float, file: Path) -> dict[str, Any]:
    """Gaps of the teacher's own estimate of clean data; unguided it is the student before training."""
    pipe = run.family.load()
    return gaps(run, teacher_of(run, pipe, guidance_scale), file)


@torch.no_grad()
def gaps(run: Run, denoise: Denoise, file: Path) -> dict[str, Any]:
    """The distance to the exact student by kind of state and share of the grid that is left."""
    pipe = run.family.load()
    cond = run.family.condition(pipe, prompts(GAPS))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(states(run, pipe, cond), file)
    found, schedule = load_file(file), run.family.schedule(pipe.scheduler)
    row: dict[str, Any] = {"n": GAPS, "seed": SEED_B, "grid": GRID}
    for key in sorted(key for key in found if not key.endswith("/end")):
        x_t, end = found[key], found[f"{key}/end"]
        t = schedule.grid(GRID)[round(float(key.split("/")[1]) * GRID)]
        x0 = denoise(x_t, per_sample(t.item(), x_t), cond).x0
        row[key] = ((x0 - end).square().sum() / end.square().sum()).item()
    return row


def states(run: Run, pipe: DiffusionPipeline, cond: Condition) -> dict[str, Tensor]:
    """States on the guided trajectories of held-out noises, their ends noised anew, and the exact student's answers."""
    teacher, schedule = teacher_of(run, pipe, W), run.family.schedule(pipe.scheduler)
    shape = run.family.latent_shape(pipe, *run.family.native_size(pipe))
    x_t, z = (torch.stack([noise_of(SEED_B, k * GAPS + i, shape) for i in range(GAPS)]) for k in range(2))
    times = schedule.grid(GRID).flip(0).tolist()
    found, starts = {}, {GRID - round(level * GRID): level for level in LEVELS}
    for k, (t, s) in enumerate(pairwise(times)):
        if k in starts:
            found[f"trajectory/{starts[k]}"] = x_t
        x_t = follow(teacher, schedule, [t, s], x_t, cond)
    found |= {f"{key}/end": x_t.clone() for key in found}
    for k, level in starts.items():
        if k:
            noised = schedule.add_noise(x_t, z, per_sample(times[k], x_t))
            found |= {f"data/{level}": noised, f"data/{level}/end": follow(teacher, schedule, times[k:], noised, cond)}
    return found
