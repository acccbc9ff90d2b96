"""Trajectory distribution matching (TDM): the student's states match the teacher's at every step, not only at the end.

As in `dmd2`, a fake score follows what the student makes, and the student moves along the difference of two scores.
DMD2 compares the clean image that each step predicts. TDM compares the state that each step leads to, at noise levels
from that state up to the step's start. These levels tell the steps apart, so that one fake score serves all of them.
Training needs prompts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Positive, Whole
from stepdistill.core.denoise import free_part
from stepdistill.core.errors import problem
from stepdistill.core.losses import Distance, surrogate
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand, per_sample
from stepdistill.core.solvers import Sampler, student_starts, transition
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect, check_steps
from stepdistill.methods.dmd2 import normalised
from stepdistill.methods.rollout import simulate
from stepdistill.networks.roles import TEACHER, Lora, Role

MOST_SNR = 5.0  # of the fake score's weight, as published


@dataclass(frozen=True, kw_only=True)
class TDM(Averaged):
    """Trajectory distribution matching with a LoRA student and a LoRA fake score on one frozen base.

    The student is sampled by deterministic steps, and in the number of steps that it is trained for alone: how far a
    step must move depends on the time that it leads to, which a network of `(x, t)` is not told. Other numbers of steps
    are refused. With exact scores the states have the distributions of the teacher's noised data at their times; in
    DMD2 with deterministic steps each state is one of the student's data, mixed with its starting noise.

    Equation:
        x_s = alpha_s x0 + sigma_s eps, (x0, eps) = student(x_t, t), where its own steps lead to x_t, and one more to s
        x_r = alpha_r / alpha_s x_s + std z, the forward process from s to r
        student: d loss / d x0 ~ (fake(x_r, r).x0 - real) / mean |x0 - real|, real = teacher(x_r, r).x0 guided by w
        fake:    loss = E min(SNR_r, 5) exp((|z|^2 - |eps_r|^2) / 2) |fake(x_r, r).x0 - x0|^2, with means over
                 dimensions as norms, and eps_r the noise of x0 in x_r = alpha_r x0 + sigma_r eps_r; or with
                 `fake_target` noise
                 loss = E |std / sigma_r fake(x_r, r).eps - z|^2, whose weight (std / sigma_r)^2 is 0 at r = s

    The exponential is the ratio of `q(x_r | x0)` and `q(x_r | x_s)`, but for its means. With sums in their place, the
    fake score would learn the denoiser of x0 noised from clean data, and the student would end where DMD2 does. With
    means it is nearly constant on latents, and the fake score learns the mean of x0 given x_r. The student then ends
    between DMD2 and exact scores, at the exact distribution in its last step. The optimum of the other loss is the
    score of the noised states itself.

    References:
        Learning few-step diffusion models by trajectory distribution matching, Luo et al. 2025,
        https://arxiv.org/abs/2503.06674: `timesteps: [899, 674, 449, 224]`.

    Args:
        num_inference_steps: steps of the student, evenly spaced from the noisiest time.
        timesteps: timesteps at which the student's steps start, descending; none spaces them evenly. See
            `DMD2.timesteps`.
        guidance_scale: w of the teacher's `uncond + w (cond - uncond)`; the fake score is never guided.
        separate: compare the scores of each step below its own start, so that no two steps share a noise level. Else
            they are compared up to the first start, and the fake score learns a mean of the steps' scores.
        gap: timesteps from the highest noise level of the comparison up to the start below which it lies.
        t_min: lowest timestep of the comparison; in steps that end above it, the step's end is.
        loss_type: `huber`, a pseudo-Huber loss on the student's x0, whose gradient is bounded by that of its sign; or
            `l2`, the whole difference of the scores.
        huber_c: constant c of the pseudo-Huber loss, in latent units.
        fake_target: what the fake score is trained on: `x0`, the student's estimate, as published; or `noise`, that
            which is added to a state, for the exact score. In the project's benchmark the published one did better.
        critic_steps: K, updates of the fake score for each update of the student.
        warmup_steps: training steps of the fake score alone, before the student's first update.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    guidance_scale: Amount = 4.5
    separate: bool = True
    gap: Positive = 10.0
    t_min: Positive = 20.0
    loss_type: Distance = "huber"
    huber_c: Positive = 1e-3
    fake_target: Literal["x0", "noise"] = "x0"
    critic_steps: Count = 1
    warmup_steps: Whole = 0

    def __post_init__(self) -> None:
        check_steps(self)
        check_effect(self, "separate", self.steps > 1, "several steps")
        check_effect(self, "huber_c", self.loss_type == "huber", "loss_type 'huber'")

    @property
    def steps(self) -> int:
        """The number of steps that the student is trained for."""
        return len(self.timesteps or range(self.num_inference_steps))

    def roles(self) -> dict[str, Role]:
        return {"student": Lora(), "fake": Lora(), **self.average}

    def check(self, schedule: NoiseSchedule) -> None:
        sampler = self.sampler(schedule)
        ranges = [self.levels(sampler, taken) for taken in range(len(sampler.timesteps))]
        for start, (low, high) in zip(sampler.timesteps, ranges, strict=True):
            if low >= high:
                raise ValueError(
                    f"the step from {start:g} has no noise level between {low:g}, its end or t_min, and {high:g}, "
                    f"which is {self.gap:g} (gap) below: expected longer steps; use fewer of them, or a smaller gap"
                )
        schedule.check((*sampler.timesteps, *(t for levels in ranges for t in levels)))

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        if steps not in (None, self.steps):
            why = "where a step of a TDM student leads is trained in, since its network is told the step's start alone"
            todo = "sample it in its own number of steps, or train a student for this one"
            raise ValueError(problem(f"{steps} sampling steps", self.steps, why, todo))
        return Sampler(student_starts(schedule, self.timesteps, self.steps, None), eta=0.0, clean=True)

    def levels(self, sampler: Sampler, taken: int) -> tuple[float, float]:
        """The lowest and the highest timestep at which the scores are compared in the step after `taken` ones."""
        start, end = [*pairwise((*sampler.timesteps, 0.0))][taken]
        return max(end, self.t_min), (start if self.separate else sampler.timesteps[0]) - self.gap

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        student, turn = context.denoiser("student"), step - self.warmup_steps
        sampler = self.sampler(context.student_schedule)
        x_t, t, taken = simulate(context, batch, sampler, context.noise(batch, "start"))
        if turn >= 0 and turn % self.critic_steps == 0:
            est = student(x_t, t, batch.cond)
            loss = self.student_loss(context, batch, sampler, taken, est)
            est = Estimate(*(part.detach() for part in est))
            yield Update("student", loss)
        else:
            with torch.no_grad():
                est = student(x_t, t, batch.cond)
        yield Update("fake", self.fake_loss(context, batch, sampler, taken, est))

    def student_loss(self, context: StepContext, batch: Batch, sampler: Sampler, taken: int, est: Estimate) -> Tensor:
        """A loss whose gradient with respect to the student's x0 is that of the matching."""
        with torch.no_grad():
            x_r, r, *_ = self.renoised(context, batch, sampler, taken, est, "score")
            real = context.guided(TEACHER, self.guidance_scale)(x_r, r, batch.cond).x0
            pull = context.denoiser("fake")(x_r, r, batch.cond).x0 - real
            if self.loss_type == "huber":  # the derivative of `losses.pseudo_huber` at x0, for the target x0 - pull
                pull = pull / (pull.square() + self.huber_c**2).sqrt()
            gradient = normalised(est.x0, real + pull, real, batch.cond)
        return surrogate(est.x0, gradient)

    def fake_loss(self, context: StepContext, batch: Batch, sampler: Sampler, taken: int, est: Estimate) -> Tensor:
        """The fake score's regression at a noised state: on the noise that was added, or on the student's x0."""
        x_r, r, z, s = self.renoised(context, batch, sampler, taken, est, "fake")
        alpha_r, sigma_r = context.schedule(r)
        fake = context.denoiser("fake")(x_r, r, batch.cond)
        if self.fake_target == "noise":
            std = context.schedule.renoise(torch.zeros_like(z), s, r, torch.ones_like(z))
            share = std / expand(sigma_r, x_r)
            return free_part(share * fake.eps - z, batch.cond).square().mean()
        mixed = (x_r - expand(alpha_r, x_r) * est.x0) / expand(sigma_r, x_r)
        error = fake.x0 - est.x0
        new, old, squared = (free_part(part.square(), batch.cond).flatten(1).mean(1) for part in (z, mixed, error))
        weight = (alpha_r / sigma_r).square().clamp(max=MOST_SNR) * ((new - old) / 2).exp()
        return (weight * squared).mean()

    def renoised(
        self, context: StepContext, batch: Batch, sampler: Sampler, taken: int, est: Estimate, purpose: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`x_r`, r (B,), z, and s (B,) or None of clean data: the state that a step leads to, noised further."""
        schedule, last = context.schedule, taken + 1 == len(sampler.timesteps)
        x_s, _ = transition(schedule, sampler, taken, est)
        s = None if last else per_sample(sampler.timesteps[taken + 1], x_s)
        r = schedule.random_times(context.draw(batch, f"{purpose} t"), *self.levels(sampler, taken))
        z = context.noise(batch, f"{purpose} eps")
        return schedule.renoise(x_s, s, r, z), r, z, s
