"""The trainable roles of a run, with an optimizer and a learning-rate schedule each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from stepdistill.config.schema import Factory
from stepdistill.core import distributed
from stepdistill.core.errors import StepdistillError, problem
from stepdistill.methods.base import Method
from stepdistill.networks import sharding
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.quantize import dense
from stepdistill.networks.roles import Ema, Role
from stepdistill.training.recipe import TrainSpec

FUSED = {"torch.optim.Adam", "torch.optim.AdamW", "torch.optim.SGD"}  # that have such a kernel on every device
WAYS = {"fused", "foreach", "capturable", "differentiable"}
GOLDEN = (5**0.5 - 1) / 2
OPTIONS = ("lr", "betas", "eps", "weight_decay")  # of an optimizer; a resumed run may change them


def in_one_kernel(make: Factory) -> dict[str, bool]:
    """Arguments that let an optimizer of torch step all tensors in one kernel, unless the config says how it steps.

    Left alone, on a CPU it takes hundreds of small tensors one by one, ten operations each.
    """
    return {"fused": True} if make.type in FUSED and not WAYS & make.kwargs.keys() else {}


@dataclass
class Optimizers:
    """An optimizer and a learning-rate schedule for each trained role.

    Args:
        scaler: of losses; at work for float16 only.

    Attributes:
        step: the last one of which an update was applied.
    """

    backbone: Backbone
    spec: TrainSpec
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False))
    by_role: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    schedulers: dict[str, torch.optim.lr_scheduler.LRScheduler] = field(default_factory=dict)
    step: int | None = None

    def declare(self, method: Method) -> Optimizers:
        """Add the method's roles, see `add`."""
        return self.add(method.roles())

    def add(self, roles: Mapping[str, Role]) -> Optimizers:
        """Add roles to the backbone, with rank 0's weights on every process."""
        for name, role in roles.items():
            self.backbone.add(name, role)
            distributed.broadcast(list(self.params(name).values()))
        return self

    def build(self) -> Optimizers:
        """Build optimizer and schedule of every declared role that is trained."""
        spec = self.spec
        for name, role in self.backbone.declared.items():
            if isinstance(role, Ema):
                continue
            make = (spec.optimizers or {}).get(name, spec.optimizer)
            self.by_role[name] = make(list(self.params(name).values()), lr=spec.learning_rate, **in_one_kernel(make))
            self.schedulers[name] = get_scheduler(
                spec.lr_scheduler,
                self.by_role[name],
                num_warmup_steps=spec.lr_warmup_steps,
                num_training_steps=spec.max_train_steps,
            )
        return self

    def params(self, role: str) -> dict[str, nn.Parameter]:
        """A role's parameters by name."""
        return self.backbone.parameters_of(role)

    def clip(self, roles: Sequence[str]) -> dict[str, Tensor]:
        """Average the gradients of `roles` over the processes, and clip them. Returns their norms by `grad_norm/ROLE`.

        The norms stay on the device: reading one waits for all that was asked of it.
        """
        norms: dict[str, Tensor] = {}
        for role in roles:
            params = self.params(role)
            missing = [key for key, p in params.items() if p.grad is None]
            if missing:
                got = f"no gradient for {len(missing)} of {len(params)} tensors of role {role!r}, such as {missing[0]}"
                why = "the loss does not depend on them, so they would never learn"
                todo = "exclude layers whose output is not used, or remove a no_grad around the role's call"
                raise StepdistillError(problem(got, "a gradient for each", why, todo))
            distributed.average([p.grad for p in params.values() if p.grad is not None])
            self.scaler.unscale_(self.by_role[role])
            largest = self.spec.max_grad_norm or float("inf")
            norms[f"grad_norm/{role}"] = nn.utils.clip_grad_norm_(list(params.values()), largest)
        return norms

    def apply(self, roles: Sequence[str], step: int) -> None:
        """One update of `roles` by their clipped gradients: step, average, zero."""
        for role in roles:
            self.scaler.step(self.by_role[role])
        self.scaler.update()
        self.backbone.average(roles, step)
        self.zero()
        self.step = step

    @property
    def rate(self) -> float:
        """The first role's learning rate."""
        return float(next(iter(self.schedulers.values())).get_last_lr()[0])

    def zero(self) -> None:
        """Drop every gradient: a role's loss leaves some in the others."""
        for optimizer in self.by_role.values():
            optimizer.zero_grad(set_to_none=True)

    def advance_schedules(self) -> None:
        """Move every learning rate on by one step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of")  # rates follow steps; a role may wait for its first
            for scheduler in self.schedulers.values():
                scheduler.step()

    def fingerprint(self) -> dict[str, Tensor]:
        """One number for each tensor, or this process's share of it, frozen ones too; two tell what has moved."""
        named = {f"{role}/{key}": p for role in self.backbone.declared for key, p in self.params(role).items()}
        trained = {id(p) for p in named.values()}
        named |= {
            f"base/{key}": sharding.local(p) for key, p in self.backbone.net.named_parameters() if id(p) not in trained
        }
        with torch.no_grad():
            # weighted, since Adam's first steps are +-lr, which a plain sum can miss; by multiples of the golden ratio,
            # of which a few are as far apart as many, so that tensors of all sizes share them
            whole = torch.arange(max(p.numel() for p in named.values()), dtype=torch.float64)
            weights = 1 + (whole * GOLDEN).frac().to(next(iter(named.values())).device)
            return {key: dense(p).flatten().double() @ weights[: p.numel()].to(p.device) for key, p in named.items()}

    def check_moved(self, before: dict[str, Tensor], all_should: bool) -> None:
        """Raise StepdistillError where a frozen tensor has changed since `before`, or, if `all_should`, a trained one
        has not."""
        now = self.fingerprint()
        learning = any(group["lr"] > 0 for opt in self.by_role.values() for group in opt.param_groups)
        equal = torch.stack([now[key] == before[key] for key in now]).tolist()  # read at once
        still = [k for k, same in zip(now, equal, strict=True) if same and k.split("/")[0] in self.by_role]
        leaked = [k for k, same in zip(now, equal, strict=True) if not same and k.startswith("base/")]
        if (still and learning and all_should) or leaked:
            got = (
                f"{len(still)} trainable tensors that did not change and {len(leaked)} frozen ones that did, "
                f"such as {(still + leaked)[0]}"
            )
            why = "the run learns nothing, or changes its teacher"
            todo = "check the learning rate, and that the loss is not zero"
            raise StepdistillError(problem(got, "changes in all trainable tensors and no others", why, todo))

    def state(self) -> dict[str, dict]:
        """The states of the optimizers. Schedules need none: they are functions of the step."""
        return {name: optimizer.state_dict() for name, optimizer in self.by_role.items()}

    def restore(self, roles: dict[str, dict[str, Tensor]], states: dict[str, dict], scaler: dict, step: int) -> None:
        """Load a checkpoint of `step` steps. `OPTIONS` and schedules stay those of the config."""
        for name in self.backbone.declared:
            self.backbone.load_state(name, roles[name])
        for name, optimizer in self.by_role.items():
            saved, fresh = states[name], optimizer.state_dict()["param_groups"]
            groups = [
                old | {key: new[key] for key in ("initial_lr", *OPTIONS, *WAYS) if key in new}
                for old, new in zip(saved["param_groups"], fresh, strict=True)
            ]
            optimizer.load_state_dict(saved | {"param_groups": groups})
            self.schedulers[name].last_epoch = step - 1
        self.advance_schedules()
        if scaler:  # none where losses were not scaled
            self.scaler.load_state_dict(scaler)
