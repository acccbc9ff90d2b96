"""Data sets of the `datasets` library: from the Hub, from a folder, from parquet files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from stepdistill.config.kinds import Place
from stepdistill.core.captions import as_captions, require_columns
from stepdistill.core.errors import DataError, problem
from stepdistill.data.base import BadSample
from stepdistill.data.images import ImageSource

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class HubDataset(ImageSource):
    """A captioned image set that `datasets` can read (`pip install 'stepdistill[data]'`).

    The data set is downloaded or memory-mapped, not streamed, so that a run can start at any sample.

    Args:
        dataset_name: id on the Hub, a folder written by `save_to_disk`, any other folder that `load_dataset`
            reads (parquet, imagefolder), or one parquet file.
        dataset_config_name: the configuration, if there are several.
        split: the split.
        image_column: column of the images: a `datasets.Image`, or encoded bytes.
    """

    dataset_name: Place
    dataset_config_name: str | None = None
    split: str = "train"
    image_column: str = "image"

    @cached_property
    def _table(self) -> Dataset:
        try:
            import datasets
        except ImportError:
            todo = "pip install 'stepdistill[data]'"
            raise DataError(
                problem("no package `datasets`", "the package installed", "it reads this source", todo)
            ) from None
        try:
            table = _load(self.dataset_name, self.dataset_config_name, self.split)
        except Exception as error:  # datasets raises anything from ValueError to its builders' own errors
            got = f"{type(error).__name__} from datasets for {self.dataset_name!r}: {error}"
            expected = f"a data set with a split {self.split!r}"
            todo = "check data.dataset_name, data.dataset_config_name and data.split"
            raise DataError(problem(got, expected, "it cannot be opened", todo)) from error
        require_columns(table.column_names, [self.image_column, self.caption_column], self.dataset_name)
        if not len(table):
            got = f"no row in split {self.split!r} of {self.dataset_name}"
            raise DataError(problem(got, "at least one", "there is nothing to train on", "check data.split"))
        try:
            # decoding is ours: a broken image must be an item to skip, not an error of the table
            table = table.cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            got = f"column {self.image_column!r} of {table.features[self.image_column]}"
            why = "it does not hold images"
            raise DataError(problem(got, "encoded images", why, "set data.image_column")) from error
        return table.select(range(min(len(table), self.max_train_samples or len(table))))

    @cached_property
    def _captions(self) -> Dataset:
        # the column alone: a whole row would read the image too
        return self._table.select_columns([self.caption_column])

    def __len__(self) -> int:
        return len(self._table)

    def captions(self, i: int) -> Sequence[str]:
        value = self._captions[i][self.caption_column]
        captions = as_captions(value)
        if not captions:
            raise BadSample(self.name(i), f"no caption: {self.caption_column} is {value!r}")
        return captions

    def name(self, i: int) -> str:
        return f"{self.dataset_name} [{self.split}] row {i}"

    def stamp(self, i: int) -> str:
        return f"{self._table._fingerprint} {i}"

    def open(self, i: int) -> IO[bytes]:
        cell = self._table[i][self.image_column]
        if cell is None:
            raise BadSample(self.name(i), f"no image: {self.image_column} is empty")
        return open(cell["path"], "rb") if cell["bytes"] is None else io.BytesIO(cell["bytes"])


def _load(name: str, config: str | None, split: str) -> Dataset:
    import datasets

    path = Path(name)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path), split=split)
    if (path / "dataset_dict.json").exists():
        return datasets.DatasetDict.load_from_disk(str(path))[split]
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return datasets.Dataset.load_from_disk(str(path))
    return datasets.load_dataset(name, config, split=split)
