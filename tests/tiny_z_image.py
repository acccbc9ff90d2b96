"""A tiny random pipeline of Z-Image."""

from __future__ import annotations

import chat
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

from stepdistill.families.z_image import ZImage

# the chat template has 8 tokens of its own
FAMILY = ZImage(pretrained_teacher_model="Tongyi-MAI/Z-Image", max_sequence_length=24)


def z_image(vae: AutoencoderKL) -> ZImagePipeline:
    """Z-Image's shape, with latents of 4 x 8 x 8: refiners of image and prompt, then two layers of both."""
    net = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=chat.WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 64, 64],
    ).eval()
    for token in (net.x_pad_token, net.cap_pad_token):  # zeros at the start of training
        token.data = 0.5 * torch.randn(token.shape)
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    return ZImagePipeline(
        vae=vae,
        text_encoder=chat.qwen3(Qwen3Model),
        tokenizer=chat.tokens(),
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )
