"""Our LCM step beside a plain loop: seconds by cause, calls, and peak memory, at equal batch on one thread.

    python tests/bench/consistency_step.py

Reference: the step of diffusers' LCM-LoRA training script in its plainest form. It encodes texts and pictures in
every step, keeps a deep-copied teacher, and calls it twice, with and without the prompt. Everything else is equal to
ours: network, LoRA, batch, loss, optimizer, float32.

Ours: `Feed.batches` and `Loop.one_step` as a run builds them. *Uncached*, no picture and no prompt comes twice, so
that both encoders work in every step, too. *Cached*, all of them have been seen before.

Seconds are measured in one process that takes the sides in turn, step by step; memory in a process for each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, wraps
from itertools import chain, repeat
from pathlib import Path
from random import Random
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import ClassVar
from unittest.mock import patch

import torch
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stepdistill.data import Sample, Source
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.consistency import Consistency
from stepdistill.metrics.cost import count_calls
from stepdistill.roles import LoraSpec
from stepdistill.run import Run, assemble, prepare
from stepdistill.spec import TrainSpec
from stepdistill.tiny import build
from stepdistill.trainer import Team

SIDES = ("reference", "uncached", "cached")
CAUSES = (
    "text encoding",
    "image encoding",
    "teacher",
    "target",
    "student forward",
    "backward",
    "clip, optimizer",
    "rest",
)
EPOCH = 4  # batches in the data set of the cached side
GRID, GUIDANCE, HUBER, RATE = 50, 7.5, 1e-3, 1e-4  # ours: `uncond + w (cond - uncond)`


@dataclass(frozen=True)
class Setup:
    """What both sides share; by default the architecture of the bundled teacher."""

    channels: tuple[int, ...] = (64, 112)
    width: int = 128
    vae: tuple[int, ...] = (32, 64, 96)
    rank: int = 64
    batch: int = 16
    warm: int = EPOCH + 2
    steps: int = 40

    def count(self, side: str) -> int:
        """Pictures of a side's data set: none comes twice, except where caches shall find them."""
        return self.batch * (EPOCH if side == "cached" else self.warm + self.steps)


@cache
def pictures(count: int) -> Tensor:
    """(count, 3, 32, 32) in [-1, 1]: already decoded, since reading files is no part of the comparison."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@dataclass(frozen=True, kw_only=True)
class Pictures(Source):
    """Pictures in memory, each with a caption of its own."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "images"})
    count: int

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> tuple[str]:
        return (f"animal mammal face number {i}",)

    def sample(self, i: int, rng: Random) -> Sample:
        return Sample(prompt=self.prompt(i, rng), pixels=pictures(self.count)[i], item=i)

    def name(self, i: int) -> str:
        return f"picture {i}"

    def stamp(self, i: int) -> str:
        return str(i)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        """For the reference's DataLoader."""
        return pictures(self.count)[i], self.captions(i)[0]


class Reference:
    """The plain loop, its operations in the script's order."""

    def __init__(self, folder: Path, setup: Setup) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        self.setup = setup
        self.tokenizer, self.text_encoder, self.vae, self.unet = (
            pipe.tokenizer,
            pipe.text_encoder.requires_grad_(False),
            pipe.vae.requires_grad_(False),
            pipe.unet.requires_grad_(False),
        )
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
        data = DataLoader(Pictures(count=setup.count("reference")), setup.batch, shuffle=True)
        self.batches = chain.from_iterable(repeat(data))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids)[0]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

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
        latents = self.encode_image(pixels)
        start = self.times[index]
        end = (start - self.times[0] - 1).clamp(min=0)
        alpha, sigma = self.levels(start)
        x = alpha * latents + sigma * noise
        pred = self.jump(self.unet(x, start, states).sample, start, x)
        with torch.no_grad():
            cond = self.teacher(x, start, states).sample
            cond_x0 = self.x0(cond, start, x)
            uncond = self.teacher(x, start, self.null).sample
            uncond_x0 = self.x0(uncond, start, x)
            alpha, sigma = self.levels(end)
            x_prev = alpha * (uncond_x0 + GUIDANCE * (cond_x0 - uncond_x0))
            x_prev = x_prev + sigma * (uncond + GUIDANCE * (cond - uncond))
            target = self.jump(self.unet(x_prev, end, states).sample, end, x_prev)
        return ((pred - target).square() + HUBER**2).sqrt().sub(HUBER).mean()

    def step(self) -> float:
        pixels, prompts = next(self.batches)
        index = torch.randint(0, GRID, (self.setup.batch,))
        loss = self.loss(pixels, list(prompts), index, torch.randn(self.setup.batch, 4, 8, 8))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Ours:
    """The production step."""

    def __init__(self, folder: Path, setup: Setup, side: str) -> None:
        # no average, since the reference has none
        method = Consistency(num_ddim_timesteps=GRID, guidance_scale=GUIDANCE, huber_c=HUBER, ema_decay=None)
        train = TrainSpec(
            output_dir=str(folder / side),
            train_batch_size=setup.batch,
            learning_rate=RATE,
            cache_latents=side == "cached",
            report_to="none",
        )
        self.run = Run(
            family=StableDiffusion(pretrained_teacher_model=str(folder)),
            method=method,
            data=Pictures(count=setup.count(side)),
            lora=LoraSpec(rank=setup.rank),
            train=train,
        )
        Path(train.output_dir).mkdir()
        self.stage = prepare(self.run)
        self.loop = assemble(self.stage, Team.assemble(self.stage.backbone, method, train))
        self.done, self.stepped = 0, {"student": 0}

    def step(self) -> float:
        values = self.loop.one_step(self.done, next(self.loop.batches), self.stepped)
        self.done += 1
        return values["loss"]


