"""Random generators, derived from the run's seed and a sample's index. No global generator is used."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

IMAGES = 1_000_003  # numbers that a seed has before the next seed's begin
VALIDATION = 900_000  # validation images have numbers from here on: what a teacher makes for training has the first


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of sample i: a function of (seed, i) alone, so that it need not be stored.

    Raises ValueError for i outside of [0, 1,000,003): it would be a noise of the next seed.
    """
    if not 0 <= i < IMAGES:
        raise ValueError(f"sample {i}: expected a number in [0, {IMAGES:,}), those of one seed; use another seed")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed * IMAGES + i))


def fresh_noise(seed: int, i: int) -> torch.Generator:
    """The generator of the noise that a stochastic sampler adds to sample i on its way; no `noise_of` draws from it."""
    return _generator("fresh noise", seed, i)


def seed_of_video(seed: int) -> int:
    """The seed of a video that begins with an image of this seed.

    Another one: with the same, both would draw the same numbers, and the video's noise would not be independent of the
    image. It is half of the 2**32 seeds away, so that no image of the next seeds has it.
    """
    return (seed + 2**31) % 2**32


def step_generator(seed: int, step: int, index: int | str, purpose: str) -> torch.Generator:
    """The generator of one draw in training, for a sample's position in the data (or a word) and a purpose."""
    return _generator(seed, step, index, purpose)


def _generator(*key: object) -> torch.Generator:
    # 56 bits: two keys have one seed about as often as two random draws of that many agree
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def sample_rng(seed: int, position: int) -> random.Random:
    """The generator of a sample's draws in a data source, at position `step * global_batch + j` of the data."""
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{position}".encode()).digest(), "big"))
