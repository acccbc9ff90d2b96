"""What the side-by-sides share: clocks, turns, peak memory, and tables."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import quantiles
from unittest.mock import patch

import torch
from torch import Tensor, nn

from stepdistill.core.cost import count_calls

CPU, WALL = "step, CPU", "step, wall"
Rows = dict[str, list[dict[str, float]]]  # what each step, or process, of each side took


@dataclass
class Side:
    """One side: its step, the networks whose calls count, and CPU seconds by cause; the last cause is the rest."""

    step: Callable[[], object]
    nets: list[nn.Module]
    spent: dict[str, float]

    def timed(self, call: Callable, cause: str | Callable[..., str]) -> Callable:
        """`call`, which adds its CPU time to a cause."""

        @wraps(call)
        def wrapper(*args: object, **kwargs: object) -> object:
            name = cause if isinstance(cause, str) else cause(*args)
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] += time.process_time() - began

        return wrapper

    def measure(self) -> dict[str, float]:
        """Take one step."""
        self.spent = dict.fromkeys(self.spent, 0.0)
        with ExitStack() as stack:
            costs = [stack.enter_context(count_calls(net)) for net in self.nets]
            backward, clip = Tensor.backward, nn.utils.clip_grad_norm_  # both sides call these by name
            stack.enter_context(patch.object(Tensor, "backward", self.timed(backward, "backward")))
            stack.enter_context(patch.object(nn.utils, "clip_grad_norm_", self.timed(clip, "clip, optimizer")))
            wall, cpu = time.perf_counter(), time.process_time()
            self.step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        known = {**self.spent, "rest": cpu - sum(self.spent.values())}
        counts = {"calls": sum(c.calls for c in costs), "rows": sum(c.rows for c in costs)}
        return known | counts | {CPU: cpu, WALL: wall}


def interleaved(sides: Mapping[str, Side], warm: int, steps: int) -> Rows:
    """Each side's measured steps, taken in turn; another side begins each turn."""
    names = list(sides)
    rows: Rows = {name: [] for name in names}
    for turn in range(warm + steps):
        for n in range(len(names)):
            name = names[(turn + n) % len(names)]
            rows[name].append(sides[name].measure())
    return {name: found[warm:] for name, found in rows.items()}


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def beyond(work: Callable[[], object]) -> dict[str, float]:
    """This process's peak after `work`: in all, and beyond what it was before, when it had only imported."""
    before = peak()
    work()
    return {"peak MiB": peak(), "beyond imports": peak() - before}


def memory(script: Path, names: Sequence[str], rounds: int = 3) -> Rows:
    """The last line, JSON, that `script NAME` prints in a process of its own, for the names in turn."""
    rows: Rows = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, str(script), name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def ratios(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]], clock: str) -> list[float]:
    """`one / other` turn by turn: what disturbs a turn disturbs both sides of it."""
    return [a[clock] / b[clock] for a, b in zip(one, other, strict=True)]


def table(rows: Rows, keys: Sequence[str], unit: float) -> str:
    """A line a key and a column a side: the median and half the distance between the quartiles."""
    lines = ["".join(f"{cell:>20}" for cell in ("", *rows))]
    for key in keys:
        found = [quartiles([row[key] * unit for row in side]) for side in rows.values()]
        cells = [f"{middle:.1f} +- {(high - low) / 2:.1f}" for low, middle, high in found]
        lines.append("".join(f"{cell:>20}" for cell in (key, *cells)))
    return "\n".join(lines)


def surroundings() -> dict[str, object]:
    """What a measurement ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {processor}",
    }
