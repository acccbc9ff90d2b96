"""HPSv2 and v2.1: a CLIP of open_clip that was tuned to people's rankings of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, pad

from stepdistill.config.kinds import Place
from stepdistill.networks.clip import clip_normalized
from stepdistill.networks.rewards.base import Reward, Score
from stepdistill.networks.rewards.weights import depth_of, network_of, renamed, weights_digest, weights_in

SIDE, PATCH, HEADS = 224, 14, 16  # pixels, pixels, attention heads of both towers of a ViT-H/14
PLACES = "text_model.embeddings.position_embedding.weight"  # one for each token of a prompt
INSIDE = {  # a layer's names in open_clip, with `in_proj` split, and in Transformers
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = (
    ("logit_scale", "logit_scale"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", PLACES),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    ("text_projection", "text_projection.weight"),
    *(
        (rf"{theirs}transformer\.resblocks\.(\d+)\.{re.escape(name)}\.(\w+)", rf"{ours}.encoder.layers.\1.{other}.\2")
        for theirs, ours in ((r"visual\.", "vision_model"), ("", "text_model"))
        for name, other in INSIDE.items()
    ),
)


@dataclass(frozen=True, kw_only=True)
class HPSv2(Reward):
    """The cosine of an image and its prompt in a tuned CLIP ViT-H/14.

    As published, an image that is not square is seen whole, between black bars.

    References:
        Wu et al. 2023, https://arxiv.org/abs/2306.09341; https://github.com/tgxs002/HPSv2.

    Args:
        weights: a .safetensors file of the model of open_clip, v2 or v2.1.
        tokenizer: a folder or hub id with CLIP's tokenizer.
    """

    weights: Place
    tokenizer: Place = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}@{weights_digest(self.weights)}"

    def build(self, device: torch.device) -> Score:
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        with weights_in(self.weights) as theirs:
            tensors = clip_tensors(theirs)
            config = CLIPConfig(**_shapes(tensors, tokenizer.eos_token_id))
            network = network_of(CLIPModel, config, tensors, device)
        places = len(tensors[PLACES])

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            words = tokenizer(list(prompts), padding=True, truncation=True, max_length=places, return_tensors="pt")
            embedded = network(**words.to(device), pixel_values=clip_normalized(resized_whole(images, SIDE)))
            return cosine_similarity(embedded.image_embeds, embedded.text_embeds)

        return score


def resized_whole(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) whose longer side is resized to `side`, in the middle of a black square; in [0, 1].

    Bicubic with antialiasing, then clamped; as `ResizeMaxSize` of open_clip.
    """
    scale = side / max(images.shape[-2:])
    height, width = (round(length * scale) for length in images.shape[-2:])
    resized = interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    left, top = (side - width) // 2, (side - height) // 2
    return pad(resized, (left, side - width - left, top, side - height - top))


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open_clip model under the names and in the shapes of Transformers' CLIPModel."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(module|model)\.", "", name)
        if match := re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", name):
            split |= {f"{match[1]}{part}_proj.{match[2]}": t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
    return renamed(split, NAMES)


def _shapes(tensors: Mapping[str, Tensor], end: int) -> dict[str, Any]:
    """The keyword arguments of the network's config. Raises KeyError where a tensor is missing."""
    towers: dict[str, Any] = {}
    for tower in ("text", "vision"):
        inner = tensors[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"]
        towers[f"{tower}_config"] = {
            "hidden_size": inner.shape[1],
            "intermediate_size": inner.shape[0],
            "num_hidden_layers": depth_of(tensors, rf"{tower}_model\.encoder\.layers\."),
            "num_attention_heads": HEADS,
            "hidden_act": "gelu",
        }
    words = len(tensors["text_model.embeddings.token_embedding.weight"])
    towers["text_config"] |= {"vocab_size": words, "max_position_embeddings": len(tensors[PLACES]), "eos_token_id": end}
    towers["vision_config"] |= {"image_size": SIDE, "patch_size": PATCH}
    return {**towers, "projection_dim": len(tensors["visual_projection.weight"])}
