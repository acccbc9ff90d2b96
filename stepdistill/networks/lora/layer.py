"""The LoRA of one layer, and of an original layer that holds several of Diffusers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from stepdistill.networks.lora.names import Layer


@dataclass(frozen=True)
class LayerLora:
    """The LoRA of one layer: `W + alpha / rank * up @ down`.

    Args:
        down: (rank, inputs), of a convolution (rank, channels, height, width).
        up: (outputs, rank), of a convolution (outputs, rank, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)

    def product(self) -> Tensor:
        """The matrix (outputs, inputs) that is added to the layer's weight, in float32."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


def join_layers(parts: Sequence[LayerLora | None], layer: Layer) -> LayerLora:
    """The LoRA of an original layer from those of its parts, None for a part without one.

    Different `down` are stacked, and the `up` form a block diagonal, so the rank is the sum of the parts' ranks. If all
    share one `down`, it is kept. Exact if the parts have the same alpha / rank; otherwise `up` is scaled by the ratio.
    """
    known = [part for part in parts if part is not None]
    first = known[0]
    if len(parts) == 1:
        return replace(first, up=_swapped(first.up, first.down, layer))
    width = first.down.shape[1]
    sizes = [rows * width for rows in layer.rows]
    for part, size in zip(parts, sizes, strict=True):
        if part is not None and (len(part.up) != size or part.down.shape[1] != width):
            raise ValueError(f"{layer.parts}: shapes {[tuple(p.up.shape) for p in known]}, expected {sizes} rows")
    shared = all(torch.equal(part.down, first.down) and part.alpha == first.alpha for part in known)
    if shared and len(known) == len(parts):
        return LayerLora(first.down, torch.cat([part.up for part in known]), first.alpha)
    down = torch.cat([part.down for part in known])
    up = first.up.new_zeros(sum(sizes), len(down))
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            block = part.up if part.scale == first.scale else part.up * (part.scale / first.scale)
            up[row : row + size, column : column + len(part.down)] = block
            column += len(part.down)
        row += size
    return LayerLora(down, up, first.alpha * len(down) / len(first.down))


def split_layer(part: LayerLora, layer: Layer) -> list[LayerLora | None]:
    """The LoRAs of an original layer's parts: the inverse of `join_layers`, if `up` is block diagonal.

    Otherwise each part has all of `down`, and its own rows of `up`.
    """
    if len(layer.parts) == 1:
        return [replace(part, up=_swapped(part.up, part.down, layer))]
    sizes = [rows * part.down.shape[1] for rows in layer.rows]
    if sum(sizes) != len(part.up):
        raise ValueError(f"{layer.name}: up has {len(part.up)} rows, expected {sum(sizes)} for {layer.parts}")
    rows = part.up.split(sizes)
    ranks = _ranks([(block != 0).any(0) for block in rows])
    if ranks is None:
        return [LayerLora(part.down, block.contiguous(), part.alpha) for block in rows]
    loras: list[LayerLora | None] = []
    start = 0
    for block, rank in zip(rows, ranks, strict=True):
        columns, start = slice(start, start + rank), start + rank
        alpha = part.alpha * rank / len(part.down)
        loras.append(LayerLora(part.down[columns].clone(), block[:, columns].contiguous(), alpha) if rank else None)
    return loras


def _ranks(used: Sequence[Tensor]) -> list[int] | None:
    """The number of columns of each part in a block diagonal, from the nonzero columns of its rows.

    Equal ranks are tried first, for all parts and then for fewer; None if it is not block diagonal.
    """
    total, parts = len(used[0]), range(len(used))
    for count in range(len(used), 0, -1):
        for chosen in combinations(parts, count) if total % count == 0 else ():
            ranks = [total // count if i in chosen else 0 for i in parts]
            starts = [sum(ranks[:i]) for i in parts]
            outside = (torch.cat([u[:s], u[s + r :]]) for u, s, r in zip(used, starts, ranks, strict=True))
            if not any(bool(rest.any()) for rest in outside):
                return ranks
    ends = [int(u.nonzero().max()) + 1 if u.any() else 0 for u in used]
    begins = [int(u.nonzero().min()) if u.any() else 0 for u in used]
    ranks, start = [], 0
    for begin, end in zip(begins, ends, strict=True):
        if end and begin < start:
            return None
        ranks.append(max(end - start, 0))
        start = max(end, start)
    last = max(i for i in parts if ranks[i])
    ranks[last] += total - start  # columns that are zero everywhere
    return ranks


def _swapped(up: Tensor, down: Tensor, layer: Layer) -> Tensor:
    swap = layer.swap and len(up) == 2 * down.shape[1]
    return torch.cat([up[len(up) // 2 :], up[: len(up) // 2]]) if swap else up
