"""Base of the Wan pipelines: videos and images of a flow transformer over frames, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Count, Tokens
from stepdistill.core.denoise import Condition
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Stock
from stepdistill.families.channel_scale import channel_scale
from stepdistill.families.flow import flow_scheduler, shift_of
from stepdistill.families.parts import Needs
from stepdistill.families.shift_terminal import shift_terminal
from stepdistill.families.video import HEAD_SIDE, Video, check_chunks
from stepdistill.networks.layers import after_blocks, attentions, inner, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

# not `patch_embedding`: its LoRA would not load into the network of image to video, which has more channels there
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2"),
    "condition_embedder.time_proj",
)
CHUNK = 4  # frames that the encoder takes at once after the first, whatever its factor; it drops what is left over
TWO_EXPERTS = "it has two networks, one for high and one for low noise, and a student of both is not supported"


def wan_needs(relatives: tuple[str, ...] = (), **pipeline: tuple[Any, str]) -> Needs:
    """What every Wan pipeline needs of its parts, and further settings of the pipeline's index, with the reasons."""
    return Needs(
        optional=frozenset({"transformer_2", "image_encoder", "image_processor"}),
        relatives=relatives,
        width=("text_dim", ("text_encoder",)),
        pipeline={"boundary_ratio": (None, TWO_EXPERTS), **pipeline},
        scales_channels=True,
        counts_patches=True,
    )


@dataclass(frozen=True, kw_only=True)
class WanBase(Video):
    """A Wan pipeline. Its latents are (B, C, F, h, w); its autoencoder is causal and gives `(num_frames - 1) / 4 + 1`
    latent frames.

    Args:
        num_frames: frames of a video, `4 k + 1`; 1 is an image.
        sample_size: height and width in pixels that the network was trained at, which its config does not say.
        max_sequence_length: number of tokens of a prompt, the padding included, which the network attends to.
    """

    multiple: ClassVar[int] = 16

    num_frames: Count = 81
    sample_size: tuple[Count, Count] = (480, 832)
    max_sequence_length: Tokens = 512

    def arguments(self) -> dict[str, Any]:
        return {"num_frames": self.num_frames, "max_sequence_length": self.max_sequence_length}

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(shift_of(scheduler))

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> Stock:
        config = shift_terminal(sampler.timesteps)
        return flow_scheduler(sampler, **config), {"num_inference_steps": len(sampler.timesteps)}

    def scale_factor(self, pipe: DiffusionPipeline) -> int:
        return pipe.vae_scale_factor_spatial

    def unit(self, pipe: DiffusionPipeline) -> int:
        return max(self.multiple, self.scale_factor(pipe) * pipe.transformer.config["patch_size"][1])

    def time_factor(self, pipe: DiffusionPipeline) -> int:
        return pipe.vae_scale_factor_temporal

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear,))

    def tap(self, net: nn.Module) -> Tap:
        """The video's tokens at half the depth."""
        config: Any = net.config
        return Tap(f"blocks.{config['num_layers'] // 2}", inner(net), config["patch_size"][1], HEAD_SIDE)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The video's tokens after each block."""
        return after_blocks(net, self.tap(net), "blocks")

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        return attentions(net, "attn2", "condition_embedder.time_embedder", "blocks")

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=pipe.text_encoder.device,
        )
        return {"states": states}

    @torch.no_grad()
    def encode_frames(self, pipe: DiffusionPipeline, video: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) of videos (B, 3, frames, H, W) of `4 k + 1` frames."""
        check_chunks(video.shape[2], CHUNK, "Wan")
        latents = pipe.vae.encode(video.to(pipe.vae.dtype), return_dict=False)[0].mode().float()
        mean, std = channel_scale(pipe, latents)
        return (latents - mean) / std

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Pixels (B, 3, num_frames, H, W) from latents (B, C, F, h, w), differentiable.

        Wan's autoencoder clamps them to [-1, 1] itself, so that no gradient passes where a pixel is at an end.
        """
        mean, std = channel_scale(pipe, latents)
        return pipe.vae.decode((latents * std + mean).to(pipe.vae.dtype), return_dict=False)[0].float()

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads = max(1, round(width * config["num_attention_heads"]))
        image = {"added_kv_proj_dim": heads * config["attention_head_dim"]} if config["added_kv_proj_dim"] else {}
        return rebuilt(net, num_attention_heads=heads, ffn_dim=max(1, round(width * config["ffn_dim"])), **image)
