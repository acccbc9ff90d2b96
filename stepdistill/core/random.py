"""Random generators, derived from the run's seed and a sample's index. No global generator is used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of sample i: a function of (seed, i) alone, so that it need not be stored."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 1_000_003 + i))


def fresh_noise(seed: int, i: int) -> torch.Generator:
    """The generator of the noise that a stochastic sampler adds to sample i; see `noise_of`."""
    return torch.Generator().manual_seed(7_919 * seed + i)


def step_generator(seed: int, step: int, index: int | str, purpose: str) -> torch.Generator:
    """The generator of one draw in training, for a sample's position in the data (or a word) and a purpose."""
    key = hashlib.blake2b(f"{seed}/{step}/{index}/{purpose}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))


def sample_rng(seed: int, position: int) -> random.Random:
    """The generator of a sample's draws in a data source, at position `step * global_batch + j` of the data."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{position}".encode()).digest(), "big"))
