"""The layers and the config of a network of Diffusers, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.roles import Site, Sites, Tap


def rebuilt(net: nn.Module, **changes: Any) -> Any:  # noqa: ANN401
    """A new network of the class and config of `net`, a Diffusers model, with other values of some config keys."""
    kind: Any = type(net)
    config: Any = net.config
    # without its private keys: one lists the defaults that were used, which then would be used again
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")} | changes)


def named(net: nn.Module, endings: Sequence[str], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Full names of the layers of `kinds` whose name is, or ends in a dot and, one of `endings`."""
    names = [
        name
        for name, module in net.named_modules()
        if isinstance(module, kinds) and any(name == end or name.endswith("." + end) for end in endings)
    ]
    if not names:
        raise ConfigError(
            problem(
                f"no layer of {type(net).__name__} matching {list(endings)}",
                "at least one",
                "the LoRA is added to these layers",
                "name layers of this network in lora.target_modules",
            )
        )
    return names


def time_given(net: nn.Module, args: Sequence[Any], given: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The time in the arguments of a call of a denoiser; Z-Image calls it `t`."""
    arguments = inspect.signature(net.forward).bind(*args, **given).arguments
    return arguments["timestep" if "timestep" in arguments else "t"]


def inner(net: nn.Module) -> int:
    """The channels of a transformer's tokens."""
    config: Any = net.config
    return config["num_attention_heads"] * config["attention_head_dim"]


def halfway(net: nn.Module) -> Tap:
    """The image's tokens at half the depth of a transformer."""
    config: Any = net.config
    patch = config["patch_size"]
    return Tap(f"transformer_blocks.{config['num_layers'] // 2}", inner(net), patch, config["sample_size"] // patch)


def after_blocks(net: nn.Module, place: Tap, *lists: str) -> tuple[Tap, ...]:
    """The image's tokens after each block of a transformer, in order of depth.

    Args:
        place: one such place.
        lists: names of the network's lists of blocks, in order.
    """
    blocks: Any = [(name, len(net.get_submodule(name))) for name in lists]  # pyright: ignore[reportArgumentType]
    before = [f"{name}.{i}" for name, count in blocks for i in range(count)]
    return tuple(replace(place, before=name) for name in [*before[1:], "norm_out"])


def refuse_sites(family: str) -> NoReturn:
    """Raise ConfigError: in a network of one stream no layer attends from the image to the prompt alone."""
    got, expected = f"guidance adapters for {family}", "a family with attention from the image to the prompt"
    why, todo = "there are no guidance adapters for this family", "choose another method or another teacher"
    raise ConfigError(problem(got, expected, why, todo))


def attentions(net: nn.Module, layer: str, time: str, blocks: str = "transformer_blocks") -> Sites:
    """The attention `layer` of every block of a transformer, to a prompt as wide as its tokens.

    Args:
        time: dotted name of the module whose output is the time's embedding, as wide, too.
        blocks: name of the network's list of blocks.
    """
    config: Any = net.config
    width = inner(net)
    places = [Site(f"{blocks}.{i}.{layer}", width, width) for i in range(config["num_layers"])]
    return Sites(time, width, tuple(places))
