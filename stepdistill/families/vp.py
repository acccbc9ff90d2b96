"""Base of the families with a variance-preserving noise schedule, and their stock schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.prediction import Kind
from stepdistill.core.schedule import DiscreteVP
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family, Stock
from stepdistill.families.schedulers import FirstNoiseDDIMScheduler

KINDS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Family):
    """A pipeline whose scheduler holds a table of `alphas_cumprod`."""

    def check_scheduler(self, scheduler: Any) -> None:  # noqa: ANN401
        config = scheduler.config
        kind, discrete = config.get("prediction_type"), config.get("timestep_type", "discrete") == "discrete"
        # a scheduler made of another's config keeps its `beta_schedule`, but has no table
        table = isinstance(vars(scheduler).get("alphas_cumprod"), torch.Tensor) and "beta_schedule" in config
        if table and kind in KINDS and discrete and not config.get("use_flow_sigmas"):
            return
        settings = {
            key: config[key] for key in ("prediction_type", "timestep_type", "use_flow_sigmas") if key in config
        }
        got, expected = f"scheduler {type(scheduler).__name__} with {settings}", f"a table of betas, and one of {KINDS}"
        why = f"a {self.pipeline_class.__name__} is distilled on a variance-preserving noise schedule with timesteps"
        todo = "give the scheduler that the teacher was trained with, or choose another teacher"
        raise ConfigError(problem(got, expected, why, todo))

    def schedule(self, scheduler: Any, tokens: int | None = None) -> DiscreteVP:  # noqa: ANN401
        return DiscreteVP(scheduler.alphas_cumprod)

    def kind(self, pipe: DiffusionPipeline) -> Kind:
        return pipe.scheduler.config.prediction_type

    def solver(self, pipe: DiffusionPipeline, steps: int, tokens: int | None = None) -> Stock:
        most = len(pipe.scheduler.alphas_cumprod)
        if steps > most:
            why, todo = "its noise schedule has no more timesteps", "choose fewer steps of the teacher"
            raise ConfigError(problem(f"{steps} steps of the teacher", f"at most {most}", why, todo))
        ends: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
        scheduler: Any = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", **ends)
        return scheduler, {"num_inference_steps": steps}

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> Stock:
        times = [round(t) for t in sampler.timesteps]
        table: dict[str, Any] = _table(pipe.scheduler) | {"prediction_type": self.kind(pipe)}
        ends: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": sampler.clean}
        call: dict[str, Any] = {"timesteps": times, "num_inference_steps": len(times)}
        if sampler.ancestral:  # it takes no list of times, either; leading: the first input is the noise as it is drawn
            spaced = {"timestep_spacing": "leading", "steps_offset": times[-1]}
            scheduler = EulerAncestralDiscreteScheduler(**table, **spaced)
            scheduler.set_timesteps(len(times))
            if scheduler.timesteps.tolist() != times:
                got, why = f"timesteps {times} with ancestral", "its scheduler has evenly spaced timesteps"
                todo = "choose a number of steps that divides 1,000, or set ancestral to false"
                raise ConfigError(problem(got, f"{scheduler.timesteps.tolist()}", why, todo))
            return scheduler, {"num_inference_steps": len(times)}
        if sampler.eta == 1 and sampler.clean:
            return LCMScheduler(**table, **ends), call
        if sampler.eta > 0:
            return TCDScheduler(**table, **ends), call | {"eta": sampler.eta}
        # DDIM takes no list of times: its trailing spacing has to give them
        ddim = DDIMScheduler(**table, **ends, timestep_spacing="trailing")
        ddim.set_timesteps(len(times))
        if sampler.first_noise:
            if ddim.timesteps.tolist() != times:
                got, why = f"timesteps {times} with first_noise", "its scheduler extends DDIM with trailing timesteps"
                todo = "choose a number of steps that divides 1,000, or set method.first_noise to false"
                raise ConfigError(problem(got, f"{ddim.timesteps.tolist()}", why, todo))
            first = FirstNoiseDDIMScheduler(**table, **ends, timestep_spacing="trailing")
            return first, {"num_inference_steps": len(times)}
        if ddim.timesteps.tolist() == times:
            return ddim, {"num_inference_steps": len(times)}
        if sampler.clean:  # TCD ends at time 0, which is noisy; leading: the first input is the noise as it is drawn
            return EulerDiscreteScheduler(**table, timestep_spacing="leading"), call
        return TCDScheduler(**table, **ends), call | {"eta": 0.0}


def _table(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """Arguments with which a stock scheduler has the very table of this one.

    The same arguments do not give the same table in every class: with `rescale_betas_zero_snr` it ends at 0 in DDIM's,
    and just above 0 in Euler's.
    """
    own = scheduler.alphas_cumprod.float()
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
    table: dict[str, Any] = {"num_train_timesteps": len(own)} | {key: scheduler.config[key] for key in names}
    table |= {"rescale_betas_zero_snr": scheduler.config.get("rescale_betas_zero_snr", False)}
    try:
        same = torch.equal(DDIMScheduler(**table).alphas_cumprod, own)
    except NotImplementedError:  # a `beta_schedule` that it does not know
        same = False
    if same:
        return table
    kept = own.double()
    betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
    return {"num_train_timesteps": len(own), "trained_betas": betas.float().tolist()}
