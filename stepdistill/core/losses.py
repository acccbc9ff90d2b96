"""Losses as pure functions of tensors, in float32 (float64 where their inputs are)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule

Distance = Literal["l2", "huber"]
Adversarial = Literal["softplus", "hinge"]
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "hellinger", "jeffreys"]


def distance(kind: Distance, a: Tensor, b: Tensor, huber_c: float = 1e-3) -> Tensor:
    """Mean distance of two tensors of one shape: squared, or the pseudo-Huber of each number.

    The Huber form is nearly |a - b| at the scale of latents (Song & Dhariwal 2023, https://arxiv.org/abs/2310.14189,
    section 3.3); the squared one has the mean as its fixed point, which is what closed forms speak about.
    """
    squared = _error(a, b).square()
    match kind:
        case "l2":
            return squared.mean()
        case "huber":
            return pseudo_huber(squared, huber_c).mean()
    raise ValueError(f"distance {kind!r}: expected l2 or huber")


def sample_distances(kind: Distance, a: Tensor, b: Tensor) -> Tensor:
    """The distance (B,) of each sample of two batches (B, ...): the mean square, or the pseudo-Huber of its norm.

    The latter is `(sqrt(|a - b|^2 + c^2) - c) / d` with the norm over the d numbers of a sample and `c = 0.00054 d`,
    so no sample's gradient is longer than 1 / d (rf++, Lee et al. 2024, https://arxiv.org/abs/2405.20320, section 4.2).
    """
    squared = _error(a, b).flatten(1).square()
    d = squared.shape[1]
    return squared.mean(1) if kind == "l2" else pseudo_huber(squared.sum(1), 0.00054 * d) / d


def pseudo_huber(squared: Tensor, c: float) -> Tensor:
    """`sqrt(e^2 + c^2) - c` of squared errors `e^2`: quadratic for |e| far below c, linear far above."""
    return (squared + c**2).sqrt() - c


def _error(a: Tensor, b: Tensor) -> Tensor:
    return a - b if a.dtype == torch.float64 else a.float() - b.float()


def surrogate(x0: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `x0` is `gradient / x0.numel()`, and whose value is half its mean square.

    Both (B, ...); only `x0` keeps its graph. Yin et al. 2023, https://arxiv.org/abs/2311.18828, section 3.2.
    """
    return 0.5 * distance("l2", x0, (x0 - gradient).detach())


def denoising(est: Estimate, x0: Tensor, eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Denoising score matching: the mean squared error of the noise, or on a straight path of the velocity.

    Its minimum over networks is the score of the distribution of `x0` (Vincent 2011). All (B, ...).
    """
    return distance("l2", schedule.denoising_target(*est), schedule.denoising_target(x0, eps))


def preference_loss(logit: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """Mean cross-entropy of logits (B,) that the first of two is better, which it is with the probability `label` (B,).

    `-y log sigmoid(z) - (1 - y) log sigmoid(-z)`, Bradley & Terry's model of choices between pairs, as in direct
    preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7).
    """
    return (label * softplus(-logit) + (1 - label) * softplus(logit)).mean()


def generator_loss(kind: Adversarial, fake: Tensor) -> Tensor:
    """What the student lowers: mean `softplus(-d)` (Goodfellow et al. 2014, non-saturating), or `-d` with hinge."""
    return softplus(-fake).mean() if kind == "softplus" else -fake.mean()


def discriminator_loss(kind: Adversarial, fake: Tensor, real: Tensor) -> Tensor:
    """What the head lowers; its logits (B, 1) rise for real data. Softplus has `log p_real - log p_fake` as optimum."""
    if kind == "softplus":
        return softplus(fake).mean() + softplus(-real).mean()
    return (1 + fake).relu().mean() + (1 - real).relu().mean()


def divergence_weight(kind: Divergence, logits: Tensor) -> Tensor:
    """`h(r)` of an f-divergence, (B,), for logits `log r` of real over fake, (B, 1); mean 1 over the batch.

    The gradient of `D_f(p_real || p_fake)` is that of the reverse KL weighted by `h(r) = f''(r) r^2`, here up to a
    constant factor. Logits are clamped to +-10 and ratios to [0.1, 20], as published (f-distill, Xu et al. 2025,
    https://arxiv.org/abs/2502.15681, section 3 and table 1).
    """
    r = logits.detach().float().mean(1).clamp(-10, 10).exp().clamp(0.1, 20)
    match kind:
        case "reverse_kl":
            h = torch.ones_like(r)
        case "forward_kl":
            h = r
        case "jensen_shannon":
            h = r / (1 + r)
        case "softened_reverse_kl":
            h = 1 / (1 + r)
        case "hellinger":
            h = r.sqrt()
        case "jeffreys":
            h = 1 + r
    return h / h.mean()
