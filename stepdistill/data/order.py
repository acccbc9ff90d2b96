"""The order of items in batches, and the worker processes that read them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stepdistill.core.errors import DataError, problem
from stepdistill.core.random import sample_rng
from stepdistill.data.base import BadSample, GuidedState, Sample, Source

logger = logging.getLogger(__name__)
PATIENCE = 100  # bad items in a row after which the disk or the format is at fault, not an image


class Stream:
    """The items of global batch number k, for any k at once.

    Each epoch permutes the items of every bucket, cuts them into global batches of one bucket (the last one
    of a bucket is filled up from its front) and shuffles the batches. So an item comes once an epoch, and
    once more at most where its bucket does not divide; a bucket smaller than a batch repeats within it.

    Building one reads the source's index, and so raises its DataError before anything else is loaded.
    """

    def __init__(self, source: Source, global_batch: int, seed: int) -> None:
        if global_batch < 1:
            raise DataError(
                problem(f"a global batch of {global_batch}", "at least 1", "a step needs samples", "raise it")
            )
        self.source = source
        self.global_batch = global_batch
        self.seed = seed
        ids = np.fromiter(source.buckets(), dtype=np.int64)
        self._buckets = [np.flatnonzero(ids == bucket) for bucket in np.unique(ids)]
        self.steps_per_epoch = sum(-(-len(items) // global_batch) for items in self._buckets)
        self._epoch = -1, np.empty((0, global_batch), dtype=np.int64)

    def items(self, step: int) -> list[int]:
        """The `global_batch` items of global batch `step`, all of one bucket: a function of (seed, step)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return self._epoch[1][number].tolist()

    def _batches(self, epoch: int) -> np.ndarray:
        # RandomState, not Generator: its streams are frozen across numpy versions
        words = hashlib.sha256(f"epoch {self.seed}:{epoch}".encode()).digest()
        rng = np.random.RandomState(np.frombuffer(words, dtype=np.uint32))
        batches = []
        for items in self._buckets:
            count = -(-len(items) // self.global_batch)
            batches.append(np.resize(rng.permutation(items), (count, self.global_batch)))
        return rng.permutation(np.concatenate(batches))


class _Loaded(NamedTuple):
    result: Sample | DataError
    bad: list[BadSample]


class _Batch(NamedTuple):
    samples: list[Sample]
    errors: list[DataError]
    bad: list[BadSample]
    tensors: dict[str, Tensor]


class _Reader(Dataset[_Loaded]):
    """(item, position) to a sample; errors travel as values: a worker would wrap them in a traceback."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.buckets = source.buckets()
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> _Loaded:
        item, position = key
        bad: list[BadSample] = []
        try:
            for candidate in itertools.islice(_same_bucket(self.buckets, item), PATIENCE):
                try:
                    # a fresh rng each time: what stands in is drawn as if it had come first
                    return _Loaded(self.source.sample(candidate, sample_rng(self.seed, position)), bad)
                except BadSample as error:
                    bad.append(error)
        except DataError as error:
            return _Loaded(error, bad)
        got = f"{len(bad)} unusable samples in a row, from {bad[0]}"
        why = "no usable sample of the same shape is left, or the disk or the format is faulty"
        return _Loaded(DataError(problem(got, "usable ones", why, "run `stepdistill data check`")), bad)


def _same_bucket(buckets: Sequence[int], item: int) -> Iterator[int]:
    """`item`, then the items after it of the same bucket, around the end."""
    around = itertools.chain(range(item, len(buckets)), range(item))
    return (other for other in around if buckets[other] == buckets[item])


def _pack(loaded: list[_Loaded]) -> _Batch:
    """One tensor a kind and micro-batch: each that a worker sends costs the receiver a file descriptor."""
    samples = [result for result, _ in loaded if isinstance(result, Sample)]
    errors = [result for result, _ in loaded if isinstance(result, DataError)]
    bad = [error for _, skipped in loaded for error in skipped]
    rows = [_tensors(sample) for sample in samples]
    tensors = {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    light = [replace(sample, pixels=None, latents=None, noise=None, state=None) for sample in samples]
    return _Batch(light, errors, bad, tensors)


def _unpack(batch: _Batch) -> list[Sample]:
    columns = {name: tensor.unbind() for name, tensor in batch.tensors.items()}
    rows = [{name: column[n] for name, column in columns.items()} for n in range(len(batch.samples))]
    return [replace(sample, **_fields(row)) for sample, row in zip(batch.samples, rows, strict=True)]


def _fields(row: dict[str, Tensor]) -> dict[str, Any]:
    state = {name: row.pop(name) for name in GuidedState._fields if name in row}
    return {**row, "state": GuidedState(**state)} if state else {**row}


def _tensors(sample: Sample) -> dict[str, Tensor]:
    tensors = {"pixels": sample.pixels, "latents": sample.latents, "noise": sample.noise}
    state = {} if sample.state is None else sample.state._asdict()
    return {name: tensor for name, tensor in tensors.items() if tensor is not None} | state


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the whole process group, but a run finishes its step before it stops and needs its
    # workers for it; they leave when their parent closes them or is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(
    stream: Stream, start_step: int, positions: Sequence[Sequence[int]], workers: int, seed: int
) -> Iterator[list[Sample]]:
    """The samples of this process from global batch `start_step` on, without end, one list a micro-batch.

    A sample that cannot be used is replaced by the next good item of its bucket, named once in a warning, and
    counted.

    Args:
        stream: the order.
        start_step: number of the first global batch.
        positions: for each micro-batch of a step the places j in [0, global_batch) that it takes.
        workers: reading processes; 0 reads in this one.
        seed: of crop, flip and caption, with the global position `step * global_batch + j`.

    Raises:
        DataError: the source's own, or no usable item is left.
    """
    batches = (
        [(items[j], step * stream.global_batch + j) for j in micro_batch]
        for step in itertools.count(start_step)
        for items in [stream.items(step)]
        for micro_batch in positions
    )
    read = DataLoader(
        _Reader(stream.source, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_pack,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else the global one would be advanced
    )
    named: set[str] = set()
    batch: _Batch
    for batch in read:
        for bad in batch.bad:
            _warn(bad, named)
        if batch.errors:
            raise batch.errors[0]
        yield _unpack(batch)


def _warn(bad: BadSample, named: set[str]) -> None:
    if str(bad) not in named:
        named.add(str(bad))
        logger.warning("skipped %s; the next usable sample takes its place (%d skipped so far)", bad, len(named))
