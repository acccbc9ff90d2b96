"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import CONTROL, Condition
from stepdistill.families.control import ControlNets
from stepdistill.families.controlled import Controlled
from stepdistill.families.parts import Needs
from stepdistill.families.unet import PLAIN, UNet, unet_controls


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(Controlled, UNet):
    """Stable Diffusion 1.x and 2.x pipelines."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    filters: ClassVar[tuple[str, ...]] = ("safety_checker",)
    controls: ClassVar[ControlNets | None] = unet_controls(StableDiffusionControlNetPipeline)
    needs: ClassVar[Needs] = Needs(
        network=PLAIN | {"addition_embed_type": None},
        width=("cross_attention_dim", ("text_encoder",)),
        single_file=("v1", "v2"),
        prefixes=("model.diffusion_model.", "first_stage_model.", "cond_stage_model."),
    )

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": pipe.tokenizer.model_max_length}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, False)
        return {"states": states}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition, **residuals: Any) -> Tensor:  # noqa: ANN401
        return net(x_t, t, encoder_hidden_states=cond["states"], return_dict=False, **residuals)[0]

    def prepared_control(self, pipe: DiffusionPipeline, images: Tensor) -> Tensor:
        return images

    def residuals(self, controlnet: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
        down, mid = controlnet(
            x_t, t, encoder_hidden_states=cond["states"], controlnet_cond=cond[CONTROL], return_dict=False
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
