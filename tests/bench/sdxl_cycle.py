"""A cycle of DMD2 on SDXL at its real size, with random weights on a CPU: memory, predicted and measured.

    python tests/bench/sdxl_cycle.py

takes 12 GB. The same of other networks and methods, `sd15`, `sd15_lcm` (LCM, batch 2, latents of 64 x 64), `sd3` or
`pixart`: name one. What a cycle is, and how memory is measured: `eval/tables/memory_at_size.py`.

`ratio` and `static_ratio` are (measured / predicted) of the peak and of what stays between steps. `seconds` is the
measured cycle's wall time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import surroundings

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from tables.memory_at_size import SHAPES, cycle_of, figures_of_cycle


def summary(name: str, found: dict[str, Any]) -> dict[str, object]:
    """The line for programs."""
    said, seen, case = found["predicted"], found["measured"], cycle_of(name)
    run = case.run
    return {
        "name": "sdxl_cycle",
        "case": name,
        "peak_gib": gibibytes(seen["peak"]),
        "predicted_gib": gibibytes(said["peak"]),
        "ratio": found["ratio"],
        "static_gib": gibibytes(seen["static"]),
        "static_predicted_gib": gibibytes(said["static"]),
        "static_ratio": found["static_ratio"],
        "seconds": round(seen["seconds"], 1),
        "parameters": said["parameters"],
        "method": type(run.method).__name__,
        "steps": run.train.max_train_steps,
        "batch": run.train.train_batch_size,
        "latents": list(case.latents),
        "rank": run.lora.rank,
        **surroundings(),
    }


def table(found: dict[str, Any]) -> str:
    """GiB by role, and both sides of what stays and of the peak."""
    said, seen = found["predicted"], found["measured"]
    heads = ("weights", "gradients", "optimizer")
    lines = [row("GiB", heads), *(row(name, map(gibibytes, part)) for name, part in said["parts"].items())]
    lines += ["", row("", ("predicted", "measured", "ratio"))]
    for key, ratio in (("static", "static_ratio"), ("peak", "ratio")):
        lines.append(row(key, (gibibytes(said[key]), gibibytes(seen[key]), found[ratio])))
    at_peak = {key: gibibytes(said[key]) for key in ("gradients", "activations")}
    return "\n".join([*lines, f"of the predicted peak: {at_peak}"])


def row(name: str, cells: Any) -> str:
    return "".join(f"{cell:>14}" for cell in (name, *cells))


def gibibytes(size: float) -> float:
    return round(size / 2**30, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", default="sdxl", choices=sorted(SHAPES))
    name = parser.parse_args().case
    found = figures_of_cycle(name)
    print(table(found))
    print(json.dumps(summary(name, found)))


if __name__ == "__main__":
    main()
