"""Frozen dataclasses to YAML: the resolved config, which `config.load` reads again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stepdistill.config.schema import Factory, Hint, Value, dotted, fields, structures


def config_to_yaml(instance: object) -> str:
    """The resolved config of a dataclass instance: `load_config` of it gives an equal instance."""
    return OmegaConf.to_yaml(OmegaConf.create(to_node(instance, type(instance))))


def config_digest(instance: object) -> str:
    """Twelve hexadecimal digits that name the resolved config."""
    return hashlib.sha256(config_to_yaml(instance).encode()).hexdigest()[:12]


def to_node(value: Value, hint: Hint) -> Value:
    """Plain data for the value of a field annotated `hint`, with `type:` where that leaves a choice."""
    if isinstance(value, Factory):
        return {"type": value.type} | {name: to_node(kwarg, Any) for name, kwarg in value.kwargs.items()}
    if dataclasses.is_dataclass(value):
        hints = fields(type(value))
        head = {} if structures(hint) == [type(value)] else {"type": dotted(type(value))}
        return head | {name: to_node(getattr(value, name), hints[name]) for name in hints}
    if isinstance(value, Mapping):
        return {key: to_node(item, hint) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(to_node(item, hint) for item in value)
    if isinstance(value, list | tuple):
        return [to_node(item, hint) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path | str):
        return str(value).replace("${", r"\${")  # or OmegaConf would interpolate it
    return value
