"""Training from prompts alone: the teacher's own samples, kept as pairs of noise and latents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.data.base import Sample, Source, sample_rng
from stepdistill.data.chunks import save_chunk, unmade
from stepdistill.tiny import bundled

CHUNK = 64


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of sample i: a function of (seed, i) alone, so that it need not be stored."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 1_000_003 + i))


@dataclass(frozen=True, kw_only=True)
class TeacherSamples(Source):
    """Latents that the teacher makes from a source's prompts, before training starts and once only.

    Args:
        source: the prompts.
        folder: where the samples are kept. What lies there is used where teacher, prompts and settings are the
            same, and refused where they are not. A run that was cut goes on where it was.
        count: number of samples; more may be added later.
        num_inference_steps: deterministic solver steps of the teacher (DDIM; Euler for a flow).
        guidance_scale: of the teacher.
        seed: of the noises.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "latents", "noise"})
    source: Source
    folder: str
    count: int = 2048
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0

    @property
    def path(self) -> Path:
        """The folder; `tiny-sd-samples` is bundled."""
        return bundled(self.folder)

    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        """What every sample depends on; not their number, which may grow and shrink."""
        prompts = sha256(repr(self.source.proportion_empty_prompts).encode())
        for i in range(len(self.source)):
            prompts.update("\n".join(self.source.captions(i)).encode() + b"\0")
        return {
            "teacher": teacher,
            "shape": list(shape),
            "prompts": prompts.hexdigest()[:16],
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }

    def fill(
        self,
        generate: Callable[[list[str], Tensor], Tensor],
        shape: Sequence[int],
        teacher: str,
        rank: int,
        world: int,
    ) -> None:
        """Make what is missing: chunk files of 64 samples, shared out among the processes.

        Args:
            generate: prompts and noise (B, C, h, w) to latents.
            shape: (C, h, w).
            teacher: digest of the teacher's weights.

        Raises:
            DataError: what lies there is of another teacher, prompts or settings, or the disk refuses.
        """
        facts, stored = self.facts(teacher, shape), self.path / "samples.json"
        mine = unmade(stored, facts, -(-self.count // CHUNK), self._whole, rank, world)
        for k in tqdm(mine, desc="Teacher samples", unit="batch", disable=rank > 0):
            ids = self._ids(k)
            noise = torch.stack([noise_of(self.seed, i, shape) for i in ids])
            latents = generate([self.prompt_of(i) for i in ids], noise)
            done = next(j for j in range(k + 1) if not self._chunk(j).exists() or j == k)
            save_chunk(self._chunk(k), {"latents": latents.half()}, {}, done * CHUNK)

    def _ids(self, k: int) -> range:
        """The samples of a chunk."""
        return range(k * CHUNK, min((k + 1) * CHUNK, self.count))

    def _chunk(self, k: int) -> Path:
        return self.path / f"chunk-{k:05d}.safetensors"

    def _whole(self, k: int) -> bool:
        """Whether a chunk has all its samples; a last one, cut short at an earlier `count`, may not."""
        if not self._chunk(k).exists():
            return False
        with safe_open(self._chunk(k), "pt") as file:
            return file.get_slice("latents").get_shape()[0] >= len(self._ids(k))

    @cached_property
    def _latents(self) -> Tensor:
        parts = []
        for k in range(-(-self.count // CHUNK)):
            with safe_open(self._chunk(k), "pt") as file:
                parts.append(file.get_tensor("latents")[: len(self._ids(k))])
        return torch.cat(parts)

    def prompt_of(self, i: int) -> str:
        """The prompt of sample i: the source's items in turn."""
        return self.source.prompt(i % len(self.source), sample_rng(self.seed, i))

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> Sequence[str]:
        return [self.prompt_of(i)]

    def sample(self, i: int, rng: random.Random) -> Sample:
        latents = self._latents[i].float()
        return Sample(prompt=self.prompt(i, rng), latents=latents, noise=noise_of(self.seed, i, latents.shape), item=i)

    def name(self, i: int) -> str:
        return f"sample {i} of {self.path}"

    def stamp(self, i: int) -> str:
        return self.prompt_of(i)
