"""Losses as pure functions of tensors, in float32 (float64 where their inputs are)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["l2", "huber"]


def distance(kind: Distance, a: Tensor, b: Tensor, huber_c: float = 1e-3) -> Tensor:
    """Mean distance of two tensors of one shape: squared, or the pseudo-Huber `sqrt(d^2 + c^2) - c`.

    The Huber form is nearly |d| at the scale of latents (Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189,
    section 3.3); the squared one has the mean as its fixed point, which is what closed forms speak about.
    """
    error = a - b if a.dtype == torch.float64 else a.float() - b.float()
    match kind:
        case "l2":
            return error.square().mean()
        case "huber":
            return ((error.square() + huber_c**2).sqrt() - huber_c).mean()
    raise ValueError(f"distance {kind!r}: expected l2 or huber")
