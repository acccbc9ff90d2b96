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

    def consistency(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        """The ODE's map to clean data as an estimate, for states (B, ...) at times (B,).

        Forward-mode derivatives are exact: those of a Newton step at the quantile, which has none itself.
        """
        weights, means, stds = self._parts()

        def below(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            z = (x[..., None] - alpha * means) / ((alpha * stds) ** 2 + sigma**2).sqrt()
            return (weights * (1 + torch.erf(z / 2**0.5)) / 2).sum(-1)

        alpha, sigma = (expand(v, x_t)[..., None] for v in self.schedule(t.double()))
        share = below(x_t, alpha, sigma)
        x0 = self.quantile(share, None)
        spread = torch.exp(-(((x0[..., None] - means) / stds) ** 2) / 2) / stds
        density = (weights * spread).sum(-1) / (2 * torch.pi) ** 0.5
        x0 = x0 - (below(x0, torch.ones_like(alpha), torch.zeros_like(alpha)) - share) / density
        return Estimate(x0, (x_t - alpha[..., 0] * x0) / sigma[..., 0])
