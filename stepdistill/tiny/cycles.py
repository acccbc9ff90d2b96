# pyright: reportArgumentType=false
# Diffusers annotates its constructors more narrowly than it calls them.
"""Memory of one cycle of training at a network's real size, with random weights: predicted, and measured on a CPU.

A cycle is `steps` steps of a method, K for DMD2: so many updates of the fake score, and one of the student. The
networks are built from their published configs in bfloat16, with LoRAs of rank 64 in float32, AdamW and gradient
checkpointing. Text embeddings are random, as if they came from a cache: no text encoder and no autoencoder is there.

*static*: what is resident between steps, weights and optimizer states, beyond what the imports take. *peak*: the
largest resident memory, likewise. Each is of a process of its own. That process runs with glibc's `MALLOC_ARENA_MAX=1`
and a fixed `MALLOC_MMAP_THRESHOLD_` of 64 KiB: blocks from that size on go back to the system when they are freed, and
what is resident is what is in use. Left alone, malloc raises that threshold to 32 MiB as it goes, and keeps freed
blocks below it: so much slack is not predicted, as that of a GPU's caching allocator is not. Linux and glibc only.

    python -m stepdistill.tiny.cycles predict sdxl
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from stepdistill.backbone import Backbone
from stepdistill.denoiser import Condition, Denoiser
from stepdistill.families.base import Family
from stepdistill.families.pixart import PixArtSigma
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.families.sdxl import StableDiffusionXL
from stepdistill.memory.forecast import forecast, prime, single
from stepdistill.methods.base import Batch, Method, Play
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.prediction import Kind
from stepdistill.roles import LoraSpec
from stepdistill.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.spec import TrainSpec
from stepdistill.tiny.build import vp_scheduler
from stepdistill.trainer import Loop

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CRITIC = DMD2(critic_steps=5, ema_decay=None)
RANK = 64


@dataclass(frozen=True)
class Cycle:
    """What is trained, and on what shapes.

    Args:
        network: builds it, in torch's default precision.
        condition: the shape of each embedding of one prompt.
        latents: (C, h, w).
        steps: of a cycle.
    """

    family: Family
    network: Callable[[], nn.Module]
    condition: dict[str, tuple[int, ...]]
    schedule: NoiseSchedule
    kind: Kind
    latents: tuple[int, int, int] = (4, 32, 32)
    method: Method = CRITIC
    steps: int = CRITIC.critic_steps
    batch: int = 1


def stable_diffusion() -> nn.Module:
    """The network of Stable Diffusion 1.5."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def stable_diffusion_xl() -> nn.Module:
    """The network of Stable Diffusion XL base 1.0."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),  # pyright: ignore[reportArgumentType]
        attention_head_dim=(5, 10, 20),  # pyright: ignore[reportArgumentType]
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def stable_diffusion_3() -> nn.Module:
    """The network of Stable Diffusion 3 medium."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def pixart() -> nn.Module:
    """The network of PixArt-Sigma XL 2, 1024 pixels."""
    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=False)


VP = DiscreteVP(vp_scheduler().alphas_cumprod)
SD15 = (StableDiffusion(pretrained_teacher_model="random"), stable_diffusion, {"states": (77, 768)}, VP, "epsilon")
CYCLES = {
    "sdxl": Cycle(
        StableDiffusionXL(pretrained_teacher_model="random"),
        stable_diffusion_xl,
        {"states": (77, 2048), "pooled": (1280,), "scale": (1,)},
        VP,
        "epsilon",
    ),
    "sd15": Cycle(*SD15),
    "sd15-lcm": Cycle(*SD15, latents=(4, 64, 64), method=Consistency(), steps=1, batch=2),
    "sd3": Cycle(
        StableDiffusion3(pretrained_teacher_model="random"),
        stable_diffusion_3,
        {"states": (77 + 256, 4096), "pooled": (2048,)},
        Rectified(3.0),
        "flow",
        latents=(16, 32, 32),
    ),
    "pixart": Cycle(
        PixArtSigma(pretrained_teacher_model="random"),
        pixart,
        {"states": (300, 4096), "mask": (300,), "scale": (1,)},
        VP,
        "epsilon",
    ),
}


