"""Our LCM step beside a plain loop: seconds by cause, calls, and peak memory, at equal batch on one thread.

    python tests/bench/consistency_step.py

Reference: the step of diffusers' LCM-LoRA training script in its plainest form. It encodes texts and images
in every step, keeps a deep-copied teacher, and calls it twice, with and without the prompt. The rest is equal:
network, LoRA, batch, loss (`tests/test_bench.py` compares it), optimizer, float32.

Ours: `Batches.steps` and `train_step` as a run builds them. *uncached*: no image and no prompt comes twice,
so that both encoders work in every step, too. *cached*: all have been seen before.

One process takes the sides in turn, step by step. A speedup is the median over turns of (reference / ours), in
seconds of CPU, which other programs disturb least; the same of wall time stands beside it. Memory is measured in
a process for each side.
"""

from __future__ import annotations

import json
import os
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, repeat
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from harness import CPU, WALL, Rows, Side, beyond, interleaved, memory, quartiles, ratios, surroundings, table
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stepdistill.data import Sample, Source
from stepdistill.data.bundled import build
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.loop import train_step
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import Session, prepare

SIDES = ("reference", "uncached", "cached")
ENCODING, PASSES = ("text encoding", "image encoding"), ("teacher", "target", "student forward")
CAUSES = (*ENCODING, *PASSES, "backward", "clip, optimizer", "rest")
EPOCH = 4  # batches in the cached side's data set
GRID, GUIDANCE, HUBER, RATE = 50, 7.5, 1e-3, 1e-4  # guidance in our form, `uncond + w (cond - uncond)`


@dataclass(frozen=True)
class Setup:
    """What the sides share; by default the bundled teacher's architecture, and the batch and rank of a run."""

    channels: tuple[int, ...] = (64, 112)
    width: int = 128
    vae: tuple[int, ...] = (32, 64, 96)
    rank: int = LoraSpec.rank
    batch: int = TrainSpec.train_batch_size
    warm: int = EPOCH + 2
    steps: int = 60

    def count(self, side: str) -> int:
        """Images of a side's data set."""
        return self.batch * (EPOCH if side == "cached" else self.warm + self.steps)


@cache
def images(count: int) -> Tensor:
    """(count, 3, 32, 32) in [-1, 1], decoded before, since reading files is no part of the comparison."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@dataclass(frozen=True, kw_only=True)
class Images(Source):
    """Images in memory, each with a caption of its own; `[i]` is for the reference's DataLoader."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "images"})
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return images(self.count)[i], self.captions(i)[0]

    def captions(self, i: int) -> tuple[str]:
        return (f"animal mammal face number {i}",)

    def sample(self, i: int, rng: Random) -> Sample:
        return Sample(prompt=self.prompt(i, rng), pixels=images(self.count)[i], item=i)

    def name(self, i: int) -> str:
        return f"image {i}"

    def stamp(self, i: int) -> str:
        return str(i)


