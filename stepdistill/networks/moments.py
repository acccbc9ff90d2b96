"""The second moments of what comes into linear layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def second_moments(net: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Sums of `x x^T`, (inputs, inputs) in float32, over the inputs x that layers of a network get inside.

    A layer that is not called has none. Every token counts alike, and so does every row of a batch.

    Args:
        names: dotted names of linear layers.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().float().flatten(0, -2)
        sums[name] = sums[name].addmm_(rows.T, rows) if name in sums else rows.T @ rows

    hooks = [net.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names]
    try:
        with torch.no_grad():
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
