"""The layers and the config of a network of Diffusers, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stepdistill.errors import ConfigError, problem


def rebuilt(net: nn.Module, **changes: Any) -> Any:  # noqa: ANN401
    """A new network of the class and config of `net`, a Diffusers model, with other values of some config keys."""
    kind: Any = type(net)
    config: Any = net.config
    # without its private keys: one lists the defaults that were used, which then would be used again
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")} | changes)


def named(net: nn.Module, endings: Sequence[str], kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Full names of the layers of `kinds` whose name is, or ends in a dot and, one of `endings`."""
    found = [
        name
        for name, module in net.named_modules()
        if isinstance(module, kinds) and any(name == end or name.endswith("." + end) for end in endings)
    ]
    if not found:
        raise ConfigError(
            problem(
                f"no layer of {type(net).__name__} matching {list(endings)}",
                "at least one",
                "the LoRA needs a place",
                "name layers of this network in lora.target_modules",
            )
        )
    return found
