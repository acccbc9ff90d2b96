"""Frechet distance between Gaussians fitted to features, and companions on the same features.

F(a, b) = |mu_a - mu_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr sqrt(cov_a cov_b), in float64 on the CPU (Heusel et al. 2017,
https://arxiv.org/abs/1706.08500). No root of a non-symmetric matrix is taken: the eigenvalues of `cov_a cov_b` are
those of `root_b cov_a root_b^T`, and their square roots are the singular values of `root_a root_b^T`.
"""

import math

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.stats import PART, TOLERANCE, Stats, check_varied, roots, rows_of


def frechet(a: Stats, b: Stats) -> float:
    """Squared Frechet distance >= 0, in squared feature units: the sum of `frechet_terms`, with its errors."""
    return sum(frechet_terms(a, b))


def frechet_terms(a: Stats, b: Stats) -> tuple[float, float]:
    """What the means, and what the covariances add to the distance, each >= 0, in squared feature units.

    Raises ValueError for different dimensions, two Gaussians of one image, or a covariance with a negative
    eigenvalue, ArithmeticError for a term below zero by more than rounding.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet got {a.mean.numel()} and {b.mean.numel()} dimensions, expected equal ones: features of "
            "different extractors have no distance; compute both with one extractor"
        )
    if a.is_point and b.is_point:
        check_varied("frechet", a.mean[None], b.mean[None])
    traces = (a.cov.trace() + b.cov.trace()).item()
    shift = (a.mean - b.mean).square().sum().item()
    spread = traces - 2 * _trace_of_root(a, b)
    if spread < -TOLERANCE * traces:
        raise ArithmeticError(
            f"frechet got {spread:.6g} from the covariances, expected >= 0 within {TOLERANCE * traces:.1e}: one of "
            "them is not positive semi-definite; recompute the statistics in float64 from centred features"
        )
    return shift, max(spread, 0.0)


def paired(a: Tensor, b: Tensor) -> float:
    """Mean Euclidean distance between rows of equal index (equal prompt and seed), (N, D) with N >= 2.

    Raises TypeError, ValueError; also where all rows of both are alike.
    """
    rows_of(a[:2])  # type and shape
    if a.shape != b.shape:
        raise ValueError(
            f"paired got {tuple(a.shape)} and {tuple(b.shape)}, expected equal shapes: row i of both "
            "must come from one prompt and seed; draw both over the same list"
        )
    check_varied("paired", a, b)
    starts = range(0, len(a), PART)
    apart = [(rows_of(a[i : i + PART], 1, i) - rows_of(b[i : i + PART], 1, i)).norm(dim=1) for i in starts]
    return torch.cat(apart).mean().item()


def feature_diversity(features: Tensor, prompt_index: Tensor) -> float:
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
            "of each: a single image has no pairwise distance; draw more or drop the prompt"
        )
    means = [torch.pdist(x[prompt_index.cpu() == prompt]).mean() for prompt in prompts]
    return torch.stack(means).mean().item()


def _trace_of_root(a: Stats, b: Stats) -> float:
    """tr sqrt(cov_a cov_b)."""
    if a.centred is not None and b.centred is not None:
        return torch.linalg.svdvals(a.centred @ b.centred.T).sum().item() / math.sqrt((a.n - 1) * (b.n - 1))
    if a.centred is not None:  # the smaller root; else that of b, which a reference keeps
        a, b = b, a
    shared = roots(torch.linalg.eigvalsh(b.root @ a.cov @ b.root.T))
    return shared[0 if b.centred is None else 1 :].sum().item()  # centred rows sum to zero: one root is rounding alone
