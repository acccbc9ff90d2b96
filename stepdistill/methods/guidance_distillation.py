"""Guidance in one pass instead of two: adapters for any scale, a LoRA for one; and half the steps, again and again.

All learn the guided teacher, `uncond + w (cond - uncond)`, in the network's own output. Guidance is affine in the
output, so the target is the same in epsilon, v, x0 and flow, up to the weight of a time in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.denoise import SCALE, Condition, Denoise, guided
from stepdistill.core.losses import distance
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler
from stepdistill.data.base import GuidedState
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.methods.consistency import latents_of
from stepdistill.networks.roles import TEACHER, AdapterArch, Adapters, Ema, Lora, Role


@dataclass(frozen=True, kw_only=True)
class AdapterGuidance(Method):
    """Adapter guidance distillation (AGD): adapters on the frozen base give guidance of any scale in one pass.

    Minimises `|y(x_t, t, c, w) - y_w(x_t, t, c)|^2` over states of guided trajectories, where y_w is the guided output;
    the trajectories are made before, so training takes one pass and no teacher. The student takes as many steps as the
    teacher; negative prompts have no effect.

    References:
        Efficient distillation of classifier-free guidance using adapters, Jensen & Sadat 2025,
        https://arxiv.org/abs/2503.07274. Other than there: what an adapter adds is multiplied by w - 1, frequencies of
        w are fixed and slow, g(w) has two layers and not four, tokens have no positions of their own, since the
        prompt's have theirs already, and `mixed` is new.

    Args:
        arch: `cross_attention` from the image's tokens to those of w, time and prompt; `mixed`, the same with the
            image's tokens put to it and a nonlinearity, which fits better at the same size; or `offset`, one vector
            for all of the image.
        width: inner dimension of the adapters. 320 is 2.7 % more parameters for Stable Diffusion 1.5; SDXL has 4
            times as many attention layers, so 128 is.
        guidance_range: the scales of the trajectories; written into the contract, which warns of others.
        sampling_guidance_scale: w of images where none is set, within the range.
        num_inference_steps: steps that the contract names.
    """

    arch: AdapterArch = "cross_attention"
    width: int = 320
    guidance_range: tuple[float, float] = (1.0, 12.0)
    sampling_guidance_scale: float = 7.5
    num_inference_steps: int = 50

    def __post_init__(self) -> None:
        low, high = self.guidance_range
        if not low <= self.sampling_guidance_scale <= high:
            raise ValueError(
                f"sampling_guidance_scale is {self.sampling_guidance_scale}: expected a scale that the adapters learn, "
                f"in guidance_range {[low, high]}"
            )
        if self.width < 1:
            raise ValueError(f"width is {self.width}: expected at least 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"trajectories"})

    def roles(self) -> dict[str, Role]:
        return {"student": Adapters(self.arch, self.width)}

    def student_role(self) -> str:
        return "student"

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.grid(self.num_inference_steps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        own = {"adapter_scale": self.sampling_guidance_scale, "adapter_range": self.guidance_range}
        return replace(of_the_teacher(schedule, steps or self.num_inference_steps), **own)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        x_t, t, w, target = state_of(batch)
        student = context.denoiser("student")
        y = student.native(student(x_t, t, {**batch.cond, SCALE: w}), t)
        loss = distance("l2", y, target)
        yield Update(("student",), loss, {"loss": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class GuidedLora(Method):
    """A LoRA that is the guided teacher at one scale, in one pass: `|y(x_t, t, c) - y_w(x_t, t, c)|^2`.

    References:
        On distillation of guided diffusion models, Meng et al. 2023, https://arxiv.org/abs/2210.03142, stage 1, at a
        fixed w and unweighted in the network's output. As a LoRA on the teacher itself, with the teacher that LoRA
        switched off: DeepSpeed's `train_sd_distill_lora.py` in microsoft/DeepSpeedExamples, at w = 7.5.

    Args:
        guidance_scale: w of `uncond + w (cond - uncond)`, what the student is at guidance_scale 1.
        states: `noised` latents, as the released code has it, or states of guided `trajectories`, which are what the
            student will see; of these only the states count, the output is computed at this scale.
        num_inference_steps: steps that the contract names.
    """

    guidance_scale: float = 7.5
    states: Literal["noised", "trajectories"] = "noised"
    num_inference_steps: int = 25

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents" if self.states == "noised" else "trajectories"})

    def roles(self) -> dict[str, Role]:
        return {"student": Lora()}

    def student_role(self) -> str:
        return "student"

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.grid(self.num_inference_steps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return of_the_teacher(schedule, steps or self.num_inference_steps)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        if self.states == "trajectories":
            x_t, t, _, _ = state_of(batch)
        else:
            t = context.schedule.spread(context.draw(batch, "t"), *context.schedule.span)
            x_t = context.schedule.add_noise(latents_of(batch), context.noise(batch, "eps"), t)
        student = context.denoiser("student")
        with torch.no_grad():
            target = guided(context.denoiser(TEACHER), context.null, self.guidance_scale)(x_t, t, batch.cond)
        loss = distance("l2", student.native(student(x_t, t, batch.cond), t), student.native(target, t))
        yield Update(("student",), loss, {"loss": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class ProgressiveHalving(Method):
    """Progressive distillation: each stage's student makes one step of two of the stage before, then takes its place.

    One LoRA is carried on through all stages; a stage's teacher is a frozen copy of it as the stage began. With
    `lora.init_from` it starts as that student, such as a `GuidedLora`; without, as the base without guidance.

    References:
        Progressive distillation for fast sampling of diffusion models, Salimans & Ho 2022,
        https://arxiv.org/abs/2202.00512, algorithm 2, and for guided models Meng et al. 2023,
        https://arxiv.org/abs/2210.03142, stage 2. Weight: the truncated signal-to-noise ratio, max(1, alpha^2/sigma^2).

    Args:
        steps: of each stage's student, each half of the one before; the first teacher takes twice the first.
        stage_steps: training steps of a stage; the last goes on to the end.
    """

    steps: tuple[int, ...] = (20, 10, 5)
    stage_steps: int = 1000

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or any(n != 2 * half for n, half in pairwise(self.steps)):
            raise ValueError(
                f"steps are {list(self.steps)}: expected each to be half of the one before, as [20, 10, 5]"
            )
        if self.stage_steps < 1:
            raise ValueError(f"stage_steps is {self.stage_steps}: expected at least 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def roles(self) -> dict[str, Role]:
        kept = {f"teacher_{k}": Ema("student", 0.0, until=k * self.stage_steps) for k in range(len(self.steps))}
        return {"student": Lora(), **kept}

    def student_role(self) -> str:
        return "student"

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.grid(2 * self.steps[0])
        self.sampler(schedule)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(tuple(schedule.grid(steps or self.steps[-1]).flip(0)[:-1].tolist()))

    def stage(self, step: int) -> int:
        """The stage (from 0) of `step` (from 0)."""
        return min(step // self.stage_steps, len(self.steps) - 1)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        k, schedule = self.stage(step), context.schedule
        n = self.steps[k]
        grid = schedule.grid(2 * n).to(context.device)
        j = 2 * (context.draw(batch, "t") * n).long() + 2
        t, middle, end = grid[j], grid[j - 1], grid[j - 2]
        x_t = schedule.add_noise(latents_of(batch), context.noise(batch, "eps"), t)
        with torch.no_grad():
            target = two_steps(context.denoiser(f"teacher_{k}"), schedule, x_t, t, middle, end, batch.cond, j == 2)
        alpha_t, sigma_t = (expand(level, x_t) for level in schedule(t))
        weight = (alpha_t / sigma_t).square().clamp(min=1)
        x0 = context.denoiser("student")(x_t, t, batch.cond).x0
        loss = (weight * (x0 - target).square()).mean()
        yield Update(("student",), loss, {"loss": loss.detach()})


def of_the_teacher(schedule: NoiseSchedule, steps: int) -> Sampler:
    """The steps that the teacher's own deterministic solver takes, to the same end: one pass takes the place of two."""
    return Sampler(tuple(schedule.grid(steps).flip(0)[:-1].tolist()), clean=False)


def two_steps(
    teacher: Denoise,
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
    cond: Condition,
    last: Tensor,
) -> Tensor:
    """The x0 with which one DDIM step from t to `end` lands where the teacher's two land, over `middle`.

    Where `last` (B,) holds, the way ends at clean data, as the sampler's does.
    """
    x_middle = schedule.add_noise(*teacher(x_t, t, cond), middle)
    est = teacher(x_middle, middle, cond)
    alpha_t, sigma_t = (expand(level, x_t) for level in schedule(t))
    alpha_end, sigma_end = schedule(end)
    alpha_end = expand(torch.where(last, 1.0, alpha_end), x_t)
    sigma_end = expand(torch.where(last, 0.0, sigma_end), x_t)
    ratio = sigma_end / sigma_t
    return (alpha_end * est.x0 + sigma_end * est.eps - ratio * x_t) / (alpha_end - ratio * alpha_t)


def state_of(batch: Batch) -> GuidedState:
    """The batch's guided states, which `needs` promised."""
    if batch.state is None:
        raise ValueError("this method trains on guided trajectories, and the batch has none: see data.Trajectories")
    return batch.state
