"""95 % intervals by the delete-a-group jackknife, of Frechet distances and of mean scores.

Samples are numbered; a block is a run of consecutive ones, and a replicate is the value without one block. Values of
equal blocks may be added and subtracted replicate by replicate, and what they share (prompts, seeds) then cancels:
the interval of a difference is `interval(student - teacher, block_sizes(n))`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.stats import Stats, rows_of


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided 95 % interval, in the value's unit.

    Args:
        corrected: the value less its bias of order 1 / N; it is of use from N = 4 D on, and may be below zero.
    """

    value: float
    low: float
    high: float
    corrected: float


def block_sizes(n: int, blocks: int = 20) -> list[int]:
    """How many of n samples each block holds. Raises ValueError."""
    return [len(block) for block in _blocks(n, blocks)[1:]]


def replicates(rows: Sequence[Tensor], ref: Tensor | Stats, blocks: int = 20) -> Tensor:
    """Frechet distances (len(rows), 1 + blocks), float64: with all samples, then without each block.

    Args:
        rows: features (N, D) of equal shape, one for each thing that is compared, in one order of prompts and seeds.
        ref: features (N, D) in that order, which lose the block too; or a Gaussian that is fixed, such as a file's.

    Rounding may take a distance of zero below it. One product and one eigenvalue problem of size min(N, D) for each
    row and block. Against a Gaussian features are read block by block, so that those of a file need not fit in memory;
    against features one row at a time does. Raises TypeError, ValueError.
    """
    if isinstance(ref, Tensor):
        shapes, todo = [*rows, ref], "draw the same prompts for all of them"
    else:
        shapes, todo = rows, "draw the same number for all of them"
    if len({x.shape for x in shapes}) != 1:
        raise ValueError(
            f"replicates got features of shapes {[tuple(x.shape) for x in shapes]}, expected equal ones: the "
            f"distance's bias depends on N and cancels only at equal N; {todo}"
        )
    rows_of(rows[0][:2])  # type and shape, before they are used
    without = _blocks(len(rows[0]), blocks)
    if isinstance(ref, Tensor):
        return _leave_out(rows, rows_of(ref), without)
    if ref.mean.shape != rows[0].shape[1:]:
        raise ValueError(
            f"replicates got {rows[0].shape[1]} features a row and a reference of {ref.mean.numel()}, expected equal "
            "numbers: those of different extractors have no distance; compute both with one extractor"
        )
    return torch.stack([_leave_out_of_row(row, ref, without) for row in rows])


def interval(replicate: Tensor, sizes: Sequence[int]) -> Interval:
    """The interval of one row of replicates (1 + blocks,), or of a sum or difference of such rows.

    It is for the expected value at this N, whose bias it does not take away. Busing et al. 1999,
    https://doi.org/10.1023/A:1008800423698. Raises ValueError.

    Args:
        sizes: the blocks' own, see `block_sizes`.
    """
    if replicate.shape != (1 + len(sizes),) or len(sizes) < 5:
        raise ValueError(
            f"interval got replicates of shape {tuple(replicate.shape)} for {len(sizes)} blocks, expected "
            "(1 + blocks,) and five blocks or more: the value of all samples, then one without each block; pass one "
            "row of `replicates` and the sizes of the same blocks"
        )
    full, *left_out = replicate.tolist()
    return _jackknife(full, left_out, sizes)


def mean_interval(scores: Tensor, blocks: int = 20) -> Interval:
    """The interval of the mean of scores (N,), such as CLIP's. Raises TypeError, ValueError."""
    return interval(_means(scores, blocks), block_sizes(len(scores), blocks))


def ratio_of_means(a: Tensor, b: Tensor, blocks: int = 20) -> Interval:
    """The interval of mean(a) / mean(b) for scores (N,) at equal prompts and seeds. Raises TypeError, ValueError."""
    if a.shape != b.shape:
        raise ValueError(
            f"ratio_of_means got {tuple(a.shape)} and {tuple(b.shape)}, expected equal shapes: score i of both "
            "must come from one prompt and seed; draw both over the same list"
        )
    return interval(_means(a, blocks) / _means(b, blocks), block_sizes(len(a), blocks))


