"""The columns of a report's tables: which measures there are, and numbers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepdistill.evaluation.report.table import UNKNOWN, Identity

Row = Mapping[str, Any]  # of `flat`; empty where the column has nothing to say of it
Cells = list[tuple[str, str]]  # of each row the value, and what stands below it
Group = tuple[list[str], list[tuple[str, Cells]]]  # the lines of a heading, and columns with a heading each

TITLES = {"fd": "fd", "fid": "FID"}  # the key follows from the features, and the name from the key


@dataclass(frozen=True)
class Measure:
    """A column: heading, key of `flat`'s rows, and the keys below it: two of an interval, or one of what is ± it."""

    heading: str
    key: str
    spread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the page: its caption, rows with their numbers, and groups of columns with a cell for each row."""

    caption: str
    rows: list[tuple[int, Row]]
    groups: list[Group]


DISTANCE = (
    Measure("{title}", "distance", ("distance_low", "distance_high")),
    Measure("Excess", "excess", ("excess_low", "excess_high")),
)
CLIP = (
    Measure("CLIP score", "clip_score", ("clip_stderr",)),
    Measure("Minus teacher's", "clip_delta", ("clip_delta_low", "clip_delta_high")),
)
SAMPLING = (
    Measure("Steps", "steps"),
    Measure("Guidance", "guidance"),
    Measure("NFE", "nfe"),
    Measure("Seconds an image", "seconds_per_image"),
    Measure("Speed-up", "speedup_vs_teacher"),
)
FEATURES = (
    Measure("{title}, bias-corrected", "bias_corrected"),
    Measure("Mean term", "mean_term"),
    Measure("Covariance term", "cov_term"),
    Measure("Noise floor", "noise_floor"),
    Measure("KID", "kid", ("kid_std",)),
    Measure("Precision", "precision"),
    Measure("Recall", "recall"),
    Measure("Density", "density"),
    Measure("Coverage", "coverage"),
    Measure("CMMD", "cmmd"),
    Measure("Vendi", "vendi"),
    Measure("Diversity", "diversity"),
    Measure("over the teacher's", "diversity_vs_teacher"),
    Measure("Paired distance", "paired_features"),
)
PIXELS = (Measure("PSNR (dB)", "psnr"), Measure("SSIM", "ssim"), Measure("LPIPS", "lpips"))
RUN = (
    Measure("Seed", "seed"),
    Measure("N", "n"),
    Measure("Skipped", "n_skipped"),
    Measure("Calls", "calls"),
    Measure("Latency p50 (ms)", "latency_ms_p50"),
    Measure("Latency p90 (ms)", "latency_ms_p90"),
    Measure("Peak memory (MiB)", "peak_mem_mib"),
)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Distances and costs of all rows, the measures on features by identity, the rest of all rows.

    In the first, each identity and each CLIP model has columns of its own.
    """
    everywhere = list(enumerate(rows, start=1))
    distances = [(_lines(one), columns(DISTANCE, only(one, rows), TITLES[one.key])) for one in identities(rows)]
    scores = [([model], columns(CLIP, of_model(model, rows))) for model in models(rows)]
    found = [Table("Distances and costs", everywhere, [*distances, *scores, (["Sampling"], columns(SAMPLING, rows))])]
    for one in identities(rows):
        mine = [(place, row) for place, row in everywhere if _identity(row) == one]
        group = (_lines(one), columns(FEATURES, [row for _, row in mine], TITLES[one.key]))
        found.append(Table("Other measures on features", mine, [group]))
    pixels = (["Beside the teacher's images"], columns(PIXELS, rows))
    found.append(Table("Images and runs", everywhere, [pixels, (["Run"], columns(RUN, rows))]))
    filled = [replace(table, groups=[group for group in table.groups if group[1]]) for table in found]
    return [table for table in filled if table.groups]


def identities(rows: Iterable[Row]) -> list[Identity]:
    """Each identity of the rows once, in their order."""
    return list(dict.fromkeys(_identity(row) for row in rows))


def only(one: Identity, rows: Iterable[Row]) -> list[Row]:
    """The rows, those of another identity emptied."""
    return [row if _identity(row) == one else {} for row in rows]


def models(rows: Iterable[Row]) -> list[str]:
    """Each CLIP model that has scored a row."""
    return list(dict.fromkeys(_model(row) for row in rows if row["clip_score"] is not None))


def of_model(model: str, rows: Iterable[Row]) -> list[Row]:
    """The rows, those of another CLIP model emptied."""
    return [row if row and _model(row) == model else {} for row in rows]


def columns(measures: Iterable[Measure], rows: Sequence[Row], title: str = "") -> list[tuple[str, Cells]]:
    """Heading and cells of each measure that some row has."""
    found = []
    for measure in measures:
        values = [row.get(measure.key) for row in rows]
        if any(value is not None for value in values):
            decimals = digits(values)
            cells = [(number(row.get(measure.key), decimals), _below(measure, row, decimals)) for row in rows]
            found.append((measure.heading.format(title=title), cells))
    return found


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


def _lines(one: Identity) -> list[str]:
    n = UNKNOWN if one.n is None else one.n
    return [one.features_id, f"N {n}, protocol {one.protocol}", f"reference {one.reference_sha256[:12]}"]


def _identity(row: Row) -> Identity:
    return Identity(**{field: row[field] for field in Identity._fields})


def _model(row: Row) -> str:
    return row["clip_model"] or UNKNOWN


def _below(measure: Measure, row: Row, decimals: int) -> str:
    found = [row.get(key) for key in measure.spread]
    if not found or None in found:
        return ""
    texts = [number(value, decimals) for value in found]
    return f"± {texts[0]}" if len(texts) == 1 else f"[{', '.join(texts)}]"
