"""The README's table of control transfer: a style learnt on the teacher, put on its students, and back.

Gandikota & Bau 2025, https://arxiv.org/abs/2503.10637, section 3, measure it by CLIP scores; here a style moves a plain
statistic of the images, so that its effect is a number of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.pixels import saturation
from stepdistill.core.prediction import Estimate
from stepdistill.data.bundled import emoji
from stepdistill.evaluation.metrics.jackknife import mean_interval, ratio_of_means
from stepdistill.evaluation.spec import SEED_B
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.draw.call import PipelineCall, generate, student_call, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, prompts, spans
from tables.recipes import recipes, trained

Style = Callable[[Tensor], Tensor]  # of pixels (B, 3, H, W) in [-1, 1]
STUDENTS = {"tiny-sd": {"tscd": ("consistency", 4), "dmd2": ("distribution", 1)}}  # table, and steps to draw in
N, TRAINED, RATE, BATCH, RANK = 128, 60, 1e-3, 16, 8
STRENGTHS = (0.5, 1.0)  # as a slider has them


def grey(pixels: Tensor) -> Tensor:
    """Without colours."""
    return pixels.mean(1, keepdim=True).expand_as(pixels)


def red(pixels: Tensor) -> Tensor:
    """With half of what is green and blue."""
    tint = torch.tensor([1.0, 0.5, 0.5]).reshape(1, 3, 1, 1)
    return (pixels + 1) * tint - 1


def redness(images: Tensor) -> Tensor:
    """Mean of red less the mean of green and blue, (..., 3, H, W) in [0, 1]."""
    return images[..., 0, :, :].mean((-2, -1)) - images[..., 1:, :, :].mean((-3, -2, -1))


STYLES: dict[str, tuple[Style, Callable[[Tensor], Tensor]]] = {"grey": (grey, saturation), "red": (red, redness)}


def measure_transfer(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Each style, learnt on the teacher and on each student, on either."""
    for method, (table, steps) in STUDENTS.get(name, {}).items():
        if rows and method not in rows:
            continue
        file = recipes(name, table)[method]
        run, out = load_config(Run, file, []), trained(file)
        for style in STYLES:
            for origin, strength in (*(("teacher", each) for each in STRENGTHS), (method, 1.0)):
                measure = partial(carried, run, out, steps, style, origin, strength, work / "transfer")
                facts = {"teacher": name, "config": config_digest(run), "train_steps": TRAINED, "strength": strength}
                key = f"{name}/{style}, learnt on {origin}/{method}/{strength:g}"
                results.once(key, measure, **facts, steps=steps)


def carried(run: Run, out: Path, steps: int, style: str, origin: str, strength: float, kept: Path) -> Mapping[str, Any]:
    """What a style does to the teacher and to a student, and the share that crosses over.

    Args:
        out: the student's folder.
        steps: that the student draws in.
        origin: `teacher`, or the student's name: whose network the style was learnt on.
        kept: where styles and their effects are kept.
    """
    family, captions = run.family, prompts(N)
    folder = kept / f"{style}-{origin}"
    if not folder.exists():
        pipe, times = family.load(), None
        if origin != "teacher":
            times = student_sampler(run, pipe, steps)
            load_student(pipe, out)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        learn(family, pipe, STYLES[style][0], folder, times)

    def moved(on: str) -> Tensor:
        file = kept / f"{style}-{origin}-{strength:g}-on-{on}.safetensors"
        if not file.exists():
            pipe, w = family.load(), run.teacher_guidance_scale
            rows = {
                "teacher": teacher_call(family, pipe, run.train.teacher_steps, w, "teacher"),
                "student": student_call(family, run.method, pipe, steps),
            }
            if on != "teacher":
                load_student(pipe, out)
            row = rows["teacher" if on == "teacher" else "student"]
            save_file({"moved": effect(pipe, row, folder, strength, STYLES[style][1], captions)}, file)
        return load_file(file)["moved"]

    there, back = moved("teacher"), moved(out.name)
    share = ratio_of_means(back, there) if origin == "teacher" else ratio_of_means(there, back)
    means = {"on_teacher": mean_interval(there), "on_student": mean_interval(back)}
    return {"n": N, "seeds": [SEED_B]} | spans(**means, share=share)


def student_sampler(run: Run, pipe: Any, steps: int) -> tuple[float, ...]:  # noqa: ANN401
    """Where a student's steps begin."""
    return run.method.sampler(run.family.schedule(pipe.scheduler), steps).timesteps


def learn(
    family: Family,
    pipe: Any,  # noqa: ANN401
    style: Style,
    folder: Path,
    times: Sequence[float] | None = None,
    steps: int = TRAINED,
) -> None:
    """Train a LoRA on the network of `pipe`, by the plain denoising loss on restyled drawings, and save it.

    Args:
        pipe: the teacher, or a student that is fused into it. Its network keeps the LoRA.
        times: the noise levels of training; None is all of them.
    """
    net, schedule = family.network(pipe), family.schedule(pipe.scheduler)
    bone = Backbone(net, LoraSpec(rank=RANK), family.lora_targets(net))
    bone.add("style", Lora())
    denoiser = Denoiser(bone, "style", schedule, family.kind(pipe), family.call)
    rng, sheet, drawn = random.Random(0), emoji.packed_sheet(), emoji.subjects()
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(schedule.span[1] + 1) if times is None else torch.tensor(times)
    optimizer = torch.optim.Adam(list(bone.parameters_of("style").values()), lr=RATE)
    for _ in range(steps):
        chosen = [rng.choice(drawn) for _ in range(BATCH)]
        pixels = emoji.pixels([emoji.image(sheet, drawing, rng) for drawing in chosen])
        x0, cond = family.encode(pipe, style(pixels)), family.condition(pipe, [each.subgroup for each in chosen])
        t = levels[torch.randint(len(levels), (BATCH,), generator=generator)]
        eps = torch.randn(x0.shape, generator=generator)
        said = denoiser(schedule.add_noise(x0, eps, t), t, cond)
        loss = (denoiser.native(said, t) - denoiser.native(Estimate(x0, eps), t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    family.save_lora(folder, bone.state("style"), bone.lora_config("style"))


def effect(
    pipe: Any,  # noqa: ANN401
    row: PipelineCall,
    folder: Path,
    strength: float,
    statistic: Callable[[Tensor], Tensor],
    captions: Sequence[str],
) -> Tensor:
    """What a LoRA changes of a statistic of images, (N,), at equal prompts and noises, in one way to sample.

    Args:
        pipe: the teacher, or one with a student's LoRA, at strength 1; it keeps the LoRA beside it.
    """
    active = [name for names in pipe.get_list_adapters().values() for name in names]
    before = statistic(generate(pipe, row, captions, SEED_B)[0] / 255)
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters([*active, "style"], [*[1.0] * len(active), strength])
    return statistic(generate(pipe, row, captions, SEED_B)[0] / 255) - before
