"""Fidelity and variety of samples told apart, by nearest neighbours: precision, recall, density, coverage."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.stats import all_alike, rows_of

BLOCK = 1024  # rows of a distance matrix that are held at once


class Neighbours(NamedTuple):
    """Shares in [0, 1], but for density, which may be above. Of samples that are all alike the first and third are nan.

    Args:
        precision: of samples inside the real manifold, the union of balls around real rows up to their k-th neighbour.
        recall: of real rows inside the samples' manifold.
        density: how many real balls a sample lies in, over k.
        coverage: of real rows whose ball holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, samples: Tensor, k: int = 5) -> Neighbours:
    """Precision, recall, density and coverage of features (N, D) and (M, D).

    Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991, and Naeem et al. 2020,
    https://arxiv.org/abs/2002.09797. A ball reaches to the k-th neighbour beside the row itself, and what lies on its
    edge is outside, as in the latter's code: other tools count it, and other tools' numbers are not comparable. Memory
    grows with N + M. Raises TypeError, ValueError.
    """
    real, samples = rows_of(real), rows_of(samples)
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"prdc got {real.shape[1]} and {samples.shape[1]} features a row, expected equal numbers: those of "
            "different extractors have no distance; compute both with one extractor"
        )
    least = min(len(real), len(samples))
    if not 1 <= k < least:
        raise ValueError(
            f"prdc got k={k} for {len(real)} real rows and {len(samples)} samples, expected 1 to {least - 1}: a row "
            "needs k others; choose a smaller k or draw more"
        )
    reach, reach_of_samples = _reach(real, k), _reach(samples, k)
    inside, near = torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for rows in torch.arange(len(real)).split(BLOCK):
        away = _apart(real[rows], samples)
        held = away < reach[rows, None]
        inside += held.sum(0)
        near[rows] = held.any(1)
        recalled[rows] = (away < reach_of_samples).any(1)
    precision, density = (inside > 0).double(), inside.double() / k
    if all_alike(samples):  # one image would be as precise as any set
        precision, density = precision * math.nan, density * math.nan
    shares = (precision, recalled, density, near)
    return Neighbours(*(each.double().mean().item() for each in shares))


def _reach(x: Tensor, k: int) -> Tensor:
    """The distance of each row to its k-th neighbour beside itself."""
    return torch.cat([_apart(x[rows], x).kthvalue(k + 1, dim=1).values for rows in torch.arange(len(x)).split(BLOCK)])


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Distances; not by squares of norms, whose rounding would move edges."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
