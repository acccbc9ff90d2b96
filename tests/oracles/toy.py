"""A network of two layers with a LoRA each, and a method of linear losses, whose every update is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.config.schema import Factory
from stepdistill.core.schedule import NoiseSchedule, Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Lora, LoraSpec, Role
from stepdistill.training.loop import train_step
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec

SGD = Factory("torch.optim.SGD", {})
TARGETS = ("to_q", "to_v")


class Net(nn.Module):
    """Two layers, each with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_v(torch.tanh(self.to_q(x)))


@dataclass(frozen=True, kw_only=True)
class Turns(Averaged):
    """The student steps every K-th time, and the fake score always, each on a loss that is linear in one weight.

    Args:
        factor: of the losses.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    k: int = 1
    factor: float = 1.0

    def roles(self) -> dict[str, Role]:
        return {"student": Lora(), "fake": Lora(), **self.average}

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler((1000.0,))

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        for role in ("student", "fake") if step % self.k == 0 else ("fake",):
            terms = [(p * pattern(p, *batch.index)).sum() for p in context.module(role).parameters()]
            yield Update(role, self.factor * torch.stack(terms).sum())


def pattern(like: Tensor, i: int) -> Tensor:
    """The gradient that sample i alone gives: 1 everywhere for i = 0, longer and in another direction for others."""
    return (1 + i) * torch.cos(i * torch.arange(like.numel())).reshape(like.shape)


def scene(bone: Backbone, step: int) -> StepContext:
    return StepContext(
        schedule=Rectified(),
        null={},
        denoiser=lambda role: nn.Identity(),  # pyright: ignore[reportArgumentType]
        module=lambda role: nn.ParameterList(bone.parameters_of(role).values()),
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
    )


def optimizers(method: Turns, scale: float | None = None, **train: Any) -> Optimizers:
    spec = TrainSpec(**{"output_dir": "x", "learning_rate": 1.0, "max_grad_norm": None, "optimizer": SGD} | train)
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    torch.manual_seed(0)
    bone = Backbone(Net(), LoraSpec(rank=2), TARGETS, seed=spec.seed)
    return Optimizers(bone, spec, scaler).declare(method).build()


def step(method: Turns, team: Optimizers, number: int, *index: tuple[int, ...]) -> dict[str, float]:
    """One training step on micro-batches with these samples."""
    parts = [Batch(each, {}, (1, 1, 1)) for each in index or [(0,)]]
    return train_step(method, team, scene(team.backbone, number), parts)


def weights(team: Optimizers, role: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in team.params(role).values()])
