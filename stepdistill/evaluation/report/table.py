"""Evaluation folders as flat rows, `rows.csv`, and the tables of a report, with comparable distances in one column."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import written_whole
from stepdistill.evaluation.report.fields import (
    CLIP,
    DISTANCE,
    FEATURES,
    FIELDS,
    LIKELIHOOD,
    MEASURED,
    PIXELS,
    RUN,
    SAMPLING,
    SETTING,
    SPREAD,
    TITLES,
    UNKNOWN,
    ComparisonKey,
)

SCHEMA = "stepdistill.eval/1"

# what differs between comparison keys, and why it matters
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


def read_evaluation(folder: Path) -> Evaluation:
    """An evaluation folder. Raises DataError for one without an `eval.json` of this schema."""
    file = folder / "eval.json"
    todo = "name a folder that `stepdistill eval run` or `score` has written, or run it again"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "an evaluation is read from that file"
        raise DataError(problem(f"{file}, which cannot be read ({error})", "JSON", why, todo)) from error
    schema = _at(facts, "schema")
    if schema != SCHEMA:
        why = "the same field may mean something else in another schema"
        raise DataError(problem(f"{file} with schema {schema!r}", repr(SCHEMA), why, todo))
    rows = facts.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(problem(f"{file} without a list of rows", "`rows`", "rows hold what was measured", todo))
    grids = [folder / "grids" / name for name in facts.get("grids", [])]
    return Evaluation(folder.resolve().name, facts, [file for file in grids if file.exists()])


def comparison_key(facts: Mapping[str, Any], row: Mapping[str, Any]) -> ComparisonKey:
    """The key of a row of `eval.json`; a row without a distance has the metric of the rows beside it."""
    metrics = [one.get("metrics") or {} for one in (row, *facts["rows"])]
    return ComparisonKey(
        next((key for each in metrics for key in TITLES if key in each), "fd"),
        _at(facts, "features.id") or UNKNOWN,
        row.get("n"),
        _at(facts, "reference.sha256") or UNKNOWN,
        _at(facts, "protocol.name") or UNKNOWN,
    )


def key_differences(evaluations: Sequence[Evaluation]) -> list[str]:
    """In words, what keeps the rows that were measured out of one column; empty where they may share it."""
    keys = [
        (comparison_key(one.facts, row), one.name)
        for one in evaluations
        for row in one.facts["rows"]
        if row.get("metrics")  # any other row has nothing to compare
    ]
    words = []
    for field, (label, why) in DIFFERENCE.items():
        names: dict[object, dict[str, None]] = {}
        for key, name in keys:
            names.setdefault(getattr(key, field), {})[name] = None
        if len(names) > 1:
            each = ", ".join(f"{value} ({', '.join(of_value)})" for value, of_value in names.items())
            words.append(f"{label}: {each}: {why}")
    return words


def flat_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, object]]:
    """One dict for each row of each `eval.json`, in their order, with the keys `FIELDS`; None where unmeasured."""
    rows = []
    for one in evaluations:
        for row in one.facts["rows"]:
            key = comparison_key(one.facts, row)
            values = {name: _at(row, path.format(key=key.key)) for name, path in (SETTING | MEASURED).items()}
            reasons = "; ".join(row.get("comparable_reasons") or [])
            values |= key._asdict() | {"evaluation": one.name, "comparable_reasons": reasons}
            rows.append({field: values[field] for field in FIELDS})
    return rows


def write_csv(rows: Sequence[Mapping[str, object]], file: Path) -> None:
    """Write `flat_rows` below a header; an empty field is a value that was not measured."""
    with written_whole(file) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _at(value: Any, path: str) -> Any:  # noqa: ANN401
    """The value at a path of keys and places; None where something on the way is absent or null."""
    for step in path.split("."):
        match value:
            case dict():
                value = value.get(step)
            case [low, high]:  # the ends of an interval
                value = (low, high)[int(step)]
            case float() if step == "value":  # of a file from before that value had an interval
                pass
            case _:
                return None
    return value


Row = Mapping[str, Any]  # of `flat_rows`; empty where the column has nothing to say of it
Cells = list[tuple[str, str]]  # of each row the value, and what stands below it
Group = tuple[list[str], list[tuple[str, Cells]]]  # the lines of a heading, and columns with a heading each


class PageTable(NamedTuple):
    """A table of the page: its caption, rows with their numbers, and groups of columns with a cell for each row."""

    caption: str
    rows: list[tuple[int, Row]]
    groups: list[Group]


def tables(rows: Sequence[Row]) -> list[PageTable]:
    """Distances and costs of all rows, the measures on features by comparison key, the rest of all rows.

    In the first, each comparison key and each CLIP model has columns of its own.
    """
    numbered, keys = list(enumerate(rows, start=1)), comparison_keys(rows)
    distances = [(_lines(key), _columns(DISTANCE, with_key(key, rows), TITLES[key.key])) for key in keys]
    scores = [([model], _columns(CLIP, with_model(model, rows))) for model in clip_models(rows)]
    sampling = (["Sampling"], _columns(SAMPLING, rows))
    likelihood = (["Tokens under the teacher"], _columns(LIKELIHOOD, rows))
    pages = [PageTable("Distances and costs", numbered, [*distances, *scores, likelihood, sampling])]
    for key in keys:
        mine = [(place, row) for place, row in numbered if _key(row) == key]
        group = (_lines(key), _columns(FEATURES, [row for _, row in mine], TITLES[key.key]))
        pages.append(PageTable("Other measures on features", mine, [group]))
    beside = (["Compared with the teacher's images"], _columns(PIXELS, rows))
    pages.append(PageTable("Images and runs", numbered, [beside, (["Run"], _columns(RUN, rows))]))
    filled = [page._replace(groups=[group for group in page.groups if group[1]]) for page in pages]
    return [page for page in filled if page.groups]


def comparison_keys(rows: Iterable[Row]) -> list[ComparisonKey]:
    """Each comparison key of the rows once, in their order."""
    return list(dict.fromkeys(_key(row) for row in rows))


def with_key(key: ComparisonKey, rows: Iterable[Row]) -> list[Row]:
    """The rows, those of another key emptied."""
    return [row if _key(row) == key else {} for row in rows]


def clip_models(rows: Iterable[Row]) -> list[str]:
    """Each CLIP model that has scored a row."""
    return list(dict.fromkeys(_model(row) for row in rows if row["clip_score"] is not None))


def with_model(model: str, rows: Iterable[Row]) -> list[Row]:
    """The rows, those of another CLIP model emptied."""
    return [row if row and _model(row) == model else {} for row in rows]


def digits(values: Iterable[float | None]) -> int:
    """Decimals that show three digits of the middle value, and no more than the values have."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 0
    wanted = 2 - math.floor(math.log10(statistics.median(sizes)))
    has = max(len(f"{size:.9f}".rstrip("0").partition(".")[2]) for size in sizes)
    return max(0, min(wanted, has))


