"""Time of a cycle of DMD2, ours beside a plain loop over LoRAs and one over whole networks.

    python tests/bench/dmd2_cycle.py

A cycle is one update of the student and five of the fake score, in five steps; `dmd2_memory.py` says what it is made
of, and `dmd2_plain.py` holds both plain loops. The full fine-tune trains student and fake score whole, from the same
losses. One process takes the sides of a size in turn: at the bundled teacher's size, float32 without gradient
checkpointing, all three; at the size of Stable Diffusion 1.5, with gradient checkpointing, in bfloat16 and in float32,
the two over LoRAs, since three whole networks with their optimizers do not fit beside them. Peaks of memory are of a
process for each side, for one cycle.

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
WARM, CYCLES = {"tiny": 1}, {"tiny": 12, "SD 1.5, bf16": 3, "SD 1.5, fp32": 3}


def times(rows: Rows, other: str, clock: str = CPU) -> list[float]:
    """Quartiles of (ours / other)."""
    return [round(value, 3) for value in quartiles(ratios(rows[OURS], rows[other], clock))]


def summary(cycles: dict[str, Rows], processes: dict[str, Rows]) -> dict[str, object]:
    """The line for programs: of each size, the cycles in turn and those by process."""
    tiny = cycles["tiny"]
    line: dict[str, object] = {"name": "dmd2_cycle"}
    line |= {"lora_ratio": times(tiny, LORA)[1], "full_ratio": times(tiny, FULL)[1]}
    for size, rows in cycles.items():
        alone = processes[size]
        line[size] = {
            **{f"{other} ratio": times(rows, other) for other in rows if other != OURS},
            **{f"{other} ratio, wall": times(rows, other, WALL)[1] for other in rows if other != OURS},
            "peak_mib": {side: round(alone[side][0]["beyond imports"]) for side in alone},
            "calls": {side: alone[side][0]["calls"] for side in alone},
            **{"rank": SIZES[size].rank, "batch": SIZES[size].batch, "cycles": len(rows[OURS])},
        }
    return line | surroundings()


def main() -> None:
    if answered(SIZES):
        return
    cycles, processes = dict[str, Rows](), dict[str, Rows]()
    for size, sides in SIDES.items():
        # before this process grows: one begins with the peak of the one that starts it. Once: bytes repeat
        found = memory(Path(__file__), [f"{size}/{side}" for side in sides], rounds=1)
        processes[size] = {side: found[f"{size}/{side}"] for side in sides}
        print(size, table(processes[size], ("beyond imports", "calls", CPU), 1), sep="\n", flush=True)
    for size, sides in SIDES.items():
        made = {side: make(side, SIZES[size])[0] for side in sides}
        cycles[size] = interleaved(made, WARM.get(size, 0), CYCLES[size])
        del made  # before the next size's networks
        print(f"{size}, ms of a cycle: median and half the distance between the quartiles")
        print(table(cycles[size], (*CAUSES, CPU, WALL), 1e3))
        for other in sides:
            if other != OURS:
                print(f"ours / {other}, quartiles: {times(cycles[size], other)}", flush=True)
    print(json.dumps(summary(cycles, processes)))


if __name__ == "__main__":
    main()
