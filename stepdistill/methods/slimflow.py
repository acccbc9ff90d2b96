"""SlimFlow's second stage: a straight flow becomes a one-step student, which the flow itself leads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.core.losses import WholeDistance, whole
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, evenly, share_of_noise, time_of_share
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.methods.reflow import Lpips, pairs_of, seen_apart, student_of
from stepdistill.networks.roles import Ema, Role


@dataclass(frozen=True, kw_only=True)
class FlowGuided(Method):
    """SlimFlow's second stage: one step, led by the straight flow that the student begins as.

    On pairs the student's one step is drawn to the teacher's sample. On fresh noise it is drawn to where two steps end:
    its own first, part of the way, then one of the flow, which is a frozen copy of the student before the first step
    (`lora.init_from` names it). Only the one step from pure noise has a graph.

    References:
        SlimFlow, Zhu et al. 2024, https://arxiv.org/abs/2407.12718, section 4.2; the first step is the student's own,
        as in the released code.

    Args:
        flow_weight: of the term on fresh noise; 0 is distillation on pairs alone.
        turn_range: shares of the way from noise to data at which the flow takes over, drawn uniformly.
        loss_type: of the ends, in latents: `l2`, or rf++'s `huber` of a whole sample.
        lpips: a perceptual term beside it; none decodes no image.
        width: below 1 the student is a smaller network, as that of `Reflow`.
        ema_decay: decay of the average of the student that is exported; none exports the student itself.
    """

    flow_weight: float = 1.0
    turn_range: tuple[float, float] = (0.2, 0.8)
    loss_type: WholeDistance = "l2"
    lpips: Lpips | None = None
    width: float = 1.0
    ema_decay: float | None = 0.99

    def __post_init__(self) -> None:
        low, high = self.turn_range
        if not 0 < low < high < 1:
            raise ValueError(f"turn_range is {list(self.turn_range)}: expected two ascending shares in (0, 1)")
        student_of(self.width)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.ema_decay is None else {"ema": Ema("student", self.ema_decay)}
        return {"student": student_of(self.width), "flow": Ema("student", 0.0, until=0)} | average

    def student_role(self) -> str:
        return "student" if self.ema_decay is None else "ema"

    def check(self, schedule: NoiseSchedule) -> None:
        self.sampler(schedule)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return evenly(schedule, steps or 1)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        z, x0 = pairs_of(batch)
        student = context.denoiser("student")
        bottom, top = (torch.full((len(z),), time, device=z.device) for time in context.schedule.span)
        end = context.schedule.add_noise(*student(z, top, batch.cond), bottom)
        loss = self.apart(context, end, x0)
        logs = {"loss": loss.detach()}
        if self.flow_weight:
            z = context.noise(batch, "fresh")
            est = student(z, top, batch.cond)
            low, high = (share_of_noise(context.schedule, time) for time in (bottom, top))
            way = self.turn_range[0] + context.draw(batch, "turn") * (self.turn_range[1] - self.turn_range[0])
            t = time_of_share(context.schedule, high + way * (low - high))
            with torch.no_grad():
                x_t = context.schedule.add_noise(*est, t)
                led = context.schedule.add_noise(*context.denoiser("flow")(x_t, t, batch.cond), bottom)
            term = self.apart(context, context.schedule.add_noise(*est, bottom), led)
            loss = loss + self.flow_weight * term
            logs["loss_flow"] = term.detach()
        yield Update(("student",), loss, logs)

    def apart(self, context: StepContext, a: Tensor, b: Tensor) -> Tensor:
        """The mean distance of two ends (B, C, H, W)."""
        losses = whole(self.loss_type, a - b)
        return losses.mean() if self.lpips is None else losses.mean() + seen_apart(self.lpips, context, a, b).mean()
