"""What a pipeline would give as its final image, judged by each step of one call: teacher and student as one sheet.

The x0 that a step estimates, decoded, is the image that sampling would end at if no later step changed its mind. A
teacher decides on an image's structure over many steps, a student in its first one (DT-Visualization: Gandikota & Bau
2025, https://arxiv.org/abs/2503.10637). The last frame is the image itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.core.prediction import estimate
from stepdistill.core.random import noise_of
from stepdistill.core.schedule import DiscreteVP
from stepdistill.families.base import Family, each
from stepdistill.students.contract import STUDENTS, is_multi, read_contract, teacher
from stepdistill.students.draw.call import teacher_row
from stepdistill.students.load import load_student
from stepdistill.students.several import Students
from stepdistill.students.single import folder_of

LEFT, LINE, GAP = 150, 14, 6  # pixels of a sheet: its labels, a line of text, between images


@dataclass(frozen=True)
class Course:
    """What the final latents would be, judged by each of the n steps of one call of a pipeline.

    Args:
        timesteps: where the steps start, in the scheduler's time.
        predicted: (n, B, C, h, w), from the network's output alone, guided as the call is.
        final: (B, C, h, w), the latents that the pipeline itself ends at.
    """

    timesteps: tuple[float, ...]
    predicted: Tensor
    final: Tensor


@dataclass(frozen=True)
class Strip:
    """One line of a sheet: a label, a timestep for each frame, and frames (n, 3, H, W) uint8."""

    label: str
    timesteps: tuple[float, ...]
    frames: Tensor


@torch.no_grad()
def course(
    pipe: Any,  # noqa: ANN401
    family: Family,
    prompts: Sequence[str],
    latents: Tensor,
    call: Mapping[str, Any],
    generator: Sequence[torch.Generator] | None = None,
    clean: bool = True,
) -> Course:
    """Draw prompts once, and keep what each step estimates.

    Args:
        latents: (B, C, h, w) to begin from, in the network's scale.
        call: further keyword arguments of the pipeline's call.
        generator: of the fresh noise, one a prompt.
        clean: whether sampling ends at x0; else at time 0 of the table, which leaves some noise in the image and
            hence in every frame.
    """
    schedule, kind, frames, times = family.schedule(pipe.scheduler), family.kind(pipe), [], []
    # a table's scheduler may keep its state in another scale than the network's; a flow's has one
    scaled = isinstance(schedule, DiscreteVP)
    with _stepped(pipe.scheduler, scaled) as steps:
        packed, told = family.pack(latents), each(call, len(prompts))
        final = pipe(list(prompts), latents=packed, generator=generator, output_type="latent", **told).images
    for *packed, time in steps:
        y, x_t = (family.unpack(value, *latents.shape[-2:]) for value in packed)
        t = time.float().to(x_t.device).expand(len(x_t))
        est = estimate(kind, y, x_t, t, schedule)
        frames.append(est.x0 if clean else schedule.add_noise(est.x0, est.eps, torch.zeros_like(t)))
        times.append(float(time))
    return Course(tuple(times), torch.stack(frames), family.unpack(final, *latents.shape[-2:]))


@contextmanager
def _stepped(scheduler: Any, scaled: bool) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:  # noqa: ANN401
    """The scheduler's steps inside: the network's output as guided, the network's input, and the time ().

    Of all that pipelines call it is `step` alone that is given these three in one form by every pipeline.
    """
    step, found = scheduler.step, []

    @wraps(step)  # pipelines look at its signature
    def seen(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        x_t = scheduler.scale_model_input(sample, timestep) if scaled else sample
        found.append((model_output, x_t, torch.as_tensor(timestep)))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = seen
    try:
        yield found
    finally:
        del scheduler.step


def picked(count: int, columns: int) -> list[int]:
    """At most `columns` of `count` steps, evenly, with the first and the last."""
    if columns < 2:
        todo = "ask for at least 2"
        raise ConfigError(problem(f"{columns} columns", "2 or more", "the first and the last step are shown", todo))
    if count <= columns:
        return list(range(count))
    return [round(i * (count - 1) / (columns - 1)) for i in range(columns)]


@dataclass(frozen=True, kw_only=True)
class View:
    """What a sheet shows.

    Args:
        prompts: a block of lines each.
        seed: image i starts from `noise_of(seed, i)`, as `stepdistill.students.draw.call.generate` has it.
        teacher_steps, teacher_guidance: of the teacher at its best.
        columns: frames of a line at most; the first and the last are always there.
    """

    prompts: Sequence[str]
    seed: int = 0
    teacher_steps: int = 50
    teacher_guidance: float = 7.5
    columns: int = 8


def view(pipe: Any, folder_or_hub_id: str | Path, wanted: View) -> list[list[Strip]]:  # noqa: ANN401
    """For each prompt three lines: the teacher at full steps, the teacher at the student's steps, the student.

    Args:
        pipe: a plain pipeline of the student's base; the student is loaded into it on the way.

    Raises:
        StudentError: there is no student, or it does not fit the pipeline.
    """
    folder = folder_of(folder_or_hub_id)
    places = sorted(folder.glob(f"{STUDENTS}/*")) if is_multi(folder) else [folder]
    contracts = [read_contract(place) for place in places]
    family, steps = teacher(contracts[0]), len(contracts[0].timesteps)
    size = dict(zip(("height", "width"), contracts[0].resolution, strict=True))
    pipe.set_progress_bar_config(disable=True)
    blocks: list[list[Strip]] = [[] for _ in wanted.prompts]
    own = pipe.scheduler
    for count in (wanted.teacher_steps, steps):
        row = teacher_row(family, pipe, count, wanted.teacher_guidance, f"teacher, {_steps(count)}")
        pipe.scheduler = row.scheduler
        for i, block in enumerate(blocks):
            block.append(_strip(pipe, family, wanted, i, row.name, {**row.call, **size}, clean=False))
        pipe.scheduler = own
    loaded = load_student(pipe, folder)
    for i, block in enumerate(blocks):
        if isinstance(loaded, Students):
            k = loaded.router.route(wanted.prompts[i])
            loaded.choose(k)
            call = loaded.calls[k]
        else:
            k, call = 0, loaded
        name = f"student{f' {k}' * (len(places) > 1)}, {_steps(len(contracts[k].timesteps))}"
        block.append(_strip(pipe, family, wanted, i, name, call, contracts[k].clean))
    return blocks


def _strip(
    pipe: Any,  # noqa: ANN401
    family: Family,
    wanted: View,
    i: int,
    label: str,
    call: Mapping[str, Any],
    clean: bool,
) -> Strip:
    """The line of prompt i in one way to draw it."""
    noise = noise_of(wanted.seed, i, family.latent_shape(pipe, call["height"], call["width"]))[None].to(pipe.device)
    fresh = torch.Generator().manual_seed(7_919 * wanted.seed + i)
    seen = course(pipe, family, [wanted.prompts[i]], noise, call, [fresh], clean)
    chosen = picked(len(seen.timesteps), wanted.columns)
    latents = [*(seen.predicted[k] for k in chosen[:-1]), seen.final]
    with torch.no_grad():
        pixels = torch.cat([family.decode(pipe, frame) for frame in latents])
    return Strip(label, tuple(seen.timesteps[k] for k in chosen), to_uint8((pixels.cpu() / 2 + 0.5).clamp(0, 1)))


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def sheet(blocks: Sequence[Sequence[Strip]], prompts: Sequence[str], scale: int = 1) -> Image.Image:
    """One image: for each prompt its lines, labelled, the timestep above each frame and the last one on the right.

    Args:
        scale: how many times larger the frames are drawn.
    """
    strips = [strip for block in blocks for strip in block]
    height, width = (scale * side for side in strips[0].frames.shape[-2:])
    cell = max(width, 48) + GAP
    count, tall = max(len(strip.frames) for strip in strips), height + LINE + GAP
    size = (LEFT + cell * count, len(blocks) * (LINE + GAP) + len(strips) * tall)
    made, y = Image.new("RGB", size, "white"), 0
    pen = ImageDraw.Draw(made)
    for prompt, block in zip(prompts, blocks, strict=True):
        pen.text((GAP, y + GAP // 2), prompt, fill="black")
        y += LINE + GAP
        for strip in block:
            pen.text((GAP, y + LINE + height // 2 - LINE // 2), strip.label, fill="black")
            first = count - len(strip.frames)  # images stand below each other
            for k, (time, frame) in enumerate(zip(strip.timesteps, strip.frames, strict=True), first):
                pen.text((LEFT + k * cell, y), f"{time:.0f}", fill="black")
                image = Image.fromarray(frame.permute(1, 2, 0).numpy())
                image = image.resize((width, height), Image.Resampling.LANCZOS)
                made.paste(image, (LEFT + k * cell, y + LINE))
            y += tall
    return made
