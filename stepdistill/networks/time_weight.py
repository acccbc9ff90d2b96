"""The adaptive weight of times, a trained module of continuous-time consistency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FREQUENCIES = 16


class TimeWeight(nn.Module):
    """The logarithm of the loss's size at an angle, a linear layer on its first harmonics.

    Minimising `exp(-l) loss + l` over l gives `l = log E[loss]`, so that every time has one weight in the gradient
    (Karras et al. 2024, https://arxiv.org/abs/2312.02696, section 2.2; Lu & Song 2024,
    https://arxiv.org/abs/2410.11081, section 4.2). It starts at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * FREQUENCIES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, angle: Tensor) -> Tensor:
        """(B,) of angles (B,) in [0, pi/2]."""
        phases = 2 * angle.float().unsqueeze(1) * torch.arange(1, FREQUENCIES + 1, device=angle.device)
        return self.linear(torch.cat([phases.cos(), phases.sin()], 1)).squeeze(1)
