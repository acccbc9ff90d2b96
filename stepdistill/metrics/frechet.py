"""Frechet distance between Gaussians fitted to features, its jackknife, and companions on the same features.

F(a, b) = |mu_a - mu_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr sqrt(cov_a cov_b), in float64 on the CPU. No root of
a non-symmetric matrix is taken: the eigenvalues of `cov_a cov_b` are those of `root_a cov_b root_a`, and
their square roots are the singular values of `X_a X_b^T / sqrt((n_a - 1)(n_b - 1))`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from stepdistill.metrics.stats import TOLERANCE, Stats, roots, rows_of


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided 95 % interval, in the value's unit."""

    value: float
    low: float
    high: float


def frechet(a: Stats, b: Stats) -> float:
    """Squared Frechet distance >= 0, in squared feature units.

    Raises ValueError for different dimensions or a covariance with a negative eigenvalue, ArithmeticError for
    a distance below zero by more than rounding.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet got {a.mean.numel()} and {b.mean.numel()} dimensions, expected equal ones: features of "
            "different extractors have no distance; compute both with one extractor"
        )
    traces = (a.cov.trace() + b.cov.trace()).item()
    value = (a.mean - b.mean).square().sum().item() + traces - 2 * _trace_of_root(a, b)
    if value < -TOLERANCE * traces:
        raise ArithmeticError(
            f"frechet got {value:.6g}, expected >= 0 within {TOLERANCE * traces:.1e}: a covariance is not "
            "positive semi-definite; recompute the statistics in float64 from centred features"
        )
    return max(value, 0.0)


def excess(row: Tensor, ref: Tensor, floor: Tensor, blocks: int = 20) -> Interval:
    """F(row, ref) - F(floor, ref) with a block-jackknife interval; may be negative.

    All three are features (N, D) in one order of prompts. Each replicate drops the same run of consecutive
    indices from all three, so what they share cancels, and samples of one prompt that lie together leave
    together. The interval is for the expected excess at this N. Cost: 2 (blocks + 1) eigenvalue problems of
    size min(N, D). Raises TypeError, ValueError.
    """
    row, ref, floor = rows_of(row), rows_of(ref), rows_of(floor)
    if not row.shape == ref.shape == floor.shape:
        raise ValueError(
            f"excess got row {tuple(row.shape)}, ref {tuple(ref.shape)}, floor {tuple(floor.shape)}, "
            "expected equal shapes: the distance's bias depends on N and cancels only at equal N; draw "
            "the same prompts for all three"
        )
    if not 5 <= blocks <= len(row) // 2:
        raise ValueError(
            f"excess got blocks={blocks} for N={len(row)}, expected 5 to N / 2: each block leaves out at "
            "least two samples, and fewer than five blocks give no useful interval; use 20"
        )
    without = [torch.arange(0), *torch.arange(len(row)).tensor_split(blocks)]
    distances = _leave_out([row, floor], ref, without)
    full, *left_out = (distances[0] - distances[1]).tolist()
    return _jackknife(full, left_out, [len(block) for block in without[1:]])


def paired(a: Tensor, b: Tensor) -> float:
    """Mean Euclidean distance between rows of equal index (equal prompt and seed), (N, D) with N >= 2."""
    a, b = rows_of(a), rows_of(b)
    if a.shape != b.shape:
        raise ValueError(
            f"paired got {tuple(a.shape)} and {tuple(b.shape)}, expected equal shapes: row i of both "
            "must come from one prompt and seed; draw both over the same list"
        )
    return (a - b).norm(dim=1).mean().item()


def diversity(features: Tensor, prompt_index: Tensor) -> float:
    """Mean pairwise Euclidean distance within each prompt, averaged over prompts with equal weight.

    features (N, D); prompt_index (N,) integers, each at least twice. Raises TypeError, ValueError.
    """
    x = rows_of(features)
    if prompt_index.shape != x.shape[:1]:
        raise ValueError(
            f"diversity got prompt_index {tuple(prompt_index.shape)} for {len(x)} features, expected "
            f"({len(x)},): one index per feature row; concatenate both over the same batches"
        )
    prompts, counts = prompt_index.cpu().unique(return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"diversity got one sample of prompt {prompts[counts.argmin()].item()}, expected two or more "
            "of each: a single picture has no pairwise distance; draw more or drop the prompt"
        )
    means = [torch.pdist(x[prompt_index.cpu() == prompt]).mean() for prompt in prompts]
    return torch.stack(means).mean().item()


def _trace_of_root(a: Stats, b: Stats) -> float:
    """tr sqrt(cov_a cov_b)."""
    if a.centred is not None and b.centred is not None:
        return torch.linalg.svdvals(a.centred @ b.centred.T).sum().item() / math.sqrt((a.n - 1) * (b.n - 1))
    if a.centred is not None:  # the smaller root; else that of b, which a reference keeps
        a, b = b, a
    return roots(torch.linalg.eigvalsh(b.root @ a.cov @ b.root.T)).sum().item()


def _leave_out(rows: list[Tensor], ref: Tensor, without: list[Tensor]) -> Tensor:
    """F(row, ref) without each index set, (len(rows), len(without)), from one decomposition of ref.

    With centred X, Y = Q S V^T and T = X V S, the cross product is X Y^T = T Q^T. Dropping a block B and
    centring anew turns Q^T Q = I into I - Z^T Z and T^T T into itself minus E^T E, where Z and E stack the
    dropped rows and their sum over sqrt(n). So a replicate costs low-rank updates and one eigvalsh.
    """
    means, y = [row.mean(0) for row in rows], ref - ref.mean(0)
    centred = [row - mean for row, mean in zip(rows, means, strict=True)]
    q, s, vh = torch.linalg.svd(y, full_matrices=False)
    # directions without variance have no determined q; they would couple into the root below
    kept = s > 1e-10 * s[0]
    q, project = q[:, kept], vh[kept].T * s[kept]
    crosses = [x @ project for x in centred]
    grams = [t.T @ t for t in crosses]
    values = torch.empty(len(rows), len(without), dtype=torch.float64)
    for k, block in enumerate(without):
        n = len(ref) - len(block)
        _, sines, directions = torch.linalg.svd(_dropped(q[block], n), full_matrices=False)
        shrink = 1 - (1 - sines.square()).clamp(min=0).sqrt()
        for i, (x, t, gram) in enumerate(zip(centred, crosses, grams, strict=True)):
            e = _dropped(t[block], n)
            m = _shrunk(_shrunk(gram - e.T @ e, directions, shrink).T, directions, shrink)
            root = torch.linalg.eigvalsh(m).clamp(min=0).sqrt().sum()
            shift = means[i] - ref.mean(0) - (x[block].sum(0) - y[block].sum(0)) / n
            scatter = _scatter(x, block) + _scatter(y, block)
            values[i, k] = shift.square().sum() + (scatter - 2 * root) / (n - 1)
    return values


def _dropped(block: Tensor, n: int) -> Tensor:
    """The rows whose Gram matrix is lost when `block` leaves centred rows and n rows are centred anew."""
    return torch.cat([block, block.sum(0, keepdim=True) / math.sqrt(n)])


def _shrunk(m: Tensor, directions: Tensor, shrink: Tensor) -> Tensor:
    """(I - V^T diag(shrink) V) m for orthonormal rows V."""
    return m - directions.T @ (shrink.unsqueeze(1) * (directions @ m))


def _scatter(x: Tensor, block: Tensor) -> Tensor:
    """Sum of squares about their mean of the centred rows x without block."""
    return x.square().sum() - _dropped(x[block], len(x) - len(block)).square().sum()


def _jackknife(full: float, left_out: list[float], sizes: list[int]) -> Interval:
    """95 % t-interval of the delete-a-group jackknife for groups of unequal size (Busing et al. 1999)."""
    groups, total = len(sizes), sum(sizes)
    ratios = [total / size for size in sizes]
    centre = groups * full - sum((1 - 1 / h) * value for h, value in zip(ratios, left_out, strict=True))
    pseudo = [h * full - (h - 1) * value for h, value in zip(ratios, left_out, strict=True)]
    variance = sum((p - centre) ** 2 / (h - 1) for h, p in zip(ratios, pseudo, strict=True)) / groups
    half = _t975(groups - 1) * math.sqrt(variance)
    return Interval(full, full - half, full + half)


def _t975(df: int) -> float:
    """97.5 % quantile of Student's t to 0.1 % for df >= 4 (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**power for power, term in enumerate(terms, start=1))
