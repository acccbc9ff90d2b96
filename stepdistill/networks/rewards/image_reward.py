"""ImageReward: a BLIP that was tuned to people's rankings of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.kinds import Place
from stepdistill.core.pixels import resized_square
from stepdistill.networks.clip import clip_normalized
from stepdistill.networks.rewards.base import Reward, Score
from stepdistill.networks.rewards.weights import depth_of, linear, network_of, renamed, weights_digest, weights_in

HEAD = 64  # numbers of an attention head, in both networks
TOKENS = 35  # of a prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores in training
VISION = (
    (r"blip\.visual_encoder\.cls_token", "embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)", r"embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"encoder.layers.\1.mlp.\2"),
    (r"blip\.visual_encoder\.norm\.(\w+)", r"post_layernorm.\1"),
)
TEXT = ((r"blip\.text_encoder\.((?:embeddings|encoder)\..+(?:weight|bias))", r"\1"),)


@dataclass(frozen=True, kw_only=True)
class ImageReward(Reward):
    """How well people like an image for its prompt; about 0 in the mean, with a standard deviation of about 1.

    Equation:
        score = (v . h + b - 0.167) / 1.033, h = the first token's state in a text encoder that attends to the image

    References:
        Xu et al. 2023, https://arxiv.org/abs/2304.05977; https://github.com/THUDM/ImageReward.

    Args:
        weights: a .safetensors file of the model.
        tokenizer: a folder or hub id with the tokenizer of BERT.
    """

    weights: Place
    tokenizer: Place = "google-bert/bert-base-uncased"

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}@{weights_digest(self.weights)}"

    def build(self, device: torch.device) -> Score:
        from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        with weights_in(self.weights) as tensors:
            vision, text = renamed(tensors, VISION), renamed(tensors, TEXT)
            config, side = _eyes(vision)
            eyes = network_of(BlipVisionModel, BlipVisionConfig(**config), vision, device)
            reading = BlipTextConfig(**_reader(text))
            reader = network_of(BlipTextModel, reading, text, device, add_pooling_layer=False)
            head = linear(renamed(tensors, [(r"mlp\.layers\.(\d+)\.(\w+)", r"\1.\2")]))
        vector, bias = (part.to(device) for part in head)

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            fill = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
            words = tokenizer(list(prompts), **fill, return_tensors="pt").to(device)
            seen = eyes(pixel_values=clip_normalized(resized_square(images, side))).last_hidden_state
            states = reader(words.input_ids, words.attention_mask, encoder_hidden_states=seen).last_hidden_state
            return (states[:, 0] @ vector + bias - MEAN) / STD

        return score


def _eyes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """The keyword arguments of the image encoder's config, and its images' side. Raises KeyError."""
    _, places, width = tensors["embeddings.position_embedding"].shape
    patch = tensors["embeddings.patch_embedding.weight"].shape[-1]
    side = patch * isqrt(places - 1)
    config = {
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": depth_of(tensors, r"encoder\.layers\."),
        "num_attention_heads": width // HEAD,
        "image_size": side,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    return config, side


def _reader(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of the text encoder's config. Raises KeyError."""
    words, width = tensors["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": depth_of(tensors, r"encoder\.layer\."),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": len(tensors["embeddings.position_embeddings.weight"]),
        "encoder_hidden_size": tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "is_decoder": True,  # which is what gives it layers of cross-attention
    }
