"""Images and figures of teacher and student, made by plain Diffusers pipelines: what users will get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.core.cost import Cost, count_calls
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of
from stepdistill.core.schedule import Rectified
from stepdistill.families.base import Family, each
from stepdistill.methods.base import Method

SEED_A, SEED_B = 1, 2  # the reference's noises, and those of every row


@dataclass(frozen=True)
class Row:
    """One way to sample a family's pipeline: a scheduler and the keyword arguments of the pipeline's call."""

    name: str
    scheduler: Any
    call: Mapping[str, Any]
    family: Family


def teacher_row(family: Family, pipe: DiffusionPipeline, steps: int, guidance_scale: float, name: str) -> Row:
    """The teacher by a plain solver on even steps: DDIM with trailing spacing, or Euler."""
    call = {"num_inference_steps": steps} | family.guidance(guidance_scale) | family.arguments()
    schedule = family.schedule(pipe.scheduler)
    if not isinstance(schedule, Rectified):
        scheduler = DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
        return Row(name, scheduler, call, family)
    # the list of sigmas as given is warped by the shift: pass the even ones
    call["sigmas"] = [1 - i / steps for i in range(steps)]
    return Row(name, FlowMatchEulerDiscreteScheduler(shift=schedule.shift), call, family)


def student_row(family: Family, method: Method, pipe: DiffusionPipeline, steps: int) -> Row:
    """The student in `steps` steps, by a stock scheduler; `pipe` has the teacher's, which knows the noise process."""
    sampler = method.sampler(family.schedule(pipe.scheduler), steps)
    scheduler, call = family.scheduler(pipe, sampler)
    call |= family.guidance(sampler.guidance_scale) | family.arguments()
    return Row(f"student, {steps} step{'s' * (steps > 1)}", scheduler, call, family)


def generate(
    pipe: DiffusionPipeline,
    row: Row,
    prompts: Sequence[str],
    seed: int,
    batch: int = 64,
    progress: bool = False,
    numbers: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Cost]:
    """Images (N, 3, H, W) uint8 of the prompts, and what they cost.

    Image i starts from `noise_of(seed, i)` and draws fresh noise from a generator of its own, so it depends on
    neither the batch size nor the other prompts. The pipeline gets its scheduler back: others read the noise
    process from it.

    Args:
        numbers: i for each image; None counts them from 0.
        size: height and width in pixels; None is what the network was trained at.
    """
    family = row.family
    height, width = size or (family.native_side(pipe),) * 2
    shape = family.latent_shape(pipe, height, width)
    own, pipe.scheduler = pipe.scheduler, row.scheduler
    pipe.set_progress_bar_config(disable=True)
    images = []
    with count_calls(family.network(pipe)) as cost, torch.no_grad():
        for start in tqdm(range(0, len(prompts), batch), desc=row.name, disable=not progress, leave=False):
            ids = (numbers or range(len(prompts)))[start : start + batch]
            made = pipe(  # pyright: ignore[reportCallIssue]
                list(prompts[start : start + batch]),
                latents=family.pack(torch.stack([noise_of(seed, i, shape) for i in ids]).to(pipe.device)),
                generator=[torch.Generator().manual_seed(7_919 * seed + i) for i in ids],
                height=height,
                width=width,
                output_type="pt",
                **each(row.call, len(ids)),
            ).images
            images.append(to_uint8(made.float().cpu().clamp(0, 1)))
            cost.batches += 1
    pipe.scheduler = own
    return torch.cat(images), cost


@dataclass(frozen=True)
class Reference:
    """Features of a teacher's images under fixed prompts and seeds.

    Args:
        features: by name, each (N, D): `reference` (full steps, seeds A), `floor` (full steps, seeds B), and any
            stock few-step rows at seeds B.
        prompts: N prompts.
        facts: what the features depend on: extractor, teacher, steps, guidance.
    """

    features: dict[str, Tensor]
    prompts: list[str]
    facts: dict[str, str]

    def save(self, file: Path) -> None:
        """Write one safetensors file, features in half precision."""
        tensors = {key: value.half().contiguous() for key, value in self.features.items()}
        save_file(tensors, file, {**self.facts, "prompts": "\n".join(self.prompts)})

    @classmethod
    def load(cls, file: Path) -> Reference:
        """Read what `save` wrote."""
        with safe_open(file, "pt") as stored:
            facts = dict(stored.metadata())
            features = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118
        return cls(features, facts.pop("prompts").split("\n"), facts)


def grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 1) -> Image.Image:
    """A sheet of images: a labelled line for each row, the same prompt and seed below each caption.

    Args:
        rows: label and images (columns, 3, H, W) uint8.
        scale: how many times larger the images are drawn.
    """
    height, width = (scale * side for side in rows[0][1].shape[-2:])
    cell, left, top = max(width, 96) + 6, 150, 34
    sheet = Image.new("RGB", (left + cell * len(captions), top + (height + 6) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        lines = _wrapped(caption, 16)[:2]
        pen.multiline_text((left + column * cell, 4), "\n".join(lines), fill="black", spacing=2)
    for line, (label, images) in enumerate(rows):
        y = top + line * (height + 6)
        pen.multiline_text((6, y + height // 2 - 12), label, fill="black", spacing=2)
        for column, image in enumerate(images):
            pil = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(pil.resize((width, height), Image.Resampling.LANCZOS), (left + column * cell, y))
    return sheet


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, word]
    return lines
