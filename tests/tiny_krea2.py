"""A random Krea 2 pipeline, with latents of 4 x 8 x 8 and images of 32 pixels."""

from __future__ import annotations

from typing import Any

import chat
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

LAYERS = (1, 2, 3)  # of the text encoder, whose states the network fuses


def krea2(**more: Any) -> Krea2Pipeline:
    """Krea 2's shape: two blocks of grouped attention, three layers of text, a dynamic shift as on the hub."""
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=vae(),
        text_encoder=Qwen3VLModel(text_config()).eval(),
        tokenizer=chat.tokens(),
        transformer=transformer(),
        text_encoder_select_layers=LAYERS,
        **more,
    )


def transformer(**changes: Any) -> Krea2Transformer2DModel:
    """The network, with every tensor away from its start: modulation and norms begin at zero."""
    shape = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "timestep_embed_dim": 32,
        "text_hidden_dim": chat.WIDTH,
        "num_text_layers": len(LAYERS),
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    net = Krea2Transformer2DModel(**(shape | changes))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    # as a teacher is loaded: layers without a bias are calculated by other kernels where their weights take gradients
    return net.eval().requires_grad_(False)


def vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 2.0, 1.0],
    ).eval()


def text_config() -> Qwen3VLConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 5e6}
    text = {"vocab_size": 64, "hidden_size": chat.WIDTH, "intermediate_size": 48, "num_hidden_layers": max(LAYERS)}
    vision = {"depth": 1, "hidden_size": chat.WIDTH, "intermediate_size": 32, "num_heads": 2, "patch_size": 16}
    more = {"out_hidden_size": chat.WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    marks = {name: chat.SPECIAL.index(token) for name, token in MARKS.items()}
    return Qwen3VLConfig(
        text_config={**text, **heads, "max_position_embeddings": 1024, "rope_parameters": rope},
        vision_config=vision | more,
        **marks,
    )


MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
