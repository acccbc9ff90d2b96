"""The states that a few-step model visits, what comes into its layers there, and how far another is from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.denoise import Condition, Denoise, guided
from stepdistill.core.prediction import Estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.moments import second_moments
from stepdistill.networks.roles import TEACHER

FITTED = (1, 2)  # seeds of the rollouts that a LoRA is fitted on
JUDGED = 0  # and of those that it is judged on


@dataclass(frozen=True)
class Rollout:
    """Few-step sampling from prompts by the role `tuned` of a backbone, which is a whole network.

    Args:
        pipe: the pipeline that `backbone` is in.
        resolution: height and width in pixels.
        batch: prompts at once.
    """

    family: Family
    pipe: DiffusionPipeline
    backbone: Backbone
    sampler: Sampler
    resolution: tuple[int, int]
    prompts: Sequence[str]
    batch: int

    def moments(self, layers: Collection[str]) -> dict[str, Tensor]:
        """Sums of `x x^T` over the inputs of linear layers of the tuned network, see `second_moments`."""
        tuned = self._denoiser("tuned")
        with second_moments(self.backbone.others["tuned"], layers) as sums:
            for seed in FITTED:
                for noise, cond, generator in self._starts(seed):
                    self._sample(tuned, noise, cond, generator)
        return sums

    @torch.no_grad()
    def gap_left(self, role: str) -> dict[float, float]:
        """By timestep, `sum |x0_role - x0_tuned|^2 / sum |x0_base - x0_tuned|^2` at the states of the tuned network.

        The noise is another one than that of `moments`.
        """
        tuned, judged, base = (self._denoiser(name) for name in ("tuned", role, TEACHER))
        near, far = (dict.fromkeys(self.sampler.timesteps, 0.0) for _ in range(2))

        for noise, cond, generator in self._starts(JUDGED):

            def compared(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
                est, time = tuned(x_t, t, cond), min(near, key=lambda known: abs(known - t[0].item()))
                for sums, denoise in ((near, judged), (far, base)):
                    sums[time] += (denoise(x_t, t, cond).x0 - est.x0).double().square().sum().item()
                return est

            self._sample(compared, noise, cond, generator)
        return {t: near[t] / far[t] if far[t] else 0.0 for t in near}

    def _denoiser(self, role: str) -> Denoise:
        family, kind = self.family, self.family.kind(self.pipe)
        schedule = family.schedule_at(self.pipe, self.pipe.scheduler, self.resolution)
        denoise = Denoiser(self.backbone, role, schedule, kind, family.call, grad=False)
        null = family.unconditional(self.pipe)
        return guided(denoise, null, self.sampler.guidance_scale, family.combine(kind, schedule))

    def _starts(self, seed: int) -> Iterator[tuple[Tensor, Condition, torch.Generator]]:
        """Noise (B, C, H, W), condition, and the generator of the fresh noise, for a batch of prompts after another."""
        device = next(self.backbone.net.parameters()).device
        shape = self.family.latent_shape(self.pipe, *self.resolution)
        for begin in range(0, len(self.prompts), self.batch):
            some = self.prompts[begin : begin + self.batch]
            noise = torch.stack([noise_of(seed, begin + i, shape) for i in range(len(some))])
            yield noise.to(device), self.family.condition(self.pipe, some), fresh_noise(seed, begin)

    @torch.no_grad()
    def _sample(self, denoise: Denoise, noise: Tensor, cond: Condition, generator: torch.Generator) -> None:
        schedule = self.family.schedule_at(self.pipe, self.pipe.scheduler, self.resolution)

        def fresh(step: int) -> Tensor:
            return torch.randn(noise.shape, generator=generator).to(noise.device)

        few_step(denoise, schedule, self.sampler, noise, cond, fresh)
