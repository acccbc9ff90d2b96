"""A role of the backbone as a denoiser, which answers `(x_t, t, condition)` with an `Estimate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepdistill.core.denoise import SCALE, Condition, with_held
from stepdistill.core.prediction import Estimate, Kind, estimate_at_levels, output
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora_layers import at_strength
from stepdistill.networks.roles import TEACHER, Lora
from stepdistill.networks.taps import features_before

Call = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """A role's network as an estimator.

    Args:
        call: the family's way to call the network.
        dtype: precision of the network's arithmetic; estimates are always float32.
        grad: whether the role's own weights take gradients.
        strength: of the role's LoRA, 1 as it is trained.
    """

    backbone: Backbone
    role: str
    schedule: NoiseSchedule
    kind: Kind
    call: Call
    dtype: torch.dtype = torch.float32
    grad: bool = True
    strength: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return self.queried(x_t, t, cond, *self.schedule(t))

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        """The estimate at levels (B,) of `x_t`, by a network that is told t.

        Frames that `cond` holds are their own x0 and eps: on a straight path they stay clean at every time, since
        their velocity is 0.
        """
        with self._network(x_t.device, cond) as net:
            y = self.call(net, x_t, t, cond)
        est = estimate_at_levels(self.kind, y, x_t, alpha_t, sigma_t)
        return Estimate(*(with_held(part, cond) for part in est))

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What the network makes of its input halfway, (B, channels, h, w) at the family's tap."""
        return self.features_at(x_t, t, cond, ())[0]

    def features_at(self, x_t: Tensor, t: Tensor, cond: Condition, depths: tuple[float, ...]) -> tuple[Tensor, ...]:
        """The same after shares of the network's blocks, ascending in (0, 1], from one pass that ends at the last."""
        taps = self.backbone.places(depths)
        with self._network(x_t.device, cond) as net:
            found = features_before(net, taps, x_t, lambda: self.call(net, x_t, t, cond))
        return tuple(part.float() for part in found)

    @contextmanager
    def _network(self, device: torch.device, cond: Condition) -> Iterator[nn.Module]:
        half = self.dtype in (torch.bfloat16, torch.float16)
        use = self.backbone.use(self.role, self.grad, cond.get(SCALE))
        strong = at_strength(self.backbone.net, self.role, self.strength)
        with use as net, strong, torch.autocast(device.type, self.dtype, enabled=half):
            yield net

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        """The output of the network that stands for an estimate, (B, ...): the space that it was trained in."""
        return output(self.kind, est, t, self.schedule)

    def frozen(self) -> Denoiser:
        """The same role with gradients to its inputs only."""
        return replace(self, grad=False)

    def at_strength(self, strength: float) -> Denoiser:
        """The same role with its LoRA at a strength, for calls without gradients; at 0 it is the teacher."""
        kind = None if self.role == TEACHER else self.backbone.kind(self.role)
        if not isinstance(kind, Lora):
            what = "the frozen base" if kind is None else f"a {type(kind).__name__}"
            raise ValueError(
                f"role {self.role!r} at strength {strength}: expected a LoRA, which alone has a strength; it is {what}"
            )
        return replace(self, strength=strength)
