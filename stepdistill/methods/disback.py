"""Distribution backtracking (DisBack): record the path from the teacher to the initial student, then distil backwards.

A score far from the student's distribution is a poor guide. So the fake score is first trained from the teacher to the
*initial* student, and copies of it on the way are kept as waypoints. Then distribution matching takes these as its
targets, from the nearest to the student back to the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from stepdistill.core.guidance import Norm
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data.base import Source
from stepdistill.methods.base import Batch, Method, StepContext, Update, check_effect
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.vsd import VSD
from stepdistill.networks.rewards.base import MeasureReward, Reward
from stepdistill.networks.roles import TEACHER, Ema, Role


@dataclass(frozen=True, kw_only=True)
class DisBack(Method):
    """Distribution backtracking (DisBack), applied to a distribution matching method.

    Equation:
        recording:    loss = E |fake(x_t, t).eps - eps|^2 on samples of the initial student; waypoints 1 ... N: copies
        backtracking: distribution matching, with waypoint N - 1, ..., 1 and at last the teacher as the real score

    References:
        Distribution backtracking builds a faster convergence trajectory for diffusion distillation, Zhang et al. 2024,
        https://arxiv.org/abs/2408.15991, algorithms 1 and 2.

    Args:
        matching: the distribution matching method; the recording stage replaces its warm-up.
        waypoints: N, number of copies of the fake score on the path; the last one is its start in the second stage.
        recording_steps: i_1, training steps of the fake score between two waypoints.
        backtracking_steps: i_2, training steps with each of the waypoints N - 1, ..., 1 as the real score, before the
            teacher.
    """

    matching: DMD2 | VSD = field(default_factory=DMD2)
    waypoints: int = 5
    recording_steps: int = 50
    backtracking_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("waypoints", "recording_steps", "backtracking_steps"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")
        check_effect(self, "backtracking_steps", self.waypoints > 1, "several waypoints")
        if isinstance(self.matching, DMD2) and self.matching.weak:
            raise ValueError(
                f"matching.weak is {self.matching.weak}: it moves the real score from the teacher, and here that is a "
                "waypoint; use 0"
            )
        if self.matching.warmup_steps:
            raise ValueError(
                f"matching.warmup_steps is {self.matching.warmup_steps}: the recording replaces the warm-up; use 0"
            )

    @property
    def guidance_scale(self) -> float | tuple[float, float]:
        return self.matching.guidance_scale

    @property
    def guidance_norm(self) -> Norm | None:
        return self.matching.guidance_norm

    @property
    def needs(self) -> frozenset[str]:
        return self.matching.needs

    def roles(self) -> dict[str, Role]:
        kept: dict[str, Role] = {
            f"waypoint_{n}": Ema("fake", 0.0, until=n * self.recording_steps) for n in range(1, self.waypoints)
        }
        return self.matching.roles() | kept

    def student_role(self) -> str:
        return self.matching.student_role()

    def check(self, schedule: NoiseSchedule) -> None:
        self.matching.check(schedule)

    def check_data(self, data: Source) -> None:
        self.matching.check_data(data)

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        return self.matching.trained_rewards

    def calibrate(self, measure: MeasureReward) -> DisBack:
        return replace(self, matching=self.matching.calibrate(measure))

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return self.matching.sampler(schedule, steps)

    @property
    def trained_steps(self) -> tuple[int, ...]:
        return self.matching.trained_steps

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        recording = replace(self.matching, warmup_steps=self.waypoints * self.recording_steps)
        return recording.towards(self.target(step), context, batch, step)

    def target(self, step: int) -> str:
        """The role that is the real score in `step` (from 0)."""
        turn = step - self.waypoints * self.recording_steps
        left = self.waypoints - 1 - max(turn, 0) // self.backtracking_steps
        return f"waypoint_{left}" if left > 0 else TEACHER
