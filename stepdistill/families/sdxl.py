"""Stable Diffusion XL: two text encoders, a pooled embedding, and size conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.families.control import ControlNets
from stepdistill.families.parts import Needs
from stepdistill.families.unet import PLAIN, UNet, unet_controls


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(UNet):
    """Stable Diffusion XL base pipelines; not the refiner.

    The size conditions are those of an uncropped image at the training resolution, the defaults of the pipeline's call.
    Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.2.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    filters: ClassVar[tuple[str, ...]] = ("watermark",)
    controls: ClassVar[ControlNets | None] = unet_controls(StableDiffusionXLControlNetPipeline)
    needs: ClassVar[Needs] = Needs(
        network=PLAIN | {"addition_embed_type": "text_time"},
        width=("cross_attention_dim", ("text_encoder", "text_encoder_2")),
        single_file=("xl_base",),
        prefixes=("model.diffusion_model.", "first_stage_model.", "conditioner."),
    )

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {name: pipe.components[name].model_max_length for name in ("tokenizer", "tokenizer_2")}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        # in pixels a latent; `call` sees only the latents, and the sizes are in pixels
        scale = torch.full((len(prompts), 1), float(pipe.vae_scale_factor), device=states.device)
        return {"states": states, "pooled": pooled, "scale": scale}

    def unconditional(self, pipe: DiffusionPipeline) -> Condition:
        """Zeros, for the base model; they are not the embedding of the empty prompt."""
        cond = self.condition(pipe, [""])
        if not pipe.config["force_zeros_for_empty_prompt"]:
            return cond
        return {key: value if key == "scale" else torch.zeros_like(value) for key, value in cond.items()}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        # original size, top left corner of the crop, target size
        sizes = cond["scale"] * torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device)
        return net(
            x_t,
            t,
            encoder_hidden_states=cond["states"],
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
