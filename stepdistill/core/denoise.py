"""What estimates x0 and eps, and its wrappers: classifier-free guidance, and the scale of guidance adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import expand

Condition = Mapping[str, Tensor]
SCALE = "guidance_scale"  # the condition that guidance adapters are told, (B,)


class Denoise(Protocol):
    """Anything that estimates: x_t (B, C, H, W), t (B,) in scheduler timesteps, tensors of B rows in `cond`."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate: ...


class RoleDenoise(Denoise, Protocol):
    """A role's network as an estimator, with what adversarial and regression losses ask of it beside estimates."""

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the network makes of its input halfway, (B, channels, h, w) at the family's tap."""
        ...

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        """The output of the network that stands for an estimate, (B, ...): the space that it was trained in."""
        ...

    def frozen(self) -> RoleDenoise:
        """The same role with gradients to its inputs only."""
        ...


def guided(denoise: Denoise, null: Condition, scale: float | Tensor) -> Denoise:
    """Classifier-free guidance, `uncond + scale (cond - uncond)`, in one batched call (scale 1 is none).

    Applied to (x0, eps), which equals applying it to any network output: each conversion is affine with a part in
    `x_t` that does not depend on the output. Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, in Imagen's scale.

    Args:
        null: the unconditional embeddings, one row or B rows.
        scale: one number, or one per sample (B,).
    """
    if isinstance(scale, float | int) and scale == 1:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        batch = len(x_t)
        both = {key: torch.cat([null[key].expand_as(value), value]) for key, value in cond.items()}
        est = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        w = expand(scale, x_t) if isinstance(scale, Tensor) else scale
        mixed = (value[:batch] + w * (value[batch:] - value[:batch]) for value in est)
        return Estimate(*mixed)

    return call


def with_scale(denoise: Denoise, scale: float | None) -> Denoise:
    """Guidance adapters are told one scale for all samples; None is for roles without adapters."""
    if scale is None:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return denoise(x_t, t, {**cond, SCALE: torch.full((len(x_t),), scale, device=x_t.device)})

    return call
