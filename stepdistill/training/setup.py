"""Setup of a run on one process, before training."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.guidance import Rule, on_estimates
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.data import BadSample, Source
from stepdistill.families.controlled import Controlled, controlnet_of, with_control
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.families.rules import rule_with
from stepdistill.methods.base import Method, StepContext
from stepdistill.networks import sharding
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.pipeline_loras import assist
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sharding import ShardedNetwork
from stepdistill.students.base_model import Base, base_of
from stepdistill.students.chain import Start, fuse_start, read_assistant
from stepdistill.students.licence import warn_of_licence
from stepdistill.students.sizes import shown_sizes
from stepdistill.training.batches import Batches
from stepdistill.training.cache.keys import Keys, family_keys
from stepdistill.training.launcher import DTYPES, check_launcher
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.sizes import Size, StepSizes

CAPTIONS = 1000  # in the digest of a data source


@dataclass
class Session:
    """The parts of a run on this process. `method` is the run's, with what is measured before training."""

    run: Run
    accelerator: Accelerator
    pipe: DiffusionPipeline
    base: Base
    dtype: torch.dtype
    backbone: Backbone
    batches: Batches
    method: Method
    start: Start | None = None
    shards: ShardedNetwork | None = None
    controlnet: nn.Module | None = None

    @cached_property
    def digest(self) -> str:
        """Of the teacher's network, in float32, with what is fused into it."""
        base = self.base.hashes["float32"]
        if self.start is None:
            return base
        return sha256("".join([base, *(stage.sha256 for stage in self.start.stages)]).encode()).hexdigest()

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """Scales losses in float16, and does nothing otherwise."""
        return torch.amp.GradScaler(self.accelerator.device.type, enabled=self.dtype == torch.float16)

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.run.train.global_batch(self.accelerator.num_processes)

    @cached_property
    def samples(self) -> str:
        """See `samples_of`."""
        return samples_of(self.run.data)

    @cached_property
    def sizes(self) -> StepSizes:
        """The size of each step's images."""
        return self.batches.sizes_of(self.run.data, self.global_batch)

    @property
    def shown_sizes(self) -> tuple[Size, ...]:
        """Those of validation images, of the collapse monitor's and of the proof: the first, and the most elongated."""
        return shown_sizes(self.batches.size, self.sizes.sizes)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise process at the run's first size, whose grid the student's levels are taken from."""
        return self.schedule_at(self.batches.size)

    def schedule_at(self, size: Size) -> NoiseSchedule:
        """The noise process at a height and width in pixels."""
        return self.run.family.schedule_at(self.pipe, self.pipe.scheduler, size)

    @property
    def rule(self) -> Rule:
        """How the teacher is guided in training."""
        return rule_with(self.run.method.guidance_norm, self.run.family, self.backbone.net)

    def denoiser(self, role: str) -> Denoiser:
        """A role as an estimator."""
        family = self.run.family
        kind = family.kind(self.pipe)
        call = partial(with_control, family, self.controlnet) if isinstance(family, Controlled) else family.call
        return Denoiser(self.backbone, role, self.schedule, kind, call, self.dtype)

    def leading(self) -> AbstractContextManager[bool]:
        """True on the main process, which works alone inside; False on the others. All processes come here."""
        return nullcontext(self.accelerator.is_main_process) if self.shards is None else self.shards.leading()

    def context(self, step: int, size: Size | None = None) -> StepContext:
        """What the method may touch in a step.

        Args:
            size: height and width in pixels that the schedule is for; None is the size of the step's images.
        """
        return StepContext(
            schedule=self.schedule_at(size or self.sizes.at(step)),
            null=self.batches.null,
            denoiser=self.denoiser,
            module=lambda name: self.backbone.others[name],
            decode=lambda latents: self.decode(latents, "the method compares images"),
            seed=self.run.train.seed,
            step=step,
            device=self.accelerator.device,
            combine=on_estimates(self.rule, self.run.family.kind(self.pipe), self.schedule),
            first_schedule=self.schedule,
        )

    def decode(self, latents: Tensor, why: str) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], not clamped; `why` is said where the autoencoder must be loaded for it."""
        pipe = self.batches.parts.vae(why)
        # the decoder's activations at full size are most of what a loss on images keeps
        if self.run.train.gradient_checkpointing and pipe.vae._supports_gradient_checkpointing:
            pipe.vae.enable_gradient_checkpointing()
        return self.run.family.decode(pipe, latents)


