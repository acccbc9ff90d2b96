"""What a ControlNet sees, computed from the pixels of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def edges(pixels: Tensor) -> Tensor:
    """An edge map (B, 3, H, W) in [0, 1] of pixels (B, 3, H, W) in [-1, 1], equal in all channels.

    The length of the Sobel gradient of the mean over the channels: 1 beside a straight edge between black and white.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=pixels.device) / 4
    kernels = torch.stack([across, across.T])[:, None]
    grey = (pixels.float().mean(1, keepdim=True) + 1) / 2
    gradient = conv2d(pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    return gradient.norm(dim=1, keepdim=True).clamp(max=1).expand(-1, 3, -1, -1)
