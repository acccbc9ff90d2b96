"""Commented config templates, generated from the signatures and docstrings of the classes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

from omegaconf import OmegaConf

from stepdistill.config.dump import to_node
from stepdistill.config.registry import offered
from stepdistill.config.schema import Factory, Hint, Value, arms, dotted, fields, is_structure, structures
from stepdistill.core.errors import ConfigError

REQUIRED = "(required) "
EXAMPLES = {str: "CHANGE-ME", Path: "CHANGE-ME", bool: False, int: 1, float: 1.0, NoneType: None, dict: {}}


def template(schema: type, chosen: Mapping[str, type], hidden: Collection[str] = ()) -> str:
    """YAML that `load` accepts for `schema`, with every default written out and every field explained.

    Args:
        chosen: the class of some keys of `schema`; any other key with an abstract class takes the subclass with the
            fewest required fields.
        hidden: paths of fields that are left out, such as `train.seed`.
    """
    return "\n".join(_block(schema, dataclasses.MISSING, chosen, hidden)) + "\n"


def _simplest(base: type) -> list[type]:
    """The finished subclasses of `base`, first the one that needs the fewest values and no other object."""

    def needs(cls: type) -> tuple[bool, int]:
        hints = fields(cls)
        required = [f.name for f in dataclasses.fields(cls) if f.init and _default(f) is dataclasses.MISSING]
        return any(structures(hints[name]) for name in required), len(required)

    finished = sorted(offered(base), key=needs)
    if not finished or needs(finished[0])[0]:  # wrappers around one another have no end
        raise ConfigError(f"{base.__name__} has no subclass that works without further classes; name one")
    return finished


def _block(cls: type, value: Value, chosen: Mapping[str, type], hidden: Collection[str] = ()) -> list[str]:
    """The lines of a class, with the fields of `value` where it is an instance."""
    lines, said, hints = [], _arguments(cls), fields(cls)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in hidden:
            default = getattr(value, field.name) if dataclasses.is_dataclass(value) else _default(field)
            text, hint = said.get(field.name, ""), hints[field.name]
            below = [path.removeprefix(f"{field.name}.") for path in hidden if path.startswith(f"{field.name}.")]
            lines += _entry(field.name, text, hint, default, chosen.get(field.name), below)
    return lines


def _entry(name: str, text: str, hint: Hint, default: Value, chosen: type | None, hidden: Collection[str]) -> list[str]:
    """The lines of one field: its comment, its key, and what is below."""
    missing = default is dataclasses.MISSING
    bases = [arm for arm in arms(hint) if is_structure(arm) and arm is not Factory]
    cls, others = chosen, []
    if cls is None and dataclasses.is_dataclass(default) and not isinstance(default, Factory):
        cls = type(default)
    elif cls is None and missing and bases:
        cls, *others = _simplest(bases[0]) if inspect.isabstract(bases[0]) else [bases[0]]
    if cls is None:
        node = to_node(_example(hint) if missing else default, hint)
        return [*_comment(f"{REQUIRED}{text}" if missing else text), *_plain(name, node)]
    body = [] if bases == [cls] else [f"type: {dotted(cls)}"]
    body += [f"# or type: {dotted(other)}" for other in others]
    body += _block(cls, default if isinstance(default, cls) else dataclasses.MISSING, {}, hidden)
    below = textwrap.indent("\n".join(body), "  ").splitlines()
    return ["", *_comment(text), *_comment(first_paragraph(cls)), f"{name}:" if body else f"{name}: {{}}", *below]


def first_paragraph(cls: type) -> str:
    """The first paragraph of a class's docstring, or nothing where `dataclass` wrote a signature instead."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    return "" if doc.startswith(f"{cls.__name__}(") else doc.split("\n\n")[0]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _plain(name: str, node: Value) -> list[str]:
    if isinstance(node, str):
        return OmegaConf.to_yaml(OmegaConf.create({name: node})).splitlines()
    return [f"{name}: {json.dumps(node, ensure_ascii=False)}"]


def _default(field: dataclasses.Field) -> Value:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _example(hint: Hint) -> Value:
    """A value that a field without a default accepts."""
    kind = arms(hint)[0]
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    if get_origin(kind) in (list, tuple):
        return [_example(arg) for arg in get_args(kind) if arg is not ...]
    return EXAMPLES[get_origin(kind) or kind]


def _arguments(cls: type) -> dict[str, str]:
    """The `Args:` sections of a class and its bases, by name."""
    texts = {}
    for base in reversed(cls.__mro__):
        section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.cleandoc(base.__doc__ or ""), re.M)
        rows = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.M)
        texts |= {name: " ".join(text.split()) for name, text in rows}
    return texts
