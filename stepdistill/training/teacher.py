"""The teacher of a run as a sampler: samples, inverted images, and states of guided trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.schedule import per_sample
from stepdistill.core.solvers import each_step, follow
from stepdistill.data import GuidedState
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.methods.base import StepContext
from stepdistill.networks.roles import TEACHER
from stepdistill.training.setup import Session
from stepdistill.training.sizes import Size


@dataclass(frozen=True)
class TeacherSampler:
    """The teacher of a session, as data sources and validation ask for it.

    Args:
        size: height and width in pixels; None is the run's first.
    """

    session: Session
    size: Size | None = None

    @property
    def digest(self) -> str:
        """Of the teacher's weights."""
        return self.session.digest

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of latents."""
        return self.session.batches.shape_at(self.size)

    def _context(self) -> StepContext:
        return self.session.context(0, self.size or self.session.batches.size)

    @property
    def takes_images(self) -> bool:
        """Whether it continues images."""
        return isinstance(self.session.run.family, ImageToVideo)

    @torch.no_grad()
    def sample(
        self, prompts: list[str], noise: Tensor, steps: int, guidance_scale: float, images: Tensor | None = None
    ) -> Tensor:
        """Latents (B, C, h, w) by `steps` deterministic guided steps from `noise`; of videos that begin with images."""
        session, context = self.session, self._context()
        denoise = context.guided(TEACHER, guidance_scale)
        times = context.schedule.grid(steps).flip(0).tolist()
        cond = session.batches.with_images(prompts, images)
        return follow(denoise, context.schedule, times, noise.to(context.device), cond)

    @torch.no_grad()
    def invert(self, prompts: list[str], pixels: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The noise that the teacher's ODE has above images (B, 3, H, W), and their latents at the lowest time."""
        session, context = self.session, self._context()
        latents = session.run.family.encode(session.batches.parts.vae("images are inverted"), pixels.to(context.device))
        if latents.shape != noise.shape:
            got, expected = (f"{size[0]} x {size[1]} pixels" for size in (pixels.shape[-2:], session.batches.size))
            todo = "set train.resolution and data.source.resolution to the same value"
            raise ConfigError(problem(f"images of {got}", expected, "they are inverted at the student's size", todo))
        times = context.schedule.grid(steps).tolist()
        lowest = per_sample(times[0], latents)
        x_t = context.schedule.add_noise(latents, noise.to(context.device), lowest)
        condition = session.batches.condition(prompts)
        return follow(session.denoiser(TEACHER), context.schedule, times, x_t, condition), x_t

    @torch.no_grad()
    def trajectories(self, prompts: list[str], noise: Tensor, scales: Tensor, kept: Tensor, steps: int) -> GuidedState:
        """States (B, K, ...) of guided trajectories of `steps` deterministic steps.

        Args:
            scales: (B,) guidance scales.
            kept: (B, K) ascending numbers of steps, from 0.
        """
        context, teacher = self._context(), self.session.denoiser(TEACHER)
        schedule, times = context.schedule, context.schedule.grid(steps).flip(0)
        x_t, scales_ = noise.to(context.device), scales.to(context.device)
        denoise, cond = context.guided(TEACHER, scales_), self.session.batches.condition(prompts)
        states, outputs = [], []
        for t, s in islice(each_step(times.tolist(), x_t), int(kept.max()) + 1):
            x_t = x_t.half().float()  # as it will be stored: the output belongs to that state
            est = denoise(x_t, t, cond)
            states.append(x_t.cpu())
            outputs.append(teacher.native(est, t).cpu())
            x_t = schedule.add_noise(*est, s)
        row = torch.arange(len(kept))[:, None]
        xs, ys = (torch.stack(each, dim=1)[row, kept] for each in (states, outputs))
        return GuidedState(xs, times[kept], scales[:, None].expand(kept.shape), ys)
