"""Schedulers that Diffusers lacks. A contract names one only if no stock scheduler samples in the same way."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false, reportOptionalSubscript=false
# Diffusers annotates its tensors as `FloatTensor`, which a tensor is not, and its tables as optional.

# rf++'s rule: each step noises its estimate of x0 again with the noise that sampling began with, where DDIM and Euler
# take the noise that they estimate. On straight paths all are one; see `stepdistill.core.solvers.Sampler.first_noise`.


class FirstNoiseDDIMScheduler(DDIMScheduler):
    """DDIM that renoises with the noise of the first input, `alpha x0 + sigma eps`, not with the predicted noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        return_dict: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The next sample and the estimate of x0."""
        if timestep == self.timesteps[0]:
            self.first = sample
        x0 = super().step(model_output, int(timestep), sample, return_dict=False)[1]
        alpha_t, sigma_t = self._levels(int(self.timesteps[0]))
        alpha_s, sigma_s = self._levels(int(timestep) - self.config["num_train_timesteps"] // len(self.timesteps))
        x_s = alpha_s * x0 + sigma_s * (self.first - alpha_t * x0) / sigma_t
        return DDIMSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)

    def _levels(self, t: int) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod
        return kept.sqrt(), (1 - kept).sqrt()


class FirstNoiseEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow Euler that renoises with the noise of the first input, `(1 - s) x0 + s eps`, not with the predicted
    noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        return_dict: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The next sample."""
        if timestep == self.timesteps[0]:
            self.first = sample.float()
        super().step(model_output, timestep, sample)  # it counts the steps
        assert self.step_index is not None
        top, share, end = (self.sigmas[i] for i in (0, self.step_index - 1, self.step_index))
        x0 = sample.float() - share * model_output
        eps = (self.first - (1 - top) * x0) / top
        x_s = ((1 - end) * x0 + end * eps).to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(x_s) if return_dict else (x_s,)
