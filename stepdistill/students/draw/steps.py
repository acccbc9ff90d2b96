"""The final image as each step of a pipeline call estimates it, for teacher and student on one sheet.

A step estimates x0, the image that sampling would end at if no later step changed it. A teacher settles the structure
of an image over many steps, a student in its first one (DT-Visualization: Gandikota & Bau 2025,
https://arxiv.org/abs/2503.10637). The last frame is the image itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.pixels import clips_of, filmstrip, to_uint8
from stepdistill.core.prediction import estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.contract import read_contracts, teacher
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.call import PipelineCall, scheduled, seeded_steps, stepped_by, teacher_call
from stepdistill.students.draw.sheet import SheetRow, image_sheet
from stepdistill.students.load import folder_of, load_student
from stepdistill.students.several import Students

STILLS = 2  # of a video, its first and its last frame


@dataclass(frozen=True)
class StepPredictions:
    """The final latents as each of the n steps of a pipeline call estimates them.

    Args:
        timesteps: the start of each step, in the scheduler's time.
        predicted: (n, B, C, [F,] h, w), from the network's output with the guidance of the call.
        final: (B, C, [F,] h, w), the latents that the pipeline returns.
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
def predictions_of_steps(
    pipe: Any,  # noqa: ANN401
    family: Family,
    prompts: Sequence[str],
    latents: Tensor,
    call: Mapping[str, Any],
    generator: Sequence[torch.Generator] | None = None,
    clean: bool = True,
) -> StepPredictions:
    """Sample the prompts once, and keep the estimate of each step.

    Args:
        latents: (B, C, h, w) to start from, in the network's scale.
        call: further keyword arguments of the pipeline's call.
        generator: of the fresh noise, one for each prompt.
        clean: whether sampling ends at x0; else it ends at time 0 of the table, which leaves some noise in every
            frame.
    """
    schedule, kind, frames, times = family.schedule(pipe.scheduler), family.kind(pipe), [], []
    # a table's scheduler may keep its state in another scale than the network's; a flow's has one
    scaled = not schedule.straight
    with _stepped(pipe.scheduler, scaled) as steps:
        packed, arguments = family.pack(latents), each(call, len(prompts))
        final = pipe(prompt=list(prompts), latents=packed, generator=generator, output_type="latent", **arguments)[0]
    for *packed, time in steps:
        y, x_t = (family.unpack(value, *latents.shape[-2:]) for value in packed)
        t = time.float().to(x_t.device).expand(len(x_t))
        est = estimate(kind, y, x_t, t, schedule)
        frames.append(est.x0 if clean else schedule.add_noise(est.x0, est.eps, torch.zeros_like(t)))
        times.append(float(time))
    return StepPredictions(tuple(times), torch.stack(frames), family.latents_of(pipe, final, *latents.shape[-2:]))


