"""Caption files: plain lines, csv and jsonl tables, and what a cell may hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from stepdistill.core.errors import DataError, problem

Row = dict[str, object]


def read_text(path: Path) -> str:
    """A UTF-8 file's text, with or without a byte order mark.

    Raises:
        DataError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{path} with byte {error.object[error.start]:#04x} at offset {error.start}"
        raise DataError(problem(got, "UTF-8 text", "captions are read as UTF-8", "save it as UTF-8")) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise DataError(problem(path, "a readable file", why, "check the path")) from None


def read_table(path: Path) -> list[Row]:
    """The rows of a `.csv` file with a header, or of a `.jsonl` file with one object a line.

    Raises:
        DataError: a line that does not parse, by number.
    """
    text = read_text(path)
    return _csv(path, text) if path.suffix.lower() == ".csv" else _jsonl(path, text)


def _csv(path: Path, text: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    rows: list[Row] = []
    for row in reader:
        if "" in row and "" not in (reader.fieldnames or ()):
            got = f"{path} line {reader.line_num} with more cells than the header"
            todo = "put double quotes around cells that hold commas"
            raise DataError(problem(got, "one cell per column", "the caption would be truncated", todo))
        rows.append(dict(row))
    return rows


def _jsonl(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    # not splitlines: JSON may hold U+2028 and its kin unescaped
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = f"{error.msg} at column {error.colno}"
        if not isinstance(row, dict):
            got = f"{path} line {number}: {str(row)[:80]}"
            raise DataError(problem(got, "one JSON object per line", "each line is a sample", "correct that line"))
        rows.append(row)
    return rows


def require_columns(columns: Iterable[str], wanted: Iterable[str], where: object) -> None:
    """Raise DataError unless every wanted column is there; the message lists those that are."""
    have = list(columns)
    missing = [name for name in wanted if name not in have]
    if missing:
        got = f"{where} with columns {have}"
        todo = "name the right ones in the config (caption_column, image_column) or rename them in the data"
        raise DataError(problem(got, f"the columns {missing}", "samples are read from these columns", todo))


def as_captions(value: object) -> tuple[str, ...]:
    """A cell's captions: a text, or a list of alternative texts; () where it holds neither."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    return ()
