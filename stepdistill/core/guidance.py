"""Rules of classifier-free guidance: what a pipeline makes of its network's outputs without and with the prompt.

The plain rule is linear, and then it is the same in any space that an output is converted to. The others are not: they
are applied to the output itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stepdistill.core.prediction import Estimate, Kind, estimate, output
from stepdistill.core.schedule import NoiseSchedule, expand

Norm = Literal["token", "image"]


class Rule(Protocol):
    """A rule on network outputs (B, C, H, W), those of `eps - x0` for a flow."""

    @property
    def name(self) -> str:
        """Its name in a sampling contract."""
        ...

    @property
    def equation(self) -> str:
        """What it does to outputs, for people to read."""
        ...

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        """The guided output, for a scale that is one number or (B, 1, 1, 1), at t (B,) in scheduler timesteps."""
        ...


class Combine(Protocol):
    """A rule on estimates at x_t (B, C, H, W) and t (B,)."""

    def __call__(self, uncond: Estimate, cond: Estimate, scale: float | Tensor, x_t: Tensor, t: Tensor) -> Estimate: ...


@dataclass(frozen=True)
class Linear:
    """`uncond + w (cond - uncond)`. Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, in Imagen's scale."""

    @property
    def name(self) -> str:
        return "linear"

    @property
    def equation(self) -> str:
        return "uncond + w (cond - uncond)"

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class TokenNorm:
    """The linear rule, with each token then scaled to the norm that it has with the prompt: `y |cond| / |y|`.

    It is that of Qwen-Image's pipeline. A token whose guided output is zero gives nan, as there.

    Args:
        patch: side, in latent pixels, of the square that one token stands for. Its channels count, too.
    """

    patch: int

    @property
    def name(self) -> str:
        return "token_norm"

    @property
    def equation(self) -> str:
        return "y |cond| / |y| of each token, y = uncond + w (cond - uncond)"

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        y = uncond + scale * (cond - uncond)
        return y * (self._norm(cond) / self._norm(y))

    def _norm(self, y: Tensor) -> Tensor:
        """(B, 1, H, W), or (B, 1, F, H, W) of a video: at each place that of its token, which is in one frame."""
        power = y.square().sum(1).unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        norm = power.sum((-3, -1), keepdim=True).sqrt().expand_as(power)
        return norm.flatten(-2).flatten(-3, -2)[:, None]


@dataclass(frozen=True)
class ImageNorm:
    """The linear rule, with the image then scaled to the norm that it has with the prompt: `y |cond| / |y|`."""

    @property
    def name(self) -> str:
        return "image_norm"

    @property
    def equation(self) -> str:
        return "y |cond| / |y| of the image, y = uncond + w (cond - uncond)"

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        y = uncond + scale * (cond - uncond)
        return y * expand(cond.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1), y)


@dataclass(frozen=True)
class Capped:
    """The linear rule, with an image whose norm is above `most` times that with the prompt scaled down to it.

    It is `cfg_normalization` of Z-Image's pipeline.

    Args:
        most: share of the norm with the prompt; above 0.
    """

    most: float

    @property
    def name(self) -> str:
        return "capped"

    @property
    def equation(self) -> str:
        return f"y min(1, {self.most:g} |cond| / |y|), y = uncond + w (cond - uncond)"

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        y = uncond + scale * (cond - uncond)
        norm, most = y.flatten(1).norm(dim=1), self.most * cond.flatten(1).norm(dim=1)
        capped = y * expand(torch.where(norm > most, most / norm, 1.0), y)
        # of several scales one may be 1, at which the pipeline leaves its guidance out
        return torch.where(scale == 1, cond, capped) if isinstance(scale, Tensor) else capped


@dataclass(frozen=True)
class Truncated:
    """Another rule, and no guidance close to the image.

    It is `cfg_truncation` of Z-Image's pipeline.

    Args:
        rule: the other rule.
        after: the share of the way, `1 - t / 1000`, above which the output with the prompt stays as it is.
    """

    rule: Rule
    after: float

    @property
    def name(self) -> str:
        return f"{self.rule.name}, truncated"

    @property
    def equation(self) -> str:
        return f"{self.rule.equation}, and cond at times below {1000 * (1 - self.after):g}"

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float | Tensor, t: Tensor) -> Tensor:
        # as the pipeline has it, to the last digit: a level of an even grid may be `after` itself
        free = expand(((1000 - t) / 1000).double() > self.after, cond)
        return torch.where(free, cond, self.rule(uncond, cond, scale, t))


LINEAR = Linear()


def combine_linearly(uncond: Estimate, cond: Estimate, scale: float | Tensor, x_t: Tensor, t: Tensor) -> Estimate:
    """The linear rule on (x0, eps).

    It equals that on any network output: each conversion is affine, with a part in `x_t` that does not depend on the
    output.
    """
    return Estimate(*(u + scale * (c - u) for u, c in zip(uncond, cond, strict=True)))


def on_estimates(rule: Rule, kind: Kind, schedule: NoiseSchedule) -> Combine:
    """A rule on the outputs of a network that predicts `kind`."""
    if isinstance(rule, Linear):
        return combine_linearly

    def combine(uncond: Estimate, cond: Estimate, scale: float | Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        parts = [output(kind, est, t, schedule) for est in (uncond, cond)]
        return estimate(kind, rule(parts[0], parts[1], scale, t), x_t, t, schedule)

    return combine