def _means(scores: Tensor, blocks: int) -> Tensor:
    """The mean of all scores, then without each block."""
    if not scores.is_floating_point():
        raise TypeError(f"got scores of type {scores.dtype}, expected floating point: one number for each sample")
    if scores.ndim != 1 or not scores.isfinite().all():
        raise ValueError(
            f"got scores of shape {tuple(scores.shape)} with {int((~scores.isfinite()).sum())} NaN or infinite ones, "
            "expected (N,) and none: one such score makes the mean NaN; find its sample"
        )
    x = scores.detach().cpu().double()
    without = _blocks(len(x), blocks)
    return torch.stack([(x.sum() - x[block].sum()) / (len(x) - len(block)) for block in without])


def difference_of_means(a: Tensor, b: Tensor, blocks: int = 20) -> Interval:
    """The interval of mean(a) - mean(b) for scores (N,) at equal prompts and seeds. Raises TypeError, ValueError."""
    if a.shape != b.shape:
        raise ValueError(
            f"difference_of_means got {tuple(a.shape)} and {tuple(b.shape)}, expected equal shapes: score i of both "
            "must come from one prompt and seed; draw both over the same list"
        )
    return mean_interval(a - b, blocks)


def noise_floor(ref: Stats, n: int) -> float:
    """The distance that n samples of the reference's own Gaussian are expected to have from it, in squared units.

    With the eigenvalues l of its covariance it is, to second order in the error of the sample covariance,
    `sum_i l_i / n + sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j) / (2 (n - 1))`. Below two samples a dimension that
    is too low by more than 6 %, and the mean over seeded draws takes its place. Raises ValueError.
    """
    if n < 2:
        raise ValueError(f"noise_floor got n={n}, expected 2 or more: one sample has no covariance; draw more")
    spectrum = torch.linalg.eigvalsh(ref.root @ ref.root.T).clamp(min=0)
    eigenvalues = spectrum[spectrum > 1e-12 * spectrum[-1]]  # a direction without variance is no dimension
    rank = len(eigenvalues)
    if n >= 2 * rank:
        products, sums = torch.outer(eigenvalues, eigenvalues), eigenvalues.unsqueeze(1) + eigenvalues
        pairs = (products / sums).sum() + (products / sums).trace()
        return (eigenvalues.sum() / n + pairs / (2 * (n - 1))).item()
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(min(512, 4 + 2**17 // min(n, rank) ** 2)):  # a draw of many dimensions is close to the mean
        x = torch.randn(n, rank, generator=generator, dtype=torch.float64) * eigenvalues.sqrt()
        mean = x.mean(0)
        x -= mean
        y = x * eigenvalues.sqrt()
        root = _nuclear(y @ y.T if n < rank else y.T @ y, min(n - 1, rank)) / math.sqrt(n - 1)
        values.append(mean.square().sum() + x.square().sum() / (n - 1) + eigenvalues.sum() - 2 * root)
    return torch.stack(values).mean().item()


def _blocks(n: int, blocks: int) -> list[Tensor]:
    """The indices that each replicate leaves out: none, then one run of consecutive ones after another."""
    if not 5 <= blocks <= n // 2:
        raise ValueError(
            f"got blocks={blocks} for N={n}, expected 5 to N / 2: each block leaves out at least two samples, and "
            "fewer than five blocks give no useful interval; use 20"
        )
    return [torch.arange(0), *torch.arange(n).tensor_split(blocks)]


def _leave_out_of_row(row: Tensor, ref: Stats, without: list[Tensor]) -> Tensor:
    """F(row, ref) without each index set, (len(without),), where the reference keeps all that it has.

    With R^T R = cov_ref and centred rows X, tr sqrt(cov_row cov_ref) is the sum of the singular values of Y = X R^T
    over sqrt(n - 1). Of Y Y^T the rows and columns of a block go, and what remains is centred anew; Y^T Y loses the
    Gram matrix of the dropped rows.
    """
    samples, rank = len(row), len(ref.root)
    whole = [torch.arange(samples)] if samples <= rank else without[1:]
    mean = torch.stack([_part(row, block).sum(0) for block in whole]).sum(0) / samples
    total, gram = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for block in whole:
        x = _part(row, block) - mean
        y = x @ ref.root.T
        gram = gram + (y @ y.T if samples <= rank else y.T @ y)
        total = total + x.square().sum()
    values = torch.empty(len(without), dtype=torch.float64)
    for k, block in enumerate(without):
        n, x = samples - len(block), _part(row, block) - mean
        if samples <= rank:
            kept = torch.ones(samples, dtype=torch.bool).index_fill(0, block, False)
            part = gram[kept][:, kept]
            part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
        else:
            e = _dropped(x @ ref.root.T, n)
            part = gram - e.T @ e
        root = _nuclear(part, min(n - 1, rank)) / math.sqrt(n - 1)
        shift, scatter = mean - ref.mean - x.sum(0) / n, total - _dropped(x, n).square().sum()
        values[k] = shift.square().sum() + ref.cov.trace() + scatter / (n - 1) - 2 * root
    return values


def _part(row: Tensor, block: Tensor) -> Tensor:
    """Checked rows of a block, float64."""
    return rows_of(row[block], least=0, start=int(block[0]) if len(block) else 0)


def _nuclear(gram: Tensor, rank: int) -> Tensor:
    """Sum of the singular values of a matrix of known rank from its Gram matrix.

    Eigenvalues that must be zero are left out: the root of their rounding would be 1e-8 of the largest.
    """
    return torch.linalg.eigvalsh(gram)[-rank:].clamp(min=0).sqrt().sum()


def _leave_out(rows: Sequence[Tensor], ref: Tensor, without: list[Tensor]) -> Tensor:
    """F(row, ref) without each index set, (len(rows), len(without)), from one decomposition of ref.

    With centred X, Y = Q S V^T and T = X V S, the cross product is X Y^T = T Q^T. Dropping a block B and
    centring anew turns Q^T Q = I into I - Z^T Z and T^T T into itself minus E^T E, where Z and E stack the
    dropped rows and their sum over sqrt(n). So a replicate costs low-rank updates and one eigvalsh.
    """
    y = ref - ref.mean(0)
    q, s, vh = torch.linalg.svd(y, full_matrices=False)
    # directions without variance have no determined q; they would couple into the root below
    kept = s > 1e-10 * s[0]
    q, project = q[:, kept], vh[kept].T * s[kept]
    turns = []
    for block in without:
        _, sines, directions = torch.linalg.svd(_dropped(q[block], len(ref) - len(block)), full_matrices=False)
        turns.append((directions, 1 - (1 - sines.square()).clamp(min=0).sqrt()))
    values = torch.empty(len(rows), len(without), dtype=torch.float64)
    for i, row in enumerate(rows):
        x = rows_of(row)
        mean = x.mean(0)
        x = x - mean
        t = x @ project
        gram = t.T @ t
        for k, (block, turn) in enumerate(zip(without, turns, strict=True)):
            n = len(ref) - len(block)
            e = _dropped(t[block], n)
            m = _shrunk(_shrunk(gram - e.T @ e, *turn).T, *turn)
            root = torch.linalg.eigvalsh(m).clamp(min=0).sqrt().sum()
            shift = mean - ref.mean(0) - (x[block].sum(0) - y[block].sum(0)) / n
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


def _jackknife(full: float, left_out: Sequence[float], sizes: Sequence[int]) -> Interval:
    """95 % t-interval of the delete-a-group jackknife for groups of unequal size (Busing et al. 1999)."""
    groups, total = len(sizes), sum(sizes)
    ratios = [total / size for size in sizes]
    centre = groups * full - sum((1 - 1 / h) * value for h, value in zip(ratios, left_out, strict=True))
    pseudo = [h * full - (h - 1) * value for h, value in zip(ratios, left_out, strict=True)]
    variance = sum((p - centre) ** 2 / (h - 1) for h, p in zip(ratios, pseudo, strict=True)) / groups
    half = _t975(groups - 1) * math.sqrt(variance)
    return Interval(full, full - half, full + half, centre)


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
