"""Distribution matching distillation with a learned fake score (DMD2).

The student's distribution moves to the teacher's along the gradient of KL(student || teacher), the difference of two
scores at a noised sample of the student. The teacher gives one of them. The other comes from the fake score, which is
trained continually on the student's current samples. These are simulated from prompts as sampling makes them, so no
data are needed, unless a discriminator is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Whole
from stepdistill.core.denoise import Condition, Denoise, free_part, guided_by
from stepdistill.core.losses import distance, surrogate
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, check_range, few_step, student_starts
from stepdistill.methods.base import (
    Averaged,
    Batch,
    StepContext,
    Update,
    check_effect,
    check_steps,
)
from stepdistill.methods.finetune import score_matching_loss
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.reward import RewardTerm, calibrated, reward_loss
from stepdistill.networks.rewards.base import MeasureReward, Reward
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
        weak:    real = weak_c + (1 - weak) (w - 1) (c - u), c and u of the teacher with and without the prompt, and
                 weak_c the prediction with the prompt and the fake score's LoRA at the strength `weak`
        rewards: student + sum_d w_d mean relu(margin_d - r_d(decode(x0))), as `RewardTerm` has them
        pairs:   student + lambda mean |x0 - x0'|^2, x_t the noise from which the teacher's solver made x0'

    References:
        Improved distribution matching distillation, Yin et al. 2024, https://arxiv.org/abs/2405.14867.
        One-step diffusion with distribution matching distillation, Yin et al. 2023,
        https://arxiv.org/abs/2311.18828, section 3.3, for the pairs.
        MagicDistillation, Shao et al. 2025, https://arxiv.org/abs/2503.13319, for `weak`.
        Hyper-SD, Ren et al. 2024, https://arxiv.org/abs/2404.13686, section 3.4, for its one-step stage: one step with
        `rewards` and `regression_weight`, from 999 for the LoRA of all numbers of steps, from 800 for one step alone.

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
        rewards: terms that score the student's samples, of one reward each.
        weak: strength, in [0, 1), of the fake score's LoRA in the real score, which brings the two scores closer
            (weak-to-strong). The LoRA is in the prediction with the prompt alone, since the fake score never sees the
            empty prompt. Where predictions are linear in the LoRA, `fake - real` is (1 - weak) times that of the
            teacher, at any `guidance_scale`, so that training ends at the same place. The LoRA is the fake score's
            own, so that no further weights are held; with guidance the real score takes one more call of the network.
            0 is off.
        regression_weight: lambda, weight of the squared distance from the teacher's samples of the same noise, for a
            student of one step; it needs pairs. The student then starts from their noise in every update. 0 disables
            it.
    """

    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    eta: float = 1.0
    guidance_scale: Amount = 7.5
    critic_steps: int = 5
    warmup_steps: Whole = 0
    t_range: tuple[float, float] = (20.0, 980.0)
    gan: Gan | Ladd | None = None
    rewards: tuple[RewardTerm, ...] = ()
    weak: float = 0.0
    regression_weight: Amount = 0.0

    def __post_init__(self) -> None:
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps is {self.critic_steps}: expected at least 1, else the fake score is stale")
        check_range(self.t_range)
        if self.eta not in (0, 1):
            raise ValueError(f"eta is {self.eta}: expected 1 (renoise) or 0 (deterministic)")
        if not 0 <= self.weak < 1:
            raise ValueError(
                f"weak is {self.weak}: expected at least 0 and below 1; at 1 the real score is the fake one, and the "
                "student has no gradient"
            )
        check_steps(self)
        if self.regression_weight and len(self.timesteps or range(self.num_inference_steps)) > 1:
            raise ValueError(
                f"regression_weight is {self.regression_weight}: expected 0 for a student of several steps, whose "
                "samples do not follow from the noise of a pair alone; set timesteps to one, such as [999]"
            )
        if isinstance(self.gan, Ladd):
            check_effect(self.gan, "max_time_probability", False, "a method whose student starts from noised data")

    @property
    def needs(self) -> frozenset[str]:
        if self.regression_weight:
            return frozenset({"pairs"})
        return frozenset({"prompts"} if self.gan is None else {"latents"})

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        return tuple(one.reward for one in self.rewards)

    def roles(self) -> dict[str, Role]:
        head = {} if self.gan is None else self.gan.roles()
        return {"student": Lora(), "fake": Lora(), **head, **self.average}

    def calibrate(self, measure: MeasureReward) -> DMD2:
        return replace(self, rewards=calibrated(self.rewards, measure))

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.check((*self.sampler(schedule).timesteps, *self.t_range))

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(student_starts(schedule, self.timesteps, self.num_inference_steps, steps), self.eta, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        return self.towards(TEACHER, context, batch, step)

    def towards(self, target: str, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step, with the role `target` as the real score."""
        student, turn = context.denoiser("student"), step - self.warmup_steps
        start = batch.pair[0] if self.regression_weight else context.noise(batch, "start")
        x_t, t = simulate(context, batch, self.sampler(context.student_schedule), start)
        if turn >= 0 and turn % self.critic_steps == 0:
            x0 = student(x_t, t, batch.cond).x0
            loss, logs = self.student_loss(target, context, batch, x0)
            x0 = x0.detach()
            yield Update("student", loss, **logs)
        else:
            with torch.no_grad():
                x0 = student(x_t, t, batch.cond).x0
        loss = score_matching_loss(context, batch, "fake", x0)
        if self.gan is None:
            yield Update("fake", loss)
        else:
            judged = self.gan.head_loss(context, batch, x0)
            total = loss + self.gan.discriminator_weight * judged
            yield Update(("fake", "head"), total, loss_fake=loss, loss_head=judged)

    def real_score(self, target: str, context: StepContext) -> Denoise:
        """The guided role `target`, moved towards the fake score by `weak`."""
        if not self.weak:
            return context.guided(target, self.guidance_scale)
        weak = context.denoiser("fake").at_strength(self.weak)
        # guidance of the weak prediction itself would count the LoRA w times: from w weak = 1 on the gradient turns
        scale = (1 - self.weak) * (self.guidance_scale - 1)
        return guided_by(weak, context.denoiser(target), context.null, scale, context.combine)

    def student_loss(
        self, target: str, context: StepContext, batch: Batch, x0: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose gradient with respect to the sample is that of the matching and of all further terms."""
        sample = x0.detach()
        s = context.schedule.random_times(context.draw(batch, "score t"), *self.t_range)
        x_s = context.schedule.add_noise(sample, context.noise(batch, "score eps"), s)
        with torch.no_grad():
            real = self.real_score(target, context)(x_s, s, batch.cond).x0
            fake = context.denoiser("fake")(x_s, s, batch.cond).x0
            gradient = normalised(sample, fake, real, batch.cond)
            if isinstance(self.gan, Gan):
                gradient = self.gan.weighted(context, batch, x_s, s, gradient)
        matching = surrogate(x0, gradient)
        term, logs = reward_loss(self.rewards, context, batch, x0)
        loss, logs = matching + term, {"loss": matching, **logs}
        if self.gan is not None:
            term, logs_gan = self.gan.sample_term(context, batch, x0)
            loss, logs = loss + term, {**logs, **logs_gan}
        if self.regression_weight:
            logs["loss_pairs"] = distance("l2", x0, batch.pair[1])
            loss = loss + self.regression_weight * logs["loss_pairs"]
        return loss, logs


def simulate(context: StepContext, batch: Batch, sampler: Sampler, start: Tensor) -> tuple[Tensor, Tensor]:
    """The input `(x_t, t)` of one of the student's steps, as sampling reaches it from pure noise `start` (B, C, H, W).

    Backward simulation (DMD2, section 4.4). The step is drawn once for all samples and processes.
    """
    taken = int(context.shared("step") * len(sampler.timesteps))
    return reached(context.denoiser("student"), context, batch, sampler, start, taken)


def reached(
    denoise: Denoise, context: StepContext, batch: Batch, sampler: Sampler, start: Tensor, taken: int
) -> tuple[Tensor, Tensor]:
    """The input `(x_t, t)` of the step after `taken` ones, which are sampled without a graph from noise `start`."""
    with torch.no_grad():
        x_t = few_step(
            denoise,
            context.schedule,
            sampler,
            start,
            batch.cond,
            lambda i: context.noise(batch, f"again {i}"),
            taken=taken,
        )
    return x_t, per_sample(sampler.timesteps[taken], x_t)


def normalised(x0: Tensor, fake: Tensor, real: Tensor, cond: Condition) -> Tensor:
    """`(fake - real) / mean |x0 - real|`, the mean over each sample; Yin et al. 2023, eq. 7 and 8. All (B, ...).

    Frames that `cond` holds are left out of the mean: they are equal in all three.
    """
    n = free_part((x0 - real).abs(), cond).flatten(1).mean(1).reshape(-1, *[1] * (x0.ndim - 1))
    return ((fake - real) / n).nan_to_num(0.0, 0.0, 0.0)  # a sample that equals its target has nowhere to go
