"""The rule of guidance in training, where a method asks for another one than the pipeline's."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn

from stepdistill.core.guidance import ImageNorm, Norm, Rule, TokenNorm
from stepdistill.families.base import Family


def rule_with(norm: Norm | None, family: Family, net: nn.Module) -> Rule:
    """The linear rule with its output scaled to the norm that it has with the prompt; None is the pipeline's rule.

    Args:
        norm: of each token, or of the image. A UNet has no tokens; there it is of each place of the latents.
    """
    match norm:
        case "token":
            return TokenNorm(1 if isinstance(net, UNet2DConditionModel) else family.tap(net).patch)
        case "image":
            return ImageNorm()
    return family.rule
