"""Adversarial terms: a head on features of noised samples tells them from data, and the student learns to please it.

The student's term is computed in two phases. The judging network's graph ends at the sample, and the student's loss is
the inner product of its sample with the gradient found there. So no graph spans two roles, and no weight of the judge
or of the head gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Positive, Share
from stepdistill.core.denoise import Denoise, RoleDenoise
from stepdistill.core.losses import Adversarial, Divergence, discriminator_loss, divergence_weight, generator_loss
from stepdistill.core.schedule import expand
from stepdistill.methods.base import Batch, StepContext, check_effect
from stepdistill.networks.roles import TEACHER, Module, Role
from stepdistill.networks.taps import Head, LaddHead

Logs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Gan:
    """The adversarial term of DMD2, on features of noised samples.

    References:
        Diffusion-GAN, Wang et al. 2022, https://arxiv.org/abs/2206.02262: `gan: {}`.
        f-distill, Xu et al. 2025, https://arxiv.org/abs/2502.15681: `gan: {divergence: jensen_shannon}` and others.
        Adversarial post-training, Lin et al. 2025, https://arxiv.org/abs/2501.08316, for the approximate R1.

    Args:
        generator_weight: lambda_g, weight of the student's adversarial loss.
        discriminator_weight: lambda_d, weight of the discriminator's loss.
        features: network whose features the discriminator reads: the `fake` score, which then trains on the
            discriminator's loss, too (as in the paper), or the frozen `teacher`.
        loss_type: `softplus` (the paper) or `hinge`.
        r1_weight: weight of the approximate R1 penalty `(D(x + r1_sigma z) - D(x))^2` on noised real data; 0 disables
            it.
        r1_sigma: standard deviation of that perturbation.
        divergence: f-divergence of the score term, weighted by the discriminator's density ratio; all but `reverse_kl`
            need loss_type softplus.
    """

    generator_weight: Amount = 1e-3
    discriminator_weight: Amount = 1e-2
    features: Literal["fake", "teacher"] = "fake"
    loss_type: Adversarial = "softplus"
    r1_weight: Amount = 0.0
    r1_sigma: Positive = 0.1
    divergence: Divergence = "reverse_kl"

    def __post_init__(self) -> None:
        if self.divergence != "reverse_kl" and self.loss_type != "softplus":
            raise ValueError(f"divergence {self.divergence!r} needs log-ratios, which only loss_type 'softplus' learns")
        check_effect(self, "r1_sigma", self.r1_weight > 0, "an r1_weight above 0")

    def roles(self) -> dict[str, Role]:
        """The head."""
        return {"head": Module(Head)}

    def judge(self, context: StepContext) -> RoleDenoise:
        """The role whose features the head sees."""
        return context.denoiser("fake" if self.features == "fake" else TEACHER)

    def sample_term(self, context: StepContext, batch: Batch, x0: Tensor) -> tuple[Tensor, Logs]:
        """The student's term at its samples `x0` (B, C, H, W), to be added to its loss, and its value in the logs."""

        def loss(sample: Tensor) -> Tensor:
            frozen = self.judge(context).frozen()
            return generator_loss(self.loss_type, _logits(frozen, context, batch, sample, "gan student"))

        return two_phase(x0, loss, self.generator_weight)

    def weighted(self, context: StepContext, batch: Batch, x_s: Tensor, s: Tensor, gradient: Tensor) -> Tensor:
        """The score term's gradient (B, ...) at noised samples x_s, weighted by the divergence."""
        if self.divergence == "reverse_kl":
            return gradient
        logits = context.module("head")(self.judge(context).features(x_s, s, batch.cond))
        return expand(divergence_weight(self.divergence, logits), gradient) * gradient

    def head_loss(self, context: StepContext, batch: Batch, x0: Tensor) -> Tensor:
        """The head's loss on noised samples and noised data; with `features: fake` it trains the fake score, too."""
        data, role = batch.x0, self.judge(context)
        real = _logits(role, context, batch, data, "gan real")
        loss = discriminator_loss(self.loss_type, _logits(role, context, batch, x0, "gan fake"), real)
        if self.r1_weight:
            shaken = _logits(role, context, batch, data, "gan real", shake=self.r1_sigma)
            loss = loss + self.r1_weight * (shaken - real).square().mean()
        return loss


