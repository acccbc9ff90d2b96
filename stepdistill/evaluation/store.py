"""What an evaluation has of its images: features in a memory map, and what each unit of them cost and scored.

A unit is as many consecutive images as the feature extractor takes at once. It is whole or not there, whatever ends
the run; any number of processes make the same units, since nothing of a unit depends on another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.core.files import write_text, written_whole
from stepdistill.core.units import Units, changed_facts, write_facts
from stepdistill.evaluation.inputs import FACTS
from stepdistill.evaluation.metrics.stats import PART, FeatureStats, Stats

FEATURES, IMAGES = "features.npy", "images.npy"


@dataclass(frozen=True)
class Store:
    """The units of one row of a report, in a folder of its own.

    Args:
        folder: where they are kept.
        n: images in all.
        unit: images of a unit; the last may have fewer.
        dim: features of an image.
        kept: of how many images, from the first on, the pixels are kept, too.
        views: rows of features an item: 2 of a clip, of one of its frames and of its motion.
    """

    folder: Path
    n: int
    unit: int
    dim: int
    kept: int = 0
    views: int = 1

    def open(self, facts: Mapping[str, object], shape: Sequence[int] = ()) -> None:
        """Make the folder, or go on in it where it is of the same facts; one process does, and the others wait.

        Args:
            facts: all that features, costs and scores depend on, as JSON.
            shape: (3, H, W) of images that are kept, (F, 3, H, W) of clips.

        Raises:
            EvaluationError: what lies there is of other facts, or it cannot be written.
        """
        file = self.folder / FACTS
        if changed := changed_facts(file, facts):
            got = f"{self.folder}, which was begun with other {', '.join(sorted(changed))}"
            why = "its images would be mixed with those of this evaluation"
            raise EvaluationError(problem(got, "the same", why, "name another output folder, or remove this one"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _fresh(self.folder / FEATURES, np.dtype(np.float32), (self.n, self.views * self.dim))
            if self.kept:
                _fresh(self.folder / IMAGES, np.dtype(np.uint8), (self.kept, *shape))
            write_facts(file, facts)
        except OSError as error:
            why, todo = "features and scores are kept there", "name another output folder"
            raise EvaluationError(problem(f"{self.folder} ({error})", "a folder to write to", why, todo)) from error

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """The numbers of the units that process `rank` of `world` has to make."""
        return self._units.missing(lambda k: self._file(k).exists(), rank, world)

    def rows(self, k: int) -> range:
        """The numbers of the images of unit k."""
        return self._units.rows(k)

    def put(self, k: int, images: Tensor, features: Tensor, facts: Mapping[str, object]) -> None:
        """Keep unit k: features (B, views dim) float32 of images (B, 3, H, W) or clips (B, F, 3, H, W) uint8, and its
        facts as JSON; lists in it have an entry an image, but for `skipped`, the numbers of those without.

        Raises ValueError for another number of features.
        """
        rows = self.rows(k)
        if features.shape != (len(rows), self.views * self.dim):
            expected = (len(rows), self.views * self.dim)
            raise ValueError(
                f"unit {k} got features {tuple(features.shape)}, expected {expected}: one row an image; "
                "look at the extractor"
            )
        self._write(FEATURES, rows.start, features)
        if rows.start < self.kept:
            self._write(IMAGES, rows.start, images[: self.kept - rows.start])
        write_text(self._file(k), json.dumps(dict(facts)))  # last: it says that the unit is whole

    def features(self, view: int = 0) -> Tensor:
        """All features (n, dim) float32 of a view, without those of skipped images: pages of the file, read when they
        are used.

        Raises EvaluationError where a unit is missing.
        """
        missing = self.missing()
        if missing:
            got = f"{len(missing)} of {len(self._units)} units missing in {self.folder}"
            raise EvaluationError(problem(got, "all", "a distance is over all images", "run it again: it goes on"))
        found = torch.from_numpy(np.load(self.folder / FEATURES, mmap_mode="c")).split(self.dim, 1)[view]
        skipped = {i for unit in self.unit_facts() for i in unit["skipped"]}
        return found[[i for i in range(self.n) if i not in skipped]] if skipped else found

    def motion(self) -> Tensor | None:
        """The features (n, dim) of the motion of clips; None of images. Raises EvaluationError."""
        return self.features(1) if self.views > 1 else None

    def stats(self) -> Stats:
        """The Gaussian of all features, of clips those of frames, read part by part where there are many.

        Raises EvaluationError.
        """
        found = self.features()
        if len(found) < found.shape[1]:
            return Stats.of(found)
        sums = FeatureStats(found.shape[1])
        for part in found.split(PART):
            sums.update(part)
        return sums.stats()

    def images(self, rows: Sequence[int]) -> Tensor:
        """The kept images of these consecutive numbers, uint8 (B, 3, H, W), or clips (B, F, 3, H, W)."""
        return torch.from_numpy(np.load(self.folder / IMAGES, mmap_mode="r")[rows[0] : rows[-1] + 1].copy())

    def unit_facts(self) -> Iterator[dict[str, Any]]:
        """What is known of each unit, in order."""
        return (json.loads(self._file(k).read_text()) for k in range(len(self._units)))

    def note(self, name: str, facts: Mapping[str, object]) -> None:
        """Keep something else that is known of all images, as JSON."""
        write_text(self.folder / name, json.dumps(dict(facts)))

    def noted(self, name: str) -> dict[str, Any] | None:
        """What `note` kept, if anything."""
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def _units(self) -> Units:
        return Units(self.n, self.unit)

    def _file(self, k: int) -> Path:
        return self.folder / f"unit-{k:05d}.json"

    def _write(self, name: str, start: int, values: Tensor) -> None:
        """Write rows as bytes: two hosts that map the file would write each other's part of a page, too."""
        place = np.load(self.folder / name, mmap_mode="r")
        with (self.folder / name).open("r+b") as file:
            file.seek(place.offset + start * place[0].nbytes)
            file.write(values.contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())


def _fresh(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """An empty array in a file, unless it is there."""
    if not file.exists():
        with written_whole(file) as part:
            np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape).flush()
