"""The support matrix: which method runs on which family, as `tests/test_methods.py` finds it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tables.benchmark import Results

TESTS = Path("tests/test_methods.py")
FAMILIES = {
    "sd": "SD 1.x, 2.x",
    "sdxl": "SDXL",
    "sd3": "SD3, 3.5",
    "flux": "Flux",
    "klein": "FLUX.2 klein",
    "pixart_alpha": "PixArt-alpha",
    "pixart_sigma": "PixArt-Sigma",
    "sana": "SANA",
    "z_image": "Z-Image",
    "qwen_image": "Qwen-Image",
    "krea2": "Krea 2",
    "wan": "Wan",
    "ltx": "LTX-Video",
}


def measure_families(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Run every cell, or those of some methods by class name: two steps, the student folder, its proof in a plain
    pipeline, an image in each row."""
    if name != "tiny-sd":  # the pipelines are random ones of their own
        return
    file = work / "families.xml"
    chosen = ["-k", " or ".join(rows)] if rows else []
    subprocess.run([sys.executable, "-m", "pytest", "-q", str(TESTS), f"--junitxml={file}", *chosen], check=False)
    for case in ElementTree.parse(file).iter("testcase"):
        facts = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "cell" in facts:
            passed = {"proof": float(facts["proof"])} if case.find("failure") is None else {}
            results.put(facts["cell"], passed | {"seconds": round(float(case.attrib["time"]), 1)})


def matrix(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a method, a column a family: the largest difference between plain pipeline and student, or what failed."""
    methods = list(dict.fromkeys(key.split("/")[0] for key in rows))
    lines = ["| | " + " | ".join(FAMILIES.values()) + " |", "| --- " * (len(FAMILIES) + 1) + "|"]
    for method in methods:
        cells = [rows.get(f"{method}/{family}") for family in FAMILIES]
        shown = [f"{cell['proof']:.0e}" if cell and "proof" in cell else "no" for cell in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)
