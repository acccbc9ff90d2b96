"""A folder of images, with captions in a table or in one text file per image."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from stepdistill.config.kinds import Place
from stepdistill.core.captions import as_captions, read_table, read_text, require_columns
from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import IMAGE_SUFFIXES, ImageFiles, images_below, left_out_lines, say_left_out
from stepdistill.data.images import ImageSource

logger = logging.getLogger(__name__)
TABLES = ("metadata.jsonl", "metadata.csv")
Captioned = dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class ImageFolder(ImageSource):
    """The images below a folder and the folders linked there: jpg, png, webp, bmp, gif, tiff and avif files, of an
    animation the first frame. `stepdistill data check` names what else lies there.

    Args:
        train_data_dir: the folder. If it contains `metadata.jsonl` or `metadata.csv`, its rows name the images
            (`file_name`, relative to the folder) and their captions (`caption_column`). Otherwise `cat.txt` is the
            caption of `cat.jpg`.
    """

    train_data_dir: Place

    @cached_property
    def _captioned(self) -> list[tuple[str, tuple[str, ...]]]:
        return list(self._read[0].items())[: self.max_train_samples]

    @cached_property
    def _read(self) -> tuple[Captioned, dict[str, str]]:
        """The captions of all images that have one, and why each other file is left out."""
        folder = Path(self.train_data_dir)
        if not folder.is_dir():
            todo = "check data.train_data_dir"
            raise DataError(problem(folder, "a folder of images", "there is no such folder", todo))
        files = images_below(folder)
        if not files.images:
            rest = "; ".join(left_out_lines(files.left_out).values())
            got = f"no {', '.join(IMAGE_SUFFIXES)} file below {folder}{rest and f', but {rest}'}"
            raise DataError(problem(got, "images", "there is nothing to train on", "check data.train_data_dir"))
        tables = [folder / name for name in TABLES if (folder / name).exists()]
        if len(tables) > 1:
            got = f"both {TABLES[0]} and {TABLES[1]} in {folder}"
            raise DataError(problem(got, "one of them", "they may disagree", "remove the outdated one"))
        say_left_out(files.left_out, folder)
        if not tables:
            captions = _by_text_files(folder, files.images)
            used = {Path(name).with_suffix(".txt").as_posix() for name in captions}
        else:
            captions, used = _by_table(tables[0], files, self.caption_column), {tables[0].name}
        rowless = {name: f"without a row in {tables[0].name}" for name in files.images if name not in captions}
        return captions, rowless | {name: why for name, why in files.left_out.items() if name not in used}

    def left_out(self) -> dict[str, str]:
        return self._read[1]

    def __len__(self) -> int:
        return len(self._captioned)

    def captions(self, i: int) -> Sequence[str]:
        return self._captioned[i][1]

    def name(self, i: int) -> str:
        return str(Path(self.train_data_dir, self._captioned[i][0]))

    def stamp(self, i: int) -> str:
        name, captions = self._captioned[i]
        facts = os.stat(Path(self.train_data_dir, name))
        return "\0".join((name, str(facts.st_size), str(facts.st_mtime_ns), *captions))

    def open(self, i: int) -> IO[bytes]:
        return open(self.name(i), "rb")


def _by_table(table: Path, files: ImageFiles, caption_column: str) -> Captioned:
    have, captioned = set(files.images), Captioned()
    for number, row in enumerate(read_table(table), start=1):
        where = f"{table} row {number}"
        require_columns(row, ["file_name", caption_column], where)
        name, captions = str(row["file_name"]).removeprefix("./"), as_captions(row[caption_column])
        if name not in have:
            got = f"{where} with file_name {name!r}"
            why = f"it is {files.left_out[name]}" if name in files.left_out else "that file is not in the folder"
            raise DataError(problem(got, f"an image below {table.parent}", why, "add it or remove the row"))
        if not captions:
            got = f"{where} ({name}) with {caption_column} {row[caption_column]!r}"
            raise DataError(problem(got, "a text or a list of texts", "every image needs a caption", "write one"))
        captioned[name] = captioned.get(name, ()) + captions
    if not captioned:
        raise DataError(problem(f"no row in {table}", "one per image", "there is nothing to train on", "add rows"))
    if len(captioned) < len(files.images):
        left = [name for name in files.images if name not in captioned]
        logger.warning("%d images have no row in %s and are left out, the first is %s", len(left), table, left[0])
    return captioned


def _by_text_files(folder: Path, names: list[str]) -> Captioned:
    texts = {name: (folder / name).with_suffix(".txt") for name in names}
    lacking = [name for name, text in texts.items() if not text.exists()]
    if lacking:
        got = f"{folder / lacking[0]} without a caption ({len(lacking)} of {len(names)} images)"
        todo = f"write that file, or {TABLES[0]} with file_name and a caption column into the folder"
        raise DataError(problem(got, f"{texts[lacking[0]].name} beside it", "every image needs a caption", todo))
    return {name: (read_text(text).strip(),) for name, text in texts.items()}
