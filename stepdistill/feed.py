"""From samples to micro-batches: prompts become embeddings and pictures latents, each once where asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.cache import LatentCache, PromptCache
from stepdistill.data import FixedCrops, GuidedState, Sample, Source, Stream, loader
from stepdistill.denoiser import Condition
from stepdistill.errors import ConfigError, problem
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch
from stepdistill.spec import TrainSpec


def provided(source: Source) -> set[str]:
    """What methods may ask of a source: pictures give latents too, latents with their noise are pairs."""
    have = set(source.provides)
    have |= {"latents"} if "images" in have else set()
    return have | ({"pairs"} if {"latents", "noise"} <= have else set())


def check_needs(source: Source, needs: frozenset[str], method: str) -> None:
    """Raise ConfigError where the source lacks what the method needs."""
    missing = needs - provided(source)
    if missing:
        raise ConfigError(
            problem(
                f"a {type(source).__name__} source, which gives {sorted(provided(source))}",
                f"one that gives {sorted(missing)}",
                f"{method} trains on it",
                "use stepdistill.data.Trajectories around your prompts"
                if "trajectories" in missing
                else "use an image source, or stepdistill.data.TeacherSamples around your prompts",
            )
        )


class Feed:
    """Embeddings, latents and micro-batches for one process.

    Args:
        digest: of the weights of every part of the pipeline; keys the caches.
        device: where batches go.
    """

    def __init__(
        self, family: Family, pipe: DiffusionPipeline, spec: TrainSpec, digest: str, device: torch.device
    ) -> None:
        self.family, self.pipe, self.spec, self.digest, self.device = family, pipe, spec, digest, device
        folder = Path(spec.cache_dir) if spec.cache_dir else None
        self.latents: LatentCache | None = None
        self.prompts = PromptCache(
            lambda prompts: dict(family.condition(pipe, prompts)), folder and folder / "prompts", digest
        )

    @property
    def side(self) -> int:
        """Side in pixels where no picture says so."""
        return self.spec.resolution or self.family.native_side(self.pipe)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of latents where no picture says so."""
        return self.family.latent_shape(self.pipe, self.side, self.side)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Embeddings on the device, each prompt encoded once."""
        return {key: value.to(self.device) for key, value in self.prompts(prompts).items()}

    @cached_property
    def null(self) -> Condition:
        """The unconditional embeddings on the device, one row."""
        return {key: value.to(self.device) for key, value in self.family.unconditional(self.pipe).items()}

    def save(self) -> None:
        """Write what the caches hold and have not written."""
        for cache in (self.prompts, self.latents):
            if cache is not None:
                cache.save()

    def batches(self, source: Source, start: int, rank: int, world: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step from `start` on, without end."""
        spec = self.spec
        size, parts = spec.train_batch_size, spec.gradient_accumulation_steps
        whole = size * parts * world
        # sample j of a global batch goes to one micro-batch of one process; which one changes nothing
        places = [list(range((rank * parts + part) * size, (rank * parts + part + 1) * size)) for part in range(parts)]
        if spec.cache_latents and "images" in source.provides:
            source = FixedCrops(source=source)  # else a latent would depend on where its picture came first
            folder = Path(spec.cache_dir) / "latents" if spec.cache_dir else None
            self.latents = LatentCache(folder, f"{self.digest}/{source.digest()}")
        stream = Stream(source, whole, spec.seed)
        read = loader(stream, start, places, spec.dataloader_num_workers, spec.seed)
        step = start
        while True:
            yield [self._batch(next(read), [step * whole + j for j in place]) for place in places]
            step += 1

    def _batch(self, samples: list[Sample], index: Sequence[int]) -> Batch:
        cond = self.condition([sample.prompt for sample in samples])
        first = samples[0]
        latents = None
        if first.latents is not None:
            latents = torch.stack([s.latents for s in samples if s.latents is not None]).float()
        elif first.pixels is not None:
            latents = self._encode(samples)
        shape = self.shape if latents is None else tuple(latents.shape[1:])
        noise = None if first.noise is None else torch.stack([s.noise for s in samples if s.noise is not None])
        prompts = tuple(sample.prompt for sample in samples)
        state = None
        if first.state is not None:
            shape = tuple(first.state.x_t.shape)
            parts = zip(*(sample.state for sample in samples if sample.state is not None), strict=True)
            state = GuidedState(*(torch.stack(part).to(self.device) for part in parts))
        return Batch(tuple(index), cond, shape, _to(latents, self.device), _to(noise, self.device), prompts, state)

    def _encode(self, samples: list[Sample]) -> Tensor:
        pixels = torch.stack([s.pixels for s in samples if s.pixels is not None])
        if self.latents is None:
            return self.family.encode(self.pipe, pixels.to(self.device))
        place = {sample.item: n for n, sample in enumerate(samples)}

        def encode(items: list[int]) -> Tensor:
            return self.family.encode(self.pipe, pixels[[place[item] for item in items]].to(self.device)).cpu()

        return self.latents([sample.item for sample in samples], encode)


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
