"""Merge evaluations on one page, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stepdistill.core.files import write_text
from stepdistill.evaluation.inputs import labels
from stepdistill.evaluation.report.page import page
from stepdistill.evaluation.report.table import flat_rows, key_differences, read_evaluation, write_csv


def compare_evaluations(folders: Sequence[Path], out: Path, csv: Path | None) -> list[str]:
    """Merge evaluations on one page, unlike ones in columns of their own. Returns what they differ in, in words."""
    names = labels([str(folder) for folder in folders])
    evaluations = [replace(read_evaluation(folder), name=name) for folder, name in zip(folders, names, strict=True)]
    for file in (out, csv):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(evaluations, "Evaluations compared"))
    if csv is not None:
        write_csv(flat_rows(evaluations), csv)
    return key_differences(evaluations)
