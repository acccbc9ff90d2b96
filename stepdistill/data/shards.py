"""Tar shards in the webdataset layout, with random access through an index."""

from __future__ import annotations

import glob
import io
import json
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from stepdistill.config.kinds import Place
from stepdistill.core.captions import as_captions, require_columns
from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import IMAGE_SUFFIXES
from stepdistill.data.base import BadSample
from stepdistill.data.images import ImageSource
from stepdistill.data.tarindex import CAPTION_SUFFIXES, ShardIndex, expand_braces, shard_index

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shards(ImageSource):
    """Local `.tar` shards whose members share a key: `00017.jpg` with `00017.txt`, `.caption` or `.json`.

    The webdataset package reads shards as a stream, which can neither start at a given sample nor keep its
    order when the number of processes changes. So one pass over the tar headers writes `<shard>.index.json`
    (into `~/.cache/stepdistill` where the folder is read-only; remade when the shard's size or date changes),
    and samples are read by offset. Members form samples as they do there; the package itself is not needed.

    `HubDataset` over a folder of shards reads them, too, where every sample has the same members. It refuses shards
    that mix `.jpg` with `.png`, or hold a sample without image or caption, without naming the sample; it takes no
    caption out of a `.json` member, and no pattern; and it keeps a second copy of all bytes.

    Args:
        train_shards_path_or_url: a path with `{00000..00012}`, `{a,b}`, `*` or `?`. A URL is refused: every
            sample would be one request over the network.
        caption_column: key of the caption in a `.json` member.
    """

    train_shards_path_or_url: Place

    @cached_property
    def _shards(self) -> list[tuple[Path, ShardIndex]]:
        files = _find(self.train_shards_path_or_url)
        shards = [(path, shard_index(path)) for path in tqdm(files, "indexing shards", delay=2)]
        strays = [(path, key) for path, index in shards for key in index.strays]
        if not any(index.keys for _, index in shards):
            got = f"{len(strays)} samples, none with an image, in {self.train_shards_path_or_url}"
            why = "there is nothing to train on"
            raise DataError(problem(got, f"members named .{', .'.join(IMAGE_SUFFIXES)}", why, "check the shards"))
        if strays:
            logger.warning(
                "%d samples have no image and are left out, the first is %s of %s", len(strays), *strays[0][::-1]
            )
        for path, index in shards:
            lacking = np.flatnonzero(index.kinds == -1)
            if len(lacking):
                got = f"sample {index.keys[lacking[0]]!r} of {path} without a caption ({len(lacking)} there)"
                todo = "write the missing captions into the shards"
                raise DataError(problem(got, f"a member of {CAPTION_SUFFIXES}", "every image needs a caption", todo))
        return shards

    def left_out(self) -> dict[str, str]:
        return {f"{path.name} {key}": "a sample without image" for path, index in self._shards for key in index.strays}

    @cached_property
    def _ends(self) -> list[int]:
        """For each shard the number of samples up to its end."""
        return list(accumulate(len(index.keys) for _, index in self._shards))

    def _place(self, i: int) -> tuple[Path, ShardIndex, int]:
        """The shard of item i and its row there."""
        shard = bisect_right(self._ends, i)
        path, index = self._shards[shard]
        return path, index, i - (self._ends[shard - 1] if shard else 0)

    def __len__(self) -> int:
        return min(self._ends[-1], self.max_train_samples or self._ends[-1])

    def captions(self, i: int) -> Sequence[str]:
        path, index, row = self._place(i)
        try:
            text = _read(path, index.captions[row]).decode("utf-8")
            if CAPTION_SUFFIXES[index.kinds[row]] != "json":
                return (text.strip(),)
            table = json.loads(text)
        except ValueError as error:  # of either decoder
            raise BadSample(self.name(i), f"caption: {error}") from error
        columns = list(table) if isinstance(table, dict) else []
        if i == 0:  # the first one stands for the whole set: a wrong column is no single bad sample
            require_columns(columns, [self.caption_column], f"the .json of {self.name(i)}")
        captions = as_captions(table[self.caption_column]) if self.caption_column in columns else ()
        if not captions:
            raise BadSample(self.name(i), f"no text under {self.caption_column!r} in its .json, which has {columns}")
        return captions

    def name(self, i: int) -> str:
        path, index, row = self._place(i)
        return f"{path} sample {index.keys[row]}"

    def stamp(self, i: int) -> str:
        path, index, row = self._place(i)
        return f"{path.name} {index.stamp} {index.keys[row]}"

    def open(self, i: int) -> IO[bytes]:
        path, index, row = self._place(i)
        return io.BytesIO(_read(path, index.images[row]))

    def size(self, i: int) -> tuple[int, int] | None:
        _, index, row = self._place(i)
        height, width = index.sizes[row].tolist()
        return (height, width) if height else None


def _read(path: Path, span: np.ndarray) -> bytes:
    # opened anew each time: a shared file position would not survive the fork into workers
    with open(path, "rb") as file:
        file.seek(int(span[0]))
        return file.read(int(span[1]))


def _find(pattern: str) -> list[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        why = "samples are read in random order, so each one would be a separate request"
        raise DataError(problem(pattern, "local tar files", why, "download the shards first"))
    paths: list[Path] = []
    for one in expand_braces(pattern):
        files = sorted(glob.glob(one)) if any(sign in one for sign in "*?[") else [one]
        if not files or not Path(files[0]).is_file():
            got = f"{one}, which does not exist"
            todo = "check data.train_shards_path_or_url, such as 'shards/{00000..00012}.tar' or 'shards/*.tar'"
            raise DataError(problem(got, "tar shards", "a missing shard would change the data set", todo))
        paths += map(Path, files)
    return paths
