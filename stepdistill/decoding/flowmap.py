"""The map from Gaussian noise to a token, along the probability-flow ODE of the law of its codes.

A token is drawn with the probabilities p_j of the codes c_j in R^d. With a straight path from noise to data, tau from 0
to 1,

    x_tau = (1 - tau) eps + tau c,  eps ~ N(0, I),  c ~ sum_j p_j delta(c_j),
    w_j ∝ p_j exp((tau x·c_j - tau^2 |c_j|^2 / 2) / (1 - tau)^2),  m = sum_j w_j c_j,  dx/dtau = (m - x) / (1 - tau),

all in closed form. The token is the code that is nearest to x_1. It has the probabilities p exactly, and depends on
nothing but eps: Distilled Decoding (Liu et al. 2024, https://arxiv.org/abs/2412.17153, section 3).

An Euler step is x + (tau' - tau) / (1 - tau) (m - x). The last one, to tau' = 1, returns m, so nothing is singular. The
others are of the second order in log(tau / (1 - tau)): DPM-Solver++(2M), https://arxiv.org/abs/2211.01095, with one
evaluation a step. A decision between two codes that are D apart falls where (1 - tau) / tau is about D, so the grid
spans the distances of the codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepdistill.core.errors import DataError, problem

STEPS = 50
NEAREST = 0.05  # quantile of the distances of each code to its nearest one, which the grid resolves
PART = 1024  # rows of a matrix of distances at once: that of 16,384 codes has 2 GB
PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class FlowMap:
    """The map of a codebook.

    Args:
        codes: (V, d), float32 or float64.
        steps: of the solver.
        top_k: codes that keep their probability, the most probable ones; `None` for all. It is a property of the
            teacher: its tokens are other ones without it.

    Raises:
        DataError: codes that are not finite, or that two tokens share; more top codes than codes; noise in half
            precision.
    """

    codes: Tensor
    steps: int = STEPS
    top_k: int | None = None
    taus: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k > len(self.codes):
            why = "no more tokens can be the most probable ones"
            raise DataError(problem(f"top_k {self.top_k}", f"at most the {len(self.codes)} codes", why, "lower it"))
        object.__setattr__(self, "taus", tuple(times(self.codes, self.steps).tolist()))

    def __call__(self, eps: Tensor, logits: Tensor) -> Tensor:
        """Tokens (B,) of noise (B, d) and the teacher's logits (B, V)."""
        check_precision(eps)
        if self.top_k is None:
            return self._tokens(eps, self.codes, logits)
        likely, index = logits.topk(self.top_k, -1)
        return index.gather(1, self._tokens(eps, self.codes[index], likely)[:, None])[:, 0]

    def _tokens(self, eps: Tensor, codes: Tensor, logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.to(eps.dtype), -1)
        return nearest_code(flow(eps, codes, log_p, self.taus), codes, log_p)


def check_precision(eps: Tensor) -> None:
    """Raises DataError."""
    if eps.dtype not in PRECISE:
        why, todo = "in bfloat16 two tokens of a hundred are other ones", "keep noise and codes in float32"
        raise DataError(problem(f"noise in {eps.dtype} for the map to tokens", "float32", why, todo))


def times(codes: Tensor, steps: int = STEPS) -> Tensor:
    """The grid of tau (steps + 1,), float64, from 0 to 1, of a codebook (V, d).

    Between the ends it is even in log(tau / (1 - tau)), from 0.2 over the largest distance of two codes to 10 over the
    5 % quantile of the distances of each to its nearest.
    """
    near, largest = distances(codes)
    inner = torch.linspace(
        math.log(0.2 / largest), math.log(10 / near.quantile(NEAREST).item()), steps - 1, dtype=torch.float64
    )
    return torch.cat([torch.zeros(1), torch.sigmoid(inner), torch.ones(1)])


def distances(codes: Tensor) -> tuple[Tensor, float]:
    """The distance (V,) of each code to its nearest one, and the largest distance, float64. Raises DataError."""
    check_precision(codes)
    if not codes.isfinite().all():
        row = (~codes.isfinite()).any(1).nonzero()[0].item()
        why, todo = "no noise leads there", "drop codes that were never trained"
        raise DataError(problem(f"code {row} with NaN or infinity", "finite codes", why, todo))
    near, largest, x = [], 0.0, codes.cpu().double()
    for start in range(0, len(x), PART):
        part = torch.cdist(x[start : start + PART], x, compute_mode="donot_use_mm_for_euclid_dist")
        largest = max(largest, part.max().item())
        own = torch.arange(len(part))
        part[own, start + own] = math.inf
        least, other = part.min(1)
        if not least.all():
            i = int((least == 0).nonzero()[0])
            why = "no noise tells tokens of one code from each other"
            todo = "merge them, or drop codes that were never used"
            raise DataError(problem(f"codes {start + i} and {other[i].item()} alike", "different codes", why, todo))
        near.append(least)
    return torch.cat(near), largest


def posterior_mean(x: Tensor, tau: float, codes: Tensor, log_p: Tensor) -> Tensor:
    """m (B, d) of x (B, d) at tau < 1, for codes (V, d) or (B, V, d) and log-probabilities (B, V)."""
    score = log_p + (tau * products(x, codes) - 0.5 * tau**2 * codes.square().sum(-1)) / (1 - tau) ** 2
    return (torch.softmax(score, -1)[:, None] @ codes)[:, 0]


def products(x: Tensor, codes: Tensor) -> Tensor:
    """x·c_j (B, V)."""
    return (x[:, None] @ codes.mT)[:, 0]


def flow(eps: Tensor, codes: Tensor, log_p: Tensor, taus: tuple[float, ...]) -> Tensor:
    """x_1 (B, d) of noise (B, d), for log-probabilities (B, V) of the codes."""
    x, before = eps, None  # before: log(tau / (1 - tau)) and m of the step before
    for tau, then in zip(taus, taus[1:], strict=False):
        m = posterior_mean(x, tau, codes, log_p)
        now = math.log(tau / (1 - tau)) if tau > 0 else -math.inf
        if before is None or then == 1:
            x = x + (then - tau) / (1 - tau) * (m - x)
        else:
            after = math.log(then / (1 - then))
            ahead = m + (after - now) / (now - before[0]) / 2 * (m - before[1])
            x = (1 - then) / (1 - tau) * x + then * (1 - math.exp(now - after)) * ahead
        before = (now, m) if tau > 0 else None
    return x


def nearest_code(x: Tensor, codes: Tensor, log_p: Tensor) -> Tensor:
    """The index (B,) of the code that is nearest to x (B, d), among those of a probability above 0."""
    far = codes.square().sum(-1) - 2 * products(x, codes)
    return far.masked_fill(log_p == -math.inf, math.inf).argmin(-1)
