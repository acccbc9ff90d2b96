"""A one-dimensional Gaussian mixture: the exact oracle with more than one mode.

A one-dimensional flow keeps the order of its points, so the ODE's map from t to s is `Q_s(CDF_t(x))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.gaussian import levels
from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser of `sum_k weights_k N(means_k, stds_k^2)`, the same for every prompt."""

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.0, 1.2)
    stds: tuple[float, ...] = (0.3, 0.5)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, stds = torch.tensor([self.weights, self.means, self.stds], dtype=torch.float64)
        return weights, means, stds

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        weights, means, stds = self._parts()
        alpha_t, sigma_t = (expand(v, x_t)[..., None] for v in self.schedule(t.double()))
        variance = (alpha_t * stds) ** 2 + sigma_t**2
        centred = x_t[..., None] - alpha_t * means
        share = torch.softmax(weights.log() - variance.log() / 2 - centred**2 / (2 * variance), -1)
        x0 = (share * (means + alpha_t * stds**2 / variance * centred)).sum(-1)
        eps = (share * sigma_t / variance * centred).sum(-1)
        return Estimate(x0, eps)

    def cdf(self, x: Tensor, t: float | None) -> Tensor:
        """Of the marginal at t (None: of the data)."""
        weights, means, stds = self._parts()
        alpha_t, sigma_t = levels(self.schedule, t)
        scale = torch.hypot(alpha_t * stds, torch.full_like(stds, sigma_t))
        return (weights * torch.special.ndtr((x[..., None] - alpha_t * means) / scale)).sum(-1)

    def quantile(self, share: Tensor, t: float | None) -> Tensor:
        """The inverse of `cdf`, by bisection."""
        low, high = torch.full_like(share, -20.0), torch.full_like(share, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, t) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def ode_map(self, x_t: Tensor, t: float, s: float | None) -> Tensor:
        """The probability-flow ODE's exact map from t to s (None: to clean data)."""
        return self.quantile(self.cdf(x_t, t), s)
