"""Caches that encode each prompt and image once, in memory and optionally on disk."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from stepdistill.core.denoise import filled
from stepdistill.core.errors import StepdistillError, problem
from stepdistill.core.files import written_whole

logger = logging.getLogger(__name__)
FLUSH = 256  # new rows after which a file is written
LIMIT = 4 * 2**30  # bytes of rows in memory beyond which the oldest are dropped; 100,000 prompts of T5 are 500 GB

Row = dict[str, Tensor]


class _Cut(NamedTuple):
    """A row's tensor without the zeros at its end, and its length (its first dimension) with them.

    Wan's prompts are some tokens and then zeros up to 512, in all 4 MiB each in bfloat16.
    """

    tensor: Tensor
    length: int

    def whole(self) -> Tensor:
        """The tensor as it was."""
        if not self.tensor.ndim or len(self.tensor) == self.length:
            return self.tensor
        return torch.cat([self.tensor, self.tensor.new_zeros(self.length - len(self.tensor), *self.tensor.shape[1:])])


def _cut(tensor: Tensor) -> _Cut:
    """A copy on the cpu: a slice would keep its whole batch alive."""
    # a fake one, of a prediction of memory, has no content
    used = tensor.flatten(1).any(1).nonzero() if tensor.ndim > 1 and not isinstance(tensor, FakeTensor) else None
    kept = tensor if used is None else tensor[: int(used.max()) + 1 if len(used) else 0]
    return _Cut(kept.detach().cpu().clone(), len(tensor) if tensor.ndim else 0)


class _Stored(NamedTuple):
    """Where a row lies: its file, its number there, the names of its tensors and their lengths."""

    file: safe_open
    number: int
    names: list[str]
    lengths: list[int] | None  # None in files of earlier versions, which hold whole tensors

    def row(self) -> Row:
        tensors = [self.file.get_tensor(f"{self.number}.{name}") for name in self.names]
        if self.lengths is not None:
            tensors = [_Cut(tensor, length).whole() for tensor, length in zip(tensors, self.lengths, strict=True)]
        return dict(zip(self.names, tensors, strict=True))


class RowStore:
    """Rows of named tensors by id: in memory, and in files of a folder, each written once, whole or not at
    all.

    A file carries its key; files of another key are not read, and stay. Several processes may share a folder.

    Args:
        folder: where the files go; None keeps the rows in memory only.
        key: digest of all that the rows depend on: the encoder's weights, for images the source's digest.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.folder = folder
        self.key = key
        self._rows: dict[str, dict[str, _Cut]] = {}
        self._new: list[str] = []
        self._bytes = 0
        self._stored: dict[str, _Stored] = {}
        files = sorted(folder.glob("*.safetensors")) if folder else []
        others = sum(not self._open(path) for path in files)
        if others:
            logger.warning("ignoring %d cache files in %s: they belong to another model or data set", others, folder)

    def _open(self, path: Path) -> bool:
        """Take up a file's rows; False where its key is another."""
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            logger.warning("cannot read cache file %s (%s): its rows are encoded again", path, error)
            return True
        metadata = file.metadata() or {}
        if metadata.get("key") != self.key:
            return False
        names, ids = json.loads(metadata["names"]), json.loads(metadata["ids"])
        lengths = json.loads(metadata["lengths"]) if "lengths" in metadata else [None] * len(ids)
        places = enumerate(zip(ids, lengths, strict=True))
        self._stored.update({row: _Stored(file, n, names, each) for n, (row, each) in places})
        return True

    def missing(self, ids: Iterable[str]) -> list[str]:
        """The ids without a row, each once, in the order of their first appearance."""
        return [row for row in dict.fromkeys(ids) if row not in self._rows and row not in self._stored]

    def add(self, ids: Sequence[str], columns: Row) -> None:
        """Keep row n of every tensor (len(ids), ...) under id n, on the cpu."""
        for name, column in columns.items():
            if len(column) != len(ids):
                got = f"{len(column)} rows of {name!r} for {len(ids)} inputs"
                raise ValueError(
                    problem(got, "one row per input", "each row is stored on its own", "correct the encoder")
                )
        for n, row in enumerate(ids):
            tensors = {name: _cut(column[n]) for name, column in columns.items()}
            self._bytes += _size(tensors)
            self._rows[row] = tensors
        self._new += ids if self.folder else []
        if len(self._new) >= FLUSH:
            self.save()

    def _make_room(self) -> None:
        """Drop the oldest rows beyond the limit; on disk they stay, else they are encoded again."""
        if self._bytes > LIMIT:
            self.save()
        while self._bytes > LIMIT:
            self._bytes -= _size(self._rows.pop(next(iter(self._rows))))

    def rows(self, ids: Sequence[str], ragged: bool = False) -> Row:
        """The rows of `ids`, stacked to (len(ids), ...) by name, on the cpu.

        Args:
            ragged: whether their lengths differ: each tensor is filled up with zeros to the longest.
        """
        kept = [self._row(row) for row in ids]
        self._make_room()
        if ragged:
            return {name: torch.cat(filled([row[name][None] for row in kept])) for name in kept[0]}
        shapes = {tuple((name, tuple(tensor.shape)) for name, tensor in row.items()) for row in kept}
        if len(shapes) > 1:
            got = f"rows of shapes {sorted(shapes)[:2]}"
            todo = "pad prompts to one length, and keep a batch in one bucket"
            raise StepdistillError(problem(got, "one shape", "a batch is one tensor", todo))
        return {name: torch.stack([row[name] for row in kept]) for name in kept[0]}

    def _row(self, row: str) -> Row:
        if row in self._rows:
            return {name: cut.whole() for name, cut in self._rows[row].items()}
        return self._stored[row].row()

    def save(self) -> None:
        """Write what is new. Where the disk refuses, say so and go on in memory: nothing but time is lost."""
        if self.folder is None or not self._new:
            return
        rows = [self._rows[row] for row in self._new]
        tensors = {f"{n}.{name}": cut.tensor for n, row in enumerate(rows) for name, cut in row.items()}
        lengths = [[cut.length for cut in row.values()] for row in rows]
        described = {"ids": self._new, "names": list(rows[0]), "lengths": lengths}
        metadata = {"key": self.key} | {name: json.dumps(value) for name, value in described.items()}
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            with written_whole(path) as part:
                save_file(tensors, part, metadata)
            self._open(path)
            for row in self._new:  # what was written is read from there
                if row in self._stored:
                    self._bytes -= _size(self._rows.pop(row))
        except (OSError, SafetensorError) as error:
            logger.warning("cannot write the cache to %s (%s): it stays in memory only", self.folder, error)
            self.folder = None
        self._new = []