@dataclass(frozen=True, kw_only=True)
class Ladd:
    """Latent adversarial diffusion distillation (LADD), in the form of SANA-Sprint.

    Equation:
        student: x0 = student(x_t, t).x0; with probability p at pure noise and the time where sampling in one step
                 starts, else at noised data and a time of the method
                 + lambda_g mean(-D(x_s)),   x_s = alpha_s x0 + sigma_s eps
        head:    1/2 (mean relu(1 - D(data_s)) + mean relu(1 + D(x_s)))
        time:    sigma_s / alpha_s = e^tau / 0.5,   tau ~ N(time_mean, time_std^2)

    D gives one logit a token at each of several depths of the frozen teacher. The head sees its samples and the data at
    the same s. The frozen teacher is the only judge.

    References:
        LADD, Sauer et al. 2024, https://arxiv.org/abs/2403.12015.
        SANA-Sprint, Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.3.

    Args:
        generator_weight: lambda_g, weight of the student's adversarial loss.
        depths: where the head reads the teacher, as shares of its blocks that lie before, ascending in (0, 1]. The
            paper reads after 3, 9, 15 and 20 of the 20 blocks of SANA 1.6B. Shares that lead to one place in a network
            of few blocks count once. In a UNet the blocks are those on the way down, the middle, and those on the way
            up.
        time_mean: mean of tau, the logarithm of the noise level at which the head sees its inputs.
        time_std: standard deviation of tau.
        max_time_probability: p, probability that the student's input is pure noise at the time where sampling in one
            step starts; it has no effect in DMD2, which simulates the student's inputs.
        misaligned_pairs: whether the head also learns that data beside the prompt of the next sample of the micro-batch
            are fake. They are as many as the student's samples; a micro-batch of one sample has none. With them the
            loss depends on how samples are put together in micro-batches.
    """

    discriminator_weight: ClassVar[float] = 1.0

    generator_weight: Amount = 0.5
    depths: tuple[Share, ...] = (0.15, 0.45, 0.75, 1.0)
    time_mean: float = -0.6
    time_std: Positive = 1.0
    max_time_probability: Share = 0.5
    misaligned_pairs: bool = False

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0.0, *self.depths), self.depths, strict=False))
        if not self.depths or not ascending or self.depths[-1] > 1:
            raise ValueError(
                f"depths is {list(self.depths)}: expected ascending shares of the network's blocks, above 0 and up to "
                "1, such as [0.15, 0.45, 0.75, 1.0]"
            )

    def roles(self) -> dict[str, Role]:
        """The head."""
        return {"head": Module(LaddHead, self.depths)}

    def student_term(
        self, context: StepContext, batch: Batch, student: Denoise, t: Tensor, start: float
    ) -> tuple[Tensor, Tensor, Logs]:
        """The student's term at its samples from noised data, or from pure noise.

        Args:
            t: (B,) times of the method's own distribution.
            start: where sampling in one step starts, from pure noise. With probability p a sample starts there.

        Returns:
            The term, to be added to the student's loss; its samples (B, C, H, W) without a graph, for `head_loss`; and
            the term's value in the logs.
        """
        first, z = context.draw(batch, "gan start") < self.max_time_probability, context.noise(batch, "gan input eps")
        # a table's noisiest state is not quite noise, but sampling starts from noise
        x_t = torch.where(expand(first, z), z, context.schedule.add_noise(batch.x0, z, t))
        t = torch.where(first, start, t)
        x0 = student(x_t, t, batch.cond).x0
        term, logs = self.sample_term(context, batch, x0)
        return term, x0.detach(), logs

    def sample_term(self, context: StepContext, batch: Batch, x0: Tensor) -> tuple[Tensor, Logs]:
        """The student's term at its samples `x0` (B, C, H, W), to be added to its loss, and its value in the logs."""
        t = self.times(context, batch, "gan student t")

        def loss(sample: Tensor) -> Tensor:
            return generator_loss("hinge", self._judged(context, batch, sample, t, "gan student eps"))

        return two_phase(x0, loss, self.generator_weight)

    def head_loss(self, context: StepContext, batch: Batch, x0: Tensor) -> Tensor:
        """The head's loss on noised samples and noised data."""
        t = self.times(context, batch, "gan t")
        real = self._judged(context, batch, batch.x0, t, "gan real eps")
        fake = self._judged(context, batch, x0, t, "gan fake eps")
        if self.misaligned_pairs and len(x0) > 1:
            t, next_x0 = self.times(context, batch, "gan misaligned t"), batch.x0.roll(1, 0)
            fake = torch.cat([fake, self._judged(context, batch, next_x0, t, "gan misaligned eps")])
        return 0.5 * discriminator_loss("hinge", fake, real)

    def times(self, context: StepContext, batch: Batch, purpose: str) -> Tensor:
        """Times (B,) at which the head sees its inputs."""
        return context.schedule.lognormal_times(context.draw(batch, purpose), self.time_mean, self.time_std)

    def _judged(self, context: StepContext, batch: Batch, x0: Tensor, t: Tensor, purpose: str) -> Tensor:
        """The head's logits (B, N) at `x0` noised to t."""
        x_t = context.schedule.add_noise(x0, context.noise(batch, purpose), t)
        features = context.denoiser(TEACHER).frozen().features_at(x_t, t, batch.cond, self.depths)
        return context.module("head")(features)


def two_phase(x0: Tensor, loss: Callable[[Tensor], Tensor], weight: float) -> tuple[Tensor, Logs]:
    """`weight (x0 . dL/dx0)`, whose gradient by the student's weights is that of `weight L(x0)`; and L in the logs.

    Args:
        x0: (B, ...), the student's samples, with their graph.
        loss: L, of the samples without it.
    """
    sample = x0.detach().requires_grad_()
    term = loss(sample)
    (pull,) = torch.autograd.grad(term, sample)
    return weight * (x0 * pull).sum(), {"loss_gan": term.detach()}


def _logits(
    role: RoleDenoise, context: StepContext, batch: Batch, x0: Tensor, purpose: str, shake: float = 0.0
) -> Tensor:
    """The head's logits (B, 1) at `x0` noised by draws of its own, and then by `shake` more."""
    t = context.schedule.random_times(context.draw(batch, f"{purpose} t"), *context.schedule.span)
    x_t = context.schedule.add_noise(x0, context.noise(batch, f"{purpose} eps"), t)
    if shake:
        x_t = x_t + shake * context.noise(batch, f"{purpose} shake")
    return context.module("head")(role.features(x_t, t, batch.cond))
