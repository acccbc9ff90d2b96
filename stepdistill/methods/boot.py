"""BOOT: data-free bootstrapping of a one-step student along the teacher's signal ODE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Positive, Whole
from stepdistill.core.denoise import Condition
from stepdistill.core.losses import sample_distances
from stepdistill.core.schedule import NoiseSchedule, expand, per_sample
from stepdistill.core.solvers import Sampler
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class Boot(Averaged):
    """BOOT: the student learns the signal of the teacher's state at every time from the starting noise alone.

    From noise eps and a time t it predicts `y_t = (x_t - sigma_t eps) / alpha_t`, where x_t is the teacher's state on
    its way from eps. The teacher's step from t to s gives the target at s from the student's own y_t, so no data are
    needed. At the end of the way y is clean data, in one call. The network sees pure noise at every time. It is told
    the mirrored time, `T - t`, so that clean data is asked for at T, as a stock scheduler does in one step.

    Equation:
        x_t = alpha_t y_t + sigma_t eps, D = the guided teacher's x0 at x_t, both without a gradient
        rho = sigma_s alpha_t / (sigma_t alpha_s), s the grid time below t
        loss = E |y_s - (rho y_t + (1 - rho) D)|^2 / (1 - rho)^2 + beta |y_T - D(eps, T)|^2

    What it converges to is the teacher's N-step DDIM (or Euler) rollout from eps, started from D. At the noisiest time
    of a table alpha is not 0, and pure noise is no state of it: the boundary term starts there from D, which keeps the
    mean of the data that the teacher's own sampler loses by 4 % on Stable Diffusion's table.

    References:
        BOOT, Gu et al. 2023, https://arxiv.org/abs/2306.05544.

    Args:
        num_ddim_timesteps: N, number of steps of the teacher's solver.
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher.
        boundary_weight: beta, weight of the boundary term.
        weight_limit: largest value of `1 / (1 - rho)^2`.
        curriculum_steps: steps in which the lowest time that is trained falls from T to clean data; 0 trains all times
            from the start.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    num_ddim_timesteps: Count = 25
    guidance_scale: Amount = 7.5
    boundary_weight: Amount = 1.0
    weight_limit: Positive = 100.0
    curriculum_steps: Whole = 0

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.grid(self.num_ddim_timesteps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        if steps not in (None, 1):
            raise ValueError(f"{steps} sampling steps: expected 1, since a BOOT student sees pure noise alone")
        return Sampler((schedule.span[1],), eta=0.0, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        schedule, cond, eps = context.schedule, batch.cond, context.noise(batch, "eps")
        grid = schedule.grid(self.num_ddim_timesteps).to(context.device)
        i = self.step_index(context.draw(batch, "t"), step)
        t, s = grid[i + 1], grid[i]
        noisiest = per_sample(schedule.span[1], eps)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        rho = sigma_s * alpha_t / (sigma_t * alpha_s)
        teacher = context.guided(TEACHER, self.guidance_scale)
        with torch.no_grad():
            y_t = signal(context, eps, t, cond)
            both = {key: torch.cat([value, value]) for key, value in cond.items()}
            x_t = torch.cat([schedule.add_noise(y_t, eps, t), eps])
            found, first = teacher(x_t, torch.cat([t, noisiest]), both).x0.chunk(2)
            share = expand(rho, eps)
            target = share * y_t + (1 - share) * found
        weight = (1 - rho).square().reciprocal().clamp(max=self.weight_limit)
        followed = (weight * sample_distances("l2", signal(context, eps, s, cond), target)).mean()
        start = sample_distances("l2", signal(context, eps, noisiest, cond), first).mean()
        yield Update("student", followed + self.boundary_weight * start, loss_boundary=start)

    def step_index(self, u: Tensor, step: int) -> Tensor:
        """Grid indices (B,) of s from uniform draws: all from the curriculum's lowest on."""
        n = self.num_ddim_timesteps
        done = min(1.0, step / self.curriculum_steps) if self.curriculum_steps else 1.0
        lowest = round((n - 1) * (1 - done))
        return (lowest + u * (n - lowest)).long().clamp(max=n - 1)


def signal(context: StepContext, eps: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The student's y_t (B, ...) for noise (B, ...): its output at pure noise when it is told the mirrored time."""
    low, high = context.schedule.span
    levels = context.schedule(per_sample(high, eps))
    return context.denoiser("student").queried(eps, low + high - t, cond, *levels).x0
