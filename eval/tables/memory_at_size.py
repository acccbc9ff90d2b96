"""Memory of one cycle of training at a network's real size, with random weights: predicted, and measured on a CPU.

A cycle is all steps of a config of `configs/tables/memory`: of DMD2, say, K updates of the fake score and one of the
student. The networks are built from their published shapes, the frozen one in bfloat16. Text embeddings are random, as
if they came from a cache: no text encoder and no autoencoder is there.

*static*: what is resident between steps, weights and optimizer states, beyond what the imports take. *peak*: the
largest resident memory, likewise. Each is of a process of its own. That process runs with glibc's `MALLOC_ARENA_MAX=1`
and a fixed `MALLOC_MMAP_THRESHOLD_` of 64 KiB: blocks from that size on go back to the system when they are freed, and
what is resident is what is in use. Left alone, malloc raises that threshold to 32 MiB as it goes, and keeps freed
blocks below it: so much slack is not predicted, as that of a GPU's caching allocator is not. Linux and glibc only.

    cd eval && python -m tables.memory_at_size predict sdxl
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    Krea2Transformer2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from stepdistill.config.load import load_config
from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Kind
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.data.bundled.build import vp_scheduler
from stepdistill.methods.base import Batch, StepContext
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.meta import with_tables
from stepdistill.training.launcher import DTYPES
from stepdistill.training.memory.forecast import Rehearsal, forecast, prime
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run
from tables.recipes import CONFIGS

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Shape:
    """A network, and what it is called with.

    Args:
        network: builds it, in torch's default precision.
        condition: the shape of each embedding of one prompt.
        channels: of the latents.
        space: pixels along one side of a latent.
        time: frames of a latent frame, the first one alone; None for images.
    """

    network: Callable[[], nn.Module]
    condition: dict[str, tuple[int, ...]]
    schedule: NoiseSchedule
    kind: Kind
    channels: int = 4
    space: int = 8
    time: int | None = None


@dataclass(frozen=True)
class Cycle:
    """What is trained, and on what shapes; the run's teacher and data are not read."""

    run: Run
    shape: Shape

    @property
    def latents(self) -> tuple[int, ...]:
        """(C, h, w), or (C, F, h, w)."""
        size: Any = self.run.train.resolution
        height, width = (size, size) if isinstance(size, int) else size
        family, shape = self.run.family, self.shape
        frames = () if shape.time is None else ((vars(family)["num_frames"] - 1) // shape.time + 1,)
        return shape.channels, *frames, height // shape.space, width // shape.space


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


def stable_diffusion_3(blocks: int = 24) -> nn.Module:
    """The network of Stable Diffusion 3 medium, or some of its blocks."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=blocks,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def pixart() -> nn.Module:
    """The network of PixArt-Sigma XL 2, 1024 pixels."""
    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=False)


def wan(heads: int, ffn: int, blocks: int, channels: int = 16) -> nn.Module:
    """The network of a Wan pipeline from text to video."""
    shape: Any = {"num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn, "num_layers": blocks}
    return WanTransformer3DModel(in_channels=channels, out_channels=channels, text_dim=4096, **shape)


def ltx() -> nn.Module:
    """The network of LTX-Video 2B."""
    return LTXVideoTransformer3DModel()


def flux2_klein() -> nn.Module:
    """The network of FLUX.2 klein base 4B."""
    return Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def qwen_image() -> nn.Module:
    """The network of Qwen-Image."""
    return with_tables(QwenImageTransformer2DModel())


VP = DiscreteVP(vp_scheduler().alphas_cumprod)
SD15 = Shape(stable_diffusion, {"states": (77, 768)}, VP, "epsilon")
WAN_13B = Shape(partial(wan, 12, 8960, 30), {"states": (512, 4096)}, Rectified(5.0), "flow", channels=16, time=4)
KLEIN = ("flux2_klein", "flux2_klein_1024")
SHAPES = {
    "sd15": SD15,
    "sd15_lcm": SD15,
    "sdxl": Shape(stable_diffusion_xl, {"states": (77, 2048), "pooled": (1280,), "scale": (1,)}, VP, "epsilon"),
    "sd3": Shape(
        stable_diffusion_3, {"states": (77 + 256, 4096), "pooled": (2048,)}, Rectified(3.0), "flow", channels=16
    ),
    **{name: WAN_13B for name in ("wan13b", "wan13b_480p")},
    "wan5b": replace(WAN_13B, network=partial(wan, 24, 14336, 30, 48), channels=48, space=16),
    "wan14b": replace(WAN_13B, network=partial(wan, 40, 13824, 40)),
    "ltx": Shape(
        ltx,
        {"states": (128, 4096), "mask": (128,), "scale": (2,)},
        Rectified(8.0),
        "flow",
        channels=128,
        space=32,
        time=8,
    ),
    # prompts of the largest number of tokens that their pipelines take by default
    **{name: Shape(flux2_klein, {"states": (512, 7680)}, Rectified(7.6), "flow", 128, 16) for name in KLEIN},
    "z_image": Shape(ZImageTransformer2DModel, {"states": (512, 2560), "mask": (512,)}, Rectified(6.0), "flow", 16),
    "qwen_image": Shape(qwen_image, {"states": (512, 3584), "mask": (512,)}, Rectified(2.0), "flow", 16),
    "krea2": Shape(Krea2Transformer2DModel, {"states": (512, 12, 2560), "mask": (512,)}, Rectified(2.48), "flow", 16),
    "pixart": Shape(pixart, {"states": (300, 4096), "mask": (300,), "scale": (1,)}, VP, "epsilon"),
}


def cycle_of(name: str) -> Cycle:
    """A cycle by the name of its config."""
    return Cycle(load_config(Run, CONFIGS / "memory" / f"{name}.yaml", []), SHAPES[name])


def build(case: Cycle) -> Rehearsal:
    """Single steps around a network with random weights, on torch's default device; its roles are not declared."""
    run, shape, device = case.run, case.shape, torch.device("cpu")
    family, dtype = run.family, DTYPES[run.train.mixed_precision or "no"]
    with _precision(dtype):  # a float32 network beside it would be a peak of its own
        net = shape.network()
    targets, tap, taps = family.lora_targets(net), family.tap(net), family.taps(net)
    backbone = Backbone(net, run.lora, targets, tap, run.train.seed, family.narrow, taps=taps)

    def denoiser(role: str) -> Denoiser:
        return Denoiser(backbone, role, shape.schedule, shape.kind, family.call, dtype)

    def context(step: int) -> StepContext:
        null, module = _embeddings(case, 1), backbone.others.__getitem__
        return StepContext(shape.schedule, null, denoiser, module, nn.Identity(), run.train.seed, step, device)

    optimizers, roles = Optimizers(backbone, run.train), run.method.roles()
    return Rehearsal(run.method, optimizers, context, _batches(case), device, roles)


def predicted(case: Cycle) -> dict[str, Any]:
    """Bytes by part, and at the peak."""
    with torch.device("meta"):
        rehearsal = build(case)
    prediction = forecast(rehearsal, {})
    parts = {part.name: [part.weights, part.gradients, part.optimizer] for part in prediction.parts}
    base, *roles = prediction.parts
    return {
        "parameters": base.parameters,
        "lora_parameters": roles[0].parameters,
        "parts": parts,
        "static": prediction.static,
        "gradients": prediction.gradients,
        "activations": prediction.activations,
        "peak": prediction.peak,
    }


def measured(case: Cycle) -> dict[str, float]:
    """Resident bytes of this process beyond those of its imports, and seconds of the cycle."""
    before = resident("VmRSS")
    rehearsal = build(case)
    optimizers = rehearsal.optimizers.add(rehearsal.roles)
    if optimizers.spec.gradient_checkpointing:
        optimizers.backbone.enable_checkpointing()
    prime(optimizers.build())
    gc.collect()
    static = resident("VmRSS") - before
    began = time.perf_counter()
    for step in range(optimizers.spec.max_train_steps):
        rehearsal.step(step, next(rehearsal.batches))
    return {"static": static, "peak": resident("VmHWM") - before, "seconds": time.perf_counter() - began}


def resident(field: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most so far (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def figures_of_cycle(name: str) -> dict[str, Any]:
    """Both of a cycle, each in a process of its own, with their ratios (measured / predicted)."""
    predicted, measured = (_apart(task, name) for task in ("predict", "measure"))
    ratios = {"ratio": measured["peak"] / predicted["peak"], "static_ratio": measured["static"] / predicted["static"]}
    return {"predicted": predicted, "measured": measured} | {key: round(value, 4) for key, value in ratios.items()}


def prediction_of_cycle(name: str) -> dict[str, Any]:
    """What is predicted of a cycle that no machine at hand can run."""
    return {"predicted": _apart("predict", name)}


def _apart(task: str, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tables.memory_at_size", task, name]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent.parent
    )
    return json.loads(done.stdout.splitlines()[-1])


def _embeddings(case: Cycle, rows: int) -> Condition:
    given = {key: torch.randn(rows, *shape, generator=torch.Generator()) for key, shape in case.shape.condition.items()}
    return given | ({"mask": torch.ones_like(given["mask"], dtype=torch.bool)} if case.run.family.ragged else {})


def _batches(case: Cycle) -> Iterator[list[Batch]]:
    size, parts, start = case.run.train.train_batch_size, case.run.train.gradient_accumulation_steps, 0
    while True:
        micro_batches = []
        for _ in range(parts):
            latents, noise = (torch.randn(size, *case.latents) for _ in range(2))
            index = tuple(range(start, start + size))
            micro_batches.append(Batch(index, _embeddings(case, size), case.latents, latents, noise))
            start += size
        yield micro_batches


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
    print(json.dumps({"predict": predicted, "measure": measured}[sys.argv[1]](cycle_of(sys.argv[2]))))
