"""Cells of the pages' tables: values with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def excess_cell(row: Mapping[str, Any]) -> str:
    value, low, high = (round(each) for each in (row["excess"], *row["ci95"]))
    return f"{value} [{low}, {high}]"


def span_cell(row: Mapping[str, Any], name: str, digits: int, unit: float = 1.0) -> str:
    spans = (row[name], *row[f"{name}_ci95"])
    value, low, high = (round(unit * each, digits) + 0.0 for each in spans)  # no minus before a zero
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
