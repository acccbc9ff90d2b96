"""The difference of a fine-tuned network from its base, and which of its layers a LoRA can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from stepdistill.core.errors import StudentError, problem
from stepdistill.networks.pipeline_loras import target_layers

FAR = 0.5  # |W' - W| / |W| of networks that have not much in common
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Difference:
    """Two networks of one architecture, the base and the tuned one.

    Args:
        base, tuned: their tensors by name, in float32.
        layers: the linear and convolution layers by name, those without groups.
    """

    base: dict[str, Tensor]
    tuned: dict[str, Tensor]
    layers: dict[str, nn.Module]

    def change(self, layer: str) -> Tensor:
        """D = W' - W of a layer's weight, in float32; 0 where both are the same numbers in half precision."""
        return _change(self.base[f"{layer}.weight"], self.tuned[f"{layer}.weight"])

    @cached_property
    def sizes(self) -> dict[str, float]:
        """|D| / |W| by layer; 0 of one that is the same."""
        return {
            name: _ratio(self.change(name).norm().item(), self.base[f"{name}.weight"].norm().item())
            for name in self.layers
        }

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The tensors that differ and are no such layer's weight, such as biases."""
        weights = {f"{name}.weight" for name in self.layers}
        names = self.base.keys() - weights
        return tuple(sorted(name for name in names if _change(self.base[name], self.tuned[name]).any()))

    def outside(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The layers that differ and are none of the targets."""
        return tuple(name for name, size in self.sizes.items() if size and name not in targets)

    def linear(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the layers that are linear."""
        return tuple(name for name in names if isinstance(self.layers[name], nn.Linear))


def difference_of(base: nn.Module, tuned: nn.Module, names: tuple[str, str]) -> Difference:
    """The difference of two networks.

    Args:
        names: of the tuned model and of its base, for messages.

    Raises:
        StudentError: they are of different architectures, have the same weights, or not much in common.
    """
    theirs, ours = (_tensors(net) for net in (tuned, base))
    got = f"the network of {names[0]}, a {type(tuned).__name__}"
    expected = f"one of the architecture of {names[1]}, a {type(base).__name__}"
    odd = sorted(key for key in ours.keys() | theirs.keys() if _shape(ours, key) != _shape(theirs, key))
    if type(base) is not type(tuned) or odd:
        shapes = [f"{key} {_shape(theirs, key) or 'none'} for {_shape(ours, key) or 'none'}" for key in odd[:3]]
        why = f"{len(odd)} of {len(ours)} tensors differ in name or shape{': ' * bool(odd)}{', '.join(shapes)}"
        todo = "name the model that the tuned one was trained from"
        raise StudentError(problem(got, expected, why, todo))
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.groups == 1
    }
    difference = Difference(ours, theirs, layers)
    changed = math.hypot(*(_change(ours[key], theirs[key]).norm().item() for key in ours))
    far = _ratio(changed, math.hypot(*(value.norm().item() for value in ours.values())))
    if changed == 0:
        why, todo = "there is nothing to extract", "check that both are the models that you mean"
        raise StudentError(problem(f"{names[0]} with the weights of {names[1]}", "a fine-tuned model", why, todo))
    if not far <= FAR:
        got = f"weights of {names[0]} that differ from those of {names[1]} by {far:.2f} of their size"
        why = "it was not trained from that base, so that their difference means nothing"
        todo = "name the model that the tuned one was trained from"
        raise StudentError(problem(got, f"at most {FAR:g}", why, todo))
    return difference


def choose_targets(difference: Difference, base: nn.Module, targets: Sequence[str], every: bool) -> list[str]:
    """The layers that get a LoRA.

    Args:
        targets: the family's.
        every: whether those that differ outside of them do, too.

    Raises:
        StudentError: none of them differs.
    """
    # an added name may be the end of other layers' names, which PEFT then takes as well
    chosen = target_layers(base, [*targets, *difference.outside(targets)]) if every else list(targets)
    chosen = [name for name in chosen if name in difference.layers]
    if not any(difference.sizes[name] for name in chosen):
        outside = difference.outside(chosen)
        others = len(outside) + len(difference.beside)
        got = f"no change in the {len(chosen)} layers that get a LoRA, and one in {others} other tensors"
        why = "the LoRA would be zero"
        todo = "add --all" if outside else "biases and norms are no part of a LoRA: share the whole network"
        raise StudentError(problem(got, "a change in one of these layers", why, todo))
    return chosen


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in net.state_dict().items() if value.is_floating_point()}


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(tensors[key].shape) if key in tensors else ()


def _change(base: Tensor, tuned: Tensor) -> Tensor:
    # a model that was saved in half precision is no other one
    if any(torch.equal(base.to(half), tuned.to(half)) for half in HALVES):
        return torch.zeros_like(base)
    return tuned.float() - base.float()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)
