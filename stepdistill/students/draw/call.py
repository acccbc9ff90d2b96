"""A call of a plain Diffusers pipeline with its scheduler and arguments, and images of many prompts by such calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.core.cost import Cost, count_calls
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.methods.base import Method
from stepdistill.students.draw.animation import image_of
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.filters import unfiltered
from stepdistill.students.several import Students


@dataclass(frozen=True)
class PipelineCall:
    """One way to sample a family's pipeline: a scheduler and the keyword arguments of the pipeline's call."""

    name: str
    scheduler: Any
    arguments: Mapping[str, Any]
    family: Family

    def plus(self, **arguments: Any) -> PipelineCall:  # noqa: ANN401
        """The same with further arguments, or with other values of them."""
        return replace(self, arguments={**self.arguments, **arguments})


@contextmanager
def scheduled(pipe: DiffusionPipeline, scheduler: Any) -> Iterator[None]:  # noqa: ANN401
    """Give the pipeline this scheduler inside the context, and restore its own afterwards, which others read."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


@contextmanager
def stepped_by(scheduler: Any, step: Callable[..., Any]) -> Iterator[None]:  # noqa: ANN401
    """Replace the `step` of the scheduler inside the context, and restore it afterwards."""
    before = vars(scheduler).get("step")  # of an outer context
    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


@contextmanager
def seeded_steps(family: Family, scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:  # noqa: ANN401
    """Let a stochastic scheduler draw its fresh noise from these generators inside the context, one for each image.

    The pipelines of Stable Diffusion 3 and Flux do not pass the generators of their call to the scheduler.
    """
    if family.seeds_steps or not scheduler.config.get("stochastic_sampling", False):
        yield
    else:
        with stepped_by(scheduler, partial(scheduler.step, generator=list(generators))):
            yield


Size = tuple[int, int]  # height and width in pixels


def teacher_call(
    family: Family, pipe: DiffusionPipeline, steps: int, guidance_scale: float, name: str, size: Size | None = None
) -> PipelineCall:
    """The teacher with `Family.solver`, on the grid of images of a size (None: the native one).

    Raises ConfigError for more steps than its table has timesteps.
    """
    scheduler, call = family.solver(pipe, steps, family.tokens(pipe, *size) if size else None)
    return PipelineCall(name, scheduler, call | family.guidance(guidance_scale) | family.arguments(), family)


def student_call(
    family: Family, method: Method, pipe: DiffusionPipeline, steps: int, size: Size | None = None
) -> PipelineCall:
    """The student in `steps` steps with a stock scheduler; `pipe` has the teacher's, which sets the noise process.

    Args:
        size: that it was trained at; None is the native one.
    """
    sampler = method.sampler(family.schedule_at(pipe, pipe.scheduler, size or family.native_size(pipe)), steps)
    scheduler, call = family.scheduler(pipe, sampler)
    call |= family.guidance(sampler.guidance_scale) | family.arguments()
    return PipelineCall(f"student, {steps} step{'s' * (steps > 1)}", scheduler, call, family)


def student_calls(
    family: Family, method: Method, pipe: DiffusionPipeline, counts: Iterable[int], size: Size | None = None
) -> dict[int, PipelineCall]:
    """`student_call` by number of steps, for those that the method has a sampler for, and the family a scheduler.

    Raises ConfigError where the family has none for the number of steps that the student is trained for.
    """
    schedule, calls = family.schedule_at(pipe, pipe.scheduler, size or family.native_size(pipe)), {}
    own = len(method.sampler(schedule).timesteps)
    for steps in counts:
        try:
            method.sampler(schedule, steps)
        except ValueError:
            continue
        try:
            calls[steps] = student_call(family, method, pipe, steps, size)
        except ConfigError:
            if steps == own:
                raise
    return calls


def generate(
    drawer: DiffusionPipeline | Students,
    call: PipelineCall | Sequence[PipelineCall],
    prompts: Sequence[str],
    seed: int,
    batch: int = 64,
    progress: bool = False,
    numbers: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    images: Tensor | None = None,
) -> tuple[Tensor, Cost]:
    """Images (N, 3, H, W) uint8 of the prompts, or clips (N, F, 3, H, W), and what they cost.

    Image i starts from `noise_of(seed, i)` and has its own generator of fresh noise, so it depends on neither the batch
    size nor the other prompts. Each of several students generates its own prompts, in full batches. The pipeline's
    safety checker and watermarker are left out.

    Args:
        drawer: a pipeline, or several students in one.
        call: how to sample; for several students one call for all, or one for each.
        numbers: i for each image; None counts them from 0.
        size: height and width in pixels; None takes the call's, else the size that the network was trained at.
        images: (N, 3, H, W) in [0, 1], that the videos begin with, for a family that continues images.

    Raises:
        ConfigError: such a family is given none.
    """
    numbers = numbers or range(len(prompts))
    if isinstance(drawer, Students):
        rows, total = {}, Cost()
        for k, places in drawer.route(prompts).items():
            one = call if isinstance(call, PipelineCall) else call[k]
            some, ids = [prompts[i] for i in places], [numbers[i] for i in places]
            with drawer.use(k):
                begun = None if images is None else images[places]
                drawn, cost = generate(drawer.pipe, one, some, seed, batch, progress, ids, size, begun)
            rows |= dict(zip(places, drawn, strict=True))
            total = Cost(*(a + b for a, b in zip(astuple(total), astuple(cost), strict=True)))
        return torch.stack([rows[i] for i in range(len(prompts))]), total
    (call,) = [call] if isinstance(call, PipelineCall) else call
    begins = isinstance(call.family, ImageToVideo)
    if begins and images is None:
        got, why = f"a {type(call.family).__name__} pipeline without images", "it continues an image as a video"
        raise ConfigError(problem(got, "one image for each prompt", why, "use a family of text to video, or pass them"))
    batch = 1 if begins else batch  # its pipeline takes one image for all prompts
    family, arguments, batches = call.family, dict(call.arguments), []
    native = family.native_size(drawer)
    height, width = (arguments.pop(name, side) for name, side in zip(("height", "width"), native, strict=True))
    height, width = size or (height, width)
    shape = family.latent_shape(drawer, height, width)
    drawer.set_progress_bar_config(disable=True)
    plain = unfiltered(drawer, family), scheduled(drawer, call.scheduler)
    with count_calls(family.network(drawer)) as cost, torch.no_grad(), plain[0], plain[1]:
        for start in tqdm(range(0, len(prompts), batch), desc=call.name, disable=not progress, leave=False):
            ids = numbers[start : start + batch]
            fresh = [fresh_noise(seed, i) for i in ids]
            noise = torch.stack([noise_of(seed, i, shape) for i in ids]).to(drawer.device)
            given: dict[str, Any] = {"generator": fresh}
            if isinstance(family, ImageToVideo) and images is not None:
                begun = to_uint8(images[start])
                noise = family.started(drawer, noise, begun[None].to(drawer.device) / 127.5 - 1)
                # as an image: of tensors Diffusers gives an image encoder values that are 255 times too small
                given = {"generator": fresh[0], "image": image_of(begun)}
            with seeded_steps(family, call.scheduler, fresh):
                drawn = drawer(  # pyright: ignore[reportCallIssue, reportIndexIssue]
                    prompt=list(prompts[start : start + batch]),
                    latents=family.pack(noise),
                    height=height,
                    width=width,
                    output_type="pt",
                    **given,
                    **each(arguments, len(ids)),
                )[0]
            batches.append(to_uint8(drawn.float().cpu().clamp(0, 1)))
            cost.batches += 1
    return torch.cat(batches), cost
