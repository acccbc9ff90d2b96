"""The trainable roles of a run, with an optimizer and a learning-rate schedule each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from stepdistill.core import distributed
from stepdistill.methods.base import Method
from stepdistill.networks import sharding
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.quantize import dense
from stepdistill.networks.roles import Ema
from stepdistill.training.recipe import TrainSpec


@dataclass
class Team:
    """The trainable roles of a run, with an optimizer and a learning-rate schedule each."""

    backbone: Backbone
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = field(default_factory=dict)

    @classmethod
    def assemble(cls, backbone: Backbone, method: Method, spec: TrainSpec) -> Team:
        """Declare the method's roles, give every process rank 0's weights, and build the optimizers."""
        team = cls(backbone)
        team.declare(method)
        team.equip(spec)
        return team

    def declare(self, method: Method) -> None:
        """Add the method's roles to the backbone, with rank 0's weights on every process."""
        for name, role in method.roles().items():
            self.backbone.add(name, role)
            distributed.broadcast(list(self.params(name).values()))

    def equip(self, spec: TrainSpec) -> None:
        """Build optimizer and schedule of every declared role that is trained."""
        for name, role in self.backbone.declared.items():
            if isinstance(role, Ema):
                continue
            make = (spec.optimizers or {}).get(name, spec.optimizer)
            self.optimizers[name] = make(list(self.params(name).values()), lr=spec.learning_rate)
            self.schedulers[name] = get_scheduler(
                spec.lr_scheduler,
                self.optimizers[name],
                num_warmup_steps=spec.lr_warmup_steps,
                num_training_steps=spec.max_train_steps,
            )

    def params(self, role: str) -> dict[str, nn.Parameter]:
        """A role's parameters by name."""
        return self.backbone.parameters_of(role)

    def zero(self) -> None:
        """Drop every gradient: a role's loss leaves some in the others."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def fingerprint(self) -> dict[str, Tensor]:
        """One number for each tensor, or this process's share of it, frozen ones too; two tell what has moved."""
        named = {f"{role}/{key}": p for role in self.backbone.declared for key, p in self.params(role).items()}
        own = {id(p) for p in named.values()}
        named |= {
            f"base/{key}": sharding.local(p) for key, p in self.backbone.net.named_parameters() if id(p) not in own
        }
        with torch.no_grad():
            # weighted, since Adam's first steps are +-lr, which a plain sum can miss
            return {
                key: dense(p).flatten().double() @ torch.linspace(1, 2, p.numel(), dtype=torch.float64, device=p.device)
                for key, p in named.items()
            }

    def state(self) -> dict[str, dict]:
        """What the optimizers and schedules need to go on."""
        return {
            name: {"optimizer": optimizer.state_dict(), "scheduler": self.schedulers[name].state_dict()}
            for name, optimizer in self.optimizers.items()
        }

    def load(self, roles: dict[str, dict[str, Tensor]], optimizers: dict[str, dict]) -> None:
        """Take up a checkpoint."""
        for name in self.backbone.declared:
            self.backbone.load_state(name, roles[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizers[name]["optimizer"])
            self.schedulers[name].load_state_dict(optimizers[name]["scheduler"])
