"""LTX-Video: text to video, and with one frame text to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers import DiffusionPipeline, LTXPipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.families.ltx_base import LTXBase, ltx_needs
from stepdistill.families.parts import Needs


@dataclass(frozen=True, kw_only=True)
class LTX(LTXBase):
    """LTX-Video text-to-video pipelines."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = LTXPipeline
    needs: ClassVar[Needs] = ltx_needs("LTXImageToVideoPipeline", "LTXConditionPipeline")

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.velocity(net, x_t, t, cond)
