"""Micro-batches from samples: prompts are encoded to embeddings, and images to latents."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.denoise import CONTROL, Condition
from stepdistill.data import (
    FixedCrops,
    GuidedState,
    ImageSource,
    Latents,
    Sample,
    Source,
    Stream,
    inside,
    loader,
)
from stepdistill.families.base import Family
from stepdistill.families.controlled import Controlled
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.lazy_pipeline import LazyPipeline
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.methods.base import Batch
from stepdistill.training.cache.keys import Keys
from stepdistill.training.cache.rows import LatentCache, PromptCache, Row
from stepdistill.training.recipe import TrainSpec
from stepdistill.training.sizes import DrawnSizes, Size, StepSizes, bucket_sizes, listed_sizes

logger = logging.getLogger(__name__)
NULL = "\0"  # the id of the unconditional row, which no prompt has
BLOCK = 4  # prompts encoded at once


def first_size(spec: TrainSpec, family: Family, pipe: DiffusionPipeline) -> Size:
    """Height and width in pixels of validation images: the first of the run's sizes."""
    return listed_sizes(spec.resolution or family.native_size(pipe))[0]


class Batches:
    """Micro-batches for one process, and the embeddings and latents that they are made of.

    Args:
        parts: the pipeline; its text encoders and autoencoder are loaded only if a cache lacks a row.
        keys: keys of the caches.
        device: device of the batches.
    """

    def __init__(self, parts: LazyPipeline, spec: TrainSpec, keys: Keys, device: torch.device) -> None:
        self.family, self.parts, self.spec, self.keys, self.device = parts.family, parts, spec, keys, device
        self.pipe = parts.pipe
        self.folder = Path(spec.cache_dir) if spec.cache_dir else None
        self.latents: LatentCache | None = None
        self.warned = False  # of prompts that are cut; once is enough
        self.encoded = 0  # rows of prompts that were in no cache
        key = f"{keys.text}/{self.family.scale_factor(self.pipe)}"  # SDXL's conditions hold it
        folder = self.folder and self.folder / "prompts"
        self.prompts = PromptCache(self._embed, folder, key, BLOCK, self.family.ragged)

    @property
    def drawn(self) -> DrawnSizes:
        """The sizes of images where no image says so."""
        sizes = listed_sizes(self.spec.resolution or self.family.native_size(self.pipe))
        return DrawnSizes(sizes, self.spec.resolution_weights or (1.0,) * len(sizes), self.spec.seed)

    @property
    def size(self) -> Size:
        """See `first_size`."""
        return first_size(self.spec, self.family, self.pipe)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), or (C, F, H, W) of videos, of latents of that size."""
        return self.shape_at(self.size)

    def shape_at(self, size: Size | None) -> tuple[int, ...]:
        """The same of a height and width in pixels; None is the first size."""
        return self.family.latent_shape(self.pipe, *(size or self.size))

    def sizes_of(self, source: Source, global_batch: int) -> StepSizes:
        """The size of each step's images.

        Args:
            global_batch: samples of a step, over all processes.
        """
        if "images" in source.provides:
            for images in inside(source):
                if isinstance(images, ImageSource):
                    return bucket_sizes(source, images.shapes, global_batch, self.spec.seed)
        if isinstance(source, Latents):
            height, width = (side * self.family.scale_factor(self.pipe) for side in source.shape[-2:])
            return DrawnSizes(((height, width),), (1.0,), self.spec.seed)
        return self.drawn

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Embeddings on the device, each prompt encoded once."""
        lacking = self.prompts.store.missing(prompts)
        if lacking:
            self.parts.text(f"{len(lacking)} prompts, such as {lacking[0][:40]!r}, are not in {self.folder}")
        return {key: value.to(self.device) for key, value in self.prompts(prompts).items()}

    def with_images(self, prompts: Sequence[str], images: Tensor | None) -> Condition:
        """Embeddings of prompts, with what the network sees of the images (B, 3, H, W) that a family continues."""
        cond = self.condition(prompts)
        if not isinstance(self.family, ImageToVideo):
            return cond
        assert images is not None, "check_first_frames"
        pipe = self.parts.vae("the images that videos begin with are encoded")
        return {**cond, **self.family.first_frame(pipe, images.to(self.device))}

    def _embed(self, prompts: list[str]) -> dict[str, Tensor]:
        # kernels round by the number of rows (the pooled row of 3 prompts is another than that of 4), and a row must
        # not depend on which run or process made it
        self.encoded += len(prompts)
        self.warned = self.warned or warn_of_cut(self.family, self.pipe, prompts)
        cond = self.family.condition(self.pipe, prompts + [""] * (BLOCK - len(prompts)))
        return {key: value[: len(prompts)] for key, value in cond.items()}

    @cached_property
    def null(self) -> Condition:
        """The unconditional embeddings on the device, one row."""
        store = self.prompts.store
        if store.missing([NULL]):
            pipe = self.parts.text(f"the unconditional embedding is not in {self.folder}")
            self.prompts.add([NULL], dict(self.family.unconditional(pipe)))
        return {key: value.to(self.device) for key, value in store.rows([NULL]).items()}

    def save(self) -> None:
        """Write what the caches hold and have not written."""
        for cache in (self.prompts, self.latents):
            if cache is not None:
                cache.save()
        if self.folder and self.encoded:
            logger.warning("%d prompts were not in %s and had to be encoded", self.encoded, self.folder)

    def fixed(self, source: Source) -> Source:
        """The source as it is read. Where latents are cached, each image has one crop, and the cache is opened."""
        if not self.spec.cache_latents or "images" not in source.provides:
            return source
        source = FixedCrops(source=source)  # else a latent would depend on where its image came first
        key = f"{self.keys.vae}/{source.digest()}"
        if isinstance(self.family, ImageToVideo):  # what the network sees of an image may depend on the video's length
            key += f"/{self.shape[1]} latent frames"
        self.latents = LatentCache(self.folder and self.folder / "latents", key)
        return source

    def steps(self, source: Source, start: int, rank: int, world: int) -> Generator[list[Batch]]:
        """The micro-batches of each step from `start` on, without end."""
        read = samples_by_step(self.fixed(source), self.spec, start, rank, world)
        for step, micro_batches in enumerate(read, start):
            size = self.drawn.at(step)
            yield [self.batch_of(samples, index, size) for samples, index in micro_batches]

    def batch_of(self, samples: Sequence[Sample], index: Sequence[int], size: Size | None = None) -> Batch:
        """The micro-batch of samples, whose draws are those of `index`.

        Args:
            size: height and width in pixels where the samples have neither images nor latents; None is the first size.
        """
        cond = self.condition([sample.prompt for sample in samples])
        first = samples[0]
        encoded: Row = {}
        if first.latents is not None:
            encoded = self._from_latents(samples)
        elif first.pixels is not None:
            encoded = self.encode(samples)
        latents = encoded.pop("latents", None)
        cond = {**cond, **{key: value.to(self.device) for key, value in encoded.items()}}
        if isinstance(self.family, Controlled) and self.family.controlnet and latents is not None:
            cond = {**cond, CONTROL: self._control(self.family, samples, latents.to(self.device))}
        shape = self.shape_at(size) if latents is None else tuple(latents.shape[1:])
        noise = None if first.noise is None else torch.stack([s.noise for s in samples if s.noise is not None])
        prompts = tuple(sample.prompt for sample in samples)
        state = None
        if first.state is not None:
            shape = tuple(first.state.x_t.shape)
            parts = zip(*(sample.state for sample in samples if sample.state is not None), strict=True)
            state = GuidedState(*(torch.stack(part).to(self.device) for part in parts))
        return Batch(tuple(index), cond, shape, _to(latents, self.device), _to(noise, self.device), prompts, state)

    def _from_latents(self, samples: Sequence[Sample]) -> Row:
        """The samples' own latents; where videos begin with images, what the network sees of these, too."""
        latents = torch.stack([s.latents for s in samples if s.latents is not None]).float()
        if not isinstance(self.family, ImageToVideo):
            return {"latents": latents}
        found = [s.pixels for s in samples if s.pixels is not None]
        images = torch.stack(found).to(self.device) if found else None
        first = dict(self.family.first_frame_of(self.parts, latents.to(self.device), images))
        return {**first, "latents": latents} if latents.shape[2] == self.shape[1] else first

    def _control(self, family: Controlled, samples: Sequence[Sample], latents: Tensor) -> Tensor:
        """What the ControlNet sees of the samples' images, or of their latents where they have none."""
        pipe = self.parts.vae("the control images are computed from pixels")
        found = [s.pixels for s in samples if s.pixels is not None]
        with torch.no_grad():
            pixels = torch.stack(found).to(self.device) if found else family.decode(pipe, latents)
        return family.control_rows(pipe, pixels)

    def encode(self, samples: Sequence[Sample]) -> Row:
        """Latents (B, C, h, w) of samples with images, by that name; see `_encoded`."""
        pixels = torch.stack([s.pixels for s in samples if s.pixels is not None])
        if self.latents is None:
            pipe = self.parts.vae("without train.cache_latents images are encoded at every step")
            return self._encoded(pipe, pixels.to(self.device))
        place = {sample.item: n for n, sample in enumerate(samples)}

        def encode(items: list[int]) -> Row:
            pipe = self.parts.vae(f"latents of {len(items)} images are not in {self.folder}")
            rows = pixels[[place[item] for item in items]].to(self.device)
            # one by one, for the reason in `_embed`
            parts = [self._encoded(pipe, row) for row in rows.split(1)]
            return {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}

        return self.latents([sample.item for sample in samples], encode)

    def _encoded(self, pipe: DiffusionPipeline, pixels: Tensor) -> Row:
        """Latents of images or videos. Where videos begin with images, what the network sees of the first frame, and
        latents of whole videos alone."""
        if not isinstance(self.family, ImageToVideo):
            return {"latents": self.family.encode(pipe, pixels)}
        first = dict(self.family.first_frame(pipe, pixels if pixels.ndim == 4 else pixels[:, :, 0]))
        whole = pixels.ndim == 5 or self.shape[1] == 1
        return {**first, "latents": self.family.encode(pipe, pixels)} if whole else first


def samples_by_step(
    source: Source, spec: TrainSpec, start: int, rank: int, world: int
) -> Generator[list[tuple[list[Sample], list[int]]]]:
    """For each step from `start` on, without end: the samples of each micro-batch of a process, and their positions."""
    size, parts, whole = spec.train_batch_size, spec.gradient_accumulation_steps, spec.global_batch(world)
    # sample j of a global batch goes to one micro-batch of one process; which one changes nothing
    places = [list(range((rank * parts + part) * size, (rank * parts + part + 1) * size)) for part in range(parts)]
    read = loader(Stream(source, whole, spec.seed), start, places, spec.dataloader_num_workers, spec.seed)
    for step in count(start):
        yield [(next(read), [step * whole + j for j in place]) for place in places]


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
