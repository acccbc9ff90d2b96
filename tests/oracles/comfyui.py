"""ComfyUI's nodes by their documented rules, run one after the other as its server does: the oracle of workflows.

A latent is what passes between nodes: divided by the base's scale, as autoencoders take it. A sampler works on the
latent times that scale, in k-diffusion's measure: `x = x0 + sigma eps`, and for a flow `(1 - sigma) x0 + sigma eps`.
All of it is float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

SCALES = {"sd": 0.18215, "sdxl": 0.13025, "pixart_alpha": 0.18215, "pixart_sigma": 0.13025}


def levels(kind: str) -> np.ndarray:
    """Sigma by timestep of the bases that ComfyUI has one table for."""
    if kind.startswith("pixart"):
        betas = np.linspace(0.0001, 0.02, 1000)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    return np.sqrt((1 - abar) / abar)


@dataclass
class Comfy:
    """ComfyUI with a network for its loaders.

    Args:
        kind: what it takes the base for: a key of `SCALES`, `flow`, or `frames` for a flow whose latents are a video.
        network: the raw output for an input (B, C, H, W), a timestep and a prompt, which is "" for the negative one
            and None for zeros.
        noise: what the seed stands for, (B, C, H, W).
        fresh: the noise after step i.
        embedded: the guidance embedding by prompt, which it collects; a prompt without one has 3.5.
    """

    kind: str
    network: Callable[[Tensor, float, str | None], Tensor]
    noise: Tensor
    fresh: Callable[[int], Tensor]
    embedded: dict[str, float] = field(default_factory=dict)

    @property
    def flow(self) -> bool:
        return self.kind in ("flow", "frames")

    @property
    def scale(self) -> float | Tensor:
        if self.kind == "frames":  # one of each channel, with five dimensions whatever the latent has
            return torch.linspace(0.5, 2.0, self.noise.shape[1]).double().view(1, -1, 1, 1, 1)
        return SCALES.get(self.kind, 1.0)

    def decoded(self, nodes: Mapping[str, Any]) -> Tensor:
        """The latents that the autoencoder is given."""
        done: dict[str, Any] = {}

        def value(given: Any) -> Any:
            if not isinstance(given, list):
                return given
            name = given[0]
            if name not in done:
                node = nodes[name]
                inputs = {key: value(link) for key, link in node["inputs"].items()}
                done[name] = getattr(self, node["class_type"])(**inputs)
            return done[name]

        return value(next(n for n in nodes.values() if n["class_type"] == "VAEDecode")["inputs"]["samples"])

    def CheckpointLoaderSimple(self, ckpt_name):
        return {"sampling": "flow" if self.flow else "eps"}

    def UNETLoader(self, unet_name, weight_dtype):
        return self.CheckpointLoaderSimple(unet_name)

    def DualCLIPLoader(self, **names):
        return None

    def CLIPLoader(self, clip_name, type):
        return None

    def LoraLoader(self, model, clip, lora_name, strength_model, strength_clip):
        assert strength_model == strength_clip == 1
        return model

    def LoraLoaderModelOnly(self, model, lora_name, strength_model):
        assert strength_model == 1
        return model

    def ModelSamplingDiscrete(self, model, sampling, zsnr):
        assert not zsnr
        return {"sampling": sampling}

    def CLIPTextEncode(self, text, clip):
        return text

    def CLIPTextEncodePixArtAlpha(self, width, height, text, clip):
        return text

    def ConditioningZeroOut(self, conditioning):
        return None

    def FluxGuidance(self, conditioning, guidance):
        self.embedded[conditioning] = guidance
        return conditioning

    def CFGGuider(self, model, positive, negative, cfg):
        return lambda x, sigma: self.guided(model["sampling"], x, sigma, positive, negative, cfg)

    def RandomNoise(self, noise_seed):
        return self.noise

    def KSamplerSelect(self, sampler_name):
        return sampler_name

    def ManualSigmas(self, sigmas):
        return [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", sigmas)]

    def EmptyLatentImage(self, width, height, batch_size):
        return torch.zeros_like(self.noise)

    EmptySD3LatentImage = EmptyFlux2LatentImage = EmptyLatentImage

    def EmptyHunyuanLatentVideo(self, width, height, batch_size, length):
        return torch.stack([torch.zeros_like(self.noise)] * ((length - 1) // 4 + 1), dim=2)

    def LatentMultiply(self, samples, multiplier):
        return samples * multiplier

    def noised(self, sigma, noise, latent, highest=False):
        noise = noise.reshape(latent.shape)  # the same numbers, in the shape of the latent
        if self.flow:
            return sigma * noise + (1 - sigma) * latent
        return (sqrt(1 + sigma**2) if highest else sigma) * noise + latent

    def AddNoise(self, model, noise, sigmas, latent_image):
        assert len(sigmas) == 1
        return self.noised(sigmas[0], noise, latent_image) / self.scale  # an empty one is not scaled

    def SamplerCustomAdvanced(self, noise, guider, sampler, sigmas, latent_image):
        if self.kind == "frames" and latent_image.ndim == 4:
            latent_image = latent_image[:, :, None]
        highest = not self.flow and sigmas[0] >= levels(self.kind)[-1] * (1 - 1e-5)
        x = self.noised(sigmas[0], noise, latent_image * self.scale, highest)
        for i in range(len(sigmas) - 1):
            denoised, then = guider(x, sigmas[i]), sigmas[i + 1]
            if sampler == "euler":
                x = x + (x - denoised) / sigmas[i] * (then - sigmas[i])
            else:
                assert sampler == "lcm"
                x = denoised if then == 0 else self.noised(then, self.fresh(i), denoised)
        return (x / (1 - sigmas[-1]) if self.flow else x) / self.scale

    def guided(self, sampling, x, sigma, positive, negative, cfg):
        cond = self.denoised(sampling, x, sigma, positive)
        if cfg == 1:
            return cond
        uncond = self.denoised(sampling, x, sigma, negative)
        return uncond + cfg * (cond - uncond)

    def denoised(self, sampling, x, sigma, prompt):
        if sampling == "flow":
            seen = x[:, :, 0] if self.kind == "frames" else x
            return x - (sigma * self.network(seen, 1000 * sigma, prompt)).reshape(x.shape)
        t = int(np.abs(np.log(levels(self.kind)) - np.log(sigma)).argmin())
        y = self.network(x / sqrt(1 + sigma**2), float(t), prompt)
        return {
            "eps": x - sigma * y,
            "v_prediction": x / (1 + sigma**2) - sigma / sqrt(1 + sigma**2) * y,
            "x0": y,
        }[sampling]
