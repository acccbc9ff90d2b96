"""The parts of a run on one process, built before training: teacher, roles, feed, and the ways to call them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from stepdistill.core.denoise import guided, with_scale
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import few_step, follow
from stepdistill.data import GuidedState
from stepdistill.evaluation.metrics.straightness import paths
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.methods.base import StepContext
from stepdistill.networks import sharding
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER
from stepdistill.networks.sharding import Shards
from stepdistill.students import single as student
from stepdistill.students.draw.call import grid
from stepdistill.students.write import Base, base_of
from stepdistill.training.batches import Feed
from stepdistill.training.cache.keys import Keys, keys_of
from stepdistill.training.logs import Logs

if TYPE_CHECKING:
    from stepdistill.training.recipe import Run

T = TypeVar("T")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Session:
    """The parts of a run on this process: teacher, roles, feed and the ways to call them."""

    run: Run
    accelerator: Accelerator
    pipe: DiffusionPipeline
    base: Base
    dtype: torch.dtype
    backbone: Backbone
    feed: Feed
    shards: Shards | None = None

    @property
    def digest(self) -> str:
        """Of the teacher's network, in float32."""
        return self.base.hashes["float32"]

    def denoiser(self, role: str) -> Denoiser:
        """A role as an estimator."""
        family = self.run.family
        schedule, kind = family.schedule(self.pipe.scheduler), family.kind(self.pipe)
        return Denoiser(self.backbone, role, schedule, kind, family.call, self.dtype)

    def lead(self, job: Callable[[], T]) -> T | None:
        """What `job()` gives on the main process, which works alone; None on the others. All processes come here."""
        if self.shards is not None:
            return self.shards.lead(job)
        return job() if self.accelerator.is_main_process else None

    def context(self, step: int) -> StepContext:
        """What the method may touch in a step."""
        return StepContext(
            schedule=self.run.family.schedule(self.pipe.scheduler),
            null=self.feed.null,
            denoiser=self.denoiser,
            module=lambda name: self.backbone.others[name],
            decode=lambda latents: self.decode(latents, "the method compares images"),
            seed=self.run.train.seed,
            step=step,
            device=self.accelerator.device,
        )

    @torch.no_grad()
    def teach(self, prompts: list[str], noise: Tensor, steps: int, scale: float) -> Tensor:
        """The teacher's latents by `steps` deterministic guided steps from `noise`."""
        context = self.context(0)
        teacher = guided(self.denoiser(TEACHER), context.null, scale)
        times = context.schedule.grid(steps).flip(0).tolist()
        return follow(teacher, context.schedule, times, noise.to(self.accelerator.device), self.feed.condition(prompts))

    @torch.no_grad()
    def invert(self, prompts: list[str], pixels: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The noise that the teacher's ODE has above images (B, 3, H, W), and their latents at the lowest time."""
        context, device = self.context(0), self.accelerator.device
        times = context.schedule.grid(steps).tolist()
        pipe = self.feed.parts.vae("images are inverted")
        latents = self.run.family.encode(pipe, pixels.to(device))
        if latents.shape != noise.shape:
            got, why = (
                f"images of {pixels.shape[-1]} pixels",
                "they are kept at the size that the student is trained at",
            )
            todo = "set train.resolution and data.source.resolution alike"
            raise ConfigError(problem(got, f"{self.feed.side}", why, todo))
        low = torch.full((len(latents),), times[0], device=device)
        x_t = context.schedule.add_noise(latents, noise.to(device), low)
        return follow(self.denoiser(TEACHER), context.schedule, times, x_t, self.feed.condition(prompts)), x_t

    @torch.no_grad()
    def trajectories(self, prompts: list[str], noise: Tensor, scales: Tensor, kept: Tensor, steps: int) -> GuidedState:
        """States (B, K, ...) of the teacher's guided trajectories of `steps` deterministic steps.

        Args:
            scales: (B,).
            kept: (B, K) ascending numbers of steps, from 0.
        """
        context, teacher = self.context(0), self.denoiser(TEACHER)
        schedule, times = context.schedule, context.schedule.grid(steps).flip(0)
        x_t, w = noise.to(self.accelerator.device), scales.to(self.accelerator.device)
        denoise, cond = guided(teacher, context.null, w), self.feed.condition(prompts)
        states, outputs = [], []
        for now, then in pairwise(times.tolist()):
            t, s = (torch.full((len(x_t),), time, device=x_t.device) for time in (now, then))
            x_t = x_t.half().float()  # as it will be stored: the output belongs to that state
            est = denoise(x_t, t, cond)
            states.append(x_t.cpu())
            outputs.append(teacher.native(est, t).cpu())
            x_t = schedule.add_noise(est.x0, est.eps, s)
        row = torch.arange(len(kept))[:, None]
        xs, ys = (torch.stack(each, dim=1)[row, kept] for each in (states, outputs))
        return GuidedState(xs, times[kept], scales[:, None].expand(kept.shape), ys)

    @property
    def teacher_steps(self) -> int:
        """`train.teacher_steps`, or the next smaller number that the teacher's table takes."""
        return _divisor(self.run.train.teacher_steps)

    def noise(self, seed: int, ids: Iterable[int]) -> Tensor:
        """Standard normal latents (B, C, H, W); each row depends on `seed` and its own of the B `ids` alone."""
        rows = [noise_of(seed, i, self.feed.shape) for i in ids]
        return torch.stack(rows).to(self.accelerator.device)

    @torch.no_grad()
    def sample(self, prompts: list[str], ids: Sequence[int], seed: int) -> Tensor:
        """The student's latents under its contract; row i starts from the noise of `ids[i]`."""
        context, method = self.context(0), self.run.method
        sampler = method.sampler(context.schedule)
        denoise = guided(self.denoiser(method.student_role()), context.null, sampler.guidance_scale)
        denoise = with_scale(denoise, sampler.adapter_scale)

        def fresh(i: int) -> Tensor:
            return self.noise(seed + i + 1, ids)

        return few_step(denoise, context.schedule, sampler, self.noise(seed, ids), self.feed.condition(prompts), fresh)

    def bend(self, count: int = 256) -> float:
        """Straightness over transport cost of the student's paths in 32 steps, from noises that it never saw."""
        context, method, batch = self.context(0), self.run.method, self.run.train.train_batch_size
        denoise = guided(
            self.denoiser(method.student_role()), context.null, method.sampler(context.schedule).guidance_scale
        )
        bent = cost = 0.0
        for ids in torch.arange(count).split(batch):
            cond = self.feed.condition([self.run.data.captions(i % len(self.run.data))[0] for i in ids.tolist()])
            found = paths(denoise, context.schedule, self.noise(-1, ids.tolist()), cond)
            bent, cost = bent + found.straightness * len(ids), cost + found.cost * len(ids)
        return bent / cost

    def decode(self, latents: Tensor, why: str) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], not clamped; `why` is said where the autoencoder must be loaded for it."""
        return self.run.family.decode(self.feed.parts.vae(why), latents)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Float images (B, 3, H, W) in [0, 1] on the cpu."""
        return (self.decode(latents, "images are drawn").float().cpu() / 2 + 0.5).clamp(0, 1)

    def draw(self, step: int, logs: Logs) -> None:
        """Validation images at fixed prompts and seeds: the teacher above the student, under its contract."""
        prompts = list(self.run.train.validation_prompts)
        if not prompts or not self.accelerator.is_main_process:
            return
        spec, ids = self.run.train, range(len(prompts))
        made = self.sample(prompts, ids, spec.validation_seed)
        noise = self.noise(spec.validation_seed, ids)
        taught = self.teach(prompts, noise, self.teacher_steps, spec.teacher_guidance_scale)
        rows = [
            (label, to_uint8(self.images(latents)))
            for label, latents in (("teacher", taught), (f"student, step {step}", made))
        ]
        sheet = grid(rows, prompts)
        folder = Path(spec.output_dir) / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:06d}.png")
        logs.images(step, "validation", [sheet])


