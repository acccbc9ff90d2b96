"""Distribution matching distillation with a learned fake score (DMD2).

The student's distribution moves to the teacher's along the gradient of KL(student || teacher), the difference of two
scores at a noised sample of the student. The teacher gives one of them. The other comes from the fake score, which is
trained continually on the student's current samples. These are simulated from prompts as sampling makes them, so no
data are needed, unless a discriminator is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Whole
from stepdistill.core.denoise import guided
from stepdistill.core.losses import denoising, surrogate
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, few_step, student_starts
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect, check_range, check_steps
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.networks.roles import TEACHER, Lora, Role


@dataclass(frozen=True, kw_only=True)
class DMD2(Averaged):
    """DMD2 with a LoRA student and a LoRA fake score on one frozen base.

    Equation:
        student: x0 = student(x_t, t).x0, where its own steps lead to x_t; x_s = alpha_s x0 + sigma_s eps
                 d loss / d x0 ~ (fake(x_s, s).x0 - real) / mean |x0 - real|, real = teacher(x_s, s).x0
        fake:    loss = E |fake(x_t, t).eps - eps|^2 on samples of the student
        gan:     student + lambda_g softplus(-D(x_s))
                 fake + lambda_d (softplus(D(x_s)) + softplus(-D(data_s)))
                 or those of `Ladd`

    References:
        Improved distribution matching distillation, Yin et al. 2024, https://arxiv.org/abs/2405.14867.
        One-step diffusion with distribution matching distillation, Yin et al. 2023,
        https://arxiv.org/abs/2311.18828.

    Args:
        num_inference_steps: steps of the student, evenly spaced from the noisiest time.
        timesteps: timesteps at which the student's steps start, descending, such as [399] for SDXL in one step; none
            spaces them evenly. At the noisiest timestep the x0 error of an epsilon network is many times larger (14.6
            times for Stable Diffusion), so a lower start is easier to learn. Sampling begins with pure noise in any
            case.
        eta: share of each step that is renoised: 1 as published, 0 for a deterministic sampler.
        guidance_scale: w of the teacher's `uncond + w (cond - uncond)`; the fake score is never guided.
        critic_steps: K, updates of the fake score for each update of the student.
        warmup_steps: training steps of the fake score alone, before the student's first update.
        t_range: lowest and highest timestep at which the scores are compared.
        gan: adversarial term, which needs images; none trains on prompts alone. Without a `type` it is `Gan`, the
            paper's; `type: stepdistill.methods.gan.Ladd` reads several depths of the teacher.
    """

    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    eta: float = 1.0
    guidance_scale: Amount = 7.5
    critic_steps: int = 5
    warmup_steps: Whole = 0
    t_range: tuple[float, float] = (20.0, 980.0)
    gan: Gan | Ladd | None = None

    def __post_init__(self) -> None:
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps is {self.critic_steps}: expected at least 1, else the fake score is stale")
        check_range(self.t_range)
        if self.eta not in (0, 1):
            raise ValueError(f"eta is {self.eta}: expected 1 (renoise) or 0 (deterministic)")
        check_steps(self)
        if isinstance(self.gan, Ladd):
            check_effect(self.gan, "max_time_probability", False, "a method whose student starts from noised data")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"prompts"} if self.gan is None else {"latents"})

    def roles(self) -> dict[str, Role]:
        head = {} if self.gan is None else self.gan.roles()
        return {"student": Lora(), "fake": Lora(), **head, **self.average}

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.check((*self.sampler(schedule).timesteps, *self.t_range))

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(student_starts(schedule, self.timesteps, self.num_inference_steps, steps), self.eta, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        return self.towards(TEACHER, context, batch, step)

    def towards(self, target: str, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step, with the role `target` as the real score."""
        student, turn = context.denoiser("student"), step - self.warmup_steps
        x_t, t = simulate(context, batch, self.sampler(context.schedule))
        if turn >= 0 and turn % self.critic_steps == 0:
            x0 = student(x_t, t, batch.cond).x0
            loss, logs = self.student_loss(target, context, batch, x0)
            x0 = x0.detach()
            yield Update("student", loss, **logs)
        else:
            with torch.no_grad():
                x0 = student(x_t, t, batch.cond).x0
        loss = fake_loss(context, batch, x0)
        if self.gan is None:
            yield Update("fake", loss)
        else:
            judged = self.gan.head_loss(context, batch, x0)
            total = loss + self.gan.discriminator_weight * judged
            yield Update(("fake", "head"), total, loss_fake=loss, loss_head=judged)

    def student_loss(
        self, target: str, context: StepContext, batch: Batch, x0: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose gradient with respect to the sample is that of the matching and the adversarial term."""
        sample = x0.detach()
        s = context.schedule.random_times(context.draw(batch, "score t"), *self.t_range)
        x_s = context.schedule.add_noise(sample, context.noise(batch, "score eps"), s)
        with torch.no_grad():
            real = guided(context.denoiser(target), context.null, self.guidance_scale)(x_s, s, batch.cond).x0
            fake = context.denoiser("fake")(x_s, s, batch.cond).x0
            gradient = normalised(sample, fake, real)
            if isinstance(self.gan, Gan):
                gradient = self.gan.weighted(context, batch, x_s, s, gradient)
        loss = surrogate(x0, gradient)
        if self.gan is None:
            return loss, {"loss": loss}
        term, logs = self.gan.sample_term(context, batch, x0)
        return loss + term, {"loss": loss, **logs}


def simulate(context: StepContext, batch: Batch, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """The input `(x_t, t)` of one of the student's steps, as sampling reaches it from pure noise.

    Backward simulation (DMD2, section 4.4). The step is drawn once for all samples and processes, and those
    before it are taken without a graph.
    """
    k = int(context.shared("step") * len(sampler.timesteps))
    with torch.no_grad():
        x_t = few_step(
            context.denoiser("student"),
            context.schedule,
            sampler,
            context.noise(batch, "start"),
            batch.cond,
            lambda i: context.noise(batch, f"again {i}"),
            taken=k,
        )
    return x_t, per_sample(sampler.timesteps[k], x_t)


def fake_loss(context: StepContext, batch: Batch, x0: Tensor) -> Tensor:
    """Denoising score matching of the fake score on the student's samples, at any time of the schedule."""
    t = context.schedule.random_times(context.draw(batch, "fake t"), *context.schedule.span)
    eps = context.noise(batch, "fake eps")
    est = context.denoiser("fake")(context.schedule.add_noise(x0, eps, t), t, batch.cond)
    return denoising(est, x0, eps, context.schedule)


def normalised(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """`(fake - real) / mean |x0 - real|`, the mean over each sample; Yin et al. 2023, eq. 7 and 8. All (B, ...)."""
    n = (x0 - real).abs().flatten(1).mean(1).reshape(-1, *[1] * (x0.ndim - 1))
    return ((fake - real) / n).nan_to_num(0.0, 0.0, 0.0)  # a sample that equals its target has nowhere to go
