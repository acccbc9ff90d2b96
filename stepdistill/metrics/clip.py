"""How well pictures fit their prompts, by CLIP; differentiable in the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from stepdistill.metrics.encoders import pretrained


class Clip:
    """A frozen CLIP in float32.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    Args:
        name: a folder or hub id with model, tokenizer and image processor.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        model: Any = pretrained(CLIPModel, name)
        self.model = model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
        self.mean, self.std = (
            torch.tensor(value, device=device).reshape(1, 3, 1, 1)
            for value in (processor.image_mean, processor.image_std)
        )

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of pictures (B, 3, H, W) in [0, 1] with their B prompts; gradients reach the pictures."""
        side = self.model.config.vision_config.image_size
        pixels = interpolate(pictures, (side, side), mode="bicubic", antialias=True, align_corners=False)
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(pictures.device)
        found = self.model(**words, pixel_values=(pixels - self.mean) / self.std)
        return cosine_similarity(found.image_embeds, found.text_embeds)


@cache
def clip(name: str, device: torch.device) -> Clip:
    """One CLIP of each name and device in this process."""
    return Clip(name, device)
