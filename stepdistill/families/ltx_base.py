"""Base of the LTX-Video pipelines: a flow transformer over a video's tokens, whose places are in seconds and pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Count, Positive, Share, Tokens
from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Stock
from stepdistill.families.flow import dynamic_shift, flow_scheduler, shift_of
from stepdistill.families.parts import Needs
from stepdistill.families.shift_terminal import shift_terminal
from stepdistill.families.video import HEAD_SIDE, Video, check_chunks
from stepdistill.networks.layers import after_blocks, attentions, inner, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out"),
    *("time_embed.linear", "caption_projection.linear_1", "caption_projection.linear_2"),
)
FACTORS = (8, 32)  # frames, and pixels a side, of a latent of the published autoencoders


def ltx_needs(*relatives: str) -> Needs:
    """What every LTX-Video pipeline needs of its parts.

    Args:
        relatives: classes of pipelines with the same parts.
    """
    return Needs(
        relatives=relatives,
        network={"patch_size": 1, "patch_size_t": 1},
        width=("caption_channels", ("text_encoder",)),
        single_file=("ltx-video", "ltx-video-0.9.1", "ltx-video-0.9.5", "ltx-video-0.9.7"),
        prefixes=("model.diffusion_model.", "vae.", "text_encoders."),
    )


@dataclass(frozen=True, kw_only=True)
class LTXBase(Video):
    """An LTX-Video pipeline. Its latents are (B, C, F, h, w), and tokens (B, F h w, C) in the pipeline; its
    autoencoder is causal and gives `(num_frames - 1) / 8 + 1` latent frames, of 32 x 32 pixels a latent.

    The pipeline gives its scheduler the levels 1, 1 - 1/n, ..., 1/n itself, and the scheduler shifts them.

    Args:
        num_frames: frames of a video, `8 k + 1`; 1 is an image.
        frame_rate: frames a second; the network is told a frame's time in seconds.
        sample_size: height and width in pixels that the network was trained at, which its config does not say.
        max_sequence_length: maximum number of tokens of a prompt; the network does not attend to the padding.
        shift: timestep shift of the teacher; none takes the scheduler's, which must not depend on the video's size.
        decode_timestep: time in [0, 1] that the autoencoder is told where it takes one (since version 0.9.1). No noise
            is added to the latents that it decodes.
    """

    multiple: ClassVar[int] = 32

    num_frames: Count = 161
    frame_rate: Positive = 25.0
    sample_size: tuple[Count, Count] = (512, 704)
    max_sequence_length: Tokens = 128
    shift: Positive | None = None
    decode_timestep: Share = 0.0

    def arguments(self) -> dict[str, Any]:
        return {
            "num_frames": self.num_frames,
            "frame_rate": self.frame_rate,
            "max_sequence_length": self.max_sequence_length,
            "decode_timestep": self.decode_timestep,
            "decode_noise_scale": 0.0,
        }

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        if self.shift is None and scheduler.config.get("use_dynamic_shifting"):
            (time, space), (height, width) = FACTORS, self.sample_size
            tokens = ((self.num_frames - 1) // time + 1) * (height // space) * (width // space)
            shift = dynamic_shift(scheduler, tokens)
            got, why = "a scheduler with use_dynamic_shifting", "the noise levels must be the same for every size"
            todo = f"set family.shift; the scheduler's is {shift:.3g} at {self.num_frames} frames of {height} x {width}"
            raise ConfigError(problem(got, "one fixed shift", why, todo))
        return Rectified(shift_of(scheduler) if self.shift is None else self.shift)

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> Stock:
        n = len(sampler.timesteps)
        return flow_scheduler(sampler, **shift_terminal(sampler.timesteps, 1 / n)), {"num_inference_steps": n}

    def steps(self, call: Mapping[str, Any]) -> dict[str, Any]:
        n = call["num_inference_steps"]
        return {"sigmas": [1 - i / n for i in range(n)]}

    def scale_factor(self, pipe: DiffusionPipeline) -> int:
        return pipe.vae_spatial_compression_ratio

    def time_factor(self, pipe: DiffusionPipeline) -> int:
        return pipe.vae_temporal_compression_ratio

    def unit(self, pipe: DiffusionPipeline) -> int:
        return math.lcm(self.multiple, self.scale_factor(pipe))

    def pack(self, latents: Tensor) -> Tensor:
        """Tokens (B, F h w, C), frame by frame and row by row."""
        return latents.flatten(2).transpose(1, 2).contiguous()  # noise like it is drawn in memory's order

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, (-1, height, width))

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear,))

    def tap(self, net: nn.Module) -> Tap:
        """The video's tokens at half the depth."""
        config: Any = net.config
        return Tap(f"transformer_blocks.{config['num_layers'] // 2}", inner(net), 1, HEAD_SIDE)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The video's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        return attentions(net, "attn2", "time_embed.emb.timestep_embedder")

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, mask, _, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=pipe.text_encoder.device,
        )
        # frames, and pixels a side, of a latent: the network is told seconds and pixels, and `call` sees only latents
        factors = (self.time_factor(pipe), self.scale_factor(pipe))
        scale = torch.tensor([factors], dtype=torch.float32, device=states.device).repeat(len(prompts), 1)
        return {"states": states, "mask": mask, "scale": scale}

    def velocity(self, net: nn.Module, x_t: Tensor, times: Tensor, cond: Condition) -> Tensor:
        """The network's output for x_t (B, C, F, h, w), told times of samples (B,) or of tokens (B, F h w)."""
        frames, height, width = x_t.shape[2:]
        time, space = cond["scale"].float()[..., None, None, None, None].unbind(1)
        y = net(
            self.pack(x_t),
            encoder_hidden_states=cond["states"],
            timestep=times,
            encoder_attention_mask=cond["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.frame_rate, space, space),
            return_dict=False,
        )[0]
        return self.unpack(y, height, width)

    @torch.no_grad()
    def encode_frames(self, pipe: DiffusionPipeline, video: Tensor) -> Tensor:
        """Latents (B, C, F, h, w) of videos (B, 3, frames, H, W) of `8 k + 1` frames."""
        check_chunks(video.shape[2], self.time_factor(pipe), "LTX-Video")
        latents = pipe.vae.encode(video.to(pipe.vae.dtype), return_dict=False)[0].mode().float()
        mean, std = _statistics(pipe, latents)
        return (latents - mean) * pipe.vae.config.scaling_factor / std

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Pixels (B, 3, num_frames, H, W) in [-1, 1], not clamped, from latents (B, C, F, h, w); differentiable."""
        mean, std = _statistics(pipe, latents)
        latents = (latents * std / pipe.vae.config.scaling_factor + mean).to(pipe.vae.dtype)
        told = pipe.vae.config.timestep_conditioning
        time = latents.new_full((len(latents),), self.decode_timestep) if told else None
        return pipe.vae.decode(latents, time, return_dict=False)[0].float()

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads = max(1, round(width * config["num_attention_heads"]))
        return rebuilt(net, num_attention_heads=heads, cross_attention_dim=heads * config["attention_head_dim"])


def _statistics(pipe: DiffusionPipeline, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (1, C, 1, 1, 1), which the autoencoder keeps as buffers."""
    values = (pipe.vae.latents_mean, pipe.vae.latents_std)
    mean, std = (value.to(like.device, torch.float32).view(1, -1, 1, 1, 1) for value in values)
    return mean, std
