"""What the contract of an extracted student says: which model it was extracted from, and how it is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from stepdistill.config.kinds import Amount, Count, Place, Positive, Share
from stepdistill.core.errors import problem
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, student_starts
from stepdistill.methods.base import Batch, Method, StepContext, Update, check_steps


@dataclass(frozen=True, kw_only=True)
class Extracted(Method):
    """A LoRA that is the difference of a few-step model from its base, cut to a rank. It was not trained.

    Args:
        tuned: the few-step model: a pipeline, or its network.
        sha256: of its network, computed as `base_hash` in float32.
        whitened: whether the linear layers were cut by the error of their outputs.
        num_inference_steps: steps of the model; where they start is the teacher's solver's choice.
        timesteps: timesteps at which its steps start, descending; none takes those of the teacher's solver.
        eta: share of each step that is noised again. Between 0 and 1 the last step ends where TCD's scheduler ends, at
            time 0 of a table.
        sampling_guidance_scale: guidance scale that the model is sampled with.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    tuned: Place
    sha256: str
    whitened: bool = False
    num_inference_steps: Count = 4
    timesteps: tuple[Amount, ...] | None = None
    eta: Share = 0.0
    sampling_guidance_scale: Positive = 1.0

    def __post_init__(self) -> None:
        check_steps(self)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        starts = student_starts(schedule, self.timesteps, self.num_inference_steps, steps)
        clean = self.eta in (0, 1) or schedule.straight
        return Sampler(starts, self.eta, clean, self.sampling_guidance_scale)

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError: there is nothing to train."""
        why, todo = "it is made from two models without training", "call `stepdistill extract`"
        raise ValueError(problem("method Extracted", "a method that trains", why, todo))

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        self.check(context.schedule)
        return iter(())
