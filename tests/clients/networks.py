"""Networks as small as the clients allow: widths that their fixed group norms and head sizes take."""

from __future__ import annotations

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn

CONTEXT, POOLED = 32, 64  # widths of a prompt's embeddings
LAYERS = 3  # of the text encoder that Krea 2 sees
FLOWS = ("sd3", "flux", "klein", "z_image", "qwen_image", "krea2")
FAMILIES = ("sd", "sdxl", *FLOWS, "pixart_alpha", "pixart_512", "pixart_sigma")


def network(family: str) -> nn.Module:
    """A random network in Diffusers, with latents of 8 x 8 in its usual number of channels."""
    torch.manual_seed(0)
    match family:
        case "sd":
            return UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=CONTEXT,
                attention_head_dim=8,  # in this class the number of heads
            )
        case "sdxl":
            return UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(64, 128),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2),
                attention_head_dim=(1, 2),
                use_linear_projection=True,
                cross_attention_dim=CONTEXT,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=POOLED + 6 * 256,
            )
        case "sd3":
            return SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                joint_attention_dim=CONTEXT,
                caption_projection_dim=128,
                pooled_projection_dim=POOLED,
                pos_embed_max_size=8,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            )
        case "flux":
            return FluxTransformer2DModel(
                in_channels=64,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=CONTEXT,
                pooled_projection_dim=POOLED,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            )
        case "klein":
            return away(
                Flux2Transformer2DModel(
                    in_channels=128,
                    num_layers=2,
                    num_single_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=CONTEXT,
                    axes_dims_rope=(4, 4, 4, 4),
                    guidance_embeds=False,
                )
            )
        case "z_image":  # ComfyUI makes the layers of its time as wide as the network, up to 1024
            net = ZImageTransformer2DModel(
                in_channels=16,
                dim=1056,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=22,
                n_kv_heads=22,
                cap_feat_dim=CONTEXT,
                axes_dims=[16, 16, 16],
                axes_lens=[256, 64, 64],
            )
            for token in (net.x_pad_token, net.cap_pad_token):  # zeros at the start of training
                token.data = 0.5 * torch.randn(token.shape)
            return net
        case "qwen_image":
            return away(
                QwenImageTransformer2DModel(
                    in_channels=64,
                    out_channels=16,
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=CONTEXT,
                    axes_dims_rope=(4, 6, 6),
                )
            )
        case "krea2":  # ComfyUI makes the inner widths of the feed-forward parts multiples of 128
            return away(
                Krea2Transformer2DModel(
                    in_channels=64,
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    intermediate_size=256,
                    timestep_embed_dim=32,
                    text_hidden_dim=CONTEXT,
                    num_text_layers=LAYERS,
                    text_num_attention_heads=2,
                    text_num_key_value_heads=2,
                    text_intermediate_size=128,
                    axes_dims_rope=(4, 6, 6),
                )
            )
    # of the real width: ComfyUI's table of its names has it
    return PixArtTransformer2DModel(
        num_layers=1,
        caption_channels=CONTEXT,
        sample_size=128 if family == "pixart_alpha" else 64,
        use_additional_conditions=family == "pixart_alpha",
    )


def away(net: nn.Module) -> nn.Module:
    """The network with every tensor away from its start, where gates nearly close its blocks."""
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net
