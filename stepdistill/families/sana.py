"""SANA: a flow-matching transformer with linear attention, a Gemma text encoder and an autoencoder with factor 32."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SanaControlNetModel, SanaControlNetPipeline, SanaPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Count
from stepdistill.core.denoise import CONTROL, Condition
from stepdistill.core.schedule import Rectified
from stepdistill.families.control import ControlNets
from stepdistill.families.controlled import Controlled
from stepdistill.families.flow import Flow, shift_of
from stepdistill.families.parts import Needs
from stepdistill.networks.layers import after_blocks, attentions, halfway, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point", "proj_out"),
    *("time_embed.linear", "caption_projection.linear_1", "caption_projection.linear_2"),
)
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


@dataclass(frozen=True, kw_only=True)
class Sana(Controlled, Flow):
    """SANA and SANA 1.5 pipelines, and the base of SANA-Sprint, with timesteps in [0, 1] and normalised queries and
    keys (Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.2).

    Images have exactly the requested size (`use_resolution_binning=False`).

    Args:
        max_sequence_length: maximum number of tokens of a prompt.
        human_instruction: whether the pipeline's `complex_human_instruction` precedes every prompt, as in training.
    """

    multiple: ClassVar[int] = 32
    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    needs: ClassVar[Needs] = Needs(
        relatives=("SanaSprintPipeline",),
        network={"guidance_embeds": False},  # SANA-Sprint's own network; its pipeline gives it the scale
        width=("caption_channels", ("text_encoder",)),
    )

    controls: ClassVar[ControlNets | None] = ControlNets(
        pipeline=SanaControlNetPipeline,
        model=SanaControlNetModel,
        same=("in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "caption_channels"),
        fewer=("num_layers",),
        network={"timestep_scale": 1.0},
    )

    max_sequence_length: Count = 300
    human_instruction: bool = True

    def arguments(self) -> dict[str, Any]:
        instruction = {} if self.human_instruction else {"complex_human_instruction": None}
        return {"max_sequence_length": self.max_sequence_length, "use_resolution_binning": False} | instruction

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(shift_of(scheduler))

    def time(self, net: nn.Module, given: float) -> float:
        config: Any = net.config
        return given / config["timestep_scale"]

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear, nn.Conv2d))

    def tap(self, net: nn.Module) -> Tap:
        """The tokens at half the depth."""
        return halfway(net)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        return attentions(net, "attn2", "time_embed.emb.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        return self._encoded(pipe, prompts)[0]

    @torch.no_grad()
    def unconditional(self, pipe: DiffusionPipeline) -> Condition:
        """The embedding of the empty prompt, without the instruction."""
        return self._encoded(pipe, [""])[1]

    def _encoded(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> tuple[Condition, Condition]:
        states, mask, null, null_mask = pipe.encode_prompt(
            list(prompts),
            device=pipe.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=INSTRUCTION if self.human_instruction else None,
        )
        return {"states": states, "mask": mask}, {"states": null, "mask": null_mask}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition, **residuals: Any) -> Tensor:  # noqa: ANN401
        config: Any = net.config
        return net(
            x_t,
            encoder_hidden_states=cond["states"],
            encoder_attention_mask=cond["mask"],
            timestep=t * config["timestep_scale"],
            return_dict=False,
            **residuals,
        )[0]

    def prepared_control(self, pipe: DiffusionPipeline, images: Tensor) -> Tensor:
        """Latents of the control images."""
        return self.encode(pipe, 2 * images - 1)

    def residuals(self, controlnet: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
        samples = controlnet(
            x_t,
            encoder_hidden_states=cond["states"],
            encoder_attention_mask=cond["mask"],
            timestep=t,  # `controls` refuses a base with another `timestep_scale` than 1
            controlnet_cond=cond[CONTROL],
            return_dict=False,
        )[0]
        return {"controlnet_block_samples": tuple(samples)}

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads, cross = (
            max(1, round(width * config[key])) for key in ("num_attention_heads", "num_cross_attention_heads")
        )
        inner = heads * config["attention_head_dim"]
        return rebuilt(net, num_attention_heads=heads, num_cross_attention_heads=cross, cross_attention_dim=inner)
