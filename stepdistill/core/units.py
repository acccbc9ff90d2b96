"""Long work in numbered units, each in a folder whole or not at all: a run that ended goes on where it was."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.core.files import write_text


@dataclass(frozen=True)
class Units:
    """Rows 0 to `count` - 1 in units of `size`, of which the last may have fewer."""

    count: int
    size: int

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def rows(self, k: int) -> range:
        """The numbers of the rows of unit k."""
        return range(k * self.size, min((k + 1) * self.size, self.count))

    def missing(self, whole: Callable[[int], bool], rank: int = 0, world: int = 1) -> list[int]:
        """The numbers of the units that are not whole and that process `rank` of `world` makes.

        They go by number, not by place among the missing, which another process may already have shortened.
        """
        return [k for k in range(rank, len(self), world) if not whole(k)]


def changed_facts(file: Path, facts: Mapping[str, object]) -> dict[str, tuple[Any, Any]]:
    """The facts, as JSON, that a folder has and those that are wanted, where they differ; none where it has no file."""
    if not file.exists():
        return {}
    have, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(dict(facts)))
    keys = [key for key in have | wanted if have.get(key) != wanted.get(key)]
    return {key: (have.get(key), wanted.get(key)) for key in keys}


def write_facts(file: Path, facts: Mapping[str, object]) -> None:
    """Keep what every unit of a folder depends on; before the first of them, which would be of nobody knows what.

    Several processes may do so at once.
    """
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.stepdistill.part")
    write_text(file, json.dumps(dict(facts), indent=1), part)
