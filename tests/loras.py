"""Small networks of every family, random LoRAs on all their layers, and what these add to the weights."""

from __future__ import annotations

import json

import tiny
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

RANK, ALPHA = 3, 6.0
SMALL = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4}


def network(family: str) -> nn.Module:
    torch.manual_seed(0)
    match family:
        case "sd" | "sdxl":
            return tiny.pipeline(family).unet
        case "sd3":
            text = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8}
            return SD3Transformer2DModel(
                **SMALL, **text, out_channels=4, sample_size=8, patch_size=2, dual_attention_layers=(0,)
            )
        case "flux":
            text = {"joint_attention_dim": 16, "pooled_projection_dim": 8, "guidance_embeds": True}
            return FluxTransformer2DModel(**SMALL, **text, num_single_layers=2, axes_dims_rope=(2, 2, 4))
        case "klein":
            return Flux2Transformer2DModel(
                **SMALL, joint_attention_dim=16, num_single_layers=2, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False
            )
        case "pixart":
            text = {"cross_attention_dim": 16, "caption_channels": 8}
            return PixArtTransformer2DModel(**SMALL, **text, out_channels=8, sample_size=8)
        case "z_image":
            return tiny.pipeline("z_image").transformer
        case "qwen_image":
            return QwenImageTransformer2DModel(
                **SMALL, out_channels=1, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)
            )
        case "krea2":
            return tiny.pipeline("krea2").transformer
        case _:
            text = {"cross_attention_dim": 16, "caption_channels": 8}
            heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
            return SanaTransformer2DModel(**SMALL, **text, **heads, out_channels=4, sample_size=8)


def component(family: str) -> str:
    return "unet" if family in ("sd", "sdxl") else "transformer"


def layers(family: str) -> dict[str, torch.Size]:
    """Names of the layers that take a LoRA, and the shapes of their weights."""
    found = network(family).named_modules()
    return {
        f"{component(family)}.{name}": layer.weight.shape
        for name, layer in found
        if isinstance(layer, nn.Linear | nn.Conv2d) and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
    }


def state(family: str, rank: int = RANK, only=lambda name: True) -> dict[str, torch.Tensor]:
    """A LoRA as Diffusers has it."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, shape in layers(family).items():
        if only(name):
            ones = [1] * (len(shape) - 2)
            made[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=generator)
            made[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, *ones, generator=generator)
    return made


def metadata(family: str, rank: int = RANK, alpha: float = ALPHA) -> dict[str, str]:
    facts = {f"{component(family)}.r": rank, f"{component(family)}.lora_alpha": alpha}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(facts)}


def deltas(made: dict[str, torch.Tensor], alpha: float = ALPHA) -> dict[str, torch.Tensor]:
    """What a LoRA in Diffusers' names adds to each weight, by the definition."""
    names = {key.partition(".lora_")[0] for key in made}
    return {
        name: alpha
        / len(made[f"{name}.lora_A.weight"])
        * (made[f"{name}.lora_B.weight"].flatten(1) @ made[f"{name}.lora_A.weight"].flatten(1))
        for name in names
    }
