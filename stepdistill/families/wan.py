"""Wan 2.1 and 2.2: text to video, and with one frame text to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers import DiffusionPipeline, WanPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.families.parts import Needs
from stepdistill.families.wan_base import WanBase, wan_needs


@dataclass(frozen=True, kw_only=True)
class Wan(WanBase):
    """Wan 2.1 text-to-video pipelines, and those of Wan 2.2 with one network (TI2V-5B)."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanPipeline
    needs: ClassVar[Needs] = wan_needs()

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        # a pipeline with `expand_timesteps` tells each token the time, which is the same of them all
        return net(x_t, timestep=t, encoder_hidden_states=cond["states"], return_dict=False)[0]
