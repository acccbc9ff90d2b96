"""Prompts of an evaluation: read from a file, in its order, with whatever else its records hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepdistill.core.captions import read_table, read_text
from stepdistill.core.errors import DataError, problem

KEYS = ("prompt", "caption", "text")  # the first that a record has is its prompt


def read_records(file: Path) -> list[dict[str, object]]:
    """Every record of a file, each with a prompt (see `prompt_of`), in order.

    `.txt`: one prompt a line, blank lines left out, as `{"prompt": line}`. `.jsonl` (GenEval's metadata, for one) and
    `.csv` with a header: the whole object or row. Raises DataError.
    """
    suffix = file.suffix.lower()
    if suffix == ".txt":
        lines = [line.strip() for line in read_text(file).split("\n")]
        records: list[dict[str, object]] = [{"prompt": line} for line in lines if line]
    elif suffix in (".jsonl", ".csv"):
        records = read_table(file)
    else:
        todo = "rename or convert the file"
        raise DataError(problem(file, "a .txt, .jsonl or .csv file", "the suffix determines the format", todo))
    for number, record in enumerate(records, start=1):
        try:
            prompt_of(record)
        except DataError as error:
            raise DataError(f"{file} row {number}: {error}") from None
    if not records:
        got = f"no prompt in {file}"
        raise DataError(problem(got, "at least one", "there is nothing to sample", "write one prompt per line"))
    return records


def prompt_of(record: Mapping[str, object]) -> str:
    """The prompt of a record: its `prompt`, else its `caption`, else its `text`. Raises DataError."""
    key = next((key for key in KEYS if key in record), None)
    value = None if key is None else record[key]
    if not isinstance(value, str) or not value.strip():
        got = f"a record with {list(record)}" if key is None else f"a record with {key} {value!r}"
        expected = f"a text that is not blank under one of {', '.join(KEYS)}"
        raise DataError(problem(got, expected, "each image needs a prompt", "correct or remove that record"))
    return value.strip()


def prompts_digest(prompts: Sequence[str]) -> str:
    """Hex digest of the prompts in their order: their identity in results."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
