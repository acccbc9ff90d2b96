"""Variational score distillation into one step: SwiftBrush, and SNOOPI's PG-SB.

As in `dmd2`, a fake score follows the student's samples, and the student moves along the difference of two scores. Here
both are guided by the same w, so that the fixed point is the teacher's unguided distribution whatever w is; w only
changes the path to it. PG-SB draws w in every step, the same for both scores. Training needs prompts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Place, Share, Whole
from stepdistill.core.denoise import free_part, without_prompt
from stepdistill.core.losses import distance, surrogate
from stepdistill.core.pixels import frames_of
from stepdistill.core.schedule import NoiseSchedule, expand, per_sample
from stepdistill.core.solvers import Sampler, check_range
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.networks.clip import clip
from stepdistill.networks.roles import TEACHER, Lora, Role


@dataclass(frozen=True, kw_only=True)
class ClipTerm:
    """SwiftBrush v2's clamped term, `weight max(0, threshold - cos(image, prompt))`; 0 above the threshold.

    References:
        SwiftBrush v2, Dao et al. 2024, https://arxiv.org/abs/2408.14176, section 4.2: `clip: {}`.

    Args:
        pretrained_clip_model: a folder or hub id.
        threshold: cosine similarity above which the term is 0 (0.35 published; 0.37 in SNOOPI).
        weight: at the student's first step.
        decay_steps: training steps over which the weight decays linearly to 0; none keeps it constant.
    """

    pretrained_clip_model: Place = "openai/clip-vit-base-patch32"
    threshold: Share = 0.35
    weight: Amount = 0.1
    decay_steps: Count | None = None

    def weight_at(self, step: int) -> float:
        """The weight in the student's `step` (from 0)."""
        return self.weight * max(0.0, 1 - step / self.decay_steps) if self.decay_steps else self.weight


@dataclass(frozen=True, kw_only=True)
class VSD(Averaged):
    """SwiftBrush with a LoRA student and a LoRA fake score on one frozen base.

    Equation:
        student: x0 = student(z, T).x0; x_s = alpha_s x0 + sigma_s eps
                 d loss / d x0 ~ sigma_s^2 (teacher_w(x_s, s).eps - fake_w(x_s, s).eps), both guided by w
        fake:    loss = E alpha_t^2 |fake(x_t, t).eps - eps|^2 on samples of the student

    References:
        SwiftBrush, Nguyen & Tran 2023, https://arxiv.org/abs/2312.05239: `guidance_scale: 4.5`.
        SNOOPI, Nguyen et al. 2024, https://arxiv.org/abs/2412.02687, section 4.1 (PG-SB):
        `guidance_scale: [0.5, 4.0]`.

    Args:
        guidance_scale: w of `uncond + w (cond - uncond)`, for teacher and fake score; a pair is a range that each step
            draws from (PG-SB; [0.5, 4] for Stable Diffusion).
        timestep: timestep at which the one step starts; none is the noisiest one, as published. See `DMD2.timesteps`.
        warmup_steps: training steps of the fake score alone, before the student's first update.
        t_range: lowest and highest timestep at which the scores are compared.
        proportion_empty_prompts: share of steps in which the fake score trains on the empty prompt.
        clip: clamped CLIP term; without it no image is decoded.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    guidance_scale: Amount | tuple[Amount, Amount] = 4.5
    timestep: Amount | None = None
    warmup_steps: Whole = 0
    t_range: tuple[float, float] = (20.0, 980.0)
    proportion_empty_prompts: Share = 0.1
    clip: ClipTerm | None = None

    def __post_init__(self) -> None:
        check_range(self.t_range)

    def roles(self) -> dict[str, Role]:
        return {"student": Lora(), "fake": Lora(), **self.average}

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.check(self.t_range if self.timestep is None else (*self.t_range, self.timestep))
        alpha_t, _ = schedule(torch.tensor(self.sampler(schedule).timesteps[0], dtype=torch.float64))
        if 0 < alpha_t < 1e-3:
            raise ValueError(f"alpha is {alpha_t.item():.1e} at the noisiest time: too small to divide by")

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        start = schedule.span[1] if self.timestep is None else self.timestep
        return Sampler(schedule.even_starts(start, steps or 1), eta=1.0, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        return self.towards(TEACHER, context, batch, step)

    def towards(self, target: str, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step, with the role `target` as the real score."""
        student, z = context.denoiser("student"), context.noise(batch, "start")
        t = per_sample(self.sampler(context.student_schedule).timesteps[0], z)
        turn = step - self.warmup_steps
        if turn >= 0:
            x0 = student(z, t, batch.cond).x0
            loss = surrogate(x0, self.gradient(target, context, batch, x0.detach()))
            logs = {"loss": loss}
            if self.clip is not None:
                images = frames_of((context.decode(x0) / 2 + 0.5).clamp(0, 1))
                prompts = [prompt for prompt in batch.prompts for _ in range(len(images) // len(x0))]
                cosine = clip(self.clip.pretrained_clip_model, context.device)(images, prompts)
                loss = loss + self.clip.weight_at(turn) * (self.clip.threshold - cosine).relu().mean()
                logs["clip"] = cosine.mean()
            x0 = x0.detach()
            yield Update("student", loss, **logs)
        else:
            with torch.no_grad():
                x0 = student(z, t, batch.cond).x0
        yield Update("fake", self.fake_loss(context, batch, x0))

    @torch.no_grad()
    def gradient(self, target: str, context: StepContext, batch: Batch, x0: Tensor) -> Tensor:
        """`sigma_s^2 (eps_real - eps_fake)` at the noised sample, both guided."""
        s = context.schedule.random_times(context.draw(batch, "score t"), *self.t_range)
        x_s = context.schedule.add_noise(x0, context.noise(batch, "score eps"), s)
        w = self._guidance(context)
        real, fake = (context.guided(role, w)(x_s, s, batch.cond).eps for role in (target, "fake"))
        return (expand(context.schedule(s)[1], x_s) ** 2 * (real - fake)).nan_to_num(0.0, 0.0, 0.0)

    def fake_loss(self, context: StepContext, batch: Batch, x0: Tensor) -> Tensor:
        """Denoising score matching with weight alpha_t^2, in some steps without prompts."""
        t = context.schedule.random_times(context.draw(batch, "fake t"), *context.schedule.span)
        alpha_t, eps = expand(context.schedule(t)[0], x0), context.noise(batch, "fake eps")
        empty = context.shared("empty prompt") < self.proportion_empty_prompts
        cond = without_prompt(context.null, batch.cond) if empty else batch.cond
        est = context.denoiser("fake")(context.schedule.add_noise(x0, eps, t), t, cond)
        return distance("l2", free_part(alpha_t * est.eps, cond), free_part(alpha_t * eps, cond))

    def _guidance(self, context: StepContext) -> float:
        if isinstance(self.guidance_scale, tuple):
            low, high = self.guidance_scale
            return low + (high - low) * context.shared("guidance_scale")
        return self.guidance_scale
