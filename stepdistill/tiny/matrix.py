"""The support matrix: which method runs on which family, as `tests/test_methods.py` finds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.tiny.benchmark import Results

TESTS = Path("tests/test_methods.py")
FAMILIES = {
    "sd": "SD 1.x, 2.x",
    "sdxl": "SDXL",
    "sd3": "SD3, 3.5",
    "flux": "Flux",
    "pixart_alpha": "PixArt-alpha",
    "pixart_sigma": "PixArt-Sigma",
    "sana": "SANA",
}


class Collected:
    """A pytest plugin that keeps what the cells' tests say of themselves, and how they end."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:  # noqa: ANN401
        facts = dict(report.user_properties)
        if report.when == "call" and "cell" in facts:
            seconds = round(report.duration, 2)
            self.cells[facts.pop("cell")] = {"outcome": report.outcome, "seconds": seconds} | facts


def measure_families(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Run every cell: two steps, the student folder, its proof in a plain pipeline, a picture in each row."""
    import pytest

    if name != "tiny-sd":  # the pipelines are random ones of their own
        return
    collected = Collected()
    pytest.main(["-q", str(TESTS)], plugins=[collected])
    for cell, facts in sorted(collected.cells.items()):
        results.put(cell, facts)


def matrix(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a method, a column a family: the largest difference between plain pipeline and student, or what failed."""
    methods = list(dict.fromkeys(key.split("/")[0] for key in rows))
    lines = ["| | " + " | ".join(FAMILIES.values()) + " |", "| --- " * (len(FAMILIES) + 1) + "|"]
    for method in methods:
        cells = [rows.get(f"{method}/{family}") for family in FAMILIES]
        shown = [f"{cell['proof']:.0e}" if cell and cell["outcome"] == "passed" else "no" for cell in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)
