"""The Vendi score: how many different samples there are, in effect."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import eigvalsh

from stepdistill.evaluation.metrics.stats import rows_of


def vendi(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosines of features (N, D): from 1, all alike, to N.

    Friedman & Dieng 2022, https://arxiv.org/abs/2210.02410. Where N > D the D x D matrix with the same eigenvalues is
    taken. Comparable at equal N and one extractor only. Raises TypeError, ValueError.
    """
    x = rows_of(features)
    lengths = x.norm(dim=1, keepdim=True)
    if lengths.min() == 0:
        raise ValueError(
            f"vendi got {int((lengths == 0).sum())} rows of zeros, expected none: they have no direction to compare; "
            "find what the extractor makes of those images"
        )
    x = x / lengths
    p = eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T) / len(x)
    p = p[p > 1e-12]
    return (-(p * p.log()).sum()).exp().item()
