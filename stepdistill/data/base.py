"""Base class of data sources: samples by index, so that a run can start at any of them."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple, TypeVar

from annotated_types import Ge, Le
from torch import Tensor

from stepdistill.core.errors import DataError
from stepdistill.core.random import sample_rng

Item = TypeVar("Item")


class BadSample(DataError):
    """One item that cannot be used, such as an image that does not decode. Built from its name and the
    reason.

    A run puts the next good item of the same bucket in its place; any other `DataError` stops the run.
    """

    def __str__(self) -> str:
        return ": ".join(str(part) for part in self.args)


class GuidedState(NamedTuple):
    """States of guided trajectories, and the guided teacher's output there.

    Args:
        x_t: (..., C, h, w), the network's input.
        t: (...), in the scheduler's time.
        guidance_scale: (...), w.
        output: (..., C, h, w), `uncond + w (cond - uncond)` of the network's outputs.
    """

    x_t: Tensor
    t: Tensor
    guidance_scale: Tensor
    output: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample of a batch.

    Args:
        prompt: the caption; empty where it was dropped.
        pixels: (3, H, W) float32 in [-1, 1]; (3, F, H, W) of a clip.
        latents: (C, h, w), already in the network's scale; (C, F', h, w) of a clip.
        noise: (C, h, w), what the teacher made the latents or the trajectory from.
        state: of a guided trajectory.
        tokens: (n,), of an autoregressive teacher.
        item: index of the item that was read; it differs from the requested one if that was unusable.
    """

    prompt: str
    pixels: Tensor | None = None
    latents: Tensor | None = None
    noise: Tensor | None = None
    state: GuidedState | None = None
    tokens: Tensor | None = None
    item: int = -1


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A data source: samples by index. Nothing is read before the first use of `len`, `buckets` or `sample`.

    Args:
        proportion_empty_prompts: share of samples, in [0, 1], whose caption is dropped.
    """

    provides: ClassVar[frozenset[str]]
    proportion_empty_prompts: Annotated[float, Ge(0), Le(1)] = 0.0

    @abstractmethod
    def __len__(self) -> int:
        """Number of items, at least 1.

        Raises:
            DataError: nothing is there, or it has the wrong shape (columns, captions, files).
        """

    @abstractmethod
    def captions(self, i: int) -> Sequence[str]:
        """Every caption of item i, at least one; a sample takes one of them at random."""

    @abstractmethod
    def sample(self, i: int, rng: random.Random) -> Sample:
        """Item i; `rng` decides on caption, crop and flip only.

        Raises:
            BadSample: this item cannot be used, others may.
        """

    @abstractmethod
    def name(self, i: int) -> str:
        """What to call item i in a message: its file, its line."""

    @abstractmethod
    def stamp(self, i: int) -> str:
        """Text that changes with item i's content: its caption, or its file's name, size and date."""

    def buckets(self) -> Sequence[int]:
        """For each item the id of its (H, W) bucket. A batch is of one bucket."""
        return bytes(len(self))  # a sequence of zeros, one byte each

    def left_out(self) -> dict[str, str]:
        """Why each file that lies there is no part of the samples, by its name."""
        return {}

    def size(self, i: int) -> tuple[int, int] | None:
        """(H, W) of item i's image as stored, in pixels; None for a source without images."""
        return None

    def length(self, i: int) -> tuple[int, float] | None:
        """Number of frames of item i as stored, and frames a second, 0 where it has no times; None if it is no clip."""
        return None

    def prompt(self, i: int, rng: random.Random) -> str:
        """Item i's caption: one of several, or empty. Always two draws, so that no option moves another's."""
        choice, dropped = rng.random(), rng.random()
        captions = self.captions(i)
        return "" if dropped < self.proportion_empty_prompts else captions[int(choice * len(captions))]

    def digest(self) -> str:
        """Hex digest of the settings and of every item's stamp: the data's part of a cache key."""
        content = hashlib.sha256(repr(self).encode())
        for i in range(len(self)):
            content.update(f"\0{self.stamp(i)}".encode())
        return content.hexdigest()


def only(batch: list[Item]) -> Item:
    """The item of a batch of one, for a loader that reads item by item."""
    return batch[0]


def inside(source: Source) -> Iterator[Source]:
    """The source, and those that it is wrapped around."""
    yield source
    for part in vars(source).values():
        if isinstance(part, Source):
            yield from inside(part)


@dataclass(frozen=True, kw_only=True)
class Wrapper(Source):
    """A source that wraps another one and changes or selects its items.

    Args:
        source: the wrapped source; the shares of empty prompts of both apply.
    """

    source: Source

    @property
    def provides(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the other source does."""
        return self.source.provides

    def inner(self, i: int) -> int:
        """The other source's item that item i is made from."""
        return i

    def __len__(self) -> int:
        return len(self.source)

    def left_out(self) -> dict[str, str]:
        return self.source.left_out()

    def captions(self, i: int) -> Sequence[str]:
        return self.source.captions(self.inner(i))

    def prompt(self, i: int, rng: random.Random) -> str:
        """The other source's prompt by its own draws, dropped by one more at the share of this one."""
        prompt = self.source.prompt(self.inner(i), rng)
        return "" if rng.random() < self.proportion_empty_prompts else prompt

    def name(self, i: int) -> str:
        return self.source.name(self.inner(i))

    def stamp(self, i: int) -> str:
        return self.source.stamp(self.inner(i))


@dataclass(frozen=True, kw_only=True)
class PromptsOf(Wrapper):
    """Only the captions of another source, for a method that needs no images: none is read or decoded."""

    provides: ClassVar[frozenset[str]] = frozenset({"prompts"})  # pyright: ignore[reportIncompatibleVariableOverride]

    def sample(self, i: int, rng: random.Random) -> Sample:
        return Sample(prompt=self.prompt(i, rng), item=i)


@dataclass(frozen=True, kw_only=True)
class FixedCrops(Wrapper):
    """A source of images or clips whose crop, flip and first frame belong to the item, not to the position in the run.

    Only then can an item's latents be cached: else what the cache holds would depend on where the item came
    first, and would change with a resume or with the number of processes. Captions are drawn as before.
    """

    def sample(self, i: int, rng: random.Random) -> Sample:
        return replace(self.source.sample(i, sample_rng(0, i)), prompt=self.prompt(i, rng))

    def buckets(self) -> Sequence[int]:
        return self.source.buckets()

    def size(self, i: int) -> tuple[int, int] | None:
        return self.source.size(i)

    def length(self, i: int) -> tuple[int, float] | None:
        return self.source.length(i)
