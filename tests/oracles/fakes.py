"""Denoisers, a head, CLIP and LPIPS in closed form, with one weight a role: a method's updates take milliseconds.

Each answers sample by sample, differently for every role, time and prompt, so that a loss over a batch can be compared
with its samples' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from stepdistill.core.denoise import SCALE, Condition
from stepdistill.core.prediction import Estimate, Kind, estimate_at_levels, output
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.data.base import GuidedState
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.networks.rewards.base import Reward, Score

SHAPE = (2, 2, 4)  # neither square nor of one channel


@dataclass(frozen=True)
class Fake:
    """A role's network with one weight, which speaks as a network of v-prediction, or flow on a straight path."""

    schedule: NoiseSchedule
    weight: Tensor

    @property
    def kind(self) -> Kind:
        return "flow" if self.schedule.straight else "v_prediction"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return self.queried(x_t, t, cond, *self.schedule(t))

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        y = self.weight * torch.tanh(x_t) + 0.3 * cond["mean"] + 0.1 * expand(torch.sin(t / 200), x_t)
        if SCALE in cond:
            y = y * expand(cond[SCALE], x_t)
        return estimate_at_levels(self.kind, y, x_t, alpha_t, sigma_t)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.weight * x_t + cond["mean"] + expand(t / 1000, x_t)

    def features_at(self, x_t: Tensor, t: Tensor, cond: Condition, depths: tuple[float, ...]) -> tuple[Tensor, ...]:
        found = self.features(x_t, t, cond)
        return tuple((1 + depth) * found[..., : i + 1] for i, depth in enumerate(depths))  # of several sizes

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        return output(self.kind, est, t, self.schedule)

    def frozen(self) -> Fake:
        return replace(self, weight=self.weight.detach())


class Keyed(StepContext):
    """The draws of a run, in float64."""

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        return StepContext.noise(self, batch, purpose).double()

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        return StepContext.draw(self, batch, purpose).double()


@dataclass(frozen=True)
class Stage:
    """The roles' weights (a number each, in [0.5, 1] by name) on a schedule; what runs on it uses its context."""

    schedule: NoiseSchedule
    weights: dict[str, Tensor]

    def __getitem__(self, role: str) -> Tensor:
        if role not in self.weights:
            value = 0.5 + crc32(role.encode()) % 1000 / 2000
            self.weights[role] = torch.tensor(value, dtype=torch.float64, requires_grad=role != "teacher")
        return self.weights[role]

    def context(self, step: int, seed: int = 0) -> StepContext:
        return Keyed(
            schedule=self.schedule,
            null={"mean": torch.full((1, 1, 1, 1), -0.7, dtype=torch.float64)},
            denoiser=lambda role: Fake(self.schedule, self[role]),
            module=self._head,  # pyright: ignore[reportArgumentType]
            decode=lambda latents: latents.repeat_interleave(2, -1).cumsum(1)[:, [0, 1, 1]],
            seed=seed,
            step=step,
            device=torch.device("cpu"),
        )

    def _head(self, role: str) -> Callable[[Tensor | tuple[Tensor, ...]], Tensor]:
        """One logit of one map; of several maps, one for each place of each; of angles (B,) one weight each."""

        def call(features: Tensor | tuple[Tensor, ...]) -> Tensor:
            if isinstance(features, Tensor) and features.ndim == 1:
                return self[role] * features.sin()
            if isinstance(features, Tensor):
                return 3 * self[role] * features.sin().flatten(1).mean(1, keepdim=True)
            return torch.cat([3 * self[role] * part.sin().flatten(1) for part in features], 1)

        return call


def batch(*index: int) -> Batch:
    """The samples of these positions, each a function of its own alone, with all that a method may need."""
    rows = [torch.Generator().manual_seed(i) for i in index]
    latents, noise, x_t, target = (
        torch.stack([torch.randn(SHAPE, generator=row, dtype=torch.float64) for row in rows]) for _ in range(4)
    )
    t, scale = torch.tensor([100.0 + 37 * i for i in index]), torch.tensor([1.5 + i % 4 for i in index])
    mean = torch.tensor([0.2 + 0.1 * i for i in index], dtype=torch.float64).reshape(-1, 1, 1, 1)
    state = GuidedState(x_t, t.double(), scale.double(), target)
    prompts = tuple("abcdefghij"[i] for i in index)
    return Batch(index, {"mean": mean}, SHAPE, latents, noise, prompts, state)


@dataclass(frozen=True)
class Seen:
    """One update of a method.

    Args:
        loss: its value.
        pull: the gradient of each of its roles' weights.
        logs: by name.
    """

    roles: tuple[str, ...]
    loss: Tensor
    pull: dict[str, Tensor]
    logs: dict[str, Tensor]

    @property
    def numbers(self) -> Tensor:
        """All of it, (N,)."""
        return torch.stack([self.loss, *self.pull.values(), *self.logs.values()])


def updates(method: Method, stage: Stage, part: Batch, step: int, seed: int = 0) -> list[Seen]:
    """What the method does in a step, at the stage's weights."""
    seen = []
    for update in method.updates(stage.context(step, seed), part, step):
        pull = torch.autograd.grad(update.loss, [stage[role] for role in update.roles])
        logs = {name: value.detach().double() for name, value in update.logs.items()}
        seen.append(Seen(update.roles, update.loss.detach(), dict(zip(update.roles, pull, strict=True)), logs))
    return seen


@dataclass(frozen=True, kw_only=True)
class Brightness(Reward):
    """kappa times the mean of an image, whatever the prompt, in the images' own precision."""

    kappa: float = 1.0

    def build(self, device: torch.device) -> Score:
        return lambda images, prompts: self.kappa * images.flatten(1).mean(1)

    def load(self, device: torch.device) -> Score:
        return self.build(device)


def perceptual(a: Tensor, b: Tensor) -> Tensor:
    """An LPIPS (B,) of images (B, 3, H, W)."""
    return (a - b).abs().flatten(1).mean(1)


def similarity(images: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """A CLIP's cosines (B,) of images (B, 3, H, W) and prompts."""
    words = torch.tensor([ord(prompt) % 7 / 20 for prompt in prompts], dtype=images.dtype)
    return 0.2 * images.flatten(1).mean(1) + words - 0.2
