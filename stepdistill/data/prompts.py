"""Prompts without images, for methods that need no data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from stepdistill.config.kinds import Place
from stepdistill.core.captions import as_captions, read_table, read_text, require_columns
from stepdistill.core.errors import DataError, problem
from stepdistill.data.base import Sample, Source


@dataclass(frozen=True, kw_only=True)
class Prompts(Source):
    """Prompts from a file or from the config.

    Args:
        prompts_file: `.txt` with one prompt per line, or `.csv` / `.jsonl` with a caption column; empty prompts are
            skipped.
        prompts: list of prompts, instead of a file.
        caption_column: column of a csv or jsonl file; a list of texts in jsonl counts as alternatives.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts"})
    prompts_file: Place | None = None
    prompts: tuple[str, ...] = ()
    caption_column: str = "text"

    @cached_property
    def _captions(self) -> list[tuple[str, ...]]:
        if (self.prompts_file is None) == (not self.prompts):
            got = f"prompts_file={self.prompts_file!r} and {len(self.prompts)} prompts"
            raise DataError(problem(got, "one of the two", "a run has one list of prompts", "set data.prompts_file"))
        listed = self._read(Path(self.prompts_file)) if self.prompts_file else [(text,) for text in self.prompts]
        kept = [tuple(text.strip() for text in captions if text.strip()) for captions in listed]
        kept = [captions for captions in kept if captions]
        if not kept:
            got = f"no prompt in {self.prompts_file or 'prompts'}"
            raise DataError(problem(got, "at least one", "there is nothing to train on", "write one prompt per line"))
        return kept

    def _read(self, path: Path) -> list[tuple[str, ...]]:
        suffix = path.suffix.lower()
        if suffix == ".txt":
            return [(line,) for line in read_text(path).split("\n")]
        if suffix not in (".csv", ".jsonl"):
            todo = "rename or convert the file"
            raise DataError(problem(path, "a .txt, .csv or .jsonl file", "the suffix determines the format", todo))
        rows = read_table(path)
        for number, row in enumerate(rows, start=1):
            require_columns(row, [self.caption_column], f"{path} row {number}")
        return [as_captions(row[self.caption_column]) for row in rows]

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, i: int) -> Sequence[str]:
        return self._captions[i]

    def sample(self, i: int, rng: random.Random) -> Sample:
        return Sample(prompt=self.prompt(i, rng), item=i)

    def name(self, i: int) -> str:
        return f"prompt {i + 1} ({self._captions[i][0][:40]!r})"

    def stamp(self, i: int) -> str:
        return "\0".join(self._captions[i])
