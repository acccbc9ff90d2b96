"""A folder of images, with captions in a table or in one text file per image."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, ClassVar

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

    noun: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES
    train_data_dir: Place

    def files(self, folder: Path) -> ImageFiles:
        """What lies below the folder, and why each other file is no sample."""
        return images_below(folder)

    @cached_property
    def _captioned(self) -> list[tuple[str, tuple[str, ...]]]:
        return list(self._read[0].items())[: self.max_train_samples]

    @cached_property
    def _read(self) -> tuple[Captioned, dict[str, str]]:
        """The captions of all images that have one, and why each other file is left out."""
        folder = Path(self.train_data_dir)
        if not folder.is_dir():
            todo = "check data.train_data_dir"
            raise DataError(problem(folder, f"a folder of {self.noun}s", "there is no such folder", todo))
        files = self.files(folder)
        if not files.images:
            rest = "; ".join(left_out_lines(files.left_out).values())
            got = f"no {', '.join(self.suffixes)} file below {folder}{rest and f', but {rest}'}"
            raise DataError(problem(got, f"{self.noun}s", "there is nothing to train on", "check data.train_data_dir"))
        tables = [folder / name for name in TABLES if (folder / name).exists()]
        if len(tables) > 1:
            got = f"both {TABLES[0]} and {TABLES[1]} in {folder}"
            raise DataError(problem(got, "one of them", "they may disagree", "remove the outdated one"))
        say_left_out(files.left_out, folder)
        if not tables:
            texts = {name: self._text_of(name) for name in files.images}
            captions, used = _by_text_files(folder, texts, self.noun), set(texts.values())
        else:
            captions, used = _by_table(tables[0], files, self.caption_column, self.noun), {tables[0].name}
        rowless = {name: f"without a row in {tables[0].name}" for name in files.images if name not in captions}
        return captions, rowless | {name: why for name, why in files.left_out.items() if name not in used}

    def _text_of(self, name: str) -> str:
        """The file of a caption: `cat.txt` for `cat.jpg`, and for a folder `cat` as well."""
        stem, _, suffix = name.rpartition(".")
        return f"{stem if suffix.lower() in self.suffixes else name}.txt"

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
        facts = [os.stat(path) for path in self.stored(i)]
        return "\0".join((name, *(str(n) for fact in facts for n in (fact.st_size, fact.st_mtime_ns)), *captions))

    def stored(self, i: int) -> list[Path]:
        """What item i is read from."""
        return [Path(self.name(i))]

    def open(self, i: int) -> IO[bytes]:
        return open(self.name(i), "rb")


def _by_table(table: Path, files: ImageFiles, caption_column: str, noun: str) -> Captioned:
    have, captioned = set(files.images), Captioned()
    for number, row in enumerate(read_table(table), start=1):
        where = f"{table} row {number}"
        require_columns(row, ["file_name", caption_column], where)
        name, captions = str(row["file_name"]).removeprefix("./").removesuffix("/"), as_captions(row[caption_column])
        if name not in have:
            got = f"{where} with file_name {name!r}"
            why = f"it is {files.left_out[name]}" if name in files.left_out else "that file is not in the folder"
            raise DataError(problem(got, f"one of the {noun}s below {table.parent}", why, "add it or remove the row"))
        if not captions:
            got = f"{where} ({name}) with {caption_column} {row[caption_column]!r}"
            raise DataError(problem(got, "a text or a list of texts", f"every {noun} needs a caption", "write one"))
        captioned[name] = captioned.get(name, ()) + captions
    if not captioned:
        raise DataError(problem(f"no row in {table}", f"one per {noun}", "there is nothing to train on", "add rows"))
    if len(captioned) < len(files.images):
        left = [name for name in files.images if name not in captioned]
        logger.warning("%d %ss have no row in %s and are left out, the first is %s", len(left), noun, table, left[0])
    return captioned


def _by_text_files(folder: Path, texts: dict[str, str], noun: str) -> Captioned:
    lacking = [name for name, text in texts.items() if not (folder / text).exists()]
    if lacking:
        got = f"{folder / lacking[0]} without a caption ({len(lacking)} of {len(texts)} {noun}s)"
        todo = f"write that file, or {TABLES[0]} with file_name and a caption column into the folder"
        raise DataError(
            problem(got, f"{Path(texts[lacking[0]]).name} beside it", f"every {noun} needs a caption", todo)
        )
    return {name: (read_text(folder / text).strip(),) for name, text in texts.items()}
