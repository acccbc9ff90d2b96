"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from stepdistill.config.kinds import Tokens
from stepdistill.core.denoise import Condition
from stepdistill.core.schedule import Rectified
from stepdistill.families.control import ControlNets
from stepdistill.families.flow import Flow, shift_of
from stepdistill.families.parts import Needs
from stepdistill.networks.layers import after_blocks, attentions, halfway, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "context_embedder", "proj_out"),
    *(
        "timestep_embedder.linear_1",
        "timestep_embedder.linear_2",
        "text_embedder.linear_1",
        "text_embedder.linear_2",
    ),
)


@dataclass(frozen=True, kw_only=True)
class StableDiffusion3(Flow):
    """Stable Diffusion 3 and 3.5 pipelines, with or without the T5 text encoder.

    Args:
        max_sequence_length: maximum number of T5 tokens of a prompt; without T5 their embeddings are zeros. The
            pipeline's default is 256, and the bundled `tiny-sd3` was trained with 16.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    seeds_steps: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
        width=("joint_attention_dim", ("text_encoder_3",)),
        shifts_latents=True,
        single_file=("sd3", "sd35_large", "sd35_medium"),
    )

    controls: ClassVar[ControlNets | None] = ControlNets(
        pipeline=StableDiffusion3ControlNetPipeline,
        model=SD3ControlNetModel,
        same=(
            *("in_channels", "patch_size", "num_attention_heads", "attention_head_dim"),
            *("joint_attention_dim", "pooled_projection_dim"),
        ),
        fewer=("num_layers",),
        own={"extra_conditioning_channels": 0},
    )

    max_sequence_length: Tokens = 256

    def arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(shift_of(scheduler))

    def lora_targets(self, net: nn.Module) -> list[str]:
        names = named(net, TARGETS, (nn.Linear,))
        # the last block's text stream ends in its attention: queries of text tokens reach no output
        last = len(net.get_submodule("transformer_blocks")._modules) - 1
        return [name for name in names if name != f"transformer_blocks.{last}.attn.add_q_proj"]

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens at half the depth."""
        return halfway(net)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """The image's part of every joint attention; the prompt there is the block's own text stream."""
        return attentions(net, "attn", "time_text_embed.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        limits = {name: pipe.components[name].model_max_length for name in ("tokenizer", "tokenizer_2")}
        return limits | ({"tokenizer_3": self.max_sequence_length} if pipe.text_encoder_3 is not None else {})

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, _, pooled, _ = pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"states": states, "pooled": pooled}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return net(
            x_t,
            timestep=t,
            encoder_hidden_states=cond["states"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads = max(1, round(width * config["num_attention_heads"]))
        inner = heads * config["attention_head_dim"]
        slim = rebuilt(net, num_attention_heads=heads, caption_projection_dim=inner)
        last = slim.transformer_blocks[-1].attn
        for layer in filter(None, (last.add_q_proj, last.norm_added_q)):  # of no effect, see `lora_targets`
            for name, value in list(layer.named_parameters()):
                delattr(layer, name)
                layer.register_buffer(name, value.data)
        return slim
