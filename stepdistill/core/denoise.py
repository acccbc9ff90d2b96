"""Denoisers as functions that estimate x0 and eps; classifier-free guidance and the scale of adapters wrap them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.core.guidance import Combine, combine_linearly
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import expand

Condition = Mapping[str, Tensor]
SCALE = "guidance_scale"  # the condition by which guidance adapters get their scale, (B,)
CONTROL = "control"  # the condition that a ControlNet sees, (B, C, h, w)
HELD = "held"  # the first latent frames of a video, which are given and clean, (B, C, k, h, w)


class Denoise(Protocol):
    """Anything that estimates: x_t (B, C, H, W), t (B,) in scheduler timesteps, tensors of B rows in `cond`."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate: ...


class RoleDenoise(Denoise, Protocol):
    """A role's network as an estimator, with what adversarial and regression losses ask of it beside estimates."""

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        """What the network makes of `x_t = alpha_t x0 + sigma_t eps`, with levels (B,), when it is told the time t."""
        ...

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Intermediate features of the network, (B, channels, h, w) at the family's tap."""
        ...

    def features_at(self, x_t: Tensor, t: Tensor, cond: Condition, depths: tuple[float, ...]) -> tuple[Tensor, ...]:
        """The same after shares of the network's blocks, ascending in (0, 1], from one pass that ends at the last."""
        ...

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        """The network output that an estimate corresponds to, (B, ...), in the prediction type it was trained with."""
        ...

    def frozen(self) -> RoleDenoise:
        """The same role with gradients to its inputs but not to its weights."""
        ...

    def at_strength(self, strength: float) -> RoleDenoise:
        """The same role with its LoRA at a strength, for calls without gradients; at 0 it is the teacher."""
        ...


def with_held(x: Tensor, cond: Condition) -> Tensor:
    """`x` (B, C, F, h, w) with the frames that `cond` holds in the place of its first ones; `x` where it holds none."""
    if HELD not in cond:
        return x
    held = cond[HELD].to(x.dtype)
    return torch.cat([held, x[:, :, held.shape[2] :]], 2)


def free_part(x: Tensor, cond: Condition) -> Tensor:
    """`x` (B, C, F, h, w) without the frames that `cond` holds; a loss compares these alone."""
    return x if HELD not in cond else x[:, :, cond[HELD].shape[2] :]


def concatenated(*conds: Condition) -> Condition:
    """Several conditions as the rows of one; sequences of unequal length are filled up with zeros to the longest."""
    return {key: torch.cat(filled([cond[key] for cond in conds])) for key in conds[0]}


def filled(rows: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (B, L, ...), filled up with zeros at the end to the longest L; a mask's zeros are False."""
    if len({row.shape[1:2] for row in rows}) < 2:
        return list(rows)
    length = max(row.shape[1] for row in rows)
    return [
        torch.cat([row, row.new_zeros(len(row), length - row.shape[1], *row.shape[2:])], 1)
        if row.shape[1] < length
        else row
        for row in rows
    ]


def without_prompt(null: Condition, cond: Condition) -> Condition:
    """The unconditional embeddings in the rows of `cond`, with its images, which are no part of a prompt.

    Args:
        null: the unconditional embeddings, one row or B rows, of a length of their own where lengths differ. What they
            lack keeps its value.
    """
    return {
        key: null[key].expand(len(value), *null[key].shape[1:]) if key in null else value for key, value in cond.items()
    }


def guided(denoise: Denoise, null: Condition, scale: float | Tensor, combine: Combine = combine_linearly) -> Denoise:
    """Classifier-free guidance in one batched call, `uncond + scale (cond - uncond)` by default (scale 1 is none).

    Args:
        null: the unconditional embeddings, one row or B rows.
        scale: one number, or one per sample (B,).
        combine: the pipeline's rule.
    """
    if isinstance(scale, float | int) and scale == 1:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        w = expand(scale, x_t) if isinstance(scale, Tensor) else scale
        return combine(*without_and_with_prompt(denoise, null, x_t, t, cond), w, x_t, t)

    return call


def guided_by(
    denoise: Denoise, guide: Denoise, null: Condition, scale: float, combine: Combine = combine_linearly
) -> Denoise:
    """Guidance that another denoiser gives: `denoise` moved as guidance 1 + `scale` moves `guide` (scale 0 is none).

    By the linear rule that is `denoise + scale (cond - uncond)`, with both of `guide`.

    Args:
        null: the unconditional embeddings, one row or B rows.
        combine: the pipeline's rule.
    """
    if scale == 0:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        uncond, cond_ = without_and_with_prompt(guide, null, x_t, t, cond)
        moved = combine(uncond, cond_, 1 + scale, x_t, t)
        return Estimate(*(x + (y - c) for x, y, c in zip(denoise(x_t, t, cond), moved, cond_, strict=True)))

    return call


def without_and_with_prompt(
    denoise: Denoise, null: Condition, x_t: Tensor, t: Tensor, cond: Condition
) -> tuple[Estimate, Estimate]:
    """The two estimates that guidance compares, from one call of 2 B rows."""
    both = concatenated(without_prompt(null, cond), cond)
    est = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    halves = [value.chunk(2) for value in est]
    return Estimate(*(first for first, _ in halves)), Estimate(*(last for _, last in halves))


def with_scale(denoise: Denoise, scale: float | None) -> Denoise:
    """Pass one guidance scale for all samples to guidance adapters; None is for roles without adapters."""
    if scale is None:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return denoise(x_t, t, {**cond, SCALE: torch.full((len(x_t),), scale, device=x_t.device)})

    return call
