"""LoRA layers that add `s B A` to the frozen weight first, where one product is cheaper than three.

PEFT computes `W x + s B (A x)`. At P places (batch size times tokens, or times pixels of the output), with a weight of
O x I and rank r, that is `P I O + P r (I + O)` multiplications, and passes over the output for `s` and `+`. With
`W' = W + s B A` formed first it is `P I O + r I O`. So `W'` is cheaper where P is large against the layer's width, at
any rank. With gradients:

    dx = dy W'                                                     always, and through W'
    dB = s dy^T (x A^T),  dA = s (dy B)^T x                        2 P r (I + O) multiplications, or
    G = dy^T x,  dB = s G A^T,  dA = s B^T G                       P I O + 2 r I O: fewer where r is near the width

The choices depend on shapes alone, never on measured time, so that runs repeat. Only float32 weights without autocast
are added to: in half precision `W + s B A` rounds small updates away. Quantised layers have other classes in PEFT.
Everywhere else PEFT's own forward is called. PEFT owns names, states and files throughout. Forward-mode derivatives
(`torch.func.jvp`) are taken under `torch.no_grad`, or with `lora.arithmetic: apart`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from stepdistill.networks.roles import Arithmetic

# `W'` is formed where `P (I + O) > LIMIT I O`: equal multiplications at 1. Measured by tests/bench/lora_pass.py, for
# linear layers and convolutions; devices that were not measured go by the multiplications.
LIMITS = {"cpu": (1.2, 2.5)}
UNMEASURED = (1.0, 1.0)
BY_WEIGHT = 0.8  # time of a multiplication in the few products by `G`, over that in the products by `A x`
KEPT_NUMBERS = 2**18  # of a weight that is always kept, a mebibyte


@dataclass(frozen=True)
class LoraShape:
    """What the choices depend on: places P, inputs I (of a convolution, with its kernel's area), outputs O, rank r."""

    places: int
    inputs: int
    outputs: int
    rank: int

    def merges(self, limit: float) -> bool:
        """Whether `W'` is formed."""
        return self.places * (self.inputs + self.outputs) > limit * self.inputs * self.outputs

    def has_full_gradient(self) -> bool:
        """Whether the gradients of A and B are taken from `G`, that of the weight."""
        by_weight = (self.places + 2 * self.rank) * self.inputs * self.outputs
        return BY_WEIGHT * by_weight < 2 * self.places * self.rank * (self.inputs + self.outputs)

    def keeps(self, learns: bool) -> bool:
        """Whether `W'` is kept for backward: where it is small, or no larger than what PEFT keeps.

        That is `A x` for the gradient of B, and nothing in a role that does not learn.
        """
        return self.inputs * self.outputs <= max(KEPT_NUMBERS, self.places * self.rank if learns else 0)


@dataclass(frozen=True)
class Window:
    """Stride and padding of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window | None) -> Tensor:
    """The layer's output: of a convolution if it has a window."""
    if window is None:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, window.stride, window.padding)


