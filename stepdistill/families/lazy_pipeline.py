"""A pipeline whose text encoders and autoencoder are loaded on first use."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.families.base import Family, Part
from stepdistill.networks.meta import is_shell

logger = logging.getLogger(__name__)
PARTS: frozenset[Part] = frozenset({"text", "vae", "denoiser"})


class LazyPipeline:
    """A pipeline and its parts on a device. Parts that `family.load` left out are loaded on first use.

    Args:
        pipe: pipeline of `family`; parts are set on it in place.
        device: device of all parts, except for those named in `stay`.
    """

    def __init__(self, family: Family, pipe: DiffusionPipeline, device: torch.device, stay: Sequence[str] = ()) -> None:
        self.family, self.pipe, self.device = family, pipe, device
        self._left: dict[Part, list[str]] = {"text": [], "vae": []}
        for name, part in pipe.components.items():
            kind = family.part_of(name)
            if is_shell(part) and kind in self._left:
                self._left[kind].append(name)
            elif isinstance(part, nn.Module) and not is_shell(part) and name not in stay:
                part.to(device)

    def text(self, why: str) -> DiffusionPipeline:
        """The pipeline with its text encoders; `why` is logged if they must be loaded."""
        return self._with("text", why)

    def vae(self, why: str) -> DiffusionPipeline:
        """The pipeline with its autoencoder; `why` is logged if it must be loaded."""
        return self._with("vae", why)

    def _with(self, part: Part, why: str) -> DiffusionPipeline:
        names = self._left[part]
        if names:
            logger.warning("loading %s: %s", " and ".join(names), why)
            loaded = self.family.load(PARTS - {part}).components
            for name in names:
                setattr(self.pipe, name, loaded[name].to(self.device))
            self._left[part] = []
        return self.pipe
