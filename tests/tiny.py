"""Tiny random pipelines and batches, shared by the tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.backbone import Backbone
from stepdistill.denoiser import Denoiser
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.families.sdxl import StableDiffusionXL
from stepdistill.methods.base import Batch, Play
from stepdistill.roles import LoraSpec
from stepdistill.tiny import build

FAMILIES: dict[str, Family] = {
    "sd": StableDiffusion(pretrained_teacher_model="tiny-sd"),
    "sd3": StableDiffusion3(pretrained_teacher_model="tiny-sd3", max_sequence_length=16),
    "sdxl": StableDiffusionXL(pretrained_teacher_model="stabilityai/stable-diffusion-xl-base-1.0"),
}


@cache
def tokens():
    return build.tokenizer(build.words())


def pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A random pipeline of a family, with latents of 4 x 8 x 8 and pictures of 32 pixels."""
    torch.manual_seed(seed)
    vae = build.vae((16, 16, 16))
    if name == "sd":
        return build.sd(tokens(), vae, (32, 32), 32)
    if name == "sdxl":
        return sdxl(vae)
    return build.sd3(tokens(), vae, 64, 2, patch=2)


def sdxl(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """SDXL's shape: no attention at the first level, two blocks of it at the second, text and size conditions."""
    width = 32
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(build.text_config(tokens(), width)),
        text_encoder_2=CLIPTextModelWithProjection(build.text_config(tokens(), width)),
        tokenizer=tokens(),
        tokenizer_2=tokens(),
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * width,
            norm_num_groups=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=width + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def clip(place: Path) -> Path:
    """A folder with a small random CLIP, whose processor fits it, with 77 places for tokens."""
    tokenizer = build.tokenizer(build.words())
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shape, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=10.0)
    CLIPModel(config).save_pretrained(place)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(place)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(place)
    return place


def backbone(name: str, pipe: DiffusionPipeline, rank: int = 4, alpha: float | None = None) -> Backbone:
    net = FAMILIES[name].network(pipe)
    family = FAMILIES[name]
    spec = LoraSpec(rank=rank, alpha=alpha)
    return Backbone(net, spec, family.lora_targets(net), family.tap(net), sites=family.sites(net))


def awake(bone: Backbone, role: str, size: float = 0.05) -> None:
    """Give a LoRA that starts at zero an effect."""
    generator = torch.Generator().manual_seed(len(role))
    for key, p in bone.parameters_of(role).items():
        if "lora_B" in key:
            p.data = size * torch.randn(p.shape, generator=generator)


def batch(name: str, pipe: DiffusionPipeline, size: int = 2, first: int = 0) -> Batch:
    prompts = ["red apple", "cat face", "rose", "octopus"][:size]
    index = tuple(range(first, first + size))
    latents, noise = (
        torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(base + i)) for i in index])
        for base in (100, 200)
    )
    return Batch(index, FAMILIES[name].condition(pipe, prompts), (4, 8, 8), latents, noise)


def play(name: str, pipe: DiffusionPipeline, bones: dict[str, Backbone] | Backbone, step: int = 0) -> Play:
    """A `Play` over one shared backbone, or over one backbone for each role."""
    family = FAMILIES[name]
    schedule = family.schedule(pipe.scheduler)

    def bone(role: str) -> Backbone:
        return bones if isinstance(bones, Backbone) else bones[role]

    return Play(
        schedule=schedule,
        null=family.unconditional(pipe),
        denoiser=lambda role: Denoiser(bone(role), role, schedule, family.kind(pipe), family.call),
        module=lambda role: bone(role).others[role],
        decode=lambda latents: family.decode(pipe, latents),
        seed=0,
        step=step,
        device=torch.device("cpu"),
    )
