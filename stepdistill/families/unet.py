"""What UNet pipelines share: a variance-preserving table, epsilon or v prediction, and one shape of network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from diffusers.models.attention_processor import Attention
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from stepdistill.errors import ConfigError, problem
from stepdistill.families.base import Family, named, rebuilt
from stepdistill.prediction import Kind
from stepdistill.roles import Site, Sites, Tap
from stepdistill.sampling import Sampler
from stepdistill.schedule import DiscreteVP
from stepdistill.schedulers import FirstNoiseDDIMScheduler

# the layers of LCM-LoRA, as diffusers' train_lcm_distill_lora_sdxl.py lists them
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@dataclass(frozen=True, kw_only=True)
class UNet(Family):
    """A pipeline around a `UNet2DConditionModel`."""

    network_name: ClassVar[str] = "unet"

    def arguments(self) -> dict[str, Any]:
        return {}

    def schedule(self, scheduler: Any) -> DiscreteVP:  # noqa: ANN401
        return DiscreteVP(scheduler.alphas_cumprod)

    def kind(self, pipe: DiffusionPipeline) -> Kind:
        return pipe.scheduler.config.prediction_type

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear, nn.Conv2d))

    def tap(self, net: nn.Module) -> Tap:
        """The bottleneck, as DMD2 has it."""
        config: Any = net.config
        widths = config["block_out_channels"]
        patch = 2 ** (len(widths) - 1)
        return Tap("up_blocks.0", widths[-1], patch, config["sample_size"] // patch)

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        layers: list[tuple[str, Any]] = [(n, m) for n, m in net.named_modules() if isinstance(m, Attention)]
        places = [Site(n, m.query_dim, m.cross_attention_dim) for n, m in layers if n.endswith(".attn2")]
        config: Any = net.config
        width = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
        return Sites("time_embedding", width, tuple(places))

    @torch.no_grad()
    def encode(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        latents = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist.mode()
        return latents.float() * pipe.vae.config.scaling_factor

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        latents = latents / pipe.vae.config.scaling_factor
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()

    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> tuple[SchedulerMixin, dict[str, Any]]:
        times = [round(t) for t in sampler.timesteps]
        table: dict[str, Any] = {
            key: pipe.scheduler.config[key]
            for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        }
        table |= {"prediction_type": self.kind(pipe)}
        table |= {"rescale_betas_zero_snr": pipe.scheduler.config.get("rescale_betas_zero_snr", False)}
        ends: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": sampler.clean}
        call: dict[str, Any] = {"timesteps": times, "num_inference_steps": len(times)}
        if sampler.eta == 1 and sampler.clean:
            return LCMScheduler(**table, **ends), call
        if sampler.eta > 0:
            return TCDScheduler(**table, **ends), call | {"eta": sampler.eta}
        # DDIM takes no list of times: its trailing spacing has to give them
        ddim = DDIMScheduler(**table, **ends, timestep_spacing="trailing")
        ddim.set_timesteps(len(times))
        if sampler.first_noise:
            if ddim.timesteps.tolist() != times:
                got, why = f"steps at {times} with the first noise", "the scheduler that has them is made from DDIM"
                todo = "choose a number of steps that divides 1,000, or set method.first_noise to false"
                raise ConfigError(problem(got, f"{ddim.timesteps.tolist()}", why, todo))
            first = FirstNoiseDDIMScheduler(**table, **ends, timestep_spacing="trailing")
            return first, {"num_inference_steps": len(times)}
        if ddim.timesteps.tolist() == times:
            return ddim, {"num_inference_steps": len(times)}
        if sampler.clean:  # TCD ends at time 0, which is noisy; leading: the first input is the noise as it is drawn
            return EulerDiscreteScheduler(**table, timestep_spacing="leading"), call
        return TCDScheduler(**table, **ends), call | {"eta": 0.0}

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        channels = config["block_out_channels"]
        heads = config["num_attention_heads"] or config["attention_head_dim"]  # the second name means heads, too
        heads = heads if isinstance(heads, list | tuple) else [heads] * len(channels)
        units = [math.lcm(config["norm_num_groups"], n) for n in heads]
        slim = [max(1, round(width * c / unit)) * unit for c, unit in zip(channels, units, strict=True)]
        return rebuilt(net, block_out_channels=slim)

    def save_lora(self, folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        layers: dict[str, nn.Module | Tensor] = {**state}
        pipeline: Any = self.pipeline_class
        pipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
