"""Distribution matching distillation with a learned fake score (DMD2).

The student's distribution moves to the teacher's along the gradient of KL(student || teacher), the difference of two
scores at a noised sample of the student. The teacher gives one of them. The other comes from the fake score, which is
trained continually on the student's current samples. These are simulated from prompts as sampling makes them, so no
data are needed, unless a discriminator is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Decay, Positive, Whole
from stepdistill.core.denoise import Condition, Denoise, free_part, guided_by
from stepdistill.core.guidance import Norm
from stepdistill.core.losses import distance, surrogate
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, check_range, student_starts
from stepdistill.data.base import Source
from stepdistill.methods.anchor import Anchor
from stepdistill.methods.augmentation import Augmentation
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect, check_steps
from stepdistill.methods.finetune import score_matching_loss
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.reward import RewardTerm, calibrated, reward_loss
from stepdistill.methods.rollout import Lengths, default_eta, simulate
from stepdistill.networks.rewards.base import MeasureReward, Reward
from stepdistill.networks.roles import TEACHER, Lora, Role

OFF_PATH_FLOOR = 0.1  # without guidance the teacher's estimate may be next to the sample; as published


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
        pairs:   student + lambda mean |x0 - x0'|^2, x_t from the noise that the teacher's solver made x0' of
        off path: student + lambda_o (matching, at w = 1, of student(x_r, r).x0), x_r = alpha_r x0 + sigma_r eps_student

    References:
        Improved distribution matching distillation, Yin et al. 2024, https://arxiv.org/abs/2405.14867.
        One-step diffusion with distribution matching distillation, Yin et al. 2023,
        https://arxiv.org/abs/2311.18828, section 3.3, for the pairs.
        MagicDistillation, Shao et al. 2025, https://arxiv.org/abs/2503.13319, for `weak`.
        Hyper-SD, Ren et al. 2024, https://arxiv.org/abs/2404.13686, section 3.4, for its one-step stage: one step with
        `rewards` and `regression_weight`, from 999 for the LoRA of all numbers of steps, from 800 for one step alone.
        Continuous-time distribution matching, Liu et al. 2026, https://arxiv.org/abs/2605.06376, for `off_path`.
        SenseFlow, 2025, https://arxiv.org/abs/2506.00523, for `fake_decay` (implicit distribution alignment).

    Args:
        num_inference_steps: steps of the student, evenly spaced from the noisiest time.
        timesteps: timesteps at which the student's steps start, descending, such as [399] for SDXL in one step; none
            spaces them evenly. At the noisiest timestep the x0 error of an epsilon network is many times larger (14.6
            times for Stable Diffusion), so a lower start is easier to learn. Sampling begins with pure noise in any
            case.
        lengths: numbers of steps that one student is trained for; none is the number of the contract alone.
        eta: share of each step that is renoised: 1 as published, 0 for a deterministic sampler; none is 0 for a flow
            and 1 for a table. A student that is sampled with the other eta has another distribution: renoised, one of
            deterministic steps loses variety, and the other way round it gains contrast.
        guidance_scale: w of the teacher's `uncond + w (cond - uncond)`; the fake score is never guided.
        guidance_norm: "token" or "image" scales the teacher's guided output to the norm that it has with the prompt,
            there; none is the rule of its pipeline. It bounds the mean (saturated colours) and adds grain.
        augmentation: guidance at a noise level of its own; none guides at that of the scores.
        anchor: a first step that follows the teacher's path, for variety; the scores then train the later steps alone.
        off_path: lambda_o, weight of the matching, without guidance, at states off the student's path. 0 is off.
        critic_steps: K, training steps of the fake score for each update of the student, each on a rollout of its own.
        rollout_updates: updates of the fake score on each rollout, each with its own times and noise. A rollout of
            many steps costs more than such an update.
        warmup_steps: training steps of the fake score alone, before the student's first update.
        fake_decay: the fake score starts as a copy of the student's LoRA, and after each update of the student is moved
            to `decay fake + (1 - decay) student`. It lags less, and is drawn off its optimum, so that the student's
            distribution becomes too narrow: for 0.97 by about 1.5 % of its spread with K = 5. None is off.
        t_range: lowest and highest timestep at which the scores are compared.
        renoise_shift: s of `sigma = s u / (1 + (s - 1) u)`, by which the times of the scores and of the fake score's
            training are spread, for sigma as a share of `alpha + sigma`; none is as the solver's grid is.
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
            student of one step or of deterministic ones; it needs pairs. The student then starts from their noise in
            every update. 0 disables it.
    """

    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    lengths: Lengths | None = None
    eta: float | None = None
    guidance_scale: Amount = 7.5
    guidance_norm: Norm | None = None
    augmentation: Augmentation | None = None
    anchor: Anchor | None = None
    off_path: Amount = 0.0
    critic_steps: int = 5
    rollout_updates: Count = 1
    warmup_steps: Whole = 0
    fake_decay: Decay | None = None
    t_range: tuple[float, float] = (20.0, 980.0)
    renoise_shift: Positive | None = None
    gan: Gan | Ladd | None = None
    rewards: tuple[RewardTerm, ...] = ()
    weak: float = 0.0
    regression_weight: Amount = 0.0

    def __post_init__(self) -> None:
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps is {self.critic_steps}: expected at least 1, else the fake score is stale")
        check_range(self.t_range)
        if self.eta not in (None, 0, 1):
            raise ValueError(f"eta is {self.eta}: expected 1 (renoise) or 0 (deterministic)")
        if not 0 <= self.weak < 1:
            why = "at 1 the real score is the fake one, and the student has no gradient"
            raise ValueError(f"weak is {self.weak}: expected at least 0 and below 1; {why}")
        check_steps(self)
        sampled = len(self.timesteps or range(self.num_inference_steps))
        if not min(self.trained_steps) <= sampled <= max(self.trained_steps):
            raise ValueError(
                f"lengths.steps are {list(self.trained_steps)}: expected numbers around {sampled}, in which the "
                "student is sampled under its contract; set num_inference_steps, or timesteps, to one that is trained"
            )
        if self.anchor is not None and min(self.trained_steps) == 1:
            raise ValueError(
                "anchor with a student of 1 step: expected at least 2 in every case, since the anchored step is "
                "trained by nothing else; remove the anchor, or train for more steps"
            )
        if self.augmentation is not None:
            check_effect(self, "weak", False, "guidance at the noise level of the scores (augmentation none)")
        if self.gan is not None:
            check_effect(self, "rollout_updates", False, "gan none, whose head is trained once for each rollout")
        if isinstance(self.gan, Ladd):
            check_effect(self.gan, "max_time_probability", False, "a method whose student starts from noised data")

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The numbers of steps that the student is trained for; the contract's is one of them, or between them."""
        return self.lengths.steps if self.lengths else (len(self.timesteps or range(self.num_inference_steps)),)

    @property
    def needs(self) -> frozenset[str]:
        if self.regression_weight:
            return frozenset({"pairs"})
        if self.anchor is not None and self.anchor.stored:
            return frozenset({"trajectories"})
        return frozenset({"prompts"} if self.gan is None else {"latents"})

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        return tuple(one.reward for one in self.rewards)

    def roles(self) -> dict[str, Role]:
        head = {} if self.gan is None else self.gan.roles()
        fake = Lora() if self.fake_decay is None else Lora(of="student", decay=self.fake_decay)
        return {"student": Lora(), "fake": fake, **head, **self.average}

    def calibrate(self, measure: MeasureReward) -> DMD2:
        return replace(self, rewards=calibrated(self.rewards, measure))

    def check(self, schedule: NoiseSchedule) -> None:
        even = self.trained_steps if self.lengths is not None and self.lengths.spacing == "even" else ()
        for steps in (None, *even):
            sampler = self.sampler(schedule, steps)
            schedule.check((*sampler.timesteps, *self.t_range))
            if self.anchor is not None:
                self.anchor.check(schedule, sampler.timesteps[0])
            if self.regression_weight and sampler.eta and max(self.trained_steps) > 1:
                why = "whose samples do not follow from the noise of a pair alone"
                got, todo = f"regression_weight is {self.regression_weight}", "set eta to 0, or timesteps to [999]"
                raise ValueError(f"{got}: expected 0 for several steps with fresh noise, {why}; {todo}")

    def check_data(self, data: Source) -> None:
        if self.anchor is not None:
            self.anchor.check_data(data, self.guidance_scale)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        starts = student_starts(schedule, self.timesteps, self.num_inference_steps, steps)
        return Sampler(starts, default_eta(schedule, self.eta), clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        return self.towards(TEACHER, context, batch, step)

    def towards(self, target: str, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step, with the role `target` as the real score."""
        student, turn, schedule = context.denoiser("student"), step - self.warmup_steps, context.student_schedule
        own = partial(self.sampler, schedule)
        sampler = own() if self.lengths is None else self.lengths.drawn(context, own)
        start = batch.pair[0] if self.regression_weight else context.noise(batch, "start")
        x_t, t, taken = simulate(context, batch, sampler, start, first=0 if self.anchor is None else 1)
        if turn >= 0 and turn % self.critic_steps == 0:
            est = student(x_t, t, batch.cond)
            loss, logs = self.student_loss(target, context, batch, est, sampler.timesteps[taken])
            if self.anchor is not None:
                first = sampler.timesteps[0]
                logs["loss_anchor"] = self.anchor.loss(context, batch, start, first, self.guidance_scale)
                loss = loss + logs["loss_anchor"]
            x0 = est.x0.detach()
            yield Update("student", loss, **logs)
        else:
            with torch.no_grad():
                x0 = student(x_t, t, batch.cond).x0
        for again in range(self.rollout_updates):
            loss = score_matching_loss(context, batch, "fake", x0, self.renoise_shift, again)
            if self.gan is None:
                yield Update("fake", loss)
            else:
                judged = self.gan.head_loss(context, batch, x0)
                total = loss + self.gan.discriminator_weight * judged
                yield Update(("fake", "head"), total, loss_fake=loss, loss_head=judged)

    def real_score(self, target: str, context: StepContext) -> Denoise:
        """The guided role `target`, moved towards the fake score by `weak`."""
        if self.augmentation is not None:
            return context.denoiser(target)
        if not self.weak:
            return context.guided(target, self.guidance_scale)
        weak = context.denoiser("fake").at_strength(self.weak)
        # guidance of the weak prediction itself would count the LoRA w times: from w weak = 1 on the gradient turns
        scale = (1 - self.weak) * (self.guidance_scale - 1)
        return guided_by(weak, context.denoiser(target), context.null, scale, context.combine)

    def student_loss(
        self, target: str, context: StepContext, batch: Batch, est: Estimate, start: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose gradient with respect to the sample is that of the matching and of all further terms.

        Args:
            est: the student's, from the step that begins at the time `start`.
        """
        x0, sample = est.x0, est.x0.detach()
        x_s, s = self.renoised(context, batch, sample, "score")
        with torch.no_grad():
            real = self.real_score(target, context)(x_s, s, batch.cond).x0
            if self.augmentation is not None:
                teacher, w = context.denoiser(target), self.guidance_scale
                real = real + self.augmentation.move(context, batch, teacher, sample, w, start)
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
        if self.off_path:
            logs["loss_off_path"] = self.off_path_loss(target, context, batch, est)
            loss = loss + self.off_path * logs["loss_off_path"]
        return loss, logs

    def renoised(self, context: StepContext, batch: Batch, x0: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """A sample with noise (B, C, H, W), at random times (B,)."""
        t = context.schedule.random_times(context.draw(batch, f"{purpose} t"), *self.t_range, self.renoise_shift)
        return context.schedule.add_noise(x0, context.noise(batch, f"{purpose} eps"), t), t

    def off_path_loss(self, target: str, context: StepContext, batch: Batch, est: Estimate) -> Tensor:
        """Matching of what the student makes of states that its own estimate leads to, at any time."""
        r = context.schedule.random_times(context.draw(batch, "off path t"), *self.t_range, self.renoise_shift)
        x_r = context.schedule.add_noise(est.x0.detach(), est.eps.detach(), r)
        x0 = context.denoiser("student")(x_r, r, batch.cond).x0
        sample = x0.detach()
        x_s, s = self.renoised(context, batch, sample, "off path score")
        with torch.no_grad():
            real, fake = (context.denoiser(role)(x_s, s, batch.cond).x0 for role in (target, "fake"))
        return surrogate(x0, normalised(sample, fake, real, batch.cond, OFF_PATH_FLOOR))


def normalised(x0: Tensor, fake: Tensor, real: Tensor, cond: Condition, floor: float = 0.0) -> Tensor:
    """`(fake - real) / mean |x0 - real|`, the mean over each sample; Yin et al. 2023, eq. 7 and 8. All (B, ...).

    Frames that `cond` holds are left out of the mean: they are equal in all three.

    Args:
        floor: the least that is divided by.
    """
    n = free_part((x0 - real).abs(), cond).flatten(1).mean(1).clamp(min=floor).reshape(-1, *[1] * (x0.ndim - 1))
    return ((fake - real) / n).nan_to_num(0.0, 0.0, 0.0)  # a sample that equals its target has nowhere to go
