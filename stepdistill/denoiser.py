"""A denoiser: a role of the backbone that answers `(x_t, t, condition)` with an `Estimate`; and its wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from stepdistill.adversarial import features_before
from stepdistill.backbone import Backbone
from stepdistill.prediction import Estimate, Kind, estimate, output
from stepdistill.schedule import NoiseSchedule, expand

Condition = Mapping[str, Tensor]
Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
SCALE = "guidance_scale"  # the condition that guidance adapters are told, (B,)


class Denoise(Protocol):
    """Anything that estimates: x_t (B, C, H, W), t (B,) in scheduler timesteps, tensors of B rows in `cond`."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate: ...


@dataclass(frozen=True)
class Denoiser:
    """A role's network as an estimator.

    Args:
        call: the family's way to call the network.
        dtype: precision of the network's arithmetic; estimates are always float32.
        grad: whether the role's own weights take gradients.
    """

    backbone: Backbone
    role: str
    schedule: NoiseSchedule
    kind: Kind
    call: Call
    dtype: torch.dtype = torch.float32
    grad: bool = True

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        with self._network(x_t.device, cond) as net:
            y = self.call(net, x_t, t, cond)
        return estimate(self.kind, y, x_t, t, self.schedule)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the network makes of its input halfway, (B, channels, h, w) at the family's tap."""
        tap = self.backbone.tap
        if tap is None:
            raise ValueError(f"role {self.role!r} is asked for features, and its network has no tap")
        with self._network(x_t.device, cond) as net:
            return features_before(net, tap, x_t, lambda: self.call(net, x_t, t, cond)).float()

    @contextmanager
    def _network(self, device: torch.device, cond: Condition) -> Iterator[nn.Module]:
        half = self.dtype in (torch.bfloat16, torch.float16)
        use = self.backbone.use(self.role, self.grad, cond.get(SCALE))
        with use as net, torch.autocast(device.type, self.dtype, enabled=half):
            yield net

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        """The output of the network that stands for an estimate, (B, ...): the space that it was trained in."""
        return output(self.kind, est, t, self.schedule)

    def frozen(self) -> Denoiser:
        """The same role with gradients to its inputs only."""
        return replace(self, grad=False)


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


def told(denoise: Denoise, scale: float | None) -> Denoise:
    """Guidance adapters are told one scale for all samples; None is for roles without adapters."""
    if scale is None:
        return denoise

    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return denoise(x_t, t, {**cond, SCALE: torch.full((len(x_t),), scale, device=x_t.device)})

    return call