def add_lora(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + s B A` in the shape of `W`."""
    return torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=scale).view_as(weight)


class MergedWeight(torch.autograd.Function):
    """`W + s B A`, whose value is known, with its gradients of A and B."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, scale: float, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs[:2])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401  # pyright: ignore
        a, b = ctx.saved_tensors
        whole = ctx.scale * grad.flatten(1)
        return (b.flatten(1).T @ whole).view_as(a), (whole @ a.flatten(1).T).view_as(b), None, None


class MergedProduct(torch.autograd.Function):
    """`x -> (W + s B A) x + bias`, without the gradient of the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        return product(x, value, bias, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ANN401
        x, a, b, weight, _, ctx.scale, ctx.window, value, keep = inputs
        ctx.size, (of_x, *of_ab) = x.shape, ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if any(of_ab) else None, a, b, weight, value if keep and of_x else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401  # pyright: ignore
        x, a, b, weight, value = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            # what is kept is a constant: it will not do where this backward is differentiated
            if value is None or torch.is_grad_enabled():
                value = add_lora(weight, a, b, ctx.scale)
            dx = input_gradient(ctx.size, value, dy, ctx.window)
        if x is not None:
            da, db = low_rank_gradients(x, a, b, dy, ctx.window)
            da, db = ctx.scale * da, ctx.scale * db
        return dx, da, db, None, None, None, None, None, None


def input_gradient(size: torch.Size, weight: Tensor, dy: Tensor, window: Window | None) -> Tensor:
    """`dy W` for an input of this size."""
    if window is None:
        return dy @ weight
    gradient: Any = conv2d_input
    return gradient(size, weight, dy, window.stride, window.padding)


def weight_gradient(x: Tensor, size: torch.Size, dy: Tensor, window: Window | None) -> Tensor:
    """`dy^T x` for a weight of this size."""
    if window is None:
        return dy.T @ x
    gradient: Any = conv2d_weight
    return gradient(x, size, dy, window.stride, window.padding)


def low_rank_gradients(x: Tensor, a: Tensor, b: Tensor, dy: Tensor, window: Window | None) -> tuple[Tensor, Tensor]:
    """The gradients of A and B through `A x`, without the scale."""
    point = Window((1, 1), (0, 0)) if window else None
    inner = product(x, a, None, window)
    db = weight_gradient(inner, b.shape, dy, point)
    return weight_gradient(x, a.shape, input_gradient(inner.shape, b, dy, point), window), db


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
    weight, bias = base.weight, base.bias
    if arithmetic == "apart" or len(names) != 1 or layer.disable_adapters or layer.merged or weight.requires_grad:
        return None
    a, b, scale = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, layer.scaling[names[0]]
    if torch.is_autocast_enabled(x.device.type) or any(part.dtype != torch.float32 for part in (x, weight, a)):
        return None
    if is_hooked(base) or (window is not None and x.ndim != weight.ndim):  # a convolution of one sample
        return None
    places = prod(x.shape[:-1]) if window is None else len(x) * prod(x.shape[2:]) // prod(window.stride)
    shape = LoraShape(places, prod(weight.shape[1:]), len(weight), len(a))
    if arithmetic == "auto" and not shape.merges(LIMITS.get(x.device.type, UNMEASURED)[window is not None]):
        return None
    value = merged_weight(layer, names[0], weight, a, b, scale)
    if not torch.is_grad_enabled():
        return product(x, value, bias, window)
    keep = shape.keeps(learns=a.requires_grad or b.requires_grad)
    if keep and shape.has_full_gradient():
        return product(x, MergedWeight.apply(a, b, scale, value), bias, window)  # pyright: ignore
    # two dimensions, since what is a view of a function's own output may not be written to
    flat = x.reshape(-1, x.shape[-1]) if window is None else x
    y: Any = MergedProduct.apply(flat, a, b, weight, bias, scale, window, value, keep)
    return y if window is not None else y.view(*x.shape[:-1], -1)


def is_hooked(base: nn.Module) -> bool:
    """Whether a call of the layer does more than its product, as that of a layer that is offloaded."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))


@dataclass
class Kept:
    """Weights with their LoRAs that are kept from pass to pass, for as long as no role changes.

    Args:
        values: by layer and role, at the strength that a role is trained at.
    """

    open: bool = False
    values: dict[tuple[int, str], Tensor] = field(default_factory=dict)


@torch.no_grad()
def merged_weight(layer: Any, name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: ANN401
    """The value of `W + s B A`; that of a small layer is kept if it may be."""
    if not layer.kept.open or torch.compiler.is_compiling() or weight.numel() > KEPT_NUMBERS:
        return add_lora(weight, a, b, scale)
    key = (id(layer), name)
    if key not in layer.kept.values:
        layer.kept.values[key] = add_lora(weight, a, b, scale)
    return layer.kept.values[key]


class LoraLinear(peft_layers.Linear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(self, peft_layers.Linear, x, *args, **kwargs)


class LoraConv2d(peft_layers.Conv2d):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return forward(self, peft_layers.Conv2d, x, *args, **kwargs)


KINDS: dict[type, type] = {peft_layers.Linear: LoraLinear, peft_layers.Conv2d: LoraConv2d}


def choose_arithmetic(net: nn.Module, arithmetic: Arithmetic, kept: Kept) -> None:
    """Give PEFT's plain LoRA layers in a network this arithmetic: those on a Linear or a Conv2d, not on heirs."""
    for module in net.modules():
        layer: Any = module
        if type(layer) in KINDS and is_plain(layer.get_base_layer()):
            layer.__class__ = KINDS[type(layer)]
        if type(layer) in KINDS.values():
            base = layer.get_base_layer()
            layer.arithmetic, layer.kept = arithmetic, kept
            layer.window = None if isinstance(base, nn.Linear) else Window(base.stride, base.padding)


@contextmanager
def at_strength(net: nn.Module, name: str, strength: float) -> Iterator[None]:
    """Inside, the LoRA `name` adds `strength` times as much, 1 being what it is trained at.

    Without gradients only: checkpointing computes a block again in backward, where the strength is 1 again.
    """
    if strength == 1:
        yield
        return
    if torch.is_grad_enabled():
        raise ValueError(
            f"role {name!r} is called at strength {strength} with gradients: call it under torch.no_grad()"
        )
    layers: list[Any] = [layer for layer in net.modules() if isinstance(layer, peft_layers.LoraLayer)]
    kept = next((layer.kept for layer in layers if type(layer) in KINDS.values()), Kept())  # all have the same
    # weights at another strength serve one pass: to keep them would hold the role's merged weights twice
    opened, kept.open = kept.open, False
    try:
        for layer in layers:
            layer.set_scale(name, strength)
        yield
    finally:
        kept.open = opened
        for layer in layers:
            layer.set_scale(name, 1.0)


def is_plain(base: Any) -> bool:  # noqa: ANN401
    """Whether PEFT's LoRA is one on the layer's weight: its convolutions have no groups, dilation or other borders."""
    if type(base) is nn.Conv2d:
        borders = base.padding_mode == "zeros" and not isinstance(base.padding, str)
        return borders and base.groups == 1 and base.dilation == (1, 1)
    return type(base) is nn.Linear
