"""Direct regression to the teacher's own samples: the cheap baseline.

The teacher has turned noise into `latents` once, in N guided deterministic steps. The student starts from the same
noise and, at each of its few steps, predicts that end point; its inputs are those of its own rollout, so that what
is trained is what is sampled. A squared loss on a deterministic pairing has one fixed point, the pairing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepdistill.core.losses import Distance, distance
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, check_starts, follow, starts
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.networks.roles import Ema, Lora, Role


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """Few-step regression onto the teacher's N-step output from the same noise.

    References:
        Knowledge distillation in iterative generative models, Luhman & Luhman 2021, https://arxiv.org/abs/2101.02388,
        is the one-step case.

    Args:
        num_inference_steps: steps of the student, evenly spaced.
        timesteps: other starts of the steps, descending; see `DMD2.timesteps`, whose warm start this may be.
        loss_type: `l2` or `huber`.
        huber_c: the Huber constant, in latent units.
        ema_decay: decay of the average of the student that is exported; none exports the student itself.
    """

    num_inference_steps: int = 4
    timesteps: tuple[float, ...] | None = None
    loss_type: Distance = "l2"
    huber_c: float = 1e-3
    ema_decay: float | None = 0.99

    def __post_init__(self) -> None:
        check_starts(self.timesteps)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.ema_decay is None else {"ema": Ema("student", self.ema_decay)}
        return {"student": Lora()} | average

    def student_role(self) -> str:
        return "student" if self.ema_decay is None else "ema"

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.check(self.timesteps or ())
        self.sampler(schedule)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return Sampler(starts(schedule, self.timesteps, self.num_inference_steps, steps), eta=0.0, clean=True)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        if batch.latents is None or batch.noise is None:
            raise ValueError("regression needs pairs of noise and the teacher's latents; the batch has none")
        student, times = context.denoiser("student"), self.sampler(context.schedule).timesteps
        # one exit for the whole step, so that no sample is carried further than it is used
        exit_at = int(context.shared("exit") * len(times))
        with torch.no_grad():
            x_t = follow(student, context.schedule, times[: exit_at + 1], batch.noise, batch.cond)
        t = torch.full((len(x_t),), times[exit_at], device=context.device)
        loss = distance(self.loss_type, student(x_t, t, batch.cond).x0, batch.latents, self.huber_c)
        yield Update(("student",), loss, {"loss": loss.detach()})