@dataclass
class Side:
    """One side, and what its measured steps took.

    Args:
        step: draws a batch and does a whole step.
        nets: the denoising networks, whose calls are counted.
        spent: CPU seconds by cause of the step that runs.
    """

    step: Callable[[], float]
    nets: list[nn.Module]
    spent: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)

    def timed(self, call: Callable, cause: str | Callable[..., str]) -> Callable:
        """`call`, with its CPU time added to a cause."""

        @wraps(call)
        def wrapper(*args: object, **kwargs: object) -> object:
            name = cause if isinstance(cause, str) else cause(*args)
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - began

        return wrapper

    @contextmanager
    def split(self) -> Iterator[None]:
        """Time the two calls that both sides make on shared classes."""
        backward = self.timed(Tensor.backward, "backward")
        clip = self.timed(nn.utils.clip_grad_norm_, "clip, optimizer")
        with patch.object(Tensor, "backward", backward), patch.object(nn.utils, "clip_grad_norm_", clip):
            yield

    def measure(self) -> None:
        """One step."""
        self.spent.clear()
        with ExitStack() as stack:
            costs = [stack.enter_context(count_calls(net)) for net in self.nets]
            stack.enter_context(self.split())
            wall, cpu = time.perf_counter(), time.process_time()
            self.step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        row = {cause: self.spent.get(cause, 0.0) for cause in CAUSES}
        row["rest"] = cpu - sum(row.values())
        row |= {"calls": sum(c.calls for c in costs), "rows": sum(c.rows for c in costs)}
        self.rows.append(row | {"step, CPU": cpu, "step, wall": wall})


def save_teacher(folder: Path, setup: Setup) -> None:
    """A pipeline with random weights, for all sides to load."""
    torch.manual_seed(0)
    tokens = build.tokenizer(build.words())
    build.sd(tokens, build.vae(setup.vae), setup.channels, setup.width).save_pretrained(folder)


def make(side: str, folder: Path, setup: Setup) -> Side:
    """A side with its clocks in place."""
    if side == "reference":
        reference = Reference(folder, setup)
        made = Side(reference.step, [reference.unet, reference.teacher])
        reference.encode_text = made.timed(reference.encode_text, "text encoding")
        reference.teacher.forward = made.timed(reference.teacher.forward, "teacher")
        vae, unet, optimizer = reference.vae, reference.unet, reference.optimizer
    else:
        ours = Ours(folder, setup, side)
        pipe = ours.stage.pipe
        made = Side(ours.step, [ours.stage.backbone.net])
        pipe.encode_prompt = made.timed(pipe.encode_prompt, "text encoding")
        vae, unet, optimizer = pipe.vae, ours.stage.backbone.net, ours.loop.team.optimizers["student"]

    def cause(x: Tensor, *_: object) -> str:
        if torch.is_grad_enabled():
            return "student forward"
        return "target" if len(x) == setup.batch else "teacher"

    unet.forward = made.timed(unet.forward, cause)
    vae.encode = made.timed(vae.encode, "image encoding")
    optimizer.step = made.timed(optimizer.step, "clip, optimizer")
    return made


