"""The table of extraction: a LoRA cut from the fused network of a TSCD student, beside that student, by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.students.contract import CONTRACT, read_contract
from stepdistill.students.draw.call import student_call
from stepdistill.students.extract import Extraction, extract_student
from stepdistill.students.extracted import Extracted
from stepdistill.students.load import load_student
from stepdistill.students.lora.fuse import fuse_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, figures, prompts, reference
from tables.cells import excess_cell
from tables.recipes import CONFIGS, trained

FILE = CONFIGS / "consistency" / "tiny_sd_tscd.yaml"  # of the student that extracts are cut from
RANKS = (4, 8, 16, 64)
CUT = {"weights": False, "outputs": True}  # by the error of what, and whether inputs are collected for it
STEPS, PROMPTS = 4, 16


def measure_extraction(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Images of the student and of each extract in 4 steps, and what is left of the way from base to student."""
    if name != "tiny-sd":
        return
    run, student = load_config(Run, FILE, []), trained(FILE)
    ref, facts = reference(name, run, work), {"config": config_digest(run)}

    def drawn(folder: Path) -> dict[str, Any]:
        pipe = run.family.load()
        load_student(pipe, folder)
        return figures(pipe, student_call(run.family, run.method, pipe, STEPS), ref)

    def extract(rank: int, whitened: bool) -> dict[str, Any]:
        folder, made = extracted(work, rank, whitened)
        energy = [layer.energy for layer in made.layers.values()]
        return drawn(folder) | {"gap_left": list(asdict(made)["gap_left"].values()), "energy": min(energy)}

    results.once(f"{name}/student", partial(drawn, student), **facts)
    for rank in RANKS:
        for label, whitened in CUT.items():
            if not rows or label in rows:
                results.once(f"{name}/{label}/{rank}", partial(extract, rank, whitened), rank=rank, **facts)


def extracted(work: Path, rank: int, whitened: bool) -> tuple[Path, Extraction]:
    """The folder of a LoRA that is cut from the fused network of the TSCD student, made anew, and what was cut."""
    run, student, whole = load_config(Run, FILE, []), trained(FILE), work / "extraction" / "whole"
    if not (whole / CONTRACT).exists():
        fuse_student(student, whole)
    contract, folder = read_contract(student), folder_of(work, rank, whitened)
    times = {"timesteps": contract.timesteps, "num_inference_steps": len(contract.timesteps)}
    method = Extracted(tuned="", sha256="", whitened=whitened, eta=contract.eta, **times)
    captions = prompts(PROMPTS)
    made = extract_student(str(whole), run.family, folder, method=method, rank=rank, prompts=captions, overwrite=True)
    return folder, made


def folder_of(work: Path, rank: int, whitened: bool) -> Path:
    """The folder of an extract."""
    return work / "extraction" / f"{rank}-{whitened}"


def extraction_page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row of the student, and one for each extract."""
    heads = ["excess [95 %]", "paired", "diversity", "least energy of a layer", "x0 gap left, by step"]
    lines = [f"| in {STEPS} steps | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for key in sorted(rows, key=lambda key: (rows[key].get("rank", 0), key)):
        row, (_, _, label) = rows[key], key.partition("/")
        cut, _, rank = label.partition("/")
        title = f"rank {rank}, by {cut}" if rank else "the student, rank 64"
        energy = f"{row['energy']:.1%}" if rank else ""
        gap = ", ".join(f"{share:.1%}" for share in row["gap_left"]) if rank else ""
        cells = [excess_cell(row), f"{row['paired']:.1f}", f"{row['diversity']:.2f}", energy, gap]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
