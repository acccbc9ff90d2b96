"""LPIPS, the perceptual distance of two images; differentiable in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stepdistill.config.kinds import Amount, Count
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import frames_of

Net = Literal["vgg", "alex", "squeeze"]
SIDE = 224  # of the images that the networks were trained on


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """A perceptual term: LPIPS between the decoded images of a student and of its target.

    It needs torchmetrics, torchvision and the weights that torchvision downloads. In rf++ the loss with it is
    `(1 - s) premetric + weight LPIPS` between the decoded ends of two lines, at the share of noise s.

    References:
        LPIPS, Zhang et al. 2018, https://arxiv.org/abs/1801.03924.
        rf++, Lee et al. 2024, https://arxiv.org/abs/2405.20320, section 4.2.

    Args:
        weight: weight of the term.
        net: `vgg`, `alex` or `squeeze`.
        samples: how many of a micro-batch's samples are decoded, over which the term is averaged; none takes all.
        divide: divide the term by s (the paper's configuration F). `Reflow` only.
    """

    weight: Amount = 1.0
    net: Net = "vgg"
    samples: Count | None = None
    divide: bool = False


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
