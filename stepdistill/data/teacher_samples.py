"""Pairs of noise and the teacher's samples, for training from prompts alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Seed
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of, sample_rng
from stepdistill.data.base import Sample
from stepdistill.data.made import SampleCount, TeacherCalls, TeacherMade, prompts_hash


@dataclass(frozen=True, kw_only=True)
class TeacherSamples(TeacherMade):
    """Latents that the teacher generates from a source's prompts, once, before training.

    Stored samples are reused with the same teacher, prompts and settings, and refused otherwise. An interrupted run
    resumes.

    Args:
        source: the prompts.
        folder: folder in which the samples are stored; `tiny-sd-samples` is bundled.
        count: number of samples; it may be raised later.
        num_inference_steps: deterministic solver steps of the teacher (DDIM; Euler for a flow).
        guidance_scale: guidance scale of the teacher.
        seed: seed of the initial noise.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "latents", "noise"})
    chunk: ClassVar[int] = 64
    title: ClassVar[str] = "Teacher samples"
    stored: ClassVar[str] = "samples.json"
    count: SampleCount = 2048
    num_inference_steps: Count = 25
    guidance_scale: Amount = 7.5
    seed: Seed = 0

    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        """What every sample depends on; not their number, which may grow and shrink."""
        return {
            "teacher": teacher,
            "shape": list(shape),
            "prompts": prompts_hash(self.source),
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }

    def make(self, teacher: TeacherCalls, ids: Sequence[int]) -> dict[str, Tensor]:
        noise = torch.stack([noise_of(self.seed, i, teacher.shape) for i in ids])
        prompts = [self.prompt_of(i) for i in ids]
        images = torch.stack([self.image_of(i) for i in ids]) if teacher.takes_images else None
        made = teacher.sample(prompts, noise, self.num_inference_steps, self.guidance_scale, images)
        return {"latents": made.half(), **({} if images is None else {"images": to_uint8(images / 2 + 0.5)})}

    def image_of(self, i: int) -> Tensor:
        """The image (3, H, W) that sample i begins with, in [-1, 1]: that of its source, or a clip's first frame."""
        pixels = self.source.sample(i % len(self.source), sample_rng(self.seed, i)).pixels
        assert pixels is not None, "training.checks.check_first_frames"
        return pixels if pixels.ndim == 3 else pixels[:, 0]

    def prompt_of(self, i: int) -> str:
        """The prompt of sample i: the source's items in turn."""
        return self.source.prompt(i % len(self.source), sample_rng(self.seed, i))

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """All samples: `latents`, and `images` where videos begin with them."""
        parts = []
        for k in range(len(self.units)):
            with safe_open(self._chunk(k), "pt") as file:
                rows = len(self.units.rows(k))
                parts.append({key: file.get_tensor(key)[:rows] for key in file.keys()})  # noqa: SIM118 - it is no dict
        return {key: torch.cat([part[key] for part in parts]) for key in set[str].intersection(*map(set, parts))}

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> Sequence[str]:
        return [self.prompt_of(i)]

    def sample(self, i: int, rng: random.Random) -> Sample:
        stored = self._tensors
        latents, image = stored["latents"][i].float(), stored["images"][i] if "images" in stored else None
        noise = noise_of(self.seed, i, latents.shape)
        pixels = None if image is None else image.float() / 127.5 - 1
        return Sample(prompt=self.prompt(i, rng), pixels=pixels, latents=latents, noise=noise, item=i)

    def name(self, i: int) -> str:
        return f"sample {i} of {self.path}"

    def stamp(self, i: int) -> str:
        return self.prompt_of(i)
