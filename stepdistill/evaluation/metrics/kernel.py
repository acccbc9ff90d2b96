"""Distances of two sets of features by a kernel: KID, and CLIP's maximum mean discrepancy.

Both are squared maximum mean discrepancies, `E k(x, x') + E k(y, y') - 2 E k(x, y)`, in float64 on the CPU, summed row
block by row block, so that memory grows with N and not with N^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.stats import check_varied, rows_of

BLOCK = 1024  # rows of a kernel matrix that are held at once
Kernel = Callable[[Tensor, Tensor], Tensor]


class Kid(NamedTuple):
    """Mean and standard deviation of the unbiased estimate over subsets."""

    value: float
    std: float


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel, `(x . y / D + 1)^3`: (N, D) and (M, D) to (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid(a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """Kernel Inception distance of features (N, D) and (M, D): unbiased, so it may be below zero.

    Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401. Subsets are drawn without replacement by `seed` alone.
    Raises TypeError, ValueError.
    """
    _check("kid", a, b)
    least = min(len(a), len(b))
    if subsets < 1 or not 2 <= subset_size <= least:
        raise ValueError(
            f"kid got {subsets} subsets of {subset_size} for sets of {len(a)} and {len(b)}, expected at least one, "
            f"of 2 to {least}: a subset is drawn without replacement; choose a smaller subset_size"
        )
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        x, y = (rows_of(each[torch.randperm(len(each), generator=generator)[:subset_size]]) for each in (a, b))
        values[i] = mmd(x, y, cubic)
    return Kid(values.mean().item(), values.std(correction=0).item())


def cmmd(a: Tensor, b: Tensor, bandwidth: float = 10.0) -> float:
    """CMMD of CLIP image embeddings (N, D) and (M, D): a Gaussian kernel on unit vectors, biased, times 1000.

    Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603, with `exp(-|x - y|^2 / (2 bandwidth^2))`. Raises
    TypeError, ValueError.
    """
    _check("cmmd", a, b)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (rows_of(a), rows_of(b)))

    def gaussian(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ y.T - 1) / bandwidth**2).exp()  # |x - y|^2 is 2 - 2 x . y

    return 1000 * mmd(a, b, gaussian, biased=True)


def mmd(x: Tensor, y: Tensor, kernel: Kernel, biased: bool = False) -> float:
    """The squared maximum mean discrepancy of float64 rows; unbiased without the pairs of a row with itself."""
    n, m, less = len(x), len(y), 0 if biased else 1
    within = sum((_sum(each, each, kernel, biased) / (k * (k - less)) for each, k in ((x, n), (y, m))), torch.zeros(()))
    return (within - 2 * _sum(x, y, kernel, biased=True) / (n * m)).item()


def _sum(x: Tensor, y: Tensor, kernel: Kernel, biased: bool) -> Tensor:
    """The sum of `k(x_i, y_j)`; not biased it is without i = j."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(x)).split(BLOCK):
        block = kernel(x[rows], y)
        total += block.sum() - (0 if biased else block[torch.arange(len(rows)), rows].sum())
    return total


def _check(name: str, a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        rows_of(x[:2])  # type and shape
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name} got {a.shape[1]} and {b.shape[1]} features a row, expected equal numbers: those of different "
            "extractors have no distance; compute both with one extractor"
        )
    check_varied(name, a, b)