def measure(setup: Setup) -> dict[str, list[dict[str, float]]]:
    """The measured steps of each side, taken in turn; the side that begins changes from round to round."""
    with TemporaryDirectory() as folder:
        save_teacher(Path(folder), setup)
        sides = {name: make(name, Path(folder), setup) for name in SIDES}
        for side in sides.values():
            for _ in range(setup.warm):
                side.step()
        for turn in range(setup.steps):
            for n in range(len(SIDES)):
                sides[SIDES[(turn + n) % len(SIDES)]].measure()
        return {name: side.rows for name, side in sides.items()}


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def remember(side: str, folder: Path, setup: Setup) -> dict[str, float]:
    """Peak memory of a process that runs one side only: in all, and beyond imports and pictures."""
    pictures(setup.count(side))
    before = peak()
    made = make(side, folder, setup)
    for _ in range(setup.warm + 2):
        made.step()
    return {"peak": peak(), "beyond": peak() - before}


def memory(setup: Setup, rounds: int = 3) -> dict[str, list[dict[str, float]]]:
    """`remember` of each side in processes of their own, in turn; `setup` must be the default."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as name:
        for n, side in enumerate(SIDES * rounds):
            folder = Path(name) / str(n)
            save_teacher(folder, setup)
            command = [sys.executable, __file__, "--memory", side, "--folder", str(folder)]
            made = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(made.stdout.splitlines()[-1]))
    return found


def cell(values: list[float], unit: float) -> str:
    """Median and half the distance between the quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return f"{median(values) * unit:9.2f} +-{(high - low) / 2 * unit:6.2f}"


def table(seconds: dict[str, list[dict[str, float]]], mebibytes: dict[str, list[dict[str, float]]]) -> str:
    """Milliseconds of CPU by cause, then the whole step, calls, rows, and memory."""
    lines = [f"{'ms a step':>18} " + " ".join(f"{side:>18}" for side in SIDES)]
    for key in (*CAUSES, "step, CPU", "step, wall"):
        lines.append(f"{key:>18} " + " ".join(cell([r[key] for r in seconds[s]], 1e3) for s in SIDES))
    for key in ("calls", "rows"):
        lines.append(f"{key:>18} " + " ".join(f"{seconds[s][0][key]:18d}" for s in SIDES))
    for key, title in (("peak", "peak MiB"), ("beyond", "beyond imports")) if mebibytes else ():
        lines.append(f"{title:>18} " + " ".join(cell([r[key] for r in mebibytes[s]], 1) for s in SIDES))
    return "\n".join(lines)


def machine() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.system()} {platform.machine()}, {names[0] if names else platform.processor()}"


def summary(
    setup: Setup, seconds: dict[str, list[dict[str, float]]], mebibytes: dict[str, list[dict[str, float]]]
) -> dict[str, object]:
    """The line for machines."""

    def ratio(side: str, clock: str) -> float:
        one, other = ([row[clock] for row in seconds[name]] for name in ("reference", side))
        return round(median(one) / median(other), 3)

    return {
        "name": "consistency_step",
        "speedup_uncached": ratio("uncached", "step, wall"),
        "speedup": ratio("cached", "step, wall"),
        "speedup_uncached_cpu": ratio("uncached", "step, CPU"),
        "speedup_cpu": ratio("cached", "step, CPU"),
        "calls": {side: sorted({row["calls"] for row in seconds[side]}) for side in SIDES},
        "rows": {side: sorted({row["rows"] for row in seconds[side]}) for side in SIDES},
        "peak_mib": {side: round(median(r["peak"] for r in rows)) for side, rows in mebibytes.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": setup.batch,
        "steps": setup.steps,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", choices=SIDES, help="only print the memory of one side; used by this script")
    parser.add_argument("--folder", type=Path, help="the pipeline for --memory")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    setup = Setup()
    if args.memory:
        print(json.dumps(remember(args.memory, args.folder, setup)))
        return
    # first, since a process begins with the peak of the one that starts it
    mebibytes = memory(setup)
    seconds = measure(setup)
    print(table(seconds, mebibytes))
    print(json.dumps(summary(setup, seconds, mebibytes)))


if __name__ == "__main__":
    main()
