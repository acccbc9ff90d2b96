"""Reflow (rectified flow), rf++, and the first stage of SlimFlow: straight sampling paths.

The teacher's ODE carries a state from one time to a later, cleaner one along a curve. The student learns to get there
along a straight line, which one solver step follows without error. What "straight" means on any schedule is in
`core.solvers`: coordinates in which epsilon, v and flow networks have straight paths alike, so the student is sampled
by stock schedulers, and before training it has the teacher's own velocity.

Reflow draws one line from pure noise to the sample that the teacher made of it; PeRFlow (`perflow`) one in each of
several windows of time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count
from stepdistill.core.losses import Distance, sample_distances
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand, per_sample
from stepdistill.core.solvers import Sampler, chord, even_sampler, share_of_noise, time_of_share, u_shaped
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.networks.lpips import Lpips, lpips
from stepdistill.networks.roles import Copy, Lora, Role

logger = logging.getLogger(__name__)
STRAIGHT = 0.01  # straightness over transport cost, 32 steps
Density = Literal["uniform", "u_shaped"]


@dataclass(frozen=True, kw_only=True)
class Reflow(Averaged):
    """Reflow on pairs of noise and the teacher's samples; with `annealing_steps` SlimFlow's first stage.

    Annealed, the noise of a pair is `sqrt(1 - beta^2) z + beta z'` with fresh z', and beta falls from 1 to 0: training
    begins as flow matching on the teacher's samples, which a fresh, smaller network learns more easily.

    Equation:
        (z, x0) = noise, and what the teacher makes of it; x_s = the line from z to x0 at the share of noise s ~ density
        loss = E d( v(x_s), z - x0 ), where v = eps - x0 of the student's estimate

    References:
        Flow straight and fast, Liu et al. 2022, https://arxiv.org/abs/2209.03003, and InstaFlow, Liu et al. 2023,
        https://arxiv.org/abs/2309.06380.
        rf++, Lee et al. 2024, https://arxiv.org/abs/2405.20320:
        `density: u_shaped, loss_type: huber, lpips: {}, first_noise: true`.
        SlimFlow, Zhu et al. 2024, https://arxiv.org/abs/2407.12718, section 4.1:
        `annealing_steps: 300000, random_flip: true, width: 0.5`.

    Args:
        density: density of the noise share along the line: `uniform`, or rf++'s `u_shaped`, which is higher at both
            ends.
        loss_type: loss on velocities: `l2`, or rf++'s pseudo-Huber loss per sample, `huber`. The latter and LPIPS keep
            the minimum only because the end of a pair is a function of its noise.
        lpips: perceptual term; without it no image is decoded.
        annealing_steps: training steps over which beta falls from 1 to 0; 0 uses the pair's own noise from the start.
        random_flip: flip a pair's noise and latents together horizontally, with probability 0.5.
        width: below 1 the student is a smaller network of about this share of the channels, with fresh weights.
        sampling_guidance_scale: default guidance scale of sampling, stored in the contract; keep 1 if the pairs were
            made with guidance.
        num_inference_steps: default number of sampling steps, stored in the contract.
        first_noise: sample by rf++'s rule, which renoises each step with the initial noise. The rule is correct on
            straight paths only, so straightness over transport cost is measured after training (32 steps from 256
            noises), and the rule is dropped unless it is below 0.01. Diffusers has no scheduler for it;
            `stepdistill.load_student` sets one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    density: Density = "uniform"
    loss_type: Distance = "l2"
    lpips: Lpips | None = None
    annealing_steps: int = 0
    random_flip: bool = False
    width: float = 1.0
    sampling_guidance_scale: Amount = 1.0
    num_inference_steps: Count = 1
    first_noise: bool = False

    def __post_init__(self) -> None:
        if self.annealing_steps < 0:
            raise ValueError(f"annealing_steps is {self.annealing_steps}: expected 0 or more")
        sized_student(self.width)

    def roles(self) -> dict[str, Role]:
        return {"student": sized_student(self.width), **self.average}

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return even_sampler(schedule, steps or self.num_inference_steps, self.sampling_guidance_scale, self.first_noise)

    def finalize(self, straightness: Callable[[], float]) -> Reflow:
        if not self.first_noise or (measured := straightness()) < STRAIGHT:
            return self
        logger.warning(
            "first_noise: straightness over transport cost is %.3g, expected below %g. On curved paths the initial "
            "noise gives wrong samples, so the student is sampled with ordinary steps. Train it longer, or set "
            "method.first_noise to false",
            *(measured, STRAIGHT),
        )
        return replace(self, first_noise=False)

    def beta(self, step: int) -> float:
        """The share of fresh noise in `step` (from 0)."""
        return max(0.0, 1 - step / self.annealing_steps) if self.annealing_steps else 0.0

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        z, x0 = batch.pair
        if self.random_flip:
            mirrored = expand(context.draw(batch, "flip") < 0.5, z)
            z, x0 = (torch.where(mirrored, value.flip(-1), value) for value in (z, x0))
        beta = self.beta(step)
        if beta:
            z = (1 - beta**2) ** 0.5 * z + beta * context.noise(batch, "annealing")
        bottom, top = (per_sample(time, z) for time in context.schedule.span)
        line = chord(context.schedule, z, top, x0, bottom)
        est, share = on_the_line(context, batch, line, top, bottom, self.density)
        losses = sample_distances(self.loss_type, est.velocity, line.velocity)
        if self.lpips is None:
            loss = losses.mean()
        else:
            ends = (context.schedule.add_noise(*each, bottom) for each in (est, line))
            term = perceptual_distances(self.lpips, context, *ends)
            term = term / share[: len(term)] if self.lpips.divide else term
            loss = ((1 - share) * losses).mean() + term.mean()
        yield Update("student", loss)


def on_the_line(
    context: StepContext, batch: Batch, line: Estimate, t: Tensor, s: Tensor, density: Density
) -> tuple[Estimate, Tensor]:
    """The student's estimate (B, C, H, W) at a drawn point of the line between the times t and s (B,), t noisier, and
    the share of noise (B,) there."""
    low, high = (share_of_noise(context.schedule, time) for time in (s, t))
    u = context.draw(batch, "t")
    share = low + (u_shaped(u) if density == "u_shaped" else u) * (high - low)
    now = time_of_share(context.schedule, share)
    return context.denoiser("student")(context.schedule.add_noise(*line, now), now, batch.cond), share


def perceptual_distances(term: Lpips, context: StepContext, a: Tensor, b: Tensor) -> Tensor:
    """The weighted LPIPS of the first `term.samples` of two batches of latents (B, C, H, W), decoded."""
    a, b = (context.decode(latents[: term.samples]) for latents in (a, b))
    return term.weight * lpips(term.net, a.device)(a, b)


def sized_student(width: float) -> Lora | Copy:
    """A LoRA, or below 1 a fresh network of about this share of the channels. Raises ValueError outside of (0, 1]."""
    if not 0 < width <= 1:
        raise ValueError(f"width is {width}: expected a share of the teacher's channels in (0, 1]")
    return Lora() if width == 1 else Copy(width=width)
