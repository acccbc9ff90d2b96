"""The README's table of guidance in one pass: how near each student is to the two passes it stands for, by scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.denoise import guided
from stepdistill.core.random import noise_of
from stepdistill.data import Trajectories
from stepdistill.evaluation.spec import SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.networks.roles import TEACHER, LoraSpec
from stepdistill.students.draw.call import generate, student_call, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, figures, prompts, taught
from tables.recipes import recipes, seconds, trained

SCALES = tuple(float(w) for w in range(1, 9))
IMAGES = 512  # for the excess at one scale
PATHS = 128  # trajectories, other than those of training, whose states R^2 is measured on


def measure_guidance(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Train each student that is missing, and compare it with two passes at every scale that it has."""
    for method, file in recipes(name, "guidance").items():
        if rows and method not in rows:
            continue
        run, out = load_config(Run, file, []), trained(file)
        facts = {
            "teacher": name,
            "config": config_digest(run),
            "train_steps": run.train.max_train_steps,
            "train_seconds": round(seconds(out)),
        }
        fixed = run.method.guidance_scale
        for w in SCALES if fixed is None else (fixed,):
            measure = partial(compared, name, load_config(Run, file, [f"train.teacher_guidance_scale={w}"]), out, work)
            results.once(f"{name}/{method}/{w:g}", measure, **facts, guidance_scale=w)


def compared(name: str, run: Run, out: Path, work: Path) -> dict[str, Any]:
    """One pass of a student beside two of its teacher, both at the run's `teacher_guidance_scale`."""
    w, steps, captions = run.teacher_guidance_scale, run.train.teacher_steps, prompts(IMAGES)
    teacher, pipe = run.family.load(), run.family.load()
    twice, once = (
        teacher_call(run.family, teacher, steps, w, f"two passes, w = {w:g}"),
        student_call(run.family, run.method, pipe, steps),
    )
    call = load_student(pipe, out)
    row: dict[str, Any] = {"n": IMAGES, "steps": steps, "states": PATHS * steps}
    if isinstance(call, GuidedCall):
        call.guidance_scale = w
        nets = call.attachment.adapters, run.family.network(teacher)
        added, base = (sum(p.numel() for p in net.parameters()) for net in nets)
        row["extra"] = added / base
    else:
        pipe.fuse_lora()
    row["r2"] = agreement(run, teacher, pipe, w, steps)
    file = work / "guided" / f"{name}-{w:g}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        taught(name, run, captions).save(file)
    row |= figures(pipe, once, StoredFeatures.load(file))
    cost = generate(teacher, twice, captions[:64], SEED_B)[1]
    again = generate(pipe, once, captions[:64], SEED_B)[1]
    hole = run.data.guidance_hole if isinstance(run.data, Trajectories) else None
    row |= {"two_passes": {"nfe": cost.rows / 64}, "time_ratio": again.seconds / cost.seconds}
    return row | {"unseen": hole is not None and hole[0] <= w <= hole[1]}


@torch.no_grad()
def agreement(run: Run, teacher: DiffusionPipeline, pipe: DiffusionPipeline, w: float, steps: int) -> float | None:
    """`1 - |y - y_w|^2 / |y_c - y_w|^2` over the states of two-pass trajectories; None where guidance does nothing.

    y is the one pass of the student in `pipe`, y_w the guided output and y_c the conditional one, each in the
    network's own form.
    """
    schedule, kind = run.family.schedule(teacher.scheduler), run.family.kind(teacher)
    shape = run.family.latent_shape(teacher, *run.family.native_size(teacher))
    cond, null = run.family.condition(teacher, prompts(PATHS)), run.family.unconditional(teacher)

    def alone(each: DiffusionPipeline) -> Denoiser:
        backbone = Backbone(run.family.network(each), LoraSpec(), ())
        return Denoiser(backbone, TEACHER, schedule, kind, run.family.call)

    base, one = alone(teacher), alone(pipe)
    x_t = torch.stack([noise_of(SEED_B, i, shape) for i in range(PATHS)])
    missed, moved = torch.zeros(()), torch.zeros(())
    for now, then in pairwise(schedule.grid(steps).flip(0).tolist()):
        t, s = (torch.full((PATHS,), time) for time in (now, then))
        est = guided(base, null, w)(x_t, t, cond)
        y_w, y_c, y = (base.native(each, t) for each in (est, base(x_t, t, cond), one(x_t, t, cond)))
        missed, moved = missed + (y - y_w).square().sum(), moved + (y_c - y_w).square().sum()
        x_t = schedule.add_noise(est.x0, est.eps, s)
    return None if moved == 0 else 1 - (missed / moved).item()
