"""CLIP similarity as a reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepdistill.config.kinds import Place
from stepdistill.networks.clip import clip, clip_digest
from stepdistill.networks.rewards.base import Reward, Score


@dataclass(frozen=True, kw_only=True)
class ClipScore(Reward):
    """The cosine of an image's and its prompt's CLIP embeddings.

    References:
        Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    Args:
        pretrained_clip_model: a folder or hub id with model, tokenizer and image processor.
    """

    pretrained_clip_model: Place = "openai/clip-vit-base-patch32"

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}@{clip_digest(self.pretrained_clip_model)}"

    def build(self, device: torch.device) -> Score:
        return clip(self.pretrained_clip_model, device)
