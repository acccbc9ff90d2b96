"""Prediction types. A network output is a row `y = p x0 + q eps` of a 2x2 system with `x_t`.

With `x_t = alpha x0 + sigma eps` and `det = alpha q - sigma p`:
`x0 = (q x_t - sigma y) / det`, `eps = (alpha y - p x_t) / det`. No other module depends on the prediction type.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill.core.schedule import NoiseSchedule, expand

Kind = Literal["epsilon", "sample", "v_prediction", "flow"]


class Estimate(NamedTuple):
    """A denoiser's guess of the two parts of `x_t`; each (B, ...), float32 or float64."""

    x0: Tensor
    eps: Tensor

    @property
    def velocity(self) -> Tensor:
        """`eps - x0`, along a straight path in the direction of noise."""
        return self.eps - self.x0


def row(kind: Kind, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
    """`(p, q)` of a prediction type, of `alpha_t`'s shape."""
    zero, one = torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    match kind:
        case "epsilon":
            return zero, one
        case "sample":
            return one, zero
        case "v_prediction":
            return -sigma_t, alpha_t
        case "flow":
            return -one, one
    raise ValueError(f"prediction type {kind!r}: expected epsilon, sample, v_prediction or flow")


def estimate(kind: Kind, y: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Estimate:
    """The estimate behind a network output `y` (B, ...) at `x_t` (B, ...) and t (B,), in float32 at least."""
    return estimate_at_levels(kind, y, x_t, *schedule(t))


def estimate_at_levels(kind: Kind, y: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
    """`estimate` where `x_t = alpha_t x0 + sigma_t eps` with levels (B,) that are known."""
    # the network sees a half x_t too, but sigma / alpha reaches 14.6: the conversion may not lose those bits
    y, x_t = (v if v.dtype == torch.float64 else v.float() for v in (y, x_t))
    alpha_t, sigma_t = (expand(v, x_t) for v in (alpha_t, sigma_t))
    p, q = row(kind, alpha_t, sigma_t)
    det = alpha_t * q - sigma_t * p
    return Estimate((q * x_t - sigma_t * y) / det, (alpha_t * y - p * x_t) / det)


def output(kind: Kind, est: Estimate, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The network output that stands for `est`: the inverse of `estimate`."""
    p, q = row(kind, *(expand(v, est.x0) for v in schedule(t)))
    return p * est.x0 + q * est.eps
