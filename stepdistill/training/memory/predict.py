"""Memory prediction for a config."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from stepdistill.data import GuidedState, Sample, inside
from stepdistill.data.base import Wrapper
from stepdistill.data.made import TeacherMade
from stepdistill.families.controlled import Controlled
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.networks.rewards.base import RewardScale
from stepdistill.students.base_model import Base
from stepdistill.students.load import start_from
from stepdistill.students.proof import check_sampling
from stepdistill.training.batches import first_size
from stepdistill.training.cache.keys import Keys
from stepdistill.training.launcher import DTYPES, check_launcher
from stepdistill.training.memory.forecast import BASE, FEW, Prediction, Rehearsal, forecast
from stepdistill.training.memory.outline import networks_of, outline
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run
from stepdistill.training.setup import session_of
from stepdistill.training.sizes import listed_sizes


def predict(run: Run) -> Prediction:
    """Predict a run's memory on this process's device. Weights are not read, but for those of rewards and of
    networks that a method's own terms load, as CLIP and LPIPS, and of the student in `lora.init_from`."""
    check_launcher(run.train)
    accelerator = Accelerator(mixed_precision=run.train.mixed_precision)
    run.family.check_files()
    with run.family.reached():
        pipe = outline(run.family)
    schedule = run.family.schedule_at(pipe, pipe.scheduler, first_size(run.train, run.family, pipe))
    check_sampling(run.family, pipe, run.method.sampler(schedule))
    dtype = DTYPES[accelerator.mixed_precision]
    parts, net = networks_of(pipe), run.family.network(pipe)
    loading = sum(p.nbytes for part in parts.values() for p in part.parameters())
    if dtype != torch.float32:
        net.to(dtype)
    frozen = {name: part for name, part in parts.items() if part is not net}
    rehearsal = rehearse(run, accelerator, pipe)
    check_start(run, rehearsal)
    return replace(forecast(rehearsal, frozen, loading), remarks=tuple(_remarks(run)))


def check_start(run: Run, rehearsal: Rehearsal) -> None:
    """Raise StudentError where what a role starts from has other tensors than the role: it is loaded as the run does,
    into roles on the meta device."""
    if run.lora.starts():
        optimizers = deepcopy(rehearsal.optimizers)
        with torch.device("meta"):
            optimizers.declare(run.method)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # it compares names and shapes
            for role, source in run.lora.starts().items():
                start_from(optimizers.backbone, source, run.family, role)


def _remarks(run: Run) -> Iterator[str]:
    """What the outline of a pipeline does not show."""
    if run.family.quantization is not None:
        yield f"{BASE} is counted without family.quantization: it will take less memory"
    if isinstance(run.family, Controlled) and run.family.controlnet:
        yield "family.controlnet is not counted: its weights and its outputs take memory beside the network's"
    if run.train.shard_base:
        yield f"{BASE} is counted whole: with train.shard_base each process keeps a shard and one gathered block"
    if run.train.cache_dir:
        yield "text encoders and autoencoder are counted: if train.cache_dir has everything, they are not loaded"


def rehearse(run: Run, accelerator: Accelerator, pipe: DiffusionPipeline) -> Rehearsal:
    """Single steps of the run, around a pipeline in its place and precision; its roles are not declared.

    Caches are neither read nor written, and what the teacher makes before training need not be there.
    """
    spec = replace(run.train, cache_dir=None, dataloader_num_workers=0)
    spec = replace(spec, gradient_accumulation_steps=min(FEW, spec.gradient_accumulation_steps))
    if spec.resolution is not None:  # of several sizes the one with the most tokens
        largest = max(listed_sizes(spec.resolution), key=math.prod)
        spec = replace(spec, resolution=largest, resolution_weights=None)
    parts = Outlined(run.family, pipe, accelerator.device, stay=tuple(networks_of(pipe)))
    session = session_of(replace(run, train=spec), accelerator, parts, Base({}, (), None), Keys())
    data = run.data
    if any(isinstance(source, TeacherMade) for source in inside(data)):
        size = session.batches.size if isinstance(run.family, ImageToVideo) else None
        data = Unmade(source=data, shape=session.batches.shape, size_of_images=size)
    optimizers = Optimizers(session.backbone, run.train, session.scaler)
    sizes = session.batches.sizes_of(data, spec.global_batch(1))
    start = next(step for step in count() if sizes.at(step) == max(sizes.sizes, key=math.prod))
    batches = session.batches.steps(data, start, 0, 1)
    method = run.method.calibrate(lambda reward, slope=False: RewardScale(0.0, 1.0, 1.0))
    rewards = [reward for reward in (*method.trained_rewards, method.held_out) if reward is not None]
    roles = method.roles()
    return Rehearsal(method, optimizers, session.context, batches, accelerator.device, roles, rewards)


class Outlined(LazyPipeline):
    """A pipeline whose parts have no content, which for a prediction is as good as having them."""

    def text(self, why: str) -> DiffusionPipeline:
        return self.pipe

    def vae(self, why: str) -> DiffusionPipeline:
        return self.pipe


@dataclass(frozen=True, kw_only=True)
class Unmade(Wrapper):
    """A source that the teacher will make: samples of its shapes, with zeros.

    Args:
        shape: (C, h, w) of the latents.
        size_of_images: height and width of the images that videos begin with; None without any.
    """

    shape: tuple[int, ...]
    size_of_images: tuple[int, int] | None = None

    def captions(self, i: int) -> Sequence[str]:
        return [str(i)]

    def sample(self, i: int, rng: random.Random) -> Sample:
        zeros, have = torch.zeros(self.shape), self.provides
        state = GuidedState(zeros, torch.tensor(0.0), torch.tensor(2.0), zeros) if "trajectories" in have else None
        latents, noise = (zeros if name in have else None for name in ("latents", "noise"))
        pixels = torch.zeros(3, *self.size_of_images) if self.size_of_images else None
        return Sample(prompt=str(i), pixels=pixels, latents=latents, noise=noise, state=state, item=i)

    def stamp(self, i: int) -> str:
        return str(i)
