"""Continuous-time consistency distillation (sCM), for a LoRA on a network of any noise process.

A consistency model maps every state of the teacher's ODE to its end. Discrete methods compare two neighbouring times
and so converge to their solver's product. Here the two times are infinitely near: the loss takes the derivative of the
student along the ODE, and its fixed point is the ODE's own map.

The derivative is taken in TrigFlow's coordinates (`stepdistill.core.trigflow`) inside the loss. Outside of it the
student is an ordinary one, and stock schedulers sample it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Positive, Whole
from stepdistill.core.denoise import Condition
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, check_starts
from stepdistill.core.trigflow import central_difference, scale_of, tangent, trig_network, trig_output
from stepdistill.methods.base import Averaged, Batch, StepContext, Update
from stepdistill.methods.gan import Ladd
from stepdistill.networks.roles import TEACHER, Lora, Module, Role, Tap
from stepdistill.networks.time_weight import TimeWeight

# SANA-Sprint's starts in one, two and four steps (Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.4)
STARTS = ((math.pi / 2,), (math.pi / 2, 1.3), (math.pi / 2, 1.4, 1.2, 0.8))


@dataclass(frozen=True, kw_only=True)
class SCM(Averaged):
    """sCM: one student for one to four steps.

    Equation:
        x = cos(t) x0 + sin(t) eps, and F = cos(t) eps - sin(t) x0 of the student's estimate; F^- has no gradient
        f(x, t) = cos(t) x - sin(t) F(x, t), the student's estimate of clean data
        dx/dt = the guided teacher's F
        g = -cos(t)^2 (F^- - dx/dt) - r cos(t) sin(t) (x + dF^-/dt), which is cos(t) df/dt at r = 1
        loss = E exp(-w(t)) / tan(t) |F - F^- - g / (|g| + c)|^2 + w(t), where w is the adaptive weight

    A difference of h timesteps in place of the derivative (`difference`) is too small by `1 - sin(h) / h` in the
    fastest component of the usual time embedding: 0.2 % at h = 0.1, 16 % at 1, and all of it at 10. Below 0.03
    timesteps float32 rounds it away.

    References:
        Simplifying, stabilizing and scaling continuous-time consistency models, Lu & Song 2024,
        https://arxiv.org/abs/2410.11081.
        SANA-Sprint, Chen et al. 2025, https://arxiv.org/abs/2503.09641: `gan: {}`.

    Args:
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher; a pair is a range that each sample draws from.
        time_mean: P_mean, mean of tau in `tan t = e^tau / 0.5`.
        time_std: P_std, its standard deviation.
        warmup_steps: H, steps in which r rises from 0 to 1.
        tangent_offset: c, the length of a tangent below which it is not normalised, in units of latents of
            variance 1.
        difference: h, scheduler timesteps of a central difference in place of the forward-mode derivative, in
            [0.03, 0.3]; none differentiates.
        num_inference_steps: default number of sampling steps, stored in the contract.
        starts: angles at which the steps of sampling start, descending, a list for each number of steps that has one;
            other numbers are spaced evenly in the angle, from that of the noisiest time.
        gan: adversarial term LADD; with it the method is SANA-Sprint.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    guidance_scale: Amount | tuple[Amount, Amount] = 4.5
    time_mean: float = 0.0
    time_std: Positive = 1.6
    warmup_steps: Whole = 1000
    tangent_offset: Positive = 0.1
    difference: Positive | None = None
    num_inference_steps: Count = 4
    starts: tuple[tuple[Amount, ...], ...] = STARTS
    gan: Ladd | None = None

    def __post_init__(self) -> None:
        if self.difference is not None and not 0.03 <= self.difference <= 0.3:
            raise ValueError(
                f"difference is {self.difference} timesteps: expected 0.03 to 0.3. A shorter one is lost in float32, "
                "and a longer one is no derivative of the network in time, which changes within one timestep"
            )
        for angles in self.starts:
            descend = angles and list(angles) == sorted(set(angles), reverse=True)
            if not descend or not 0 < angles[-1] <= angles[0] < 1.5709:  # pi/2 may be rounded up
                raise ValueError(
                    f"starts has {list(angles)}: expected descending angles in (0, pi/2], such as [1.5708, 1.3]"
                )
        if len(numbers := [len(angles) for angles in self.starts]) > len(set(numbers)):
            raise ValueError(f"starts has lists of {numbers} angles: expected one list for each number of steps")

    @property
    def derivative(self) -> Literal["forward", "difference"]:
        return "forward" if self.difference is None else "difference"

    def roles(self) -> dict[str, Role]:
        head = {} if self.gan is None else self.gan.roles()
        return {"student": Lora(), "weight": Module(_weight), **head, **self.average}

    def check(self, schedule: NoiseSchedule) -> None:
        for n in {self.num_inference_steps, *map(len, self.starts)}:
            schedule.check(self.sampler(schedule, n).timesteps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        n = steps or self.num_inference_steps
        noisiest = schedule.angle(torch.tensor(schedule.span[1], dtype=torch.float64)).item()
        even = [noisiest * (n - i) / n for i in range(n)]
        angles = next((angles for angles in self.starts if len(angles) == n), even)
        times = tuple(time_of_angle(schedule, angle) for angle in angles)
        check_starts(times)  # a table's last entries stand for all angles above
        return Sampler(times, eta=1.0, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        schedule, cond, student = context.schedule, batch.cond, context.denoiser("student")
        t = self._times(context, batch, "t")
        angle = schedule.angle(t)
        x_t = schedule.add_noise(batch.x0, context.noise(batch, "eps"), t)
        x = x_t / expand(scale_of(schedule, angle), x_t)
        with torch.no_grad():
            teacher = context.guided(TEACHER, context.guidance(self.guidance_scale, batch))
            dx = trig_output(teacher(x_t, t, cond), angle)
        slope = self._slope(context, x, angle, t, cond, dx)

        F = trig_network(student, schedule, x, angle, t, cond)  # the paper's letter
        cos, sin = (expand(part, x) for part in (angle.cos(), angle.sin()))
        r = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        g = -(cos**2) * (F.detach() - dx) - r * cos * sin * (x + slope)
        length = g.flatten(1).norm(dim=1)
        wanted = F.detach() + g / expand(length + self.tangent_offset, g)
        weight = context.module("weight")(angle)
        size = (F - wanted).square().flatten(1).sum(1) * angle.cos() / angle.sin()
        loss, roles = ((-weight).exp() * size + weight).mean(), ("student", "weight")
        if self.gan is None:
            yield Update(roles, loss, tangent=length.mean())
            return
        again = self._times(context, batch, "gan input t")
        term, x0, logs = self.gan.student_term(context, batch, student, again, self.sampler(schedule, 1).timesteps[0])
        yield Update(roles, loss + term, loss=loss, tangent=length.mean(), **logs)
        yield Update("head", self.gan.head_loss(context, batch, x0))

    def _times(self, context: StepContext, batch: Batch, purpose: str) -> Tensor:
        return context.schedule.lognormal_times(context.draw(batch, purpose), self.time_mean, self.time_std)

    def _slope(self, context: StepContext, x: Tensor, angle: Tensor, t: Tensor, cond: Condition, dx: Tensor) -> Tensor:
        """The student's `dF / dt` along the teacher's ODE."""
        given = (context.denoiser("student"), context.schedule, x, angle, t, cond, dx)
        return tangent(*given) if self.difference is None else central_difference(*given, self.difference)


def _weight(tap: Tap) -> TimeWeight:
    return TimeWeight()


def time_of_angle(schedule: NoiseSchedule, angle: float) -> float:
    """The scheduler's timestep at an angle: of a table the nearest entry."""
    sine, cosine = math.sin(angle), max(math.cos(angle), 0.0)
    return schedule.time_of_sigma(sine / (sine + cosine) if schedule.straight else sine)
