"""PickScore: a CLIP that was tuned to people's choices between two images of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepdistill.config.kinds import Place
from stepdistill.networks.clip import clip, clip_digest
from stepdistill.networks.rewards.base import Reward, Score


@dataclass(frozen=True, kw_only=True)
class PickScore(Reward):
    """The logit of an image and its prompt: their cosine in a tuned CLIP ViT-H/14, times exp(logit_scale).

    References:
        Kirstain et al. 2023, https://arxiv.org/abs/2305.01569.

    Args:
        pretrained_clip_model: a folder or hub id with model, tokenizer and image processor.
    """

    pretrained_clip_model: Place = "yuvalkirstain/PickScore_v1"

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}@{clip_digest(self.pretrained_clip_model)}"

    def build(self, device: torch.device) -> Score:
        cosine = clip(self.pretrained_clip_model, device)
        scale = cosine.model.logit_scale.exp().item()
        return lambda images, prompts: scale * cosine(images, prompts)
