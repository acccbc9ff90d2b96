"""Precomputed latents, memory-mapped."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError, safe_open

from stepdistill.config.kinds import Place
from stepdistill.core.captions import as_captions, read_text
from stepdistill.core.errors import DataError, problem
from stepdistill.data.base import BadSample, Sample, Source

FILE, KEY = "latents.safetensors", "latents"


@dataclass(frozen=True, kw_only=True)
class Latents(Source):
    """Latents with captions, as the sampling scripts write them.

    Args:
        folder: holds `latents.safetensors` with the key `latents` (N, C, h, w), of videos (N, C, F, h, w), already in
            the network's scale, and either `prompts.txt` (line n for latent n; an empty line is the empty prompt) or
            `captions.json` (N texts, or N lists of alternative texts).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "latents"})
    folder: Place

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(N, C, h, w), or (N, C, F, h, w)."""
        path = Path(self.folder, FILE)
        todo = "check data.folder, or write the file again"
        if not path.is_file():
            raise DataError(problem(f"no {path}", "that file", "the latents are read from it", todo))
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                shape = tuple(file.get_slice(KEY).get_shape()) if KEY in keys else ()
        except SafetensorError as error:
            raise DataError(
                problem(f"{path}: {error}", "a safetensors file", "it is incomplete or another format", todo)
            ) from None
        if len(shape) not in (4, 5) or 0 in shape:
            got = f"{path} with keys {keys}, {KEY} of shape {list(shape)}"
            why = "a sample has shape (C, h, w), or (C, F, h, w)"
            raise DataError(problem(got, f"{KEY} of shape (N, C, h, w), N > 0", why, todo))
        return shape

    @cached_property
    def _captions(self) -> list[tuple[str, ...]]:
        count = self.shape[0]
        listed, plain = Path(self.folder, "captions.json"), Path(self.folder, "prompts.txt")
        if listed.is_file():
            try:
                cells = json.loads(read_text(listed))
            except json.JSONDecodeError as error:
                raise DataError(problem(f"{listed}: {error}", "JSON", "it does not parse", "write it again")) from None
            captions = [as_captions(cell) for cell in (cells if isinstance(cells, list) else ())]
        else:
            captions = [(line,) for line in read_text(plain).removesuffix("\n").split("\n")]
        if len(captions) != count or not all(captions):
            empty = [n for n, texts in enumerate(captions) if not texts]
            got = f"{len(captions)} captions for {count} latents in {self.folder}, without a text: {empty[:5]}"
            why = "caption n belongs to latent n"
            raise DataError(problem(got, "one per latent", why, "write prompts.txt or captions.json again"))
        return captions

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, i: int) -> Sequence[str]:
        return self._captions[i]

    def sample(self, i: int, rng: random.Random) -> Sample:
        # opened anew: a header of one tensor is cheap, and an open map cannot be sent to a worker
        with safe_open(Path(self.folder, FILE), "pt") as file:
            latents = file.get_slice(KEY)[i]
        if not latents.isfinite().all():
            raise BadSample(self.name(i), "the latent holds NaN or infinity")
        return Sample(prompt=self.prompt(i, rng), latents=latents, item=i)

    def name(self, i: int) -> str:
        return f"{Path(self.folder, FILE)} latent {i}"

    def stamp(self, i: int) -> str:
        facts = Path(self.folder, FILE).stat()
        return "\0".join((str(facts.st_size), str(facts.st_mtime_ns), *self._captions[i]))
