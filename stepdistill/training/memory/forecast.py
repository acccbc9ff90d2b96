"""A run's memory, predicted by running its training loop on tensors that have shapes and no content.

What runs is the trainer's own step (`train_step`: the method's updates, backward, clipping, optimizers) on networks
whose weights are fake tensors, so that nothing is read, computed or allocated, and the prediction cannot drift from the
code. Only the weights are fake, and with them all that is computed from them. What a method draws is real, a few
kilobytes, since its numbers decide how many steps are simulated, and which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.rewards.base import Reward, rewards_by_name
from stepdistill.networks.roles import Role
from stepdistill.training.loop import B, C, Updating, train_step
from stepdistill.training.memory.tracker import Tracker
from stepdistill.training.optimizers import Optimizers

LONGEST = 100  # steps in which every role has to step
FEW = 3  # micro-batches of a step that are run
BASE = "base"
UNCOUNTED = (
    "the allocator's slack, the CUDA context and kernel workspaces; samples in memory, and embeddings and latents "
    "cached beyond the first; validation images and the collapse monitor; what the teacher generates before "
    "training"
)


@dataclass(frozen=True)
class RoleMemory:
    """A network or role, in bytes; of what is frozen there are weights only.

    Args:
        parameters: their number.
        gradients: while the role is updated; they are dropped after each update.
    """

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Prediction:
    """Memory of a run in bytes.

    Args:
        peak: the most that lives at once in a step.
        gradients: those that live then.
        loading: of the pipeline as it is loaded, in float32 in main memory; 0 where nothing is loaded.
        remarks: where the run will hold less than is said.
    """

    parts: tuple[RoleMemory, ...]
    peak: int
    gradients: int
    loading: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def static(self) -> int:
        """What stays between steps: weights and optimizer states."""
        return sum(part.weights + part.optimizer for part in self.parts)

    @property
    def activations(self) -> int:
        """What lives at the peak besides weights, optimizer states and gradients."""
        return self.peak - self.static - self.gradients

    def __str__(self) -> str:
        heads = ("parameters", "weights", "gradients", "optimizer")
        lines = ["predicted memory in MiB", "".join(f"{cell:>18}" for cell in ("", *heads))]
        for part in self.parts:
            cells = [f"{size / 2**20:.1f}" for size in (part.weights, part.gradients, part.optimizer)]
            count = f"{part.parameters / 1e6:.2f} M"
            lines.append("".join(f"{cell:>18}" for cell in (part.name, count, *cells)))
        rows = {
            "static: weights and optimizer states": self.static,
            "gradients at the peak, dropped after each update": self.gradients,
            "activations and batches at the peak": self.activations,
            "peak": self.peak,
            "while loading, in main memory": self.loading,
        }
        lines += ["", *(f"{label:>54}{size / 2**20:>18.1f}" for label, size in rows.items() if size)]
        return "\n".join([*lines, *self.remarks, f"not counted: {UNCOUNTED}"])


@dataclass
class Rehearsal(Generic[C, B]):
    """What single steps of a run need; they log, validate and save nothing.

    Args:
        context: what the method may use in a step.
        batches: the micro-batches of each step.
        roles: those of the method.
        rewards: what else the method loads.
    """

    method: Updating[C, B]
    optimizers: Optimizers
    context: Callable[[int], C]
    batches: Iterator[list[B]]
    device: torch.device
    roles: Mapping[str, Role]
    rewards: Sequence[Reward] = ()

    def step(self, number: int, micro_batches: Sequence[B]) -> dict[str, float]:
        """One step of the run; the values that it would log."""
        return train_step(self.method, self.optimizers, self.context(number), micro_batches)


def prime(optimizers: Optimizers) -> None:
    """Let every optimizer step once on zeros, so that its states are there; the gradients are dropped."""
    for role, optimizer in optimizers.by_role.items():
        for param in optimizers.params(role).values():
            param.grad = torch.zeros_like(param)
        try:
            optimizer.step()
        except RuntimeError as error:
            kind, why = type(optimizer).__name__, "its states are counted in one step on fake tensors"
            todo = "predict with an optimizer of torch.optim; the states of this one may be smaller"
            raise ConfigError(
                problem(f"{kind}, which cannot step ({error})", "an optimizer that can", why, todo)
            ) from error
    optimizers.zero()


def by_foreach(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of torch.optim work on all tensors at once, as by itself it does on a GPU with real ones."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def forecast(rehearsal: Rehearsal, frozen: Mapping[str, nn.Module], loading: int = 0) -> Prediction:
    """Predict the memory of a run.

    Args:
        rehearsal: its network lies on the meta device, and its roles are not declared.
        frozen: other networks on that device that the run keeps, by name.
        loading: see `Prediction`.
    """
    optimizers, device = rehearsal.optimizers, rehearsal.device
    tracker = Tracker(device)
    with torch.device("meta"):
        optimizers.add(rehearsal.roles)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        for network in (*frozen.values(), optimizers.backbone):
            network.to_empty(device=device)
            if isinstance(network, PreTrainedModel):
                network.tie_weights()  # what was one tensor has become two
    if optimizers.spec.gradient_checkpointing:
        optimizers.backbone.enable_checkpointing()
    with tracker:
        optimizers.build()
        if device.type == "cuda":
            for optimizer in optimizers.by_role.values():
                by_foreach(optimizer)
        prime(optimizers)
        parts = (*_parts(optimizers, frozen, tracker), *_rewards(rehearsal.rewards, tracker, device))
        for role in optimizers.by_role:
            for param in optimizers.params(role).values():
                param.register_post_accumulate_grad_hook(lambda p: tracker.mark(_grad(p)))
        peak, gradients = _peak(rehearsal, tracker)
    return Prediction(parts, peak, gradients, loading)


def cycle(rehearsal: Rehearsal[C, B], micro_batches: Sequence[B]) -> None:
    """Run the first step, then the last ones, until every role has stepped: what a run comes to hold, it holds there.

    Args:
        micro_batches: of each of these steps.
    """
    waiting = set(rehearsal.optimizers.by_role)
    last = rehearsal.optimizers.spec.max_train_steps - 1
    for step in (0, *range(last, max(0, last - LONGEST), -1)):
        values = rehearsal.step(step, micro_batches)
        waiting -= {role for role in waiting if values.get(f"grad_norm/{role}", 0) > 0}
        if not waiting:
            return


def _peak(rehearsal: Rehearsal, tracker: Tracker) -> tuple[int, int]:
    """The most bytes that live at once, and of these the gradients'.

    Micro-batches advance in lockstep: while one is at work, each of the others holds its batch, and what its method
    keeps from one update to the next. Gradients that wait for more count from the second on, so beyond three a
    micro-batch adds what the third did.
    """
    more = rehearsal.optimizers.spec.gradient_accumulation_steps - FEW
    tracker.reset()
    micro_batches = next(rehearsal.batches)[:FEW]  # what encoding takes may be the most
    cycle(rehearsal, micro_batches)
    peak, gradients = tracker.peak, tracker.gradients_at_peak
    if more > 0:
        del micro_batches[-1]
        tracker.reset()
        cycle(rehearsal, micro_batches)
        peak += more * (peak - tracker.peak)
    return peak, gradients


def _parts(optimizers: Optimizers, frozen: Mapping[str, nn.Module], tracker: Tracker) -> Iterator[RoleMemory]:
    backbone = optimizers.backbone
    roles = {name: list(optimizers.params(name).values()) for name in backbone.declared}
    trained = {id(param) for params in roles.values() for param in params}
    shared = [p for p in backbone.net.parameters() if id(p) not in trained]
    yield RoleMemory(BASE, _count(shared), tracker.bytes([*shared, *backbone.net.buffers()]))
    for name, network in frozen.items():
        params = list(network.parameters())
        yield RoleMemory(name, _count(params), tracker.bytes([*params, *network.buffers()]))
    for name, params in roles.items():
        kept = [*params, *(backbone.others[name].buffers() if name in backbone.others else ())]
        states: list[Any] = []
        if name in optimizers.by_role:
            states = [value for state in optimizers.by_role[name].state.values() for value in state.values()]
        optimizer = tracker.bytes(value for value in states if isinstance(value, Tensor))
        gradients = sum(p.nbytes for p in params) if name in optimizers.by_role else 0
        yield RoleMemory(name, _count(params), tracker.bytes(kept), gradients, optimizer)


def _rewards(rewards: Sequence[Reward], tracker: Tracker, device: torch.device) -> Iterator[RoleMemory]:
    """The networks of rewards, which are loaded and used, each at the first reward that has it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, 64, 64, device=device)
    for name, reward in rewards_by_name(rewards).items():
        before = tracker.total
        with torch.no_grad():
            reward.load(device)(image, ["a"])
        if taken := tracker.total - before:
            yield RoleMemory(f"reward {name}", taken // torch.float32.itemsize, taken)


def _count(params: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in params)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
