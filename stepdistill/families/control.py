"""ControlNets of a family: the classes that Diffusers has for them, and whether one fits a network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.parts import UNREADABLE

TODO = "choose a ControlNet that was trained on this base model"


@dataclass(frozen=True, kw_only=True)
class ControlNets:
    """What Diffusers has for the ControlNets of a family. Zhang et al. 2023, https://arxiv.org/abs/2302.05543.

    A ControlNet is a copy of a part of the base's network that also sees an image, such as an edge map; its outputs
    are added to the features of the network.

    Args:
        pipeline: stock pipeline that calls a ControlNet before the network in each step.
        model: class of the ControlNet.
        image: the argument of the pipeline's call that takes the control image.
        same: settings that the configs of the ControlNet and the network have in common; one that is None in the
            ControlNet's stands for an input that it does not read.
        fewer: settings that count blocks, of which a ControlNet has at most as many as the network.
        own: what settings of the ControlNet's config must be.
        network: what settings of the network's config must be, because of what the pipeline passes to it.
        hint: the setting that lists the widths of the convolutions that shrink a control image to the latents' size.
    """

    pipeline: type[DiffusionPipeline]
    model: Any
    image: str = "control_image"
    same: tuple[str, ...]
    fewer: tuple[str, ...] = ()
    own: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    hint: str | None = None

    def read(self, place: str) -> nn.Module:
        """The ControlNet of a folder or hub id in float32, frozen.

        Raises:
            ConfigError: there is none, it is of another class, or its files lack tensors.
        """
        got, expected = f"{place} as a ControlNet", f"a folder or hub id of a {self.model.__name__}"
        try:
            name = self.model.load_config(place).get("_class_name")
            if name != self.model.__name__:
                raise ConfigError(problem(got, expected, f"its config.json is of a {name}", TODO))
            net, info = self.model.from_pretrained(place, output_loading_info=True)
        except UNREADABLE as error:
            if isinstance(error, ConfigError):
                raise
            why, todo = str(error).strip().splitlines()[0].rstrip("."), "name the folder of `save_pretrained`"
            raise ConfigError(problem(got, expected, why, todo)) from error
        if missing := sorted(info["missing_keys"]):
            why = f"its files lack {len(missing)} of {len(net.state_dict())} tensors, such as {missing[0]}"
            raise ConfigError(problem(got, expected, why, "copy it again, from where it is whole"))
        return net.requires_grad_(False).float()

    def pipeline_of(self, pipe: DiffusionPipeline, controlnet: nn.Module) -> DiffusionPipeline:
        """The stock pipeline with a ControlNet and the parts of a pipeline of the base, which it shares."""
        taken = inspect.signature(self.pipeline.__init__).parameters
        given = {key: value for key, value in {**pipe.config, **pipe.components}.items() if key in taken}
        controlled = self.pipeline(**given | {"controlnet": controlnet})
        controlled.set_progress_bar_config(disable=True)
        return controlled

    def check(self, pipe: DiffusionPipeline, network: nn.Module, controlnet: nn.Module) -> None:
        """Raise ConfigError where a ControlNet, or one of several, does not fit the network of a pipeline."""
        nets: Any = dict(controlnet.named_children()).get("nets", [controlnet])  # of Diffusers' class of several
        for one in nets:
            self._check_one(pipe.vae_scale_factor, network, one)

    def _check_one(self, scale: int, network: Any, controlnet: Any) -> None:  # noqa: ANN401
        expected, base = f"a {self.model.__name__} of the base model", _plain(network.config)
        if not isinstance(controlnet, self.model):
            why = f"its outputs are not the features of a {type(network).__name__}"
            raise ConfigError(problem(f"a {type(controlnet).__name__}", expected, why, TODO))
        config, got = _plain(controlnet.config), f"a {self.model.__name__} with"
        for key in self.same:
            if config[key] not in (None, base[key]):
                why = f"the base's {type(network).__name__} has another width or other blocks"
                raise ConfigError(problem(f"{got} {key} {config[key]}", f"{base[key]}", why, TODO))
        for key in self.fewer:
            if config[key] > base[key]:
                why = f"the base's {type(network).__name__} has no block for the last outputs"
                raise ConfigError(problem(f"{got} {key} {config[key]}", f"at most {base[key]}", why, TODO))
        for key, value in self.own.items():
            if config[key] != value:
                why = "it is given one image in red, green and blue, and nothing else"
                raise ConfigError(problem(f"{got} {key} {config[key]}", f"{value}", why, TODO))
        if self.hint is not None and 2 ** (len(config[self.hint]) - 1) != scale:
            levels, why = scale.bit_length(), f"the base's autoencoder shrinks an image by {scale}"
            raise ConfigError(problem(f"{got} {self.hint} {config[self.hint]}", f"{levels} levels", why, TODO))
        for key, value in self.network.items():
            if base[key] != value:
                got, why = f"a base with {key} {base[key]}", f"a {self.pipeline.__name__} does not apply it"
                raise ConfigError(problem(got, f"{value}", why, "sample the student without a ControlNet"))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with lists for tuples, as one that was read from a file has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
