"""Flux: a flow-matching transformer with 2 x 2 latent patches; dev also takes a guidance scale as an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Amount, Positive, Tokens
from stepdistill.core.denoise import Condition
from stepdistill.core.schedule import Rectified
from stepdistill.families.control import ControlNets
from stepdistill.families.flow import size_shift
from stepdistill.families.packed import Packed
from stepdistill.families.parts import Needs
from stepdistill.networks.layers import after_blocks, attentions, inner, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
    *("norm.linear", "norm1.linear", "norm1_context.linear"),
)


@dataclass(frozen=True, kw_only=True)
class Flux(Packed):
    """Flux.1 pipelines, dev and schnell.

    dev takes a guidance scale as an input beside the timestep. This is not classifier-free guidance: the
    `guidance_scale` of methods is another setting.

    Args:
        guidance_embedding: guidance scale that dev takes as an input, for teacher and student alike.
        max_sequence_length: maximum number of T5 tokens of a prompt; 512 for dev, 256 for schnell.
        shift: timestep shift of the teacher; none takes the scheduler's, at the size of training where it depends on
            that (for dev 3.16 at 1024 x 1024 pixels, 1.88 at 512 x 512).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    seeds_steps: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(
        width=("joint_attention_dim", ("text_encoder_2",)),
        places=4,
        shifts_latents=True,
        single_file=("flux-dev", "flux-schnell"),
    )

    controls: ClassVar[ControlNets | None] = ControlNets(
        pipeline=FluxControlNetPipeline,
        model=FluxControlNetModel,
        same=(
            *("in_channels", "num_attention_heads", "attention_head_dim"),
            *("joint_attention_dim", "pooled_projection_dim"),
        ),
        fewer=("num_layers", "num_single_layers"),
        own={"num_mode": None},
    )

    guidance_embedding: Amount = 3.5
    max_sequence_length: Tokens = 512
    shift: Positive | None = None

    def arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length, "guidance_scale": self.guidance_embedding}

    def guidance(self, scale: float) -> dict[str, Any]:
        # without a negative prompt the pipeline leaves guidance out
        return {"true_cfg_scale": scale} | ({"negative_prompt": ""} if scale > 1 else {})

    def embedded(self, pipe: DiffusionPipeline) -> float | None:
        return self.guidance_embedding if pipe.transformer.config["guidance_embeds"] else None

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(size_shift(scheduler, tokens) if self.shift is None else self.shift)

    def lora_targets(self, net: nn.Module) -> list[str]:
        # the network's own last layer has the name of a block's
        return [name for name in named(net, TARGETS, (nn.Linear,)) if "." in name]

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens where the two streams join."""
        return Tap("single_transformer_blocks.0", inner(net), 2, 16)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks", "single_transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """The image's part of every joint attention of two streams; the prompt there is the block's text stream."""
        return attentions(net, "attn", "time_text_embed.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": pipe.tokenizer.model_max_length, "tokenizer_2": self.max_sequence_length}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, pooled, _ = pipe.encode_prompt(
            list(prompts), device=pipe.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return {"states": states, "pooled": pooled}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        config: Any = net.config
        guidance = torch.full((len(x_t),), self.guidance_embedding, device=x_t.device)
        y = net(
            self.pack(x_t),
            timestep=t / 1000,
            guidance=guidance if config["guidance_embeds"] else None,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            txt_ids=torch.zeros(cond["states"].shape[1], 3, device=x_t.device),
            img_ids=self.places(x_t).float(),
            return_dict=False,
        )[0]
        return self.unpack(y, height, width)

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        return rebuilt(net, num_attention_heads=max(1, round(width * config["num_attention_heads"])))
