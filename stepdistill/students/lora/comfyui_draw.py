"""What ComfyUI computes when it runs a workflow of `students.lora.comfyui`, by the rules of its own nodes.

`stepdistill verify` samples with it, so that it compares what the file says, and not what the file was made from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Raw = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class ComfyRun:
    """A workflow with a network in the place of its loaders and prompts.

    Args:
        nodes: of the workflow, by id.
        levels: of the base's table by timestep, see `comfy_table`; None where the base is a flow.
        raw: the output (B, C, H, W) of the network for its input of that shape, a timestep and a guidance scale.
        noise: (B, C, H, W), which the seed stands for.
        fresh: the noise after step i, of the same shape.
    """

    nodes: Mapping[str, Any]
    levels: Tensor | None
    raw: Raw
    noise: Tensor
    fresh: Callable[[int], Tensor]

    def latents(self) -> Tensor:
        """What is decoded, (B, C, H, W), in the network's scale."""
        decode = next(node for node in self.nodes.values() if node["class_type"] == "VAEDecode")
        return self._latents(decode["inputs"]["samples"][0])

    def _latents(self, name: str) -> Tensor:
        node, inputs = self.nodes[name]["class_type"], self.nodes[name]["inputs"]
        match node:
            case "LatentMultiply":
                return self._latents(inputs["samples"][0]) * inputs["multiplier"]
            case "AddNoise":
                level, latent = self._sigmas(inputs["sigmas"][0])[0], self._latents(inputs["latent_image"][0])
                return self._noised(latent, self.noise, level, False)
            case "SamplerCustomAdvanced":
                return self._sample(inputs)
        return torch.zeros_like(self.noise)  # an empty latent

    def _sigmas(self, name: str) -> Tensor:
        text = self.nodes[name]["inputs"]["sigmas"]
        return torch.tensor([float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)])

    def _noised(self, latent: Tensor, noise: Tensor, level: Tensor, top: bool) -> Tensor:
        if self.levels is None:
            return level * noise + (1 - level) * latent
        return noise * ((1 + level**2).sqrt() if top else level) + latent

    def _sample(self, inputs: Mapping[str, Any]) -> Tensor:
        sigmas = self._sigmas(inputs["sigmas"][0]).to(self.noise.device)
        guider = self.nodes[inputs["guider"][0]]["inputs"]
        sampler = self.nodes[inputs["sampler"][0]]["inputs"]["sampler_name"]
        top = self.levels is not None and bool(sigmas[0] >= self.levels[-1] * (1 - 1e-5))
        x = self._noised(self._latents(inputs["latent_image"][0]), self.noise, sigmas[0], top)
        for i, (now, then) in enumerate(pairwise(sigmas)):
            clean = self._denoised(x, now, guider)
            if sampler == "euler":
                x = x + (x - clean) / now * (then - now)
            else:
                x = self._noised(clean, self.fresh(i), then, False) if then > 0 else clean
        return x

    def _denoised(self, x: Tensor, sigma: Tensor, guider: Mapping[str, Any]) -> Tensor:
        if self.levels is None:
            return x - sigma * self.raw(x, 1000 * sigma.item(), guider["cfg"])
        t = (sigma.log().cpu() - self.levels.float().log()).abs().argmin().item()
        size = (1 + sigma**2).sqrt()
        y = self.raw(x / size, float(t), guider["cfg"])
        node = self.nodes[guider["model"][0]]
        match node["inputs"].get("sampling", "eps"):
            case "eps":
                return x - sigma * y
            case "v_prediction":
                return x / size**2 - y * sigma / size
        return y