@contextmanager
def _stepped(scheduler: Any, scaled: bool) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:  # noqa: ANN401
    """Collect the scheduler's steps inside the context: the output with guidance, the network's input, and the time ().

    `step` is the only method that every pipeline calls with these three in the same form.
    """
    step, steps = scheduler.step, []

    @wraps(step)  # pipelines inspect its signature
    def seen(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        x_t = scheduler.scale_model_input(sample, timestep) if scaled else sample
        steps.append((model_output, x_t, torch.as_tensor(timestep)))
        return step(model_output, timestep, sample, *args, **kwargs)

    with stepped_by(scheduler, seen):
        yield steps


def picked(count: int, columns: int) -> list[int]:
    """At most `columns` of `count` steps, evenly spaced, with the first and the last."""
    if columns < 2:
        why, todo = "the first and the last step are always shown", "use at least 2 columns"
        raise ConfigError(problem(f"{columns} columns", "2 or more", why, todo))
    if count <= columns:
        return list(range(count))
    return [round(i * (count - 1) / (columns - 1)) for i in range(columns)]


@dataclass(frozen=True, kw_only=True)
class View:
    """What a sheet shows.

    Args:
        prompts: each has a block of three lines.
        seed: image i starts from `noise_of(seed, i)`, as in `stepdistill.students.draw.call.generate`.
        teacher_steps, teacher_guidance: of the teacher at full steps.
        columns: largest number of frames in a line; the first and the last are always shown.
    """

    prompts: Sequence[str]
    seed: int = 0
    teacher_steps: int = 50
    teacher_guidance: float = 7.5
    columns: int = 8


def view(pipe: Any, folder_or_hub_id: str | Path, wanted: View) -> list[list[Strip]]:  # noqa: ANN401
    """For each prompt three lines: the teacher at full steps, the teacher at the student's steps, the student.

    Args:
        pipe: a plain pipeline of the student's base; the student is loaded into it.

    Raises:
        StudentError: there is no student, it does not fit the pipeline, or it continues images.
    """
    folder = folder_of(folder_or_hub_id)
    contracts = read_contracts(folder)
    family, steps, (height, width) = teacher(contracts[0]), len(contracts[0].timesteps), contracts[0].resolution
    if isinstance(family, ImageToVideo):
        got, todo = f"a student of {type(family).__name__}", "generate some with `stepdistill generate --image`"
        raise StudentError(problem(got, "one that takes prompts alone", "its videos begin with an image", todo))
    pipe.set_progress_bar_config(disable=True)
    blocks: list[list[Strip]] = [[] for _ in wanted.prompts]
    for count in (wanted.teacher_steps, steps):
        call = teacher_call(family, pipe, count, wanted.teacher_guidance, f"teacher, {_steps(count)}", (height, width))
        for i, block in enumerate(blocks):
            block.append(_strip(pipe, call.plus(height=height, width=width), wanted, i, clean=False))
    loaded = load_student(pipe, folder)
    for i, block in enumerate(blocks):
        several = isinstance(loaded, Students)
        k = loaded.router.route(wanted.prompts[i]) if several else 0
        if several:
            loaded.choose(k)
        arguments = loaded.calls[k] if several else loaded
        name = f"student{f' {k}' * (len(contracts) > 1)}, {_steps(len(contracts[k].timesteps))}"
        call = PipelineCall(name, pipe.scheduler, arguments, family)
        block.append(_strip(pipe, call, wanted, i, contracts[k].clean))
    return blocks


def _strip(pipe: Any, call: PipelineCall, wanted: View, i: int, clean: bool) -> Strip:  # noqa: ANN401
    """The line of prompt i for one pipeline call."""
    family, (height, width) = call.family, (call.arguments[name] for name in ("height", "width"))
    noise = noise_of(wanted.seed, i, family.latent_shape(pipe, height, width))[None].to(pipe.device)
    fresh = [fresh_noise(wanted.seed, i)]
    with scheduled(pipe, call.scheduler), seeded_steps(family, call.scheduler, fresh):
        seen = predictions_of_steps(pipe, family, [wanted.prompts[i]], noise, call.arguments, fresh, clean)
    chosen = picked(len(seen.timesteps), wanted.columns)
    latents = [*(seen.predicted[k] for k in chosen[:-1]), seen.final]
    with torch.no_grad():
        pixels = torch.cat([filmstrip(clips_of(family.decode(pipe, frame)), STILLS) for frame in latents])
    return Strip(call.name, tuple(seen.timesteps[k] for k in chosen), to_uint8((pixels.cpu() / 2 + 0.5).clamp(0, 1)))


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def view_sheet(blocks: Sequence[Sequence[Strip]], prompts: Sequence[str], scale: int = 1) -> Image.Image:
    """One image of all lines, labelled by prompt, with the timestep above each frame and the last frame on the right.

    Args:
        scale: factor by which the frames are enlarged.
    """
    rows = [
        SheetRow(strip.label, strip.frames, [f"{time:.0f}" for time in strip.timesteps], "" if line else prompt)
        for prompt, block in zip(prompts, blocks, strict=True)
        for line, strip in enumerate(block)
    ]
    return image_sheet(rows, scale)
