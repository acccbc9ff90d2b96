"""LoRA layers that add `s B A` to the frozen weight first, where one product is cheaper than three.

PEFT computes `W x + s B (A x)`: at P places (rows of the batch times tokens, or times pixels of the output), with a
weight of O x I and rank r, that is `P I O + P r (I + O)` multiplications, and passes over the output for `s` and `+`.
With `W' = W + s B A` formed first it is `P I O + r I O`. So `W'` is cheaper where P is large against the layer's
width, at any rank. With gradients:

    dx = dy W'                                                     always, and through W'
    dB = s dy^T (x A^T),  dA = s (dy B)^T x                        2 P r (I + O) multiplications, or
    G = dy^T x,  dB = s G A^T,  dA = s B^T G                       P I O + 2 r I O: fewer where r is near the width

The choices depend on shapes alone, never on measured time, so that runs repeat. Only float32 weights without autocast
are added to: in half precision `W + s B A` rounds small updates away. Quantised layers have other classes in PEFT.
Everywhere else PEFT's own forward is called. PEFT owns names, states and files throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight, conv3d_input, conv3d_weight

from stepdistill.networks.roles import Arithmetic

# `W'` is formed where `P (I + O) > LIMIT I O`: equal multiplications at 1. Measured by tests/bench/lora_pass.py, for
# linear layers and convolutions; devices that were not measured go by the multiplications.
LIMITS = {"cpu": (1.2, 2.5)}
UNMEASURED = (1.0, 1.0)
LARGE = 0.8  # the time of a multiplication in a large product, over that in several small ones
SMALL = 2**18  # numbers of a weight, a mebibyte


@dataclass(frozen=True)
class Shape:
    """What the choices depend on: places P, inputs I (of a convolution, with its kernel's area), outputs O, rank r."""

    places: int
    inputs: int
    outputs: int
    rank: int

    def merges(self, limit: float) -> bool:
        """Whether `W'` is formed."""
        return self.places * (self.inputs + self.outputs) > limit * self.inputs * self.outputs

    def has_full_gradient(self) -> bool:
        """Whether the gradients of A and B are taken from that of the weight, a few large products."""
        by_weight = (self.places + 2 * self.rank) * self.inputs * self.outputs
        return LARGE * by_weight < 2 * self.places * self.rank * (self.inputs + self.outputs)

    def keeps(self) -> bool:
        """Whether `W'` is kept for backward: where it is small, or no larger than the `A x` that PEFT keeps."""
        return self.inputs * self.outputs <= max(SMALL, self.places * self.rank)


@dataclass(frozen=True)
class Window:
    """Stride and padding of a convolution in 2 or 3 dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window | None) -> Tensor:
    """The layer's output: of a convolution if it has a window."""
    if window is None:
        return F.linear(x, weight, bias)
    convolve = F.conv2d if weight.ndim == 4 else F.conv3d
    return convolve(x, weight, bias, window.stride, window.padding)


def add_lora(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + s B A` in the shape of `W`."""
    return torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=scale).view_as(weight)


class MergedWeight(torch.autograd.Function):
    """`W + s B A`, whose value is known, with its gradients of A and B."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float, value: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401  # pyright: ignore
        a, b = ctx.saved_tensors
        whole = grad.flatten(1)
        return scaled(ctx.scale, b.flatten(1).T, whole, a), scaled(ctx.scale, whole, a.flatten(1).T, b), None, None


def scaled(scale: float, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """`s left right` in the shape of `like`."""
    return torch.addmm(like.flatten(1), left, right, beta=0, alpha=scale).view_as(like)


class MergedProduct(torch.autograd.Function):
    """`x -> (W + s B A) x + bias`, without the gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        window: Window | None,
        value: Tensor,
        keep: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, weight, *([value] if keep and ctx.needs_input_grad[0] else []))
        ctx.scale, ctx.window = scale, window
        return product(x, value, bias, window)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        x, a, b, weight, *kept = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            # what is kept is a constant: it will not do where this backward is differentiated
            value = kept[0] if kept and not torch.is_grad_enabled() else add_lora(weight, a, b, ctx.scale)
            dx = input_gradient(x, value, dy, ctx.window)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            da, db = low_rank_gradients(x, a, b, dy, ctx.window)
            da, db = ctx.scale * da, ctx.scale * db
        return dx, da, db, None, None, None, None, None, None


def input_gradient(x: Tensor, weight: Tensor, dy: Tensor, window: Window | None) -> Tensor:
    """`dy W` in the shape of x."""
    if window is None:
        return dy @ weight
    gradient: Any = conv2d_input if weight.ndim == 4 else conv3d_input
    return gradient(x.shape, weight, dy, window.stride, window.padding)


def weight_gradient(x: Tensor, size: torch.Size, dy: Tensor, window: Window | None) -> Tensor:
    """`dy^T x` for a weight of this size."""
    if window is None:
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    gradient: Any = conv2d_weight if len(size) == 4 else conv3d_weight
    return gradient(x, size, dy, window.stride, window.padding)


def low_rank_gradients(x: Tensor, a: Tensor, b: Tensor, dy: Tensor, window: Window | None) -> tuple[Tensor, Tensor]:
    """The gradients of A and B through `A x`, without the scale."""
    ones = (1,) * (a.ndim - 2)
    point = Window(ones, (0,) * len(ones)) if window else None
    inner = product(x, a, None, window)
    db = weight_gradient(inner, b.shape, dy, point)
    return weight_gradient(x, a.shape, input_gradient(inner, b, dy, point), window), db


def forward(layer: Any, kind: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """The output of a layer that is PEFT's `kind`."""
    names = [name for name in layer._active_adapter if name in layer.lora_A]
    if not names:
        return layer.base_layer(x, *args, **kwargs)
    y = None if args or kwargs else merged_output(layer, x, names)
    return kind.forward(layer, x, *args, **kwargs) if y is None else y


def merged_output(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:  # noqa: ANN401
    """The layer's output by one product, or None where PEFT's forward is the way: two paths, or several LoRAs."""
    base, arithmetic, window = layer.base_layer, layer.arithmetic, layer.window
    weight = base.weight
    if arithmetic == "apart" or len(names) != 1 or layer.disable_adapters or layer.merged or weight.requires_grad:
        return None
    a, b, scale = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, layer.scaling[names[0]]
    if torch.is_autocast_enabled(x.device.type) or any(part.dtype != torch.float32 for part in (x, weight, a)):
        return None
    places = prod(x.shape[:-1]) if window is None else len(x) * prod(x.shape[2:]) // prod(window.stride)
    shape = Shape(places, prod(weight.shape[1:]), len(weight), len(a))
    if arithmetic == "auto" and not shape.merges(LIMITS.get(x.device.type, UNMEASURED)[window is not None]):
        return None
    value = merged_weight(layer, names[0], weight, a, b, scale)
    if not torch.is_grad_enabled():
        return product(x, value, base.bias, window)
    if shape.keeps() and shape.has_full_gradient():
        return product(x, MergedWeight.apply(a, b, scale, value), base.bias, window)  # pyright: ignore
    return MergedProduct.apply(x, a, b, weight, base.bias, scale, window, value, shape.keeps())  # pyright: ignore


class Formed(NamedTuple):
    """A value of `W + s B A`, and what it was formed from: the tensors are held, so that no other takes their place."""

    value: Tensor
    parts: tuple[Tensor, Tensor, Tensor]
    versions: list[int]
    scale: float

    def is_of(self, parts: tuple[Tensor, Tensor, Tensor], scale: float) -> bool:
        """Whether nothing has been written to, or put in another place, since."""
        same = all(new.is_set_to(old) for new, old in zip(parts, self.parts, strict=True))
        return same and scale == self.scale and [part._version for part in parts] == self.versions


@torch.no_grad()
def merged_weight(layer: Any, name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: ANN401
    """The value of `W + s B A`; that of a small layer is kept until one of the three is written to."""
    if weight.numel() > SMALL or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return add_lora(weight, a, b, scale)
    parts = (weight, a, b)
    if name not in layer.formed or not layer.formed[name].is_of(parts, scale):
        held = (weight.detach(), a.detach(), b.detach())
        layer.formed[name] = Formed(add_lora(*parts, scale), held, [part._version for part in parts], scale)
    return layer.formed[name].value


class LoraLinear(peft_layers.Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(self, peft_layers.Linear, x, *args, **kwargs)


class LoraConv2d(peft_layers.Conv2d):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(self, peft_layers.Conv2d, x, *args, **kwargs)


class LoraConv3d(peft_layers.Conv3d):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(self, peft_layers.Conv3d, x, *args, **kwargs)


KINDS: dict[type, type] = {
    peft_layers.Linear: LoraLinear,
    peft_layers.Conv2d: LoraConv2d,
    peft_layers.Conv3d: LoraConv3d,
}


def choose_arithmetic(net: nn.Module, arithmetic: Arithmetic) -> None:
    """Give PEFT's plain LoRA layers in a network this arithmetic: those on a Linear, Conv2d or Conv3d, not on heirs."""
    for module in net.modules():
        layer: Any = module
        if type(layer) in KINDS and is_plain(layer.get_base_layer()):
            layer.__class__ = KINDS[type(layer)]
        if type(layer) in KINDS.values():
            base = layer.get_base_layer()
            layer.arithmetic, layer.formed = arithmetic, {}
            layer.window = None if isinstance(base, nn.Linear) else Window(base.stride, base.padding)


def is_plain(base: Any) -> bool:  # noqa: ANN401
    """Whether PEFT's LoRA is one on the layer's weight: its convolutions have no groups, dilation or other borders."""
    if type(base) in (nn.Conv2d, nn.Conv3d):
        borders = base.padding_mode == "zeros" and not isinstance(base.padding, str)
        return borders and base.groups == 1 and set(base.dilation) == {1}
    return type(base) is nn.Linear
