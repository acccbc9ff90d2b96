"""Tiny random pipelines and batches, shared by the tests."""

from __future__ import annotations

from functools import cache

import torch
from diffusers import DiffusionPipeline

from stepdistill.backbone import Backbone
from stepdistill.denoiser import Denoiser
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.base import Batch, Play
from stepdistill.roles import LoraSpec
from stepdistill.tiny import build

FAMILIES: dict[str, Family] = {
    "sd": StableDiffusion(pretrained_teacher_model="tiny-sd"),
    "sd3": StableDiffusion3(pretrained_teacher_model="tiny-sd3", max_sequence_length=16),
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
    return build.sd3(tokens(), vae, 64, 2, patch=2)


def backbone(name: str, pipe: DiffusionPipeline, rank: int = 4, alpha: float | None = None) -> Backbone:
    net = FAMILIES[name].network(pipe)
    family = FAMILIES[name]
    return Backbone(net, LoraSpec(rank=rank, alpha=alpha), family.lora_targets(net), family.tap(net))


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
        null=family.condition(pipe, [""]),
        denoiser=lambda role: Denoiser(bone(role), role, schedule, family.kind(pipe), family.call),
        module=lambda role: bone(role).others[role],
        decode=lambda latents: family.decode(pipe, latents),
        seed=0,
        step=step,
        device=torch.device("cpu"),
    )
