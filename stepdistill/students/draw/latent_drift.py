"""How the latents of a long video's windows drift from those of the first one, and a way to take the drift out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Ends = Callable[[Tensor, int], Tensor]  # frames that are given and a window's number, to latents (B, C, F, h, w)
LEAST_SPREAD = 1e-5  # of a channel, below which it is constant


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each latent channel, (..., C)."""

    means: Tensor
    spreads: Tensor


def channel_statistics(latents: Tensor) -> ChannelStatistics:
    """Of latents (B, C, F, h, w), over frames, rows and columns; (B, C)."""
    values = latents.flatten(2)
    return ChannelStatistics(values.mean(2), values.std(2, correction=0))


def from_first(windows: ChannelStatistics) -> tuple[Tensor, Tensor]:
    """How far windows (W, C) are from the first one, each (W,): its own are 0 and 1.

    The first is the root mean square over channels of `(mean - mean_1) / std_1`, the second the mean of `std / std_1`.
    """
    means, spreads = windows
    unit = spreads[0].clamp_min(LEAST_SPREAD)
    return ((means - means[0]) / unit).square().mean(1).sqrt(), (spreads / unit).mean(1)


def matched_to_first(ends: Ends, first: Tensor, held: int) -> Ends:
    """Windows whose new latent frames have the mean and standard deviation of the first window's, by channel.

    Equation:
        y = mean_1 + std_1 (x - mean) / std, over the latent frames after the overlap alone

    A bias and a shrinkage that each window adds do not add up then. What the windows have to say of brightness and
    colour goes with them: a new scene takes those of the first.

    References:
        Adaptive instance normalisation, Huang & Belongie 2017, https://arxiv.org/abs/1703.06868, eq. 8.

    Args:
        first: latents (B, C, F, h, w) of the first window.
        held: latent frames of the overlap, which stay as they are.
    """
    means, spreads = channel_statistics(first[:, :, held:])

    def matched(given: Tensor, number: int) -> Tensor:
        before, new = ends(given, number).tensor_split([held], 2)
        own = channel_statistics(new)
        scale = spreads / own.spreads.clamp_min(LEAST_SPREAD)
        shift = means - own.means * scale
        return torch.cat([before, _each(scale) * new + _each(shift)], 2)

    return matched


def _each(values: Tensor) -> Tensor:
    """Values (B, C) of channels, for latents."""
    return values[:, :, None, None, None]
