"""CLIPScore: how well images fit their prompts, one number for each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.evaluation.metrics.features import check_images
from stepdistill.networks.clip import Clip

BATCH = 64  # images that go through CLIP at once


@torch.no_grad()
def clip_scores(clip: Clip, images: Tensor, prompts: Sequence[str], prefix: str = "") -> Tensor:
    """Scores (N,) in [0, 100], float32 on the CPU: 100 max(cos, 0) of each image and its prompt.

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with torchmetrics' scale of 100 for the paper's 2.5. The mean
    over images is of values at or above zero, where torchmetrics bounds the mean alone. As CLIP's own processor does,
    the shorter side is resized, the middle cut out; a prompt's tokens beyond the tokenizer's limit (77) are left out.
    Numbers of different CLIP models, or of different prefixes, are not comparable. Raises TypeError, ValueError.

    Args:
        images: uint8 (N, 3, H, W).
        prefix: goes before every prompt, such as the paper's "A photo depicts ".
    """
    check_images("clip_scores", images)
    if len(prompts) != len(images):
        raise ValueError(
            f"clip_scores got {len(images)} images and {len(prompts)} prompts, expected equal numbers: each "
            "image is scored with its own prompt; pass both over the same list"
        )
    side = clip.model.config.vision_config.image_size
    words, cosines = [prefix + prompt for prompt in prompts], []
    for start in range(0, len(images), BATCH):
        part = torch.stack([_square(image, side) for image in images[start : start + BATCH].cpu()])
        cosines.append(clip(part.to(clip.model.device, torch.float32) / 255, words[start : start + BATCH]))
    return 100 * torch.cat(cosines).clamp(min=0).cpu()


def _square(image: Tensor, side: int) -> Tensor:
    """uint8 (3, side, side), as CLIP's processor makes it by PIL, so that `clip` has nothing left to resize."""
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    size = [side * length // min(pil.size) for length in pil.size]
    left, top = ((length - side) // 2 for length in size)
    pil = pil.resize((size[0], size[1]), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)
