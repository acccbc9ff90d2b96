"""SlimFlow's second stage: flow-guided distillation of a straight flow into a one-step student.

The first stage is `reflow.Reflow` with `annealing_steps`, `random_flip` and `width`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount
from stepdistill.core.losses import Distance, sample_distances
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import Sampler, even_sampler, share_of_noise, time_of_share
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect
from stepdistill.methods.reflow import perceptual_distances, sized_student
from stepdistill.networks.lpips import Lpips
from stepdistill.networks.roles import Ema, Role


@dataclass(frozen=True, kw_only=True)
class FlowGuided(Averaged):
    """SlimFlow's second stage, flow-guided distillation: a straight flow is distilled into one step.

    On pairs, the student's one step is regressed to the teacher's sample. On fresh noise, it is regressed to the result
    of two steps: its own first, part of the way, then one of the flow, a frozen copy of the student before training
    (`lora.init_from` names it). Only the one step from pure noise has gradients.

    Equation:
        pairs: loss = E d( student(z, T).x0, x0 )
        fresh: x_t = alpha_t x0 + sigma_t eps of the student's estimate at fresh noise z'
               + flow_weight E d( student(z', T).x0, flow(x_t, t).x0 ), where the flow has no gradient

    References:
        SlimFlow, Zhu et al. 2024, https://arxiv.org/abs/2407.12718, section 4.2; the first step is the student's own,
        as in the released code.

    Args:
        flow_weight: weight of the term on fresh noise; 0 distils on pairs alone.
        turn_range: shares of the way from noise to data at which the flow takes over, drawn uniformly.
        loss_type: loss on the latents after the step: `l2`, or rf++'s pseudo-Huber loss per sample, `huber`.
        lpips: additional perceptual term; without it no image is decoded.
        width: below 1 the student is a smaller network, as in `Reflow`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    flow_weight: Amount = 1.0
    turn_range: tuple[float, float] = (0.2, 0.8)
    loss_type: Distance = "l2"
    lpips: Lpips | None = None
    width: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.turn_range
        if not 0 < low < high < 1:
            raise ValueError(f"turn_range is {list(self.turn_range)}: expected two ascending shares in (0, 1)")
        if self.lpips is not None and self.lpips.divide:
            raise ValueError("lpips.divide is true: expected false, since the student's one step starts at s = 1")
        check_effect(self, "turn_range", self.flow_weight > 0, "a flow_weight above 0")
        sized_student(self.width)

    def roles(self) -> dict[str, Role]:
        return {"student": sized_student(self.width), "flow": Ema("student", 0.0, until=0), **self.average}

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return even_sampler(schedule, steps or 1)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        z, x0 = batch.pair
        student, add_noise = context.denoiser("student"), context.schedule.add_noise
        bottom, top = (per_sample(time, z) for time in context.schedule.span)
        loss = total = self.distance(context, add_noise(*student(z, top, batch.cond), bottom), x0)
        logs = {}
        if self.flow_weight:
            est = student(context.noise(batch, "fresh"), top, batch.cond)
            low, high = (share_of_noise(context.schedule, time) for time in (bottom, top))
            way = self.turn_range[0] + context.draw(batch, "turn") * (self.turn_range[1] - self.turn_range[0])
            t = time_of_share(context.schedule, high + way * (low - high))
            with torch.no_grad():
                x_t = add_noise(*est, t)
                led = add_noise(*context.denoiser("flow")(x_t, t, batch.cond), bottom)
            logs["loss_flow"] = self.distance(context, add_noise(*est, bottom), led)
            total = loss + self.flow_weight * logs["loss_flow"]
        yield Update("student", total, loss=loss, **logs)

    def distance(self, context: StepContext, a: Tensor, b: Tensor) -> Tensor:
        """The mean distance of two ends (B, C, H, W)."""
        apart = sample_distances(self.loss_type, a, b).mean()
        return apart if self.lpips is None else apart + perceptual_distances(self.lpips, context, a, b).mean()
