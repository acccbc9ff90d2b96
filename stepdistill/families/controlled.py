"""Training with a ControlNet in the loop: the base of the families that can."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Place
from stepdistill.config.schema import locate
from stepdistill.core.denoise import CONTROL, Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.base import Family


@dataclass(frozen=True, kw_only=True)
class Controlled(Family):
    """A family whose student can be trained with a ControlNet of the base in the loop, for teacher and student alike.

    The ControlNet is frozen and in the base's precision. Where a gradient reaches the network's input, it passes
    through the ControlNet, too. Validation, `eval.json` and the proof sample without it.
    Real-time control of SANA-Sprint: Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.4.

    Args:
        controlnet: folder or hub id of a ControlNet of the base that is called before the network in training.
        control: dotted path of the function that computes what it sees: pixels (B, 3, H, W) in [-1, 1] of the samples'
            images to control images (B, 3, H, W) in [0, 1]. Latents without an image are decoded for it.
    """

    controlnet: Place | None = None
    control: str = "stepdistill.data.control.edges"

    @torch.no_grad()
    def control_rows(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """What the ControlNet sees for images, pixels (B, 3, H, W) in [-1, 1], as the pipeline prepares it."""
        return self.prepared_control(pipe, locate(self.control)(pixels))

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition, **residuals: Any) -> Tensor:  # noqa: ANN401
        """The network's raw output, with the residuals of a ControlNet, see `Family.call`."""

    @abstractmethod
    def prepared_control(self, pipe: DiffusionPipeline, images: Tensor) -> Tensor:
        """Control images (B, 3, H, W) in [0, 1] as the pipeline passes them to the ControlNet."""

    @abstractmethod
    def residuals(self, controlnet: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> dict[str, Any]:
        """The outputs of a ControlNet, by the names of the network's arguments that take them."""


def with_control(
    family: Controlled, controlnet: nn.Module | None, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    """`family.call` with the ControlNet before the network, where the condition holds what it sees."""
    if controlnet is None or CONTROL not in cond:
        return family.call(net, x_t, t, cond)
    return family.call(net, x_t, t, cond, **family.residuals(controlnet, x_t, t, cond))


def controlnet_of(family: Family, pipe: DiffusionPipeline) -> nn.Module | None:
    """The ControlNet that a family trains with, frozen and in float32; None without one.

    Raises ConfigError where there is none at its place, or it is of another base.
    """
    if not isinstance(family, Controlled) or family.controlnet is None:
        return None
    assert family.controls is not None
    controlnet = family.controls.read(family.controlnet)
    family.controls.check(pipe, family.network(pipe), controlnet)
    return controlnet


def load_controlled(family: Family, place: str) -> DiffusionPipeline:
    """The stock pipeline of a family's base with the ControlNet of a folder or hub id.

    Raises:
        ConfigError: Diffusers has no such pipeline for the family, there is no ControlNet, or it is of another base.
    """
    if family.controls is None:
        got, why = f"a ControlNet for a {family.pipeline_class.__name__}", "Diffusers has no pipeline with both"
        raise ConfigError(problem(got, "none", why, "leave the ControlNet out"))
    controlnet, pipe = family.controls.read(place), family.load()
    family.controls.check(pipe, family.network(pipe), controlnet)
    return family.controls.pipeline_of(pipe, controlnet)
