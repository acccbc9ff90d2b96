"""The seeds of every random draw: functions of a run's seed and a sample's place, never of a global generator."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of sample i: a function of (seed, i) alone, so that it need not be stored."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * 1_000_003 + i))


def sample_rng(seed: int, position: int) -> random.Random:
    """The draws of one sample: a function of the seed and of `step * global_batch + j` alone."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{position}".encode()).digest(), "big"))
