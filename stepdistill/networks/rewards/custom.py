"""A reward by the dotted path of a function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepdistill.config.schema import locate
from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.rewards.base import Reward, Score


@dataclass(frozen=True, kw_only=True)
class Custom(Reward):
    """A function of your own, `score(images, prompts)`. One with settings or weights is better a subclass of `Reward`.

    Args:
        function: dotted path of the function, in a module that can be imported. It takes float32 images
            (B, 3, H, W) in about [0, 1] and a list of B prompts, and returns scores (B,), differentiable in the images.
    """

    function: str

    def build(self, device: torch.device) -> Score:
        # not before: a student is sampled without its reward's module
        if not callable(locate(self.function)):
            why, todo = "it is called with images and prompts", "name a function"
            raise ConfigError(problem(f"function {self.function}, which cannot be called", "a function", why, todo))
        return locate(self.function)
