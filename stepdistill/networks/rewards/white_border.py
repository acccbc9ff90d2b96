"""How white an image's border is: a reward without a network, whose optimum is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.config.kinds import Positive, Share
from stepdistill.networks.rewards.base import Reward, Score


@dataclass(frozen=True, kw_only=True)
class WhiteBorder(Reward):
    """A smooth share of white pixels in the frame around an image, in (0, 1]; 1 for a white frame alone.

    Equation:
        score = mean over the frame's pixels of 1 / (1 + (d / softness)^2), d^2 = mean over channels of (1 - value)^2

    Its tails are heavy, so that every colour has a gradient towards white.

    Args:
        width: of the frame, as a share of the image's sides; at least one pixel.
        softness: distance d from white at which a pixel counts half.
    """

    width: Share = 0.0625
    softness: Positive = 0.1

    def build(self, device: torch.device) -> Score:
        def score(images: Tensor, prompts: object) -> Tensor:
            height, width = images.shape[-2:]
            frame = torch.ones(height, width, device=images.device)
            rows, columns = (max(1, round(self.width * length)) for length in (height, width))
            frame[rows:-rows, columns:-columns] = 0
            apart = (1 - images.clamp(0, 1)).square().mean(1)
            return (frame / (1 + apart / self.softness**2)).sum((1, 2)) / frame.sum()

        return score
