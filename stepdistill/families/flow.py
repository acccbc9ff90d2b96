"""Base of the rectified-flow families, and their stock schedulers."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.prediction import Kind
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family, Stock
from stepdistill.families.schedulers import FirstNoiseEulerScheduler

# settings of a shift that depends on the image's size, and what pipelines take where the scheduler has none
DYNAMIC = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def shift_of(scheduler: Any) -> float:  # noqa: ANN401
    """The fixed shift of a flow's grid. Raises ConfigError where it depends on the image's size."""
    if scheduler.config.get("use_dynamic_shifting"):
        got, why = "a scheduler with use_dynamic_shifting", "the solver's grid must be the same for every image size"
        todo = "set use_dynamic_shifting to false and shift to the value for your resolution"
        raise ConfigError(problem(got, "one fixed shift", why, todo))
    return scheduler.config["flow_shift" if "flow_shift" in scheduler.config else "shift"]


def dynamic_shift(scheduler: Any, tokens: int) -> float:  # noqa: ANN401
    """The shift of a grid that depends on the number of an image's tokens: `log(shift)` is linear in it.

    Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2, in the form of Flux.1's pipeline.
    """
    low, high, first, last = (scheduler.config.get(key, value) for key, value in DYNAMIC.items())
    mu = first + (last - first) * (tokens - low) / (high - low)
    return mu if scheduler.config.get("time_shift_type") == "linear" else math.exp(mu)


def size_shift(scheduler: Any, tokens: int | None) -> float:  # noqa: ANN401
    """A flow's shift for images of so many tokens; None is 1024 x 1024 pixels, in tokens of 16 x 16."""
    if scheduler.config.get("use_dynamic_shifting"):
        return dynamic_shift(scheduler, tokens or 4096)
    return shift_of(scheduler)


@dataclass(frozen=True, kw_only=True)
class Flow(Family):
    """A pipeline whose network predicts the velocity `eps - x0`."""

    network_name: ClassVar[str] = "transformer"

    def check_scheduler(self, scheduler: Any) -> None:  # noqa: ANN401
        config = scheduler.config
        flow = config.get("prediction_type", "flow_prediction") == "flow_prediction" and not config.get("invert_sigmas")
        if flow and ("shift" in config or config.get("use_flow_sigmas")) and config.num_train_timesteps == 1000:
            return
        names = ("prediction_type", "use_flow_sigmas", "invert_sigmas", "num_train_timesteps")
        settings = {key: config[key] for key in names if key in config}
        got, expected = f"scheduler {type(scheduler).__name__} with {settings}", "flow matching in 1,000 timesteps"
        why = f"a {self.pipeline_class.__name__} is distilled on a rectified flow, whose timesteps are 1,000 sigma"
        todo = "give the scheduler that the teacher was trained with, or choose another teacher"
        raise ConfigError(problem(got, expected, why, todo))

    def kind(self, pipe: DiffusionPipeline) -> Kind:
        return "flow"

    def solver(self, pipe: DiffusionPipeline, steps: int, tokens: int | None = None) -> Stock:
        # the scheduler applies its shift to the sigmas that it is given: pass the even ones
        even = [1 - i / steps for i in range(steps)]
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.schedule(pipe.scheduler, tokens).shift)
        return scheduler, {"num_inference_steps": steps, "sigmas": even}

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> Stock:
        # shift 1: explicit sigmas are warped by the shift, and would no longer be the trained ones
        return flow_scheduler(sampler, shift=1.0), {
            "sigmas": [t / 1000 for t in sampler.timesteps],
            "num_inference_steps": len(sampler.timesteps),
        }

    @abstractmethod
    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        """The straight path, with the shift of the scheduler's grid."""


def flow_scheduler(sampler: Sampler, **config: Any) -> FlowMatchEulerDiscreteScheduler:  # noqa: ANN401
    """The Euler scheduler of a config that steps as a sampler says. Raises ConfigError where there is none."""
    if sampler.eta not in (0, 1):
        why, todo = "Diffusers has no flow scheduler for values in between", "set method.eta to 0 or 1"
        expected = "0 (Euler) or 1 (renoise from clean data)"
        raise ConfigError(problem(f"eta {sampler.eta} for a flow student", expected, why, todo))
    if sampler.ancestral:
        why, todo = "Diffusers has no ancestral sampler for flows", "set ancestral to false"
        raise ConfigError(problem("ancestral steps of a flow student", "eta 0 or 1", why, todo))
    if sampler.first_noise:
        return FirstNoiseEulerScheduler(**config)
    return FlowMatchEulerDiscreteScheduler(**config, stochastic_sampling=sampler.eta == 1)
