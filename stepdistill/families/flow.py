"""Base of the rectified-flow families, and their stock schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.prediction import Kind
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family
from stepdistill.families.schedulers import FirstNoiseEulerScheduler


@dataclass(frozen=True, kw_only=True)
class Flow(Family):
    """A pipeline whose network predicts the velocity `eps - x0`."""

    network_name: ClassVar[str] = "transformer"

    def kind(self, pipe: DiffusionPipeline) -> Kind:
        return "flow"

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> tuple[SchedulerMixin, dict[str, Any]]:
        if sampler.eta not in (0, 1):
            raise ConfigError(
                problem(
                    f"eta {sampler.eta} for a flow student",
                    "0 (Euler) or 1 (renoise from clean data)",
                    "Diffusers has no flow scheduler for values in between",
                    "set method.eta to 0 or 1",
                )
            )
        # shift 1: explicit sigmas are warped by the shift, and would no longer be the trained ones
        stock = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=sampler.eta == 1)
        scheduler = FirstNoiseEulerScheduler(shift=1.0) if sampler.first_noise else stock
        return scheduler, {
            "sigmas": [t / 1000 for t in sampler.timesteps],
            "num_inference_steps": len(sampler.timesteps),
        }
