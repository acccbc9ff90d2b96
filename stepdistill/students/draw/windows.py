"""Videos that are longer than those a student was trained for: window after window, each of which begins with the end
of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition, guided, with_held
from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.latent_drift import ChannelStatistics, channel_statistics, matched_to_first
from stepdistill.students.draw.options import AS_TRAINED, DrawOptions, changed_sampler
from stepdistill.students.draw.pipeline import StudentPipeline

Window = Callable[[Tensor, int], Tensor]  # frames (B, C, o, H, W) that are given and a number, to (B, C, F, H, W)


def stitched(draw: Window, begin: Tensor, windows: int, overlap: int) -> Tensor:
    """A sequence (B, C, F + (W - 1) (F - o), H, W) of W windows of F frames, each given the last o before it.

    With exact windows every window has the right distribution. Across a seam only what the overlap knows is carried
    on: the covariance of a frame before it and one after it is `S_io S_oo^-1 S_ok`. One frame carries no velocity.

    Args:
        draw: a window that begins with given frames, and its number from 0.
        begin: (B, C, k, H, W), what the first window begins with.
        overlap: o, from 1 to F - 1.
    """
    video = draw(begin, 0)
    frames = video.shape[2]
    if not 0 < overlap < frames:
        got, why = f"an overlap of {overlap} frames", "a window begins with them and must go on"
        raise ConfigError(problem(got, f"1 to {frames - 1}", why, "choose another overlap"))
    for number in range(1, windows):
        given = video[:, :, -overlap:]
        video = torch.cat([video, draw(given, number)[:, :, overlap:]], 2)
    return video


@dataclass(frozen=True)
class Windows:
    """How long videos are made.

    Args:
        windows: their number.
        overlap: frames that each begins with.
        then: prompts of the windows after the first.
        options: of the sampler.
        match_first_window: see `long_video`.
    """

    windows: int
    overlap: int = 1
    then: tuple[str, ...] = ()
    options: DrawOptions = AS_TRAINED
    match_first_window: bool = False

    def draw(
        self, student: StudentPipeline, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall
    ) -> Iterator[LongVideo]:
        """A video of each prompt."""
        for prompt, seed in zip(prompts, seeds, strict=True):
            each = [prompt, *self.then]
            how = (self.windows, self.overlap, seed, self.options, self.match_first_window)
            yield long_video(student, each, call, *how)


class LongVideo(NamedTuple):
    """A video of several windows.

    Args:
        frames: (T, 3, H, W) in [0, 1].
        latents: (W, C), of each window over the latent frames after its overlap, as they are decoded.
    """

    frames: Tensor
    latents: ChannelStatistics


def check_windows(student: StudentPipeline, call: PipelineCall, overlap: int) -> ImageToVideo:
    """The family of a student that can go on from the end of a window.

    Raises:
        StudentError: the student does not continue images, or is not one LoRA or network.
        ConfigError: the overlap is not among those of `ImageToVideo.overlaps`.
    """
    family, contract = student.family, student.contract
    if not isinstance(family, ImageToVideo) or contract is None or contract.adapters is not None:
        got, todo = f"windows of a {type(family).__name__} student", "use a student of image to video"
        raise StudentError(problem(got, "one that continues an image", "each window begins with frames", todo))
    fitting = family.overlaps(student.pipe, call.arguments["num_frames"])
    if overlap not in fitting:
        got, why = f"an overlap of {overlap} frames", "the pipeline encodes so many, and its network sees them whole"
        raise ConfigError(problem(got, f"one of {', '.join(map(str, fitting))}", why, "choose another --overlap"))
    return family


@torch.no_grad()
def long_video(
    student: StudentPipeline,
    prompts: Sequence[str],
    call: PipelineCall,
    windows: int,
    overlap: int = 1,
    seed: int = 0,
    options: DrawOptions = AS_TRAINED,
    match_first_window: bool = False,
) -> LongVideo:
    """A video of several windows by a student that continues images.

    The first window is the pipeline's own with this seed. Each further one begins with the last `overlap` frames of
    the video so far, in floats. More than one frame is beyond what plain Diffusers can do, and carries the velocity.

    Args:
        prompts: of each window; the last one serves the rest.
        call: with the image that the video begins with.
        options: of the sampler, as those that `call` was made with.
        match_first_window: give what later windows add the first one's mean and spread of each latent channel, see
            `matched_to_first`.

    Raises:
        StudentError, ConfigError: see `check_windows`.
    """
    family, contract, pipe = check_windows(student, call, overlap), student.contract, student.pipe
    assert contract is not None
    schedule, kind, net = family.schedule(student.native), family.kind(pipe), family.network(pipe)
    sampler: Sampler = changed_sampler(contract, schedule, options)
    dtype = next(net.parameters()).dtype
    shape = family.latent_shape(pipe, call.arguments["height"], call.arguments["width"])
    frames, first = _first_window(student, prompts[0], seed, call, family, shape)
    held = 1 + (overlap - 1) * (shape[1] - 1) // (
        call.arguments["num_frames"] - 1
    )  # the first latent frame is one frame

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        with torch.autocast(x_t.device.type, dtype, enabled=dtype != torch.float32):
            y = family.call(net, x_t, t, cond)
        return Estimate(*(with_held(part, cond) for part in estimate(kind, y, x_t, t, schedule)))

    def ends(given: Tensor, number: int) -> Tensor:
        prompt = prompts[min(number, len(prompts) - 1)]
        cond = {**family.condition(pipe, [prompt]), **family.first_frames(pipe, 2 * given.to(pipe.device) - 1)}
        noises, fresh = noise_of(seed, number, shape)[None].to(pipe.device), fresh_noise(seed, number)
        return few_step(
            guided(denoise, family.unconditional(pipe), sampler.guidance_scale, family.combine(kind, schedule)),
            schedule,
            sampler,
            noises,
            cond,
            lambda _: torch.randn((1, *shape), generator=fresh).to(pipe.device),
        )

    made = matched_to_first(ends, first, held) if match_first_window else ends
    found = [channel_statistics(first[:, :, held:])]

    def draw(given: Tensor, number: int) -> Tensor:
        if number == 0:
            return frames
        latents = made(given, number)
        found.append(channel_statistics(latents[:, :, held:]))
        return (family.decode(pipe, latents) / 2 + 0.5).clamp(0, 1).cpu()

    video = stitched(draw, torch.empty(0), windows, overlap)[0].transpose(0, 1)
    return LongVideo(video, ChannelStatistics(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True))))


def _first_window(
    student: StudentPipeline, prompt: str, seed: int, call: PipelineCall, family: ImageToVideo, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Frames (1, 3, F, H, W) and latents (1, C, F, h, w), except those that are held, of the pipeline's own call."""
    ends: list[Tensor] = []

    def note(pipe: object, step: int, t: object, given: dict[str, Any]) -> dict[str, Any]:
        ends[:] = [given["latents"]]
        return {}

    (drawn,) = student.draw([prompt], [seed], call.plus(output_type="pt", callback_on_step_end=note))
    latents = family.unpack(ends[0], *shape[-2:]).float()
    return drawn.image.float().transpose(0, 1)[None], latents
