"""Pairs of noise and the tokens that the teacher draws from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.config.kinds import Count, Seed
from stepdistill.core.random import noise_of, sample_rng
from stepdistill.data.base import Sample
from stepdistill.data.made import SampleCount, TeacherMade, prompts_hash
from stepdistill.decoding.flowmap import STEPS


@dataclass(frozen=True, kw_only=True)
class TokenPairs(TeacherMade):
    """Tokens that the teacher draws for a source's prompts, once, before training, each image from a noise of its own.

    Stored pairs are reused with the same teacher, prompts and settings, and refused otherwise. An interrupted run
    resumes. Pairs, not steps, are what limits a student: it agrees with the teacher on those that it has seen.

    Args:
        source: the prompts.
        folder: folder in which the pairs are stored.
        count: number of pairs; it may be raised later.
        seed: seed of the noise.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "tokens", "noise"})
    chunk: ClassVar[int] = 64
    title: ClassVar[str] = "Teacher tokens"
    stored: ClassVar[str] = "pairs.json"
    num_inference_steps: Count = field(init=False, default=STEPS)
    count: SampleCount = 8192
    seed: Seed = 0

    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        return {"teacher": teacher, "shape": list(shape), "prompts": prompts_hash(self.source), "seed": self.seed}

    def make(self, teacher: Any, ids: Sequence[int]) -> dict[str, Tensor]:  # noqa: ANN401
        noise = torch.stack([noise_of(self.seed, i, teacher.shape) for i in ids])
        return {"tokens": teacher.draw([self.prompt_of(i) for i in ids], noise).int()}

    def prompt_of(self, i: int) -> str:
        """The prompt of pair i: the source's items in turn."""
        return self.source.prompt(i % len(self.source), sample_rng(self.seed, i))

    @cached_property
    def _tokens(self) -> Tensor:
        """All tokens (count, n)."""
        parts = [load_file(self._chunk(k))["tokens"][: len(self.units.rows(k))] for k in range(len(self.units))]
        return torch.cat(parts)

    def __len__(self) -> int:
        return self.count

    def captions(self, i: int) -> Sequence[str]:
        return [self.prompt_of(i)]

    def sample(self, i: int, rng: random.Random) -> Sample:
        return Sample(prompt=self.prompt(i, rng), tokens=self._tokens[i].long(), item=i)

    def name(self, i: int) -> str:
        return f"pair {i} of {self.path}"

    def stamp(self, i: int) -> str:
        return self.prompt_of(i)