def samples_of(data: Source) -> str:
    """The number of samples, and a digest of the captions of some of them."""
    content = sha256()
    for i in range(0, len(data), max(1, len(data) // CAPTIONS)):
        with suppress(BadSample):
            content.update("\0".join(data.captions(i)).encode())
    return f"{len(data)} samples, captions {content.hexdigest()[:12]}"


def begin(spec: TrainSpec) -> Accelerator:
    """The process's place among the others, and its settings."""
    check_launcher(spec)
    trackers = [spec.report_to] if isinstance(spec.report_to, str) else list(spec.report_to)
    accelerator = Accelerator(
        mixed_precision=spec.mixed_precision,
        log_with=[t for t in trackers if t != "none"] or None,
        project_dir=spec.output_dir,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        got = f"{started} processes that are not connected"
        why = "each would train on its own and write to the same folder"
        todo = "without a GPU set ACCELERATE_USE_CPU=true; see configs/accelerate"
        raise ConfigError(problem(got, "one process group", why, todo))
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
    """Load the teacher, place it, and build backbone and batches.

    With `train.cache_dir` the text encoders and the autoencoder wait until something is not there.
    """
    spec, family = run.train, run.family
    accelerator = begin(spec)
    if spec.shard_base:
        sharding.check_processes(accelerator.num_processes)
    pipe = family.load(("text", "vae") if spec.cache_dir else ())
    warn_of_licence(family)
    base = base_of(pipe, family)  # before any rounding
    start = fuse_start(pipe, family, run.start_from) if run.start_from else None
    dtype = DTYPES[accelerator.mixed_precision]
    net = family.network(pipe)
    if spec.enable_xformers_memory_efficient_attention:
        net.enable_xformers_memory_efficient_attention()  # pyright: ignore[reportCallIssue]
    stay = (family.network_name,) if spec.shard_base else ()  # the whole network may not fit on the device
    if dtype != torch.float32 and family.quantization is None:
        net.to(dtype)  # first, so that the device never holds it in float32
    parts = LazyPipeline(family, pipe, accelerator.device, stay)
    session = session_of(run, accelerator, parts, base, cache_keys(run, accelerator))
    session.start = start
    controlnet = controlnet_of(family, pipe)
    if controlnet is not None:  # the base's precision, as the network has it
        session.controlnet = controlnet.to(accelerator.device, dtype)
    if spec.shard_base:
        session.shards = sharding.shard(session.backbone, accelerator.device, dtype)
    return session


def session_of(run: Run, accelerator: Accelerator, parts: LazyPipeline, base: Base, keys: Keys) -> Session:
    """Backbone and batches around a pipeline in its place and precision."""
    family, pipe = run.family, parts.pipe
    net, dtype = family.network(pipe), DTYPES[accelerator.mixed_precision]
    targets = family.lora_targets(net)
    # not every family has sites: asked for them without need, it would refuse the run
    adapts = any(isinstance(role, Adapters) for role in run.method.roles().values())
    places = family.sites(net) if adapts else None, family.taps(net)
    backbone = Backbone(net, run.lora, targets, family.tap(net), run.train.seed, family.narrow, *places)
    if run.train.assistant:
        lora = read_assistant(run.train.assistant, family, run.start_from)
        assist(backbone, lora, family.network_name, run.train.assistant)
    batches = Batches(parts, run.train, keys, accelerator.device)
    return Session(run, accelerator, pipe, base, dtype, backbone, batches, run.method)


def cache_keys(run: Run, accelerator: Accelerator) -> Keys:
    """The keys of the run's caches; the first process computes the files' digests, and the others read them."""
    folder = run.train.cache_dir
    with accelerator.main_process_first():
        return family_keys(run.family, Path(folder)) if folder else Keys()
