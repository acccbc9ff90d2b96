"""The diversity anchor: the student's first step follows the teacher's path, and is not trained by anything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count
from stepdistill.core.denoise import free_part
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.losses import distance
from stepdistill.core.schedule import NoiseSchedule, per_sample
from stepdistill.core.solvers import chord, follow
from stepdistill.data.base import Source
from stepdistill.data.trajectories import Trajectories
from stepdistill.methods.base import Batch, StepContext
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Diversity-preserved distribution matching (DP-DMD): the first step goes where the teacher goes from that noise.

    Distribution matching loses modes in the first step, at the highest noise. So it trains the later steps alone, from
    the first one's result without a graph, and the first step learns the straight line from the noise to a state on the
    teacher's guided path. A student of one step has no other step, so it cannot have an anchor.

    Equation:
        z_k: `steps` of `num_inference_steps` steps of the guided teacher's solver, from the noise eps to the time t_k
        loss = weight E |student(eps, T) - y|^2, y the network output of the line through (eps, T) and (z_k, t_k)

    The state that the student makes of its first step lies on the teacher's path only where its second step starts at
    t_k or above: for four even steps that is a quarter of the teacher's.

    References:
        Diversity-preserved distribution matching distillation, 2026, https://arxiv.org/abs/2602.03139.

    Args:
        steps: of the teacher's steps, the number that lead to the anchor.
        num_inference_steps: of the teacher's solver, from noise to clean data.
        weight: of the loss, beside that of distribution matching.
        guidance_scale: of the teacher; none is the method's.
        stored: take noise and state from the data, which are then `data.Trajectories` of this guidance that keep this
            one step; else the teacher makes them in every update of the student.
    """

    steps: Count = 10
    num_inference_steps: Count = 40
    weight: Amount = 0.05
    guidance_scale: Amount | None = None
    stored: bool = False

    def __post_init__(self) -> None:
        if self.steps > self.num_inference_steps:
            raise ValueError(
                f"anchor.steps is {self.steps} of num_inference_steps {self.num_inference_steps}: expected at most "
                "all of the teacher's steps"
            )

    def times(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        """Those of the teacher's solver from noise to the anchor, both included, descending."""
        return tuple(schedule.grid(self.num_inference_steps).flip(0)[: self.steps + 1].tolist())

    def check(self, schedule: NoiseSchedule, first: float) -> None:
        """Raise ValueError where the anchor does not lie below the student's first start."""
        end = self.times(schedule)[-1]
        if end >= first:
            raise ValueError(
                f"anchor.steps {self.steps} of {self.num_inference_steps} end at timestep {end:g}: expected one below "
                f"{first:g}, where the student's first step starts; give the anchor more steps"
            )

    def check_data(self, data: Source, scale: float) -> None:
        """Raise ConfigError for trajectories that do not hold this anchor, at the guidance scale of the method."""
        if not self.stored or not isinstance(data, Trajectories):
            return
        w, names = self.scale(scale), "kept_steps, num_inference_steps and guidance_range"
        wanted = ((self.steps,), self.num_inference_steps, (w, w))
        held = (data.kept_steps, data.num_inference_steps, data.guidance_range)
        if held != wanted:
            why, todo = "the anchor is one state of the teacher's path, at one guidance", "set them in data"
            raise ConfigError(problem(f"data with {names} {held}", wanted, why, todo))

    def loss(self, context: StepContext, batch: Batch, start: Tensor, first: float, scale: float) -> Tensor:
        """The weighted loss of the student's first step.

        Args:
            start: (B, C, H, W) pure noise; not used where noise is stored.
            first: the time at which the student's steps start.
            scale: the method's guidance scale.
        """
        schedule, student, t = context.schedule, context.denoiser("student"), per_sample(first, start)
        start, state, end = self.path(context, batch, start, scale)
        with torch.no_grad():
            line = student.native(chord(schedule, start, t, state, end), t)
        output = student.native(student(start, t, batch.cond), t)
        return self.weight * distance("l2", free_part(output, batch.cond), free_part(line, batch.cond))

    @torch.no_grad()
    def path(self, context: StepContext, batch: Batch, start: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, C, H, W), the state that the guided teacher makes of it, and its time (B,)."""
        if self.stored:
            state, noise = batch.guided_state, batch.noise
            if noise is None:
                raise ValueError("the anchor is stored, and the batch has no noise of the trajectory: use Trajectories")
            return noise, state.x_t, state.t
        schedule, times = context.schedule, self.times(context.schedule)
        teacher = context.guided(TEACHER, self.scale(scale))
        return start, follow(teacher, schedule, times, start, batch.cond), per_sample(times[-1], start)

    def scale(self, of_method: float) -> float:
        """The teacher's guidance scale."""
        return of_method if self.guidance_scale is None else self.guidance_scale
