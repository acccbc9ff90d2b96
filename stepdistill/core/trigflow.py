"""TrigFlow, the coordinates of continuous-time consistency models, for a network of any noise process.

A state of a schedule over `sqrt(alpha_t^2 + sigma_t^2)` is `x = cos(a) x0 + sin(a) eps` at the angle
`a = atan(sigma_t / alpha_t)`. What the network says of (x0, eps) is there `F = cos(a) eps - sin(a) x0`, and the
teacher's F is the velocity `dx / da` of its ODE. Nothing is trained for this change of coordinates, and a student that
is trained in them is sampled in those of its schedule (SANA-Sprint, Chen et al. 2025,
https://arxiv.org/abs/2503.09641, section 3.1; the coordinates are those of Lu & Song 2024,
https://arxiv.org/abs/2410.11081, with data and noise of standard deviation 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.core.denoise import Condition, RoleDenoise
from stepdistill.core.devices import full_precision
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand


def scale_of(schedule: NoiseSchedule, angle: Tensor) -> Tensor:
    """`sqrt(alpha^2 + sigma^2)` (B,) at an angle: that by which a TrigFlow state is a state of the schedule."""
    return 1 / (angle.cos() + angle.sin()) if schedule.straight else torch.ones_like(angle)


def trig_output(est: Estimate, angle: Tensor) -> Tensor:
    """`F = cos(a) eps - sin(a) x0`, (B, ...)."""
    return expand(angle.cos(), est.eps) * est.eps - expand(angle.sin(), est.x0) * est.x0


def trig_network(
    denoise: RoleDenoise, schedule: NoiseSchedule, x: Tensor, angle: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    """F (B, ...) of a TrigFlow state x (B, ...) at an angle (B,), whose time in the schedule is t (B,).

    Differentiable in all three: levels are those of the angle, and the network alone sees t.
    """
    scale = scale_of(schedule, angle)
    est = denoise.queried(expand(scale, x) * x, t, cond, scale * angle.cos(), scale * angle.sin())
    return trig_output(est, angle)


def tangent(
    denoise: RoleDenoise, schedule: NoiseSchedule, x: Tensor, angle: Tensor, t: Tensor, cond: Condition, dx: Tensor
) -> Tensor:
    """`dF / da` (B, ...) along `dx / da`, in forward mode, without a graph.

    The fused kernels of attention have no forward-mode derivative, so the plain one is used inside: it holds a matrix
    of tokens by tokens for each head.
    """

    def output(x: Tensor, angle: Tensor, t: Tensor) -> Tensor:
        return trig_network(denoise, schedule, x, angle, t, cond)

    along = (dx, torch.ones_like(angle), schedule.time_per_angle(t))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), full_precision(x.device):
        return torch.func.jvp(output, (x, angle, t), along)[1]


def central_difference(
    denoise: RoleDenoise,
    schedule: NoiseSchedule,
    x: Tensor,
    angle: Tensor,
    t: Tensor,
    cond: Condition,
    dx: Tensor,
    h: float,
) -> Tensor:
    """`tangent` from F at `h` scheduler timesteps before and after, in one batched call.

    A component of frequency w per timestep comes out too small by `1 - sin(w h) / (w h)`; w is at most 1 in the usual
    embedding of timesteps.
    """
    step = h / schedule.time_per_angle(t)
    moves = ((x, expand(step, x) * dx), (angle, step), (t, torch.full_like(t, h)))
    x, angle, t = (torch.cat([value + part, value - part]) for value, part in moves)
    twice = {key: torch.cat([value, value]) for key, value in cond.items()}
    with torch.no_grad(), full_precision(x.device):
        after, before = trig_network(denoise, schedule, x, angle, t, twice).chunk(2)
    return (after - before) / (2 * expand(step, after))