def _size(row: dict[str, _Cut]) -> int:
    return sum(cut.tensor.nbytes for cut in row.values())


class PromptCache:
    """Prompt embeddings, each prompt encoded once.

    Args:
        encode: prompts to named tensors, each (len(prompts), ...) with the same trailing shape for every
            prompt.
        folder: keeps them for the next run; None for memory only.
        key: digest of all that an embedding depends on, see `stepdistill.training.cache.keys`.
        ragged: whether rows end with their last token: `encode` then gives `mask` (len(prompts), L), and fills up with
            zeros to the longest of its prompts, which no row may depend on.
        batch_size: most prompts in one call of `encode`. Where a kernel's rounding depends on the batch's
            size, 1 makes an embedding independent of the prompts that were missing with it.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], dict[str, Tensor]],
        folder: Path | None,
        key: str,
        batch_size: int = 32,
        ragged: bool = False,
    ) -> None:
        self.encode, self.ragged = encode, ragged
        self.batch_size = batch_size
        self.store = RowStore(folder, key)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Named tensors (len(prompts), ...) on the cpu, in the dtype of `encode`."""
        self.fill(prompts)
        return self.store.rows(prompts, self.ragged)

    def fill(self, prompts: Sequence[str]) -> None:
        """Encode those that have no row."""
        missing = self.store.missing(prompts)
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            self.add(batch, self.encode(batch))

    def add(self, ids: Sequence[str], columns: Row) -> None:
        """Keep row n of every tensor (len(ids), ...) under id n."""
        if not self.ragged:
            self.store.add(ids, columns)
            return
        mask = columns["mask"]
        # a fake one, of a prediction of memory, has no content
        lengths = [mask.shape[1]] * len(mask) if isinstance(mask, FakeTensor) else mask.sum(1).tolist()
        for n, length in enumerate(lengths):
            self.store.add(ids[n : n + 1], {name: column[n : n + 1, :length] for name, column in columns.items()})

    def save(self) -> None:
        """Write to the folder what is new since the last time; it also happens every 256 prompts."""
        self.store.save()


class LatentCache:
    """What is encoded of images, by item number, each image once: latents, or what a video begins with.

    An item's image must be the same each time: read it through `stepdistill.data.FixedCrops`, or with
    `center_crop` and without `random_flip`.

    Args:
        folder: keeps them for the next run; None for memory only.
        key: digest of the autoencoder's files and of the source (`Source.digest`).
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.store = RowStore(folder, key)

    def __call__(self, items: Sequence[int], encode_missing: Callable[[list[int]], Row]) -> Row:
        """Named tensors (len(items), ...) on the cpu; `encode_missing` turns n distinct items into such of n rows."""
        ids = [str(item) for item in items]
        missing = self.store.missing(ids)
        if missing:
            self.store.add(missing, encode_missing([int(item) for item in missing]))
        return self.store.rows(ids)

    def save(self) -> None:
        """Write to the folder what is new since the last time; it also happens every 256 items."""
        self.store.save()
