"""Gaussians fitted to features: from all of them, from batches as they come, and in files that other tools read."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.core.files import written_whole
from stepdistill.evaluation.metrics.stats_file import UNKNOWN, read_statistics

TOLERANCE = 1e-6  # relative; rounding of a rank-deficient root stays below 1e-7
PART = 1024  # rows of features that are in memory at once where a file holds more
ALIKE = 1e-5  # features of one image in batches of other sizes differ by less than this share of the largest


@dataclass(frozen=True, eq=False)
class Stats:
    """A Gaussian: mean (D,), covariance (D, D) with ddof 1, both float64, of n samples (0 is unknown).

    `centred` (n, D) is kept where n < D, so that the distance costs n^3 and not D^3. Raises ValueError.
    """

    mean: Tensor
    cov: Tensor
    n: int
    centred: Tensor | None = None

    def __post_init__(self) -> None:
        dim = self.mean.numel()
        if dim < 1 or self.mean.shape != (dim,) or self.cov.shape != (dim, dim):
            raise ValueError(
                f"Stats got mean {tuple(self.mean.shape)} and cov {tuple(self.cov.shape)}, expected (D,) and "
                "(D, D) with D >= 1: they describe one D-dimensional Gaussian"
            )
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise ValueError(
                f"Stats got mean {self.mean.dtype} and cov {self.cov.dtype}, expected float64: the distance "
                "is a small difference of large traces; convert with .double()"
            )
        if self.n < 2 and self.n != UNKNOWN:
            raise ValueError(f"Stats got n={self.n}, expected 2 or more: one sample has no covariance")
        scale = self.cov.abs().max().item()
        if not math.isfinite(scale + self.mean.abs().max().item()):
            raise ValueError("Stats got NaN or infinity, expected finite numbers: find the bad images")
        if (self.cov - self.cov.T).abs().max().item() > TOLERANCE * scale:
            raise ValueError("Stats got an asymmetric cov, expected cov = cov^T: this is not a covariance")

    @staticmethod
    def of(features: Tensor) -> "Stats":
        """Mean and covariance of features (N, D), N >= 2, any float type. Raises TypeError, ValueError."""
        x = rows_of(features)
        mean = x.mean(0)
        x = x - mean
        return Stats(mean, x.T @ x / (len(x) - 1), len(x), x if len(x) < x.shape[1] else None)

    @property
    def is_point(self) -> bool:
        """Whether nothing varies but rounding: the Gaussian of one image many times."""
        return self.cov.trace().item() <= (0.05 * ALIKE) ** 2 * self.mean.square().sum().item()

    @cached_property
    def root(self) -> Tensor:
        """R with `R^T R = cov`, (D, D), or (n, D) where `centred` is kept; kept, so that a reference pays once."""
        if self.centred is not None:
            return self.centred / math.sqrt(self.n - 1)
        eigenvalues, vectors = torch.linalg.eigh(self.cov)
        return roots(eigenvalues).unsqueeze(1) * vectors.T

    def save(self, file: Path, facts: Mapping[str, object]) -> None:
        """Write an npz with `mu`, `sigma`, `n` and `meta`; pytorch-fid, clean-fid and EDM read the first two.

        Args:
            facts: what the features depend on, as JSON in `meta`.
        """
        with written_whole(file) as part, part.open("wb") as stream:
            np.savez(stream, mu=self.mean.numpy(), sigma=self.cov.numpy(), n=self.n, meta=json.dumps(dict(facts)))

    @staticmethod
    def load(file: Path) -> "tuple[Stats, dict[str, object]]":
        """The Gaussian of an npz and its facts; of another tool's file, which has no `n`, they are empty.

        Raises ValueError for a file that is not one, or whose pickled parts would have to be run.
        """
        mean, cov, n, facts = read_statistics(file)
        return Stats(torch.from_numpy(mean), torch.from_numpy(cov), n), facts


class FeatureStats:
    """Mean and covariance of features that come in batches, float64, in the memory of one covariance.

    Sums are kept about the running mean and merged by Chan, Golub & LeVeque 1983: raw sums of squares lose all digits
    where the features' mean is large.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take features (B, D), B >= 1, any float type. Raises TypeError, ValueError."""
        x = rows_of(features, least=1)
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"FeatureStats got {x.shape[1]} features a row, expected {len(self.mean)}: those of different "
                "extractors have no common covariance; keep one FeatureStats for each"
            )
        mean = x.mean(0)
        x = x - mean
        total, shift = self.n + len(x), mean - self.mean
        self.scatter += x.T @ x + torch.outer(shift, shift) * (self.n * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.n = total

    def stats(self) -> Stats:
        """The Gaussian of all that was seen. Raises ValueError for fewer than two rows."""
        return Stats(self.mean.clone(), self.scatter / max(1, self.n - 1), self.n)


def rows_of(features: Tensor, least: int = 2, start: int = 0) -> Tensor:
    """Checked features (N, D), N >= `least`, as float64 on the CPU; `start` is the first one's number, for messages."""
    if not features.is_floating_point():
        raise TypeError(
            f"got features of type {features.dtype}, expected floating point: these look like images; pass "
            "them through a feature extractor first"
        )
    if features.ndim != 2 or len(features) < least or features.shape[1] < 1:
        raise ValueError(
            f"got features of shape {tuple(features.shape)}, expected (N, D) with N >= {least} and D >= 1: "
            "distances are between sets of feature rows; concatenate the batches first"
        )
    x = features.detach().cpu().double()
    bad = (~x.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"got {len(bad)} feature rows with NaN or infinity, first at index {start + bad[0]}, expected none: "
            "one such row makes every distance NaN; find and regenerate those images"
        )
    return x


def all_alike(*sets: Tensor) -> bool:
    """Whether all rows of features (N, D) are one and the same but for rounding, as those of equal images are."""
    ends = torch.cat([torch.stack(features.aminmax(dim=0)) for features in sets])
    low, high = ends.aminmax(dim=0)
    return bool((high - low).max() <= ALIKE * ends.abs().max())


def check_varied(who: str, a: Tensor, b: Tensor) -> None:
    """Raise ValueError where all rows of both, (N, D) and (M, D), are alike; `who` is named in it."""
    if all_alike(a, b):
        raise ValueError(
            f"{who} got two sets of {len(a)} and {len(b)} equal rows, expected rows that differ: two sets of one "
            "image, such as a black one, are no good result; look at the images"
        )


def roots(eigenvalues: Tensor) -> Tensor:
    """Square roots of ascending eigenvalues, rounding below zero clamped."""
    low, high = eigenvalues[0].item(), eigenvalues[-1].item()
    if low < -TOLERANCE * abs(high):
        raise ValueError(
            f"got a covariance with eigenvalues from {low:.6g} to {high:.6g}, expected none below zero: it "
            "is not positive semi-definite; recompute it in float64 from centred features"
        )
    return eigenvalues.clamp(min=0).sqrt()
