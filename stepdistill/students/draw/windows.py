"""Videos that are longer than those a student was trained for: window after window, each of which begins with the end
of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition, guided, with_held
from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.draw.animation import images_of_clip
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.filters import DrawnImage
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
    """

    windows: int
    overlap: int = 1
    then: tuple[str, ...] = ()
    options: DrawOptions = AS_TRAINED

    def draw(
        self, student: StudentPipeline, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall
    ) -> Iterator[DrawnImage]:
        """A video of each prompt, as a list of its frames."""
        for prompt, seed in zip(prompts, seeds, strict=True):
            each = [prompt, *self.then]
            video = long_video(student, each, call, self.windows, self.overlap, seed, self.options)
            yield DrawnImage(images_of_clip(to_uint8(video)), False)


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
) -> Tensor:
    """A video (T, 3, H, W) in [0, 1] of several windows by a student that continues images.

    The first window is the pipeline's own with this seed. Each further one begins with the last `overlap` frames of
    the video so far, in floats. More than one frame is beyond what plain Diffusers can do, and carries the velocity.

    Args:
        prompts: of each window; the last one serves the rest.
        call: with the image that the video begins with.
        options: of the sampler, as those that `call` was made with.

    Raises:
        StudentError, ConfigError: see `check_windows`.
    """
    family, contract, pipe = check_windows(student, call, overlap), student.contract, student.pipe
    assert contract is not None
    (first,) = student.draw([prompts[0]], [seed], call.plus(output_type="pt"))
    schedule, kind, net = family.schedule(student.native), family.kind(pipe), family.network(pipe)
    sampler: Sampler = changed_sampler(contract, schedule, options)
    dtype = next(net.parameters()).dtype
    shape = family.latent_shape(pipe, call.arguments["height"], call.arguments["width"])

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        with torch.autocast(x_t.device.type, dtype, enabled=dtype != torch.float32):
            y = family.call(net, x_t, t, cond)
        return Estimate(*(with_held(part, cond) for part in estimate(kind, y, x_t, t, schedule)))

    def draw(given: Tensor, number: int) -> Tensor:
        if number == 0:
            return first.image.float().transpose(0, 1)[None]
        prompt = prompts[min(number, len(prompts) - 1)]
        cond = {**family.condition(pipe, [prompt]), **family.first_frames(pipe, 2 * given.to(pipe.device) - 1)}
        noises, fresh = noise_of(seed, number, shape)[None].to(pipe.device), fresh_noise(seed, number)
        ends = few_step(
            guided(denoise, family.unconditional(pipe), sampler.guidance_scale),
            schedule,
            sampler,
            noises,
            cond,
            lambda _: torch.randn((1, *shape), generator=fresh).to(pipe.device),
        )
        return (family.decode(pipe, ends) / 2 + 0.5).clamp(0, 1).cpu()

    return stitched(draw, torch.empty(0), windows, overlap)[0].transpose(0, 1)