class Reference:
    """The plain loop, its operations in the script's order."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        self.pipe = pipe = StableDiffusionPipeline.from_pretrained(folder)
        self.setup, self.unet, self.vae = setup, pipe.unet, pipe.vae
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        self.teacher = deepcopy(self.unet)
        targets = StableDiffusion(pretrained_teacher_model=str(folder)).lora_targets(self.unet)
        self.unet.add_adapter(LoraConfig(r=setup.rank, lora_alpha=setup.rank, target_modules=targets))
        self.params = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=RATE, weight_decay=0.0)
        self.lr_scheduler = get_scheduler("constant", self.optimizer)
        table = pipe.scheduler.alphas_cumprod
        self.alpha, self.sigma = table.sqrt(), (1 - table).sqrt()
        self.times = torch.arange(1, GRID + 1) * (len(table) // GRID) - 1
        self.null = self.encode_text([""] * setup.batch)
        data = DataLoader(Images(count=setup.count("reference")), setup.batch, shuffle=True)
        self.batches = chain.from_iterable(repeat(data))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return self.pipe.text_encoder(tokens.input_ids)[0]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        return (((pred - target) ** 2 + HUBER**2).sqrt() - HUBER).mean()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def x0(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return (x - sigma * eps) / alpha

    def jump(self, eps: Tensor, t: Tensor, x: Tensor) -> Tensor:
        scaled = (10 * t.view(-1, 1, 1, 1)) ** 2 + 0.25
        return 0.25 / scaled * x + 10 * t.view(-1, 1, 1, 1) / scaled.sqrt() * self.x0(eps, t, x)

    def loss(self, pixels: Tensor, prompts: list[str], index: Tensor, noise: Tensor) -> Tensor:
        states = self.encode_text(prompts)
        latents = self.latents(pixels)
        start = self.times[index]
        end = (start - len(self.alpha) // GRID).clamp(min=0)
        alpha, sigma = self.levels(start)
        x = alpha * latents + sigma * noise
        pred = self.jump(self.unet(x, start, states, return_dict=False)[0], start, x)
        with torch.no_grad():
            cond = self.teacher(x, start, states, return_dict=False)[0]
            cond_x0 = self.x0(cond, start, x)
            uncond = self.teacher(x, start, self.null, return_dict=False)[0]
            uncond_x0 = self.x0(uncond, start, x)
            alpha, sigma = self.levels(end)
            eps = uncond + GUIDANCE * (cond - uncond)
            x_prev = alpha * (uncond_x0 + GUIDANCE * (cond_x0 - uncond_x0)) + sigma * eps
            target = self.jump(self.unet(x_prev, end, states, return_dict=False)[0], end, x_prev)
        return self.distance(pred, target)

    def step(self) -> float:
        pixels, prompts = next(self.batches)
        index, noise = torch.randint(0, GRID, (len(pixels),)), torch.randn(len(pixels), 4, 8, 8)
        loss = self.loss(pixels, list(prompts), index, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def production(folder: Path, setup: Setup, side: str) -> tuple[Session, Optimizers]:
    """A run as `stepdistill.distill` builds it; without an average, since the reference has none."""
    run = Run(
        family=StableDiffusion(pretrained_teacher_model=str(folder)),
        method=Consistency(num_ddim_timesteps=GRID, guidance_scale=GUIDANCE, huber_c=HUBER, ema_decay=None),
        data=Images(count=setup.count(side)),
        lora=LoraSpec(rank=setup.rank),
        train=TrainSpec(
            output_dir=mkdtemp(dir=folder),
            train_batch_size=setup.batch,
            learning_rate=RATE,
            cache_latents=side == "cached",
            report_to="none",
        ),
    )
    session = prepare(run)
    return session, Optimizers(session.backbone, run.train).declare(run.method).build()


def make(name: str, folder: Path, setup: Setup) -> Side:
    """A side with its clocks in place."""
    if name == "reference":
        plain = Reference(folder, setup)
        side = Side(plain.step, [plain.unet, plain.teacher], dict.fromkeys(CAUSES, 0.0))
        unet, vae, optimizer = plain.unet, plain.vae, plain.optimizer
        plain.encode_text = side.timed(plain.encode_text, "text encoding")
        plain.teacher.forward = side.timed(plain.teacher.forward, "teacher")
    else:
        session, optimizers = production(folder, setup, name)
        steps, batches = count(), session.batches.steps(session.run.data, 0, 0, 1)
        unet, vae, optimizer = session.backbone.net, session.pipe.vae, optimizers.by_role["student"]

        def step() -> dict[str, float]:
            return train_step(session.run.method, optimizers, session.context(next(steps)), next(batches))

        side = Side(step, [unet], dict.fromkeys(CAUSES, 0.0))
        session.pipe.encode_prompt = side.timed(session.pipe.encode_prompt, "text encoding")

    def cause(x: Tensor, *_: object) -> str:
        if torch.is_grad_enabled():
            return "student forward"
        return "target" if len(x) == setup.batch else "teacher"

    unet.forward = side.timed(unet.forward, cause)
    vae.encode = side.timed(vae.encode, "image encoding")
    optimizer.step = side.timed(optimizer.step, "clip, optimizer")
    return side


def save_teacher(folder: Path, setup: Setup) -> None:
    """A pipeline with random weights, for all sides to load."""
    torch.manual_seed(0)
    tokens = build.tokenizer(build.drawing_texts())
    build.sd(tokens, build.vae(setup.vae), setup.channels, setup.width).save_pretrained(folder)


def measure(setup: Setup, names: tuple[str, ...] = SIDES) -> Rows:
    """What each measured step of each side took."""
    with TemporaryDirectory() as folder:
        save_teacher(Path(folder), setup)
        return interleaved({name: make(name, Path(folder), setup) for name in names}, setup.warm, setup.steps)


def summary(setup: Setup, rows: Rows, mebibytes: Rows) -> dict[str, object]:
    """The line for programs."""

    def speedup(side: str, clock: str) -> float:
        return round(quartiles(ratios(rows["reference"], rows[side], clock))[1], 3)

    return {
        "name": "consistency_step",
        "speedup_uncached": speedup("uncached", CPU),
        "speedup": speedup("cached", CPU),
        "speedup_uncached_wall": speedup("uncached", WALL),
        "speedup_wall": speedup("cached", WALL),
        **{key: {side: rows[side][0][key] for side in SIDES} for key in ("calls", "rows")},
        "peak_mib": {side: round(median(row["peak MiB"] for row in found)) for side, found in mebibytes.items()},
        "rank": setup.rank,
        "batch": setup.batch,
        "steps": setup.steps,
        **surroundings(),
    }


def main() -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # a process that `memory` has started
        print(json.dumps(beyond(lambda: measure(Setup(steps=4), (sys.argv[1],)))))
        return
    setup = Setup()
    mebibytes = memory(Path(__file__), SIDES)  # first: a process begins with the peak of the one that starts it
    rows = measure(setup)
    print(f"LCM step, batch {setup.batch}, LoRA of rank {setup.rank}, {torch.get_num_threads()} thread")
    print("ms: median and half the distance between the quartiles")
    print(table(rows, (*CAUSES, CPU, WALL), 1e3))
    print(table(rows, ("calls", "rows"), 1))
    print(table(mebibytes, ("peak MiB", "beyond imports"), 1))
    for side in SIDES[1:]:
        for clock in (CPU, WALL):
            low, middle, high = quartiles(ratios(rows["reference"], rows[side], clock))
            print(f"{clock}: reference / {side} = {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    print(json.dumps(summary(setup, rows, mebibytes)))


if __name__ == "__main__":
    main()
