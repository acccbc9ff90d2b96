"""LAION's aesthetic predictors: a linear head on the image embedding of a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.config.kinds import Place
from stepdistill.core.pixels import resized_square
from stepdistill.networks.clip import clip_digest, clip_normalized, pretrained
from stepdistill.networks.rewards.base import Reward, Score
from stepdistill.networks.rewards.weights import linear, renamed, weights_digest, weights_in

HEADS = (  # of v2, of v1 beside its CLIP, and of v1 alone
    (r"(?:mlp\.)?layers\.(\d+)\.(weight|bias)", r"\1.\2"),
    (r"predictor\.(weight|bias)", r"0.\1"),
    (r"(weight|bias)", r"0.\1"),
)


@dataclass(frozen=True, kw_only=True)
class Aesthetic(Reward):
    """How well people like an image, from 1 to 10, whatever its prompt.

    The layers of the v2 head have no activations between them, so that all of it is one direction of the embedding: it
    is easily climbed without better images. Train with another reward beside it. Of the published v2 heads this is
    `sac+logos+ava1-l14-linearMSE`; one that was trained with activations cannot be told from it by its tensors.

    Equation:
        score = v . e / |e| + b, e = CLIP's image embedding

    References:
        v2, https://github.com/christophschuhmann/improved-aesthetic-predictor;
        v1, https://github.com/LAION-AI/aesthetic-predictor; LAION-5B, Schuhmann et al. 2022,
        https://arxiv.org/abs/2210.08402.

    Args:
        weights: a .safetensors file of the head, with or without the CLIP beside it.
        pretrained_clip_model: a folder or hub id of the CLIP that the head was trained on.
    """

    weights: Place
    pretrained_clip_model: Place = "openai/clip-vit-large-patch14"

    @property
    def identity(self) -> str:
        model = clip_digest(self.pretrained_clip_model, "CLIPVisionModelWithProjection")
        return f"{type(self).__name__}@{weights_digest(self.weights)}, CLIP@{model}"

    def build(self, device: torch.device) -> Score:
        from transformers import CLIPVisionModelWithProjection

        network: Any = pretrained(CLIPVisionModelWithProjection, self.pretrained_clip_model)
        with weights_in(self.weights) as tensors:
            head = renamed(tensors, HEADS)
            vector, bias = (part.to(device) for part in linear(head))
            if len(vector) != network.config.projection_dim:
                raise KeyError(f"a head on {network.config.projection_dim} numbers")
        network.to(device)
        side = network.config.image_size

        def score(images: Tensor, prompts: object) -> Tensor:
            embedded = network(pixel_values=clip_normalized(resized_square(images, side))).image_embeds
            return normalize(embedded, dim=-1) @ vector + bias

        return score
