"""Evaluation folders as flat rows: what each measured, which distances may share a column, and `rows.csv`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import written_whole

SCHEMA = "stepdistill.eval/1"
KEYS = ("fid", "fd")  # a distance is one or the other; nothing here turns one into the other
UNKNOWN = "unknown"
SETTING = ("name", "role", "student", "steps", "guidance", "seed", "n_skipped")

# what differs between identities, and why it matters
DIFFERENCE = {
    "key": ("metric", "they are distances in other spaces"),
    "features_id": ("features", "each extractor, weights file and resizing has a scale of its own"),
    "n": ("N", "a distance falls as N grows"),
    "reference_sha256": ("reference", "they are distances from other images"),
    "protocol": ("protocol", "it fixes prompts, resolution and preprocessing"),
}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder: its name, the contents of `eval.json`, and the sheets of images, sorted by name."""

    name: str
    facts: dict[str, Any]
    grids: list[Path]


class Identity(NamedTuple):
    """What two distances must have in common to be compared; its fields are keys of `flat`'s rows."""

    key: str
    features_id: str
    n: int | None
    reference_sha256: str
    protocol: str


def read(folder: Path) -> Evaluation:
    """An evaluation folder. Raises DataError for one without an `eval.json` of this schema."""
    file = folder / "eval.json"
    todo = "name a folder that `stepdistill eval run` or `score` has written, or run it again"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "an evaluation is known only by that file"
        raise DataError(problem(f"{file}, which cannot be read ({error})", "JSON", why, todo)) from error
    if _at(facts, "schema") != SCHEMA:
        why = "another schema may mean other things by the same words"
        raise DataError(problem(f"{file} with schema {_at(facts, 'schema')!r}", repr(SCHEMA), why, todo))
    rows = facts.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(problem(f"{file} without a list of rows", "`rows`", "they are what was measured", todo))
    grids = [folder / "grids" / name for name in facts.get("grids", [])]
    return Evaluation(folder.resolve().name, facts, [file for file in grids if file.exists()])


def identity(facts: Mapping[str, Any], row: Mapping[str, Any]) -> Identity:
    """The identity of a row of `eval.json`; a row without a distance has the key of the rows beside it."""
    named = [_at(one, "metrics") or {} for one in (row, *facts["rows"])]
    return Identity(
        next((key for metrics in named for key in KEYS if key in metrics), "fd"),
        _at(facts, "features", "id") or UNKNOWN,
        row.get("n"),
        _at(facts, "reference", "sha256") or UNKNOWN,
        _at(facts, "protocol", "name") or UNKNOWN,
    )


def alike(evaluations: Sequence[Evaluation]) -> list[str]:
    """In words, what keeps the rows that were measured out of one column; empty where they may share it."""
    found = [
        (identity(one.facts, row), one.name)
        for one in evaluations
        for row in one.facts["rows"]
        if row.get("metrics")  # any other row has nothing to compare
    ]
    words = []
    for field, (label, why) in DIFFERENCE.items():
        values: dict[object, dict[str, None]] = {}
        for one, name in found:
            values.setdefault(getattr(one, field), {})[name] = None
        if len(values) > 1:
            each = ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
            words.append(f"{label}: {each}: {why}")
    return words


def flat(evaluations: Sequence[Evaluation]) -> list[dict[str, object]]:
    """One dict for each row of each `eval.json`, in their order, with the keys `FIELDS`; None where unmeasured."""
    rows = []
    for one in evaluations:
        for row in one.facts["rows"]:
            same = identity(one.facts, row)
            values = {field: _at(row, *path) for field, path in _paths(same.key).items()}
            reasons = "; ".join(row.get("comparable_reasons") or [])
            values |= same._asdict() | {"evaluation": one.name, "comparable_reasons": reasons}
            rows.append({field: values[field] for field in FIELDS})
    return rows


def write_csv(rows: Sequence[Mapping[str, object]], file: Path) -> None:
    """Write `flat`'s rows below a header; an empty field is a value that was not measured."""
    with written_whole(file) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _paths(key: str) -> dict[str, tuple[str | int, ...]]:
    """Where each flat value lies in a row of `eval.json`."""
    metrics, cost = "metrics", "cost"
    delta = (metrics, "delta_vs_teacher")
    return {
        **{name: (name,) for name in SETTING},
        "distance": (metrics, key, "value"),
        "distance_low": (metrics, key, "ci95", 0),
        "distance_high": (metrics, key, "ci95", 1),
        **{name: (metrics, key, name) for name in ("bias_corrected", "mean_term", "cov_term", "noise_floor")},
        "excess": (*delta, key, "value"),
        "excess_low": (*delta, key, "ci95", 0),
        "excess_high": (*delta, key, "ci95", 1),
        "kid": (metrics, "kid", "value"),
        "kid_std": (metrics, "kid", "std"),
        **{name: (metrics, "prdc", name) for name in ("precision", "recall", "density", "coverage")},
        **{name: (metrics, name) for name in ("cmmd", "vendi", "diversity", "diversity_vs_teacher")},
        "clip_score": (metrics, "clip_score", "value"),
        "clip_stderr": (metrics, "clip_score", "stderr"),
        "clip_model": (metrics, "clip_score", "model"),
        "clip_delta": (*delta, "clip_score", "value"),
        "clip_delta_low": (*delta, "clip_score", "ci95", 0),
        "clip_delta_high": (*delta, "clip_score", "ci95", 1),
        "paired_features": (metrics, "paired", "features"),
        **{name: (metrics, "paired", name) for name in ("psnr", "ssim", "lpips")},
        **{name: (cost, name) for name in ("calls", "nfe", "seconds_per_image")},
        "latency_ms_p50": (cost, "latency_ms", "p50"),
        "latency_ms_p90": (cost, "latency_ms", "p90"),
        **{name: (cost, name) for name in ("peak_mem_mib", "speedup_vs_teacher")},
        "comparable": ("comparable",),
    }


FIELDS = tuple(dict.fromkeys(("evaluation", *SETTING, *Identity._fields, *_paths("fd"), "comparable_reasons")))


def _at(found: Any, *path: str | int) -> Any:  # noqa: ANN401
    """The value at a path of keys and places; None where something on the way is absent or null."""
    for step in path:
        if isinstance(found, dict):
            found = found.get(step)
        elif isinstance(found, list) and isinstance(step, int) and step < len(found):
            found = found[step]
        else:
            return None
    return found
