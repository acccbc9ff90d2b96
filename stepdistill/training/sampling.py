"""Sampling of student and teacher during and after training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition, with_scale
from stepdistill.core.image_files import upright
from stepdistill.core.pixels import clips_of, to_uint8
from stepdistill.core.random import VALIDATION, fresh_noise, noise_of, sample_rng
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data.images import Crop
from stepdistill.evaluation.metrics.straightness import paths
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.methods.base import Tuning
from stepdistill.networks.roles import TEACHER
from stepdistill.students.draw.sheet import image_grid
from stepdistill.training.logs import Logs
from stepdistill.training.setup import Session
from stepdistill.training.sizes import Size
from stepdistill.training.teacher import TeacherSampler


def validation_noise(session: Session, ids: Iterable[int], size: Size | None = None) -> Tensor:
    """Standard normal latents (B, C, h, w) of the validation images `ids`; none is a training sample's noise.

    Args:
        size: height and width in pixels; None is the run's first.
    """
    return _noise(session, session.run.train.validation_seed, (VALIDATION + i for i in ids), size)


def _noise(session: Session, seed: int, ids: Iterable[int], size: Size | None = None) -> Tensor:
    rows = [noise_of(seed, i, session.batches.shape_at(size)) for i in ids]
    return torch.stack(rows).to(session.accelerator.device)


def validation_images(session: Session, prompts: Sequence[str]) -> Tensor | None:
    """The images (B, 3, H, W) in [-1, 1] that the videos of validation prompts begin with; None without any.

    Each is resized until it covers the size of the run, and its centre is cut out.
    """
    spec = session.run.train
    if not spec.validation_images:
        return None
    crop = Crop(session.batches.size, 0.5, 0.5, False, "lanczos")
    files = dict(zip(spec.validation_prompts, spec.validation_images, strict=True))
    return torch.stack([crop(upright(Path(files[prompt]))) for prompt in prompts])


@torch.no_grad()
def sample_student(session: Session, prompts: list[str], ids: Sequence[int], size: Size | None = None) -> Tensor:
    """The student's latents under its contract; row i starts from the noise of `ids[i]`.

    Args:
        size: height and width in pixels; None is the run's first.
    """
    method = session.run.method
    return _sample_few(session, method.student_role(), method.sampler(session.schedule), prompts, ids, size)


def _sample_few(
    session: Session, role: str, sampler: Sampler, prompts: list[str], ids: Sequence[int], size: Size | None
) -> Tensor:
    """Latents of a role under a sampler."""
    size = size or session.batches.size
    context, seed, shape = session.context(0, size), session.run.train.validation_seed, session.batches.shape_at(size)
    denoise = context.guided(role, sampler.guidance_scale)
    denoise = with_scale(denoise, sampler.adapter_scale)

    generators = [fresh_noise(seed, VALIDATION + i) for i in ids]

    def fresh(_: int) -> Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(session.accelerator.device)

    condition = session.batches.with_images(prompts, validation_images(session, prompts))
    return few_step(denoise, context.schedule, sampler, validation_noise(session, ids, size), condition, fresh)


@torch.no_grad()
def sample_teacher(session: Session, prompts: list[str], ids: Sequence[int], size: Size | None = None) -> Tensor:
    """The teacher's latents from the same noises.

    In `train.teacher_steps`, or the next smaller number that divides 1,000, the length of the usual table. A few-step
    model that is tuned takes its own steps.
    """
    method = session.run.method
    if isinstance(method, Tuning):
        return _sample_few(session, TEACHER, method.few_steps(session.schedule), prompts, ids, size)
    spec = session.run.train
    steps = max(n for n in range(1, spec.teacher_steps + 1) if 1000 % n == 0)
    noise = validation_noise(session, ids, size)
    images = validation_images(session, prompts)
    return TeacherSampler(session, size).sample(prompts, noise, steps, session.run.teacher_guidance_scale, images)


def teacher_facts(session: Session) -> dict[str, object]:
    """What `sample_teacher` depends on, beside prompts and noises."""
    run, spec = session.run, session.run.train
    facts: dict[str, object] = {
        "teacher_sha256": session.digest,
        "seed": spec.validation_seed,
        "steps": spec.teacher_steps,
        "guidance_scale": run.teacher_guidance_scale,
        "shape": list(session.batches.shape),
        "dtype": str(session.dtype),
    }
    if isinstance(run.method, Tuning):
        sampler = run.method.sampler(session.schedule)
        facts |= {"steps": len(sampler.timesteps), "guidance_scale": sampler.guidance_scale, "sampler": repr(sampler)}
    return facts


def relative_straightness(session: Session, count: int = 256) -> float:
    """Straightness over transport cost of the student's paths in 32 steps, from noises that it never saw."""
    run, context = session.run, session.context(0, session.batches.size)
    scale = run.method.sampler(context.schedule).guidance_scale
    denoise = context.guided(run.method.student_role(), scale)
    straightness = cost = 0.0
    for part in torch.arange(count).split(run.train.train_batch_size):
        ids = part.tolist()
        cond = _data_condition(session, ids)
        followed = paths(denoise, context.schedule, _noise(session, -1, ids), cond)
        straightness, cost = straightness + followed.straightness * len(ids), cost + followed.cost * len(ids)
    return straightness / cost if cost else math.nan


def _data_condition(session: Session, ids: Sequence[int]) -> Condition:
    """The condition of items of the run's data, in turn."""
    data, batches = session.run.data, session.batches
    items = [i % len(data) for i in ids]
    if isinstance(session.run.family, ImageToVideo):
        return batches.batch_of([data.sample(i, sample_rng(0, i)) for i in items], ids).cond
    return batches.condition([data.captions(i)[0] for i in items])


@torch.no_grad()
def to_images(session: Session, latents: Tensor) -> Tensor:
    """Float images (B, 3, H, W), or clips (B, F, 3, H, W), in [0, 1] on the cpu."""
    return clips_of((session.decode(latents, "images are drawn").float().cpu() / 2 + 0.5).clamp(0, 1))


def draw_validation(session: Session, step: int, logs: Logs) -> None:
    """Validation images at fixed prompts and seeds: the teacher above the student, under its contract."""
    prompts, folder = list(session.run.train.validation_prompts), Path(session.run.train.output_dir) / "samples"
    if not prompts:
        return
    folder.mkdir(exist_ok=True)
    for size in session.shown_sizes:
        drawn = [make(session, prompts, range(len(prompts)), size) for make in (sample_teacher, sample_student)]
        images = [to_uint8(to_images(session, latents)) for latents in drawn]
        sheet = image_grid([("teacher", images[0]), (f"student, step {step}", images[1])], prompts)
        shape = "" if size == session.batches.size else f"-{size[0]}x{size[1]}"
        sheet.save(folder / f"step-{step:06d}{shape}.png")
        logs.images(step, f"validation{shape}", [sheet])