def _divisor(steps: int) -> int:
    """The largest number of at most `steps` that divides 1,000, the length of the usual table."""
    return max(n for n in range(1, steps + 1) if 1000 % n == 0)


def begin(run: Run) -> Accelerator:
    """The process's place among the others, and its settings."""
    spec = run.train
    trackers = [spec.report_to] if isinstance(spec.report_to, str) else list(spec.report_to)
    accelerator = Accelerator(
        mixed_precision=spec.mixed_precision,
        log_with=[t for t in trackers if t != "none"] or None,
        project_dir=spec.output_dir,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ConfigError(
            problem(
                f"{started} processes that do not know of each other",
                "one process group",
                "each would train alone and write the same folder",
                "without a GPU set ACCELERATE_USE_CPU=true; see configs/accelerate",
            )
        )
    if not accelerator.is_main_process:
        logging.getLogger("stepdistill").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()  # its hints are about loading, which is checked by the proof
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    set_seed(spec.seed)  # for libraries; methods draw from `StepContext`
    torch.backends.cuda.matmul.allow_tf32 = spec.allow_tf32
    torch.set_flush_denormal(True)  # on a CPU a trained network's smallest numbers cost a quarter of its time
    return accelerator


def prepare(run: Run) -> Session:
    """Load the teacher, place it, and build backbone and feed.

    With `train.cache_dir` the text encoders and the autoencoder wait until something is not there.
    """
    spec, family = run.train, run.family
    accelerator = begin(run)
    if spec.shard_base:
        sharding.check_processes(accelerator.num_processes)
    pipe = family.load(("text", "vae") if spec.cache_dir else ())
    student.warn_of_licence(family)
    base = base_of(pipe, family)  # before any rounding
    dtype = DTYPES[accelerator.mixed_precision]
    net = family.network(pipe)
    if spec.enable_xformers_memory_efficient_attention:
        net.enable_xformers_memory_efficient_attention()  # pyright: ignore[reportCallIssue]
    stay = (family.network_name,) if spec.shard_base else ()  # the whole network may not fit on the device
    if dtype != torch.float32 and family.quantization is None:
        net.to(dtype)  # first, so that the device never holds it in float32
    parts = LazyPipeline(family, pipe, accelerator.device, stay)
    session = staged(run, accelerator, parts, base, keys(run, accelerator))
    if spec.shard_base:
        session.shards = sharding.shard(session.backbone, accelerator.device, dtype)
    return session


def staged(run: Run, accelerator: Accelerator, parts: LazyPipeline, base: Base, keys: Keys) -> Session:
    """Backbone and feed around a pipeline in its place and precision."""
    family, pipe = run.family, parts.pipe
    net, dtype = family.network(pipe), DTYPES[accelerator.mixed_precision]
    targets = family.lora_targets(net)
    backbone = Backbone(net, run.lora, targets, family.tap(net), run.train.seed, family.narrow, family.sites(net))
    feed = Feed(parts, run.train, keys, accelerator.device)
    return Session(run, accelerator, pipe, base, dtype, backbone, feed, None)


def keys(run: Run, accelerator: Accelerator) -> Keys:
    """The keys of the run's caches; the first process computes the files' digests, and the others read them."""
    folder = run.train.cache_dir
    with accelerator.main_process_first():
        return keys_of(run.family, Path(folder)) if folder else Keys()
