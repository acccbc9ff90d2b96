"""PeRFlow: piecewise rectified flow, which straightens the paths within each of several time windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from stepdistill.config.kinds import Amount, Count
from stepdistill.core.losses import Distance, sample_distances
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, chord, even_sampler, solve
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.methods.reflow import Density, on_the_line
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class PeRFlow(Averaged):
    """Piecewise rectified flow: a straight line in each of K windows of time.

    The teacher is run inside the window only, from noised data, so no pairs are needed. Two things differ from the
    publication. The line is straight in flow coordinates and not in x, so that DDIM and Euler follow it and no
    scheduler of its own is needed. And the noisiest window begins at pure noise, as sampling does: a table that is not
    pure noise at its end would otherwise be trained at starts that sampling never sees.

    Equation:
        x_end = the guided teacher's solver from x_t, at a window's noisy edge, to its clean edge
        x_s = the line from x_t to x_end at the share of noise s; (x0, eps) = that line's own
        loss = E d( v(x_s), eps - x0 ), where v = eps - x0 of the student's estimate

    References:
        PeRFlow, Yan et al. 2024, https://arxiv.org/abs/2405.07510, section 3.

    Args:
        windows: K, number of time windows, evenly spaced in the scheduler's timesteps.
        solver_steps: solver steps of the teacher in each window.
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher. 1, with captions dropped in the data, leaves
            guidance to sampling (CFG-sync); a larger scale is distilled into the student (CFG-fixed).
        sampling_guidance_scale: default guidance scale of sampling, stored in the contract; keep 1 if the teacher is
            guided.
        density: density of the noise share within a window: `uniform` or `u_shaped`.
        loss_type: loss on velocities: `l2`, or rf++'s pseudo-Huber loss per sample, `huber`.
        num_inference_steps: default number of sampling steps, stored in the contract; none takes one per window.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    windows: int = 4
    solver_steps: int = 8
    guidance_scale: Amount = 7.5
    sampling_guidance_scale: Amount = 1.0
    density: Density = "uniform"
    loss_type: Distance = "l2"
    num_inference_steps: Count | None = None

    def __post_init__(self) -> None:
        for name in ("windows", "solver_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.num_inference_steps and self.num_inference_steps % self.windows:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}: expected a multiple of the "
                f"{self.windows} windows, so that no step crosses the edge of a window"
            )

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return even_sampler(schedule, steps or self.num_inference_steps or self.windows, self.sampling_guidance_scale)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        edges = torch.tensor(
            [*self.sampler(context.student_schedule, self.windows).timesteps, context.schedule.span[0]]
        )
        edges = edges.to(context.device)
        k = (context.draw(batch, "window") * self.windows).long()
        noisy, clean = edges[k], edges[k + 1]
        z = context.noise(batch, "eps")
        start = torch.where(expand(k == 0, z), z, context.schedule.add_noise(batch.x0, z, noisy))
        teacher = context.guided(TEACHER, self.guidance_scale)
        with torch.no_grad():
            end = solve(teacher, context.schedule, start, noisy, clean, self.solver_steps, batch.cond)
        line = chord(context.schedule, start, noisy, end, clean)
        est, _ = on_the_line(context, batch, line, noisy, clean, self.density)
        yield Update("student", sample_distances(self.loss_type, est.velocity, line.velocity).mean())
