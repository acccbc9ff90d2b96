"""Time of a cycle of DMD2, ours beside a plain loop over LoRAs and one over whole networks.

    python tests/bench/dmd2_cycle.py

A cycle is one update of the student and five of the fake score, in five steps; `dmd2_memory.py` says what it is made
of, and `dmd2_plain.py` holds both plain loops. The full fine-tune trains student and fake score whole, from the same
losses. At the bundled teacher's size, float32 without gradient checkpointing, one process takes the three in turn. At
the size of Stable Diffusion 1.5, with gradient checkpointing, each side has a process of its own for one cycle, in
bfloat16 and in float32; three whole networks with their optimizers do not fit beside each other there, so the full
fine-tune is left out.

A ratio is (ours / theirs), the median over turns, in seconds of CPU on one thread, which other programs disturb least.
The plain loops' optimizers step as torch's do by default, and ours in one kernel, as in a run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from dmd2_memory import CAUSES, SETUPS, answered, make
from harness import CPU, WALL, Rows, interleaved, memory, quartiles, ratios, surroundings, table

LORA, FULL, OURS = "plain LoRA", "full fine-tune", "ours"
TINY = replace(SETUPS["tiny"], rank=64, batch=16, checkpointing=False)
SIZES = {"tiny": TINY, "SD 1.5, bf16": SETUPS["SD 1.5"], "SD 1.5, fp32": replace(SETUPS["SD 1.5"], dtype=torch.float32)}
SIDES = {"tiny": (LORA, FULL, OURS), "SD 1.5, bf16": (LORA, OURS), "SD 1.5, fp32": (LORA, OURS)}
WARM, CYCLES = 1, 12


def times(rows: Rows, other: str, clock: str = CPU) -> list[float]:
    """Quartiles of (ours / other)."""
    return [round(value, 3) for value in quartiles(ratios(rows[OURS], rows[other], clock))]


def summary(cycles: Rows, processes: dict[str, Rows]) -> dict[str, object]:
    """The line for programs: `cycles` of the tiny network in turn, and each size by process."""
    line: dict[str, object] = {
        "name": "dmd2_cycle",
        "lora_ratio": times(cycles, LORA)[1],
        "full_ratio": times(cycles, FULL)[1],
        "lora_ratio_wall": times(cycles, LORA, WALL)[1],
        "full_ratio_wall": times(cycles, FULL, WALL)[1],
    }
    for size, rows in processes.items():
        line[size] = {
            "cpu_s": {side: round(rows[side][0][CPU], 2) for side in rows},
            "lora_ratio": times(rows, LORA)[1],
            "peak_mib": {side: round(rows[side][0]["beyond imports"]) for side in rows},
            "calls": {side: rows[side][0]["calls"] for side in rows},
        }
    shapes = {size: {"rank": setup.rank, "batch": setup.batch} for size, setup in SIZES.items()}
    return line | {"shapes": shapes, "cycles": CYCLES} | surroundings()


def main() -> None:
    if answered(SIZES):
        return
    processes: dict[str, Rows] = {}
    for size, sides in SIDES.items():
        # before this process grows: one begins with the peak of the one that starts it. Once: bytes repeat
        found = memory(Path(__file__), [f"{size}/{side}" for side in sides], rounds=1)
        processes[size] = {side: found[f"{size}/{side}"] for side in sides}
        print(size, table(processes[size], ("beyond imports", "calls", CPU), 1), sep="\n", flush=True)
    cycles = interleaved({side: make(side, TINY)[0] for side in SIDES["tiny"]}, WARM, CYCLES)
    print("tiny, ms of a cycle: median and half the distance between the quartiles")
    print(table(cycles, (*CAUSES, CPU, WALL), 1e3))
    for other in (LORA, FULL):
        print(f"ours / {other}, quartiles: {times(cycles, other)}")
    print(json.dumps(summary(cycles, processes)))


if __name__ == "__main__":
    main()
