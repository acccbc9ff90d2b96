"""The sizes of images that a run trains at, and which of them a step has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from stepdistill.core.random import step_generator
from stepdistill.data import Source, Stream

Size: TypeAlias = tuple[int, int]  # height and width in pixels


def listed_sizes(resolution: int | Size | tuple[Size, ...]) -> tuple[Size, ...]:
    """The sizes that `train.resolution` names: a square's side, height and width, or a list of such pairs."""
    if isinstance(resolution, int):
        return ((resolution, resolution),)
    pairs: Any = resolution if isinstance(resolution[0], tuple) else (resolution,)
    return pairs


def check_sizes(resolution: int | Size | tuple[Size, ...] | None, weights: Sequence[float] | None) -> None:
    """Raise ValueError for a list of sizes that is empty or names one twice, and for weights that do not fit it."""
    if resolution == ():
        raise ValueError("resolution is []: expected at least one size, such as [[1024, 1024], [832, 1216]]")
    sizes = () if resolution is None else listed_sizes(resolution)
    twice = next((size for size in sizes if sizes.count(size) > 1), None)
    if twice:
        raise ValueError(f"resolution names {list(twice)} twice: expected each size once; set resolution_weights")
    if weights is not None and (len(sizes) < 2 or len(weights) != len(sizes)):
        count = "one size" if len(sizes) < 2 else f"{len(sizes)} sizes"
        raise ValueError(f"resolution_weights has {len(weights)} numbers for {count}: expected one for each of several")


@dataclass(frozen=True)
class StepSizes(ABC):
    """The size of each step's images, the same in all its micro-batches and processes.

    Args:
        sizes: all of them, height and width in pixels.
    """

    sizes: tuple[Size, ...]

    @abstractmethod
    def at(self, step: int) -> Size:
        """Height and width in pixels of a step's images: a function of (seed, step)."""


@dataclass(frozen=True)
class DrawnSizes(StepSizes):
    """Sizes that are drawn at random, for data without images.

    Args:
        weights: how often each is drawn, relative to the others.
        seed: of the run.
    """

    weights: tuple[float, ...]
    seed: int

    def at(self, step: int) -> Size:
        if len(self.sizes) == 1:
            return self.sizes[0]
        drawn = torch.rand((), generator=step_generator(self.seed, step, "shared", "size")).item()
        ends = list(accumulate(self.weights))
        return next(size for size, end in zip(self.sizes, ends, strict=True) if drawn * ends[-1] < end)


@dataclass(frozen=True)
class BucketSizes(StepSizes):
    """The sizes of the images of a source, whose batches are of one bucket each.

    Args:
        shapes: the size of each bucket.
        buckets: the bucket of each item.
        stream: the order in which the run reads the items.
    """

    shapes: tuple[Size, ...]
    buckets: Sequence[int]
    stream: Stream

    def at(self, step: int) -> Size:
        return self.shapes[self.buckets[self.stream.items(step)[0]]]


def bucket_sizes(data: Source, shapes: Sequence[Size], global_batch: int, seed: int) -> BucketSizes:
    """The sizes of a source of images.

    Args:
        shapes: the size of each bucket, of which some may have no image.
        global_batch: samples of a step, over all processes.
    """
    buckets = data.buckets()
    sizes = tuple(shapes[bucket] for bucket in sorted(set(buckets)))
    return BucketSizes(sizes, tuple(shapes), buckets, Stream(data, global_batch, seed))
