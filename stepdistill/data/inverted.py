"""Pairs of real images and the noise that the teacher's inverted ODE gives for them."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.config.kinds import Count, Seed
from stepdistill.core.errors import ConfigError, DataError, problem
from stepdistill.core.random import noise_of, sample_rng
from stepdistill.data.base import BadSample, Sample
from stepdistill.data.images import ImageSource
from stepdistill.data.made import SampleCount, TeacherCalls, TeacherMade

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InvertedImages(TeacherMade):
    """Pairs of noise and a real image. The teacher's ODE is inverted from the image to noise once, before training.

    An image's latents begin at the schedule's lowest time, with the little noise that belongs there. Lee et al. 2024
    (rf++, https://arxiv.org/abs/2405.20320, section 4.3) train a reflow student on such pairs at the end. A guided ODE
    is hard to invert accurately, so the student should be trained without guidance.

    Args:
        source: images with captions. Each image gets one random crop and flip.
        folder: folder in which the pairs are stored.
        count: number of pairs; it may be raised later.
        num_inference_steps: deterministic solver steps of the inversion (DDIM; Euler for a flow).
        seed: seed of the crops and of the noise at the lowest timestep.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "latents", "noise"})
    chunk: ClassVar[int] = 64
    title: ClassVar[str] = "Inverted images"
    stored: ClassVar[str] = "inverted.json"
    source: ImageSource
    count: SampleCount = 2048
    num_inference_steps: Count = 125
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.source.aspect_buckets or len(self.source.shapes) > 1:
            got, why = "several sizes in data.source", "all images are inverted and stored at one size"
            todo = "set one data.source.resolution, and data.source.aspect_buckets to false"
            raise ConfigError(problem(got, "images of one size", why, todo))

    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        """What every pair depends on."""
        return {
            "teacher": teacher,
            "shape": list(shape),
            "images": self.source.digest()[:16],
            "num_inference_steps": self.num_inference_steps,
            "seed": self.seed,
        }

    def make(self, teacher: TeacherCalls, ids: Sequence[int]) -> dict[str, Tensor]:
        samples = [self._read(i) for i in ids]
        items = [sample.item for sample in samples]
        pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
        noise = torch.stack([noise_of(self.seed, i, teacher.shape) for i in ids])
        prompts = [self._prompt(i, item) for i, item in zip(ids, items, strict=True)]
        top, bottom = teacher.invert(prompts, pixels, noise, self.num_inference_steps)
        return {"noise": top.half(), "latents": bottom.half(), "item": torch.tensor(items)}

    def _read(self, i: int) -> Sample:
        """The image of pair i; where one does not read, the next that does."""
        for k in range(len(self.source)):
            item = (i + k) % len(self.source)
            try:
                return replace(self.source.sample(item, sample_rng(self.seed, i)), item=item)
            except BadSample as bad:
                logger.warning("%s: the next usable image takes its place", bad)
        got, why = f"no readable image in {type(self.source).__name__}", "the pairs are made from images"
        raise DataError(problem(got, "at least one", why, "see `stepdistill data check`"))

    def _prompt(self, i: int, item: int) -> str:
        return self.source.prompt(item, sample_rng(self.seed, i))

    @cached_property
    def _pairs(self) -> dict[str, Tensor]:
        files = [load_file(self._chunk(k)) for k in range(len(self.units))]
        return {key: torch.cat([file[key] for file in files]) for key in files[0]}

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> Sequence[str]:
        return [self._prompt(i, int(self._pairs["item"][i]))]

    def sample(self, i: int, rng: random.Random) -> Sample:
        noise, latents = (self._pairs[key][i].float() for key in ("noise", "latents"))
        return Sample(prompt=self.prompt(i, rng), latents=latents, noise=noise, item=i)

    def name(self, i: int) -> str:
        return f"pair {i} of {self.path}"

    def stamp(self, i: int) -> str:
        return self.source.stamp(int(self._pairs["item"][i]))
