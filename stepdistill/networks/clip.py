"""CLIP similarity of images and prompts, differentiable in the images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stepdistill.core.errors import WrongWeights, problem
from stepdistill.core.files import hash_of
from stepdistill.core.pixels import resized_square

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pretrained(kind: type[PreTrainedModel], name: str) -> PreTrainedModel:
    """A model in float32 and eval mode; transformers draws the weights that a folder lacks at random."""
    try:
        loaded: Any = kind.from_pretrained(name, output_loading_info=True)
    except SafetensorError as error:
        raise WrongWeights(
            problem(f"{name} ({error})", "complete files", "an incomplete copy cannot be loaded", "copy it again")
        ) from error
    net, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise WrongWeights(
            problem(
                f"{name} without {len(missing)} of its tensors, such as {missing[0]}",
                f"all tensors of a {kind.__name__}",
                "random tensors in their place would give meaningless features",
                "pass the folder of a model of this kind",
            )
        )
    return net.float().eval().requires_grad_(False)


def clip_normalized(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], less the mean and over the standard deviation of OpenAI's CLIP."""
    mean, std = (images.new_tensor(value).reshape(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


class Clip:
    """A frozen CLIP in float32.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    Args:
        name: a folder or hub id with model, tokenizer and image processor.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import (  # seconds, which methods without CLIP save
            AutoImageProcessor,
            AutoTokenizer,
            CLIPModel,
        )

        model: Any = pretrained(CLIPModel, name)
        self.model = model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
        self.mean, self.std = (
            torch.tensor(value, device=device).reshape(1, 3, 1, 1)
            for value in (processor.image_mean, processor.image_std)
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in about [0, 1] with their B prompts; gradients reach the images."""
        side = self.model.config.vision_config.image_size
        pixels = resized_square(images, side)
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(images.device)
        embedded = self.model(**words, pixel_values=(pixels - self.mean) / self.std)
        return cosine_similarity(embedded.image_embeds, embedded.text_embeds)

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings (B, D), not normalised, of images (B, 3, H, W) in about [0, 1]."""
        pixels = resized_square(images, self.model.config.vision_config.image_size)
        return image_embeddings(self.model, (pixels - self.mean) / self.std)


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401
    """A CLIPModel's embeddings (B, D) of normalised pixels (B, 3, side, side)."""
    output = model.get_image_features(pixel_values=pixels)
    return output if isinstance(output, Tensor) else output.pooler_output  # an output since transformers 5


@cache
def clip(name: str, device: torch.device) -> Clip:
    """One CLIP of each name and device in this process."""
    return Clip(name, device)


@cache
def clip_digest(name: str, network: str = "CLIPModel") -> str:
    """sha256 of the tensors (`hash_of`) of a CLIP, or of a part of it; it is loaded for that, and dropped.

    Args:
        network: its class in Transformers.
    """
    import transformers

    model: Any = pretrained(getattr(transformers, network), name)
    return hash_of(model.state_dict())
