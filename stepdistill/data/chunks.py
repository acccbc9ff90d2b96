"""Files that a teacher fills before training: each whole or not there, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import DataError, problem


def save_chunk(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], complete: int) -> None:
    """Write tensors with their facts aside, and rename.

    Raises:
        DataError: the disk refuses. No part stays behind, and the message says that `complete` samples do.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part, dict(facts))
        part.replace(file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise DataError(
            problem(
                f"{file}, which cannot be written ({error})",
                "room for it",
                f"the first {complete} samples are complete, and stay usable",
                f"make room and start again, which goes on from there, or set data.count={complete}",
            )
        ) from error


def unmade(
    stored: Path, facts: Mapping[str, object], chunks: int, whole: Callable[[int], bool], rank: int, world: int
) -> list[int]:
    """The numbers of the chunks that this process is to make; where any is missing their facts are written first.

    Args:
        stored: the file of the facts, in the folder of the chunks.
        whole: whether a chunk is there with all its samples.

    Raises:
        DataError: what lies there depends on other facts.
    """
    if stored.exists():
        compare(stored.parent, facts, json.loads(stored.read_text()))
    # chunks without their facts are of nobody knows which teacher
    missing = [k for k in range(chunks) if not (stored.exists() and whole(k))]
    if missing:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(facts, indent=1) + "\n")
    # by number, not by place in the list, which another process may already have shortened
    return [k for k in missing if k % world == rank]


def compare(folder: Path, facts: Mapping[str, object], have: Mapping[str, object]) -> None:
    """Raise DataError where what lies in a folder depends on other facts."""
    odd = [key for key in facts if have.get(key) != facts[key]]
    if odd:
        raise DataError(
            problem(
                f"samples in {folder} with other {', '.join(odd)}: {[have.get(key) for key in odd]}",
                f"{[facts[key] for key in odd]}",
                "those of another teacher or setting would teach the wrong thing",
                "name another data.folder, or remove this one",
            )
        )
