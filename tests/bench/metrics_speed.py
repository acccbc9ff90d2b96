"""Inception's features and the final Frechet distance, beside torchmetrics and scipy: seconds of CPU on one thread.

    python tests/bench/metrics_speed.py

Features: the same random weights in torchmetrics' network, called as its metrics call it, and in ours with its resize,
so that both compute the same; `features_error` is the relative difference of the two. Distance: Gaussians of 5,000
correlated features of 2048 dimensions; ours with the reference's root at hand, as every row after the first has it,
beside `|mu_a - mu_b|^2 + tr(cov_a + cov_b - 2 sqrtm(cov_a cov_b))` with scipy's root, as pytorch-fid and clean-fid
compute it.

Sides take turns. The speed-ups are medians over turns of (reference / ours), in seconds of CPU, which other programs
disturb least; the quartiles stand beside them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from harness import CPU, WALL, Rows, Side, interleaved, quartiles, ratios, surroundings, table
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import frechet
from stepdistill.evaluation.metrics.inception import inception, random_state
from stepdistill.evaluation.metrics.stats import Stats

FEATURES, DISTANCE = ("torchmetrics", "ours"), ("scipy", "ours")
WARM = 1


@dataclass(frozen=True)
class Setup:
    """Images and turns of the features, samples and dimensions of the distance, and turns of it."""

    sizes: tuple[int, ...] = (64, 512)
    images: int = 16
    turns: int = 9
    samples: int = 5000
    dim: int = 2048
    distances: int = 5


class Networks:
    """Both sides over one file of random weights; BatchNorms as training leaves them, not as they start."""

    def __init__(self) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        generator = torch.Generator().manual_seed(1)
        state = random_state(0) | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
        for name, tensor in state.items():
            if ".bn." in name and tensor.is_floating_point():
                state[name] = tensor + 0.3 * torch.rand(tensor.shape, generator=generator)
        with TemporaryDirectory() as folder:
            file = Path(folder) / "weights.pth"
            torch.save(state, file)
            self.reference = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
            self.ours = inception(file, "torchmetrics", allow_unknown_weights=True)

    @torch.no_grad()
    def theirs(self, images: Tensor) -> Tensor:
        return self.reference(images)


def features(networks: Networks, size: int, setup: Setup) -> tuple[Rows, float]:
    """What each turn took, and the relative difference of the features."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (setup.images, 3, size, size), generator=generator, dtype=torch.uint8)
    want, got = networks.theirs(images), networks.ours(images)
    steps = partial(networks.theirs, images), partial(networks.ours, images)
    sides = {name: Side(step, [], {}) for name, step in zip(FEATURES, steps, strict=True)}
    return interleaved(sides, WARM, setup.turns), ((got - want).norm() / want.norm()).item()


def gaussians(setup: Setup) -> tuple[Stats, Stats]:
    """A row and a reference: correlated features whose spectrum falls by two decades."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(setup.dim, setup.dim, generator=generator) * torch.logspace(0, -2, setup.dim).unsqueeze(1)
    row, ref = (torch.randn(setup.samples, setup.dim, generator=generator) @ mix for _ in range(2))
    return Stats.of(1.1 * row + 0.05), Stats.of(ref)


def by_sqrtm(a: Stats, b: Stats) -> float:
    """The distance as most tools compute it."""
    from scipy.linalg import sqrtm

    root = torch.from_numpy(sqrtm((a.cov @ b.cov).numpy()))
    return ((a.mean - b.mean).square().sum() + (a.cov + b.cov - 2 * root.real).trace()).item()


def distance(setup: Setup) -> tuple[Rows, float]:
    """What each turn took, and the relative difference of the distances."""
    row, ref = gaussians(setup)
    want, got = by_sqrtm(row, ref), frechet(row, ref)  # takes the reference's root
    steps = partial(by_sqrtm, row, ref), partial(frechet, row, ref)
    sides = {name: Side(step, [], {}) for name, step in zip(DISTANCE, steps, strict=True)}
    return interleaved(sides, 0, setup.distances), abs(got / want - 1)


def speedup(rows: Rows, clock: str = CPU) -> list[float]:
    """Quartiles of (reference / ours)."""
    reference, ours = rows.values()
    return [round(value, 3) for value in quartiles(ratios(reference, ours, clock))]


def summary(setup: Setup, found: dict[int, tuple[Rows, float]], last: tuple[Rows, float]) -> dict[str, object]:
    """The line for programs."""
    line: dict[str, object] = {"name": "metrics_speed"}
    for size, (rows, error) in found.items():
        line |= {
            f"features_speedup_{size}": speedup(rows)[1],
            f"features_speedup_{size}_quartiles": speedup(rows),
            f"features_error_{size}": float(f"{error:.2g}"),
            f"milliseconds_an_image_{size}": {
                side: round(1e3 * median(row[CPU] for row in turns) / setup.images, 1) for side, turns in rows.items()
            },
        }
    rows, error = last
    return line | {
        "distance_speedup": speedup(rows)[1],
        "distance_speedup_quartiles": speedup(rows),
        "distance_error": float(f"{error:.2g}"),
        "distance_seconds": {side: round(median(row[CPU] for row in turns), 2) for side, turns in rows.items()},
        "samples": setup.samples,
        "dim": setup.dim,
        **surroundings(),
    }


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when scipy loads
    torch.set_num_threads(1)
    setup, networks, found = Setup(), Networks(), {}
    for size in setup.sizes:
        found[size] = rows, error = features(networks, size, setup)
        print(f"features of {setup.images} images of {size} pixels; they differ by {error:.1e}")
        print("ms: median and half the distance between the quartiles")
        print(table(rows, (CPU, WALL), 1e3), flush=True)
    last = rows, error = distance(setup)
    print(f"distance of {setup.samples} rows of {setup.dim} features; they differ by {error:.1e}")
    print("s: median and half the distance between the quartiles")
    print(table(rows, (CPU, WALL), 1))
    print(json.dumps(summary(setup, found, last)))


if __name__ == "__main__":
    main()
