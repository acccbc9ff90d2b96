"""A random Qwen-Image in code, and the autoencoder that other pipelines share with it."""

from __future__ import annotations

from typing import Any

import chat
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# of the published scheduler: the shift depends on the size, and the grid ends above zero
SCHEDULE = {
    **{"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 8192},
    **{"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02},
}


def qwen_vae() -> AutoencoderKLQwenImage:
    """Latents of 4 x 8 x 8 for images of 32 pixels."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.9, 1.1, 1.3, 0.7],
    ).eval()


def language_model() -> Qwen2_5_VLForConditionalGeneration:
    shape = {"hidden_size": chat.WIDTH, "num_hidden_layers": 1, "intermediate_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": chat.WIDTH}
    marks: dict[str, Any] = {"image_token_id": 5, "video_token_id": 6}
    marks |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    text = {**shape, **heads, **rope, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "patch_size": 14}, **marks)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image(**schedule: Any) -> QwenImagePipeline:
    """Qwen-Image's shape, with latents of 4 x 8 x 8 for images of 32 pixels.

    Args:
        schedule: settings of the scheduler that differ from the published ones.
    """
    net = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=chat.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    for p in net.parameters():  # else the prompt is a hundredth of its output
        p.data += 0.1 * torch.randn_like(p)
    return QwenImagePipeline(
        vae=qwen_vae(),
        text_encoder=language_model(),
        tokenizer=chat.tokens(),
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**SCHEDULE, **schedule}),
    )
