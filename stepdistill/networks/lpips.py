"""LPIPS, the perceptual distance of two images; differentiable in both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import frames_of

Net = Literal["vgg", "alex", "squeeze"]
SIDE = 224  # of the images that the networks were trained on


@cache
def lpips(net: Net, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Distances (B,) of images (B, 3, H, W) in about [-1, 1], resized to 224; one network in this process.

    Videos (B, 3, F, H, W) have the distances (B F,) of their frames.

    Zhang et al. 2018, https://arxiv.org/abs/1801.03924, as implemented in torchmetrics. Raises ConfigError if
    torchmetrics or the network's weights are missing.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type=net).net.to(device)
    except (ImportError, OSError) as error:
        raise ConfigError(
            problem(
                f"an LPIPS term without its network ({error})",
                "torchmetrics, torchvision, and the weights that torchvision downloads",
                "the term compares features of that network",
                "pip install 'stepdistill[lpips]', download the weights into torch's hub folder, or leave the term out",
            )
        ) from error

    def compare(a: Tensor, b: Tensor) -> Tensor:
        each = (frames_of(videos).float() for videos in (a, b))
        a, b = (interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True) for images in each)
        return network(a, b).flatten()

    return compare