def build(case: Cycle) -> Loop:
    """The loop of a run around a network with random weights, on torch's default device; its roles are not declared."""
    with _precision(torch.bfloat16):  # a float32 network beside it would be a peak of its own
        net = case.network()
    family, device = case.family, torch.device("cpu")
    targets, tap, sites = family.lora_targets(net), family.tap(net), family.sites(net)
    backbone = Backbone(net, LoraSpec(rank=RANK), targets, tap, 0, family.narrow, sites)

    def denoiser(role: str) -> Denoiser:
        return Denoiser(backbone, role, case.schedule, case.kind, family.call, torch.bfloat16)

    def play(step: int) -> Play:
        null = _embeddings(case, 1)
        return Play(case.schedule, null, denoiser, backbone.others.__getitem__, nn.Identity(), 0, step, device)

    spec = TrainSpec(
        output_dir="unused", gradient_checkpointing=True, train_batch_size=case.batch, max_train_steps=1000
    )
    batches = _batches(case)
    return single(method=case.method, backbone=backbone, spec=spec, play=play, batches=batches, device=device)


def predicted(case: Cycle) -> dict[str, Any]:
    """Bytes by part, and at the peak."""
    with torch.device("meta"):
        loop = build(case)
    found = forecast(loop, {})
    parts = {part.name: [part.weights, part.gradients, part.optimizer] for part in found.parts}
    base, *roles = found.parts
    return {
        "parameters": base.parameters,
        "lora_parameters": roles[0].parameters,
        "parts": parts,
        "static": found.static,
        "gradients": found.gradients,
        "activations": found.activations,
        "peak": found.peak,
    }


def measured(case: Cycle) -> dict[str, float]:
    """Resident bytes of this process beyond those of its imports, and seconds of the cycle."""
    before = resident("VmRSS")
    loop = build(case)
    loop.team.declare(case.method)
    loop.team.backbone.enable_checkpointing()
    loop.team.equip(loop.spec)
    prime(loop.team)
    gc.collect()
    static = resident("VmRSS") - before
    began, stepped = time.perf_counter(), dict.fromkeys(loop.team.optimizers, 0)
    for step in range(case.steps):
        loop.one_step(step, next(loop.batches), stepped)
    return {"static": static, "peak": resident("VmHWM") - before, "seconds": time.perf_counter() - began}


def resident(field: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most so far (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def figures(name: str) -> dict[str, Any]:
    """Both of a cycle, each in a process of its own, with their ratios (measured / predicted)."""
    said, found = (_apart(task, name) for task in ("predict", "measure"))
    ratios = {"ratio": found["peak"] / said["peak"], "static_ratio": found["static"] / said["static"]}
    return {"predicted": said, "measured": found} | {key: round(value, 4) for key, value in ratios.items()}


def _apart(task: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "stepdistill.tiny.cycles", task, name]
    own = MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | own)
    return json.loads(done.stdout.splitlines()[-1])


def _embeddings(case: Cycle, rows: int) -> Condition:
    return {key: torch.randn(rows, *shape, generator=torch.Generator()) for key, shape in case.condition.items()}


def _batches(case: Cycle) -> Iterator[list[Batch]]:
    for step in count():
        index = tuple(range(step * case.batch, (step + 1) * case.batch))
        latents, noise = (torch.randn(case.batch, *case.latents) for _ in range(2))
        yield [Batch(index, _embeddings(case, case.batch), case.latents, latents, noise)]


@contextmanager
def _precision(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_flush_denormal(True)  # as a run does
    print(json.dumps({"predict": predicted, "measure": measured}[sys.argv[1]](CYCLES[sys.argv[2]])))
