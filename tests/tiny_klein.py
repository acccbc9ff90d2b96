"""A tiny random pipeline of FLUX.2 klein."""

from __future__ import annotations

from typing import Any

import chat
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3ForCausalLM

from stepdistill.families.flux2_klein import Flux2Klein

FAMILY = Flux2Klein(
    pretrained_teacher_model="black-forest-labs/FLUX.2-klein-base-4B",
    max_sequence_length=24,
    text_encoder_out_layers=(1, 2, 3),
)


def klein(**more: Any) -> Flux2KleinPipeline:
    """klein's shape: two blocks of two streams, two of one; latents of 16 x 8 x 8 for images of 32 pixels."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    net = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * chat.WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    for p in net.parameters():  # the gates of a network as it begins nearly close its blocks
        p.data += 0.1 * torch.randn_like(p)
    return Flux2KleinPipeline(
        vae=vae,
        text_encoder=chat.qwen3(Qwen3ForCausalLM),
        tokenizer=chat.tokens(),
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **more,
    )