def number(value: float | None, decimals: int) -> str:
    """A number as text, with the sign that typesetters use; a dash for None."""
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")


def _columns(fields: Mapping[str, str], rows: Sequence[Row], title: str = "") -> list[tuple[str, Cells]]:
    """Heading and cells of each field that some row has."""
    columns = []
    for heading, field in fields.items():
        values = [row.get(field) for row in rows]
        if any(value is not None for value in values):
            decimals = digits(values)
            cells = [(number(row.get(field), decimals), _below(field, row, decimals)) for row in rows]
            columns.append((heading.format(title=title), cells))
    return columns


def _lines(key: ComparisonKey) -> list[str]:
    n = UNKNOWN if key.n is None else key.n
    return [key.features_id, f"N {n}, protocol {key.protocol}", f"reference {key.reference_sha256[:12]}"]


def _key(row: Row) -> ComparisonKey:
    return ComparisonKey(**{field: row[field] for field in ComparisonKey._fields})


def _model(row: Row) -> str:
    return row["clip_model"] or UNKNOWN


def _below(field: str, row: Row, decimals: int) -> str:
    spread = [row.get(name) for name in SPREAD.get(field, [])]
    if not spread or None in spread:
        return ""
    texts = [number(value, decimals) for value in spread]
    return f"± {texts[0]}" if len(texts) == 1 else f"[{', '.join(texts)}]"
