"""YAML and overrides to frozen dataclasses, strictly.

Knows no method and no family. A node `{type: package.module.Class, ...}` becomes an instance of that class,
from the leaves upward. Where a field takes concrete dataclasses only, a node without `type:` is the first of them; no
field may have that name. A node replaces its field's default as a whole. Every problem is reported at once, by path.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Le
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, TypeAdapter, ValidationError
from yaml import YAMLError

from stepdistill.config.schema import (
    Factory,
    Hint,
    Value,
    arms,
    describe,
    fields,
    is_structure,
    is_text,
    leaves,
    nearest,
    pick,
    structures,
)
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.outputs import expanded

T = TypeVar("T")
# what the parser raises: beside its own, on explicit tags (`!!bool x`), long numbers and deep nesting
UNREADABLE = (YAMLError, ValueError, LookupError, AttributeError, RecursionError)


class _Log(NamedTuple):
    problems: list[str]
    leaves: Mapping[str, Hint]


def load_config(schema: type[T], path: Path | str | None, overrides: Sequence[str] = ()) -> T:
    """An instance of `schema`, a dataclass, from a YAML file (None: an empty one) and command-line overrides.

    Args:
        overrides: `train.seed=1`; where only one path ends in that name also `--seed 1` and `--seed=1`; for a
            boolean `--flag` alone.

    Raises:
        ConfigError: with every problem found: unknown and missing keys, wrong types, refused values.
    """
    tree, problems = _read(path), list[str]()
    return _built(schema, tree, str(path or "overrides"), _Log(problems, _override(schema, tree, overrides, problems)))


def top_keys(path: Path | str | None, overrides: Sequence[str] = ()) -> set[str]:
    """The keys at the top of a config and of its overrides, whatever its schema. Raises ConfigError."""
    names = [text.partition("=")[0].removeprefix("--") for text in overrides if "=" in text or text.startswith("--")]
    return {*map(str, _read(path)), *(name.partition(".")[0] for name in names if "." in name)}


def read_node(base: type[T], node: Mapping[str, Value], where: str) -> T:
    """An instance of `base` from the plain data that `to_node` makes of it. Raises ConfigError, which names `where`."""
    return _built(base, OmegaConf.create(dict(node)), where, _Log([], {}))


def _built(base: type[T], tree: DictConfig, where: str, log: _Log) -> T:
    try:
        node = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_interpolation(error)}") from error
    instance = _instance([base], node, "", log)
    if log.problems:
        many = "s" * (len(log.problems) > 1)
        raise ConfigError("\n  ".join([f"{where}: {len(log.problems)} problem{many}", *log.problems]))
    return instance


def _read(path: Path | str | None) -> DictConfig:
    if path is None:
        return OmegaConf.create({})
    try:
        tree = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(problem(f"config {path}", "a YAML file", str(error), "check the path")) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_interpolation(error)}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(
            problem(f"a list in {path}", "keys with values", "a config sets fields by name", "write `key: value`")
        )
    return tree


def _interpolation(error: OmegaConfBaseException) -> str:
    """What is wrong with a `${...}`."""
    got, todo = " ".join(str(error).split()), "name an existing key, or write \\${ for a literal ${"
    return problem(got, "a `${path.of.a.key}` of this config", "the reference is replaced by that key's value", todo)


def _plain(tree: DictConfig) -> Value:
    return OmegaConf.to_container(tree, resolve=False)


def _at(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _override(schema: type, tree: DictConfig, overrides: Sequence[str], problems: list[str]) -> Mapping[str, Hint]:
    """Put the overrides into `tree`, classes first: they decide which names there are. Returns the leaves."""
    classes = [text for text in overrides if re.match(r"[\w.]*\btype=", text)]
    for text in classes:
        key, _, name = text.partition("=")
        _set(tree, key, name, str, problems)
    known = leaves(schema, _plain(tree))
    pending = [text for text in overrides if text not in classes]
    while pending:
        given = pending.pop(0)
        key, equals, text = given.partition("=")
        if key.startswith("--"):
            path = _path(key[2:].replace("-", "_"), known, problems)
            flag = path is not None and bool in arms(known[path])
            if not equals and flag and pending[:1] not in (["true"], ["false"]):
                text = "true"
            elif not equals and (not pending or pending[0].startswith("--")):
                problems.append(f"{key}: got no value; write {key}=VALUE")
                continue
            elif not equals:
                text = pending.pop(0)
            if path is not None:
                _set(tree, path, text, known[path], problems)
        elif equals and key:
            _set(tree, key, text, known.get(key, Any), problems)
        else:
            problems.append(f"{given}: got no `=`, expected key=value or --key value")
    return known


def _path(name: str, known: Mapping[str, Hint], problems: list[str]) -> str | None:
    """The one path that ends in `name`; None, with the problem noted, where there is none or several."""
    ends = [path for path in known if f".{path}".endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        problems.append(f"--{name}: several paths end in this name; write one of {', '.join(f'{p}=' for p in ends)}")
    else:
        guess = nearest(name, [path.rpartition(".")[2] for path in known])
        problems.append(f"--{name}: unknown;{guess or ' the config has: ' + ', '.join(known)}")
    return None


def _set(tree: DictConfig, key: str, text: str, hint: Hint, problems: list[str]) -> None:
    """Set one path. Where only text fits, it is taken as it stands; else it is read as YAML."""
    members = arms(hint)
    words = all(arm in (Path, NoneType) or is_text(arm) or _is_words(arm) for arm in members)
    try:
        if not words or (text == "null" and NoneType in members):
            OmegaConf.update(tree, key, _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"])
        else:
            OmegaConf.update(tree, key, text)
    except (OmegaConfBaseException, TypeError, *UNREADABLE) as error:  # TypeError: a name below a list
        problems.append(f"{key}: got {text[:200]!r}, which does not parse: {' '.join(str(error).split())}")


def _is_words(arm: Hint) -> bool:
    return get_origin(arm) is Literal and all(isinstance(choice, str) for choice in get_args(arm))


def _instance(bases: Sequence[type], node: Value, path: str, log: _Log) -> Value:
    """An instance from a mapping; None, with the problems noted, where there is none."""
    node = dict(node)
    name = node.pop("type", None)
    try:
        if Factory in bases and name is not None:
            return Factory(str(name), {key: _tuples(value) for key, value in node.items()})
        cls = pick(bases, name)
    except ConfigError as error:
        log.problems.append(f"{path or 'type'}: {error}")
        return None
    hints, before, values = fields(cls), len(log.problems), {}
    for key in node:
        if key not in hints:
            guess = nearest(key, hints, log.leaves)
            log.problems.append(f"{_at(path, key)}: unknown;{guess} {cls.__name__} has: {', '.join(hints)}")
    for f in dataclasses.fields(cls):
        if f.name in hints and f.name in node:
            values[f.name] = _value(hints[f.name], node[f.name], _at(path, f.name), log)
        elif f.init and f.default is f.default_factory is dataclasses.MISSING:
            wanted = describe(hints[f.name])
            log.problems.append(f"{_at(path, f.name)}: missing; {cls.__name__} needs it ({wanted})")
    if len(log.problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        log.problems.append(f"{path or cls.__name__}: {error}")
        return None


def _value(hint: Hint, node: Value, path: str, log: _Log) -> Value:
    """The value of one field: instances where the annotation holds classes, pydantic for everything else."""
    members = arms(hint)
    bases = [arm for arm in members if is_structure(arm)]
    if bases and isinstance(node, Mapping):
        return _instance(bases, node, path, log)
    for arm in members:
        origin, args = get_origin(arm), get_args(arm)
        if not structures(arm):
            continue
        if origin is dict and isinstance(node, Mapping):
            return {key: _value(args[1], item, _at(path, key), log) for key, item in node.items()}
        if origin in (list, tuple) and isinstance(node, list):
            kinds = [args[0]] * len(node) if origin is list or args[-1] is ... else args
            if len(kinds) == len(node):
                pairs = enumerate(zip(kinds, node, strict=True))
                return origin(_value(kind, item, f"{path}[{i}]", log) for i, (kind, item) in pairs)
    plain = [arm for arm in members if not structures(arm)]
    if not plain:
        wanted = f"a mapping for {describe(hint)}: write its keys (and `type:`) below"
        log.problems.append(f"{path}: got {node!r}, expected {wanted if bases else describe(hint)}")
        return None
    try:
        # strict as JSON: a list may be a tuple and text a path, but nothing becomes a number by accident
        adapter = TypeAdapter(_readable(Union[tuple(plain)]))  # noqa: UP007
        return adapter.validate_json(json.dumps(node), strict=True)
    except TypeError:  # bytes and dates of YAML, which no field takes
        log.problems.append(f"{path}: got {node!r} ({type(node).__name__}), expected {describe(hint)}")
        return None
    except ValidationError as error:
        log.problems.append(f"{path}: {_mismatch(node, hint, error)}")
        return None


def _mismatch(node: Value, hint: Hint, error: ValidationError) -> str:
    """What was got and expected, with those of pydantic's reasons that say more than the type does."""
    said = [f"got {node!r} ({type(node).__name__}), expected {describe(hint)}"]
    for place, message in [(detail["loc"], detail["msg"]) for detail in error.errors()]:
        if place and isinstance(place[-1], int):
            said.append(f"[{place[-1]}] {message}")
        elif not message.startswith("Input should be a valid"):
            said.append(message)
    if isinstance(node, int | float) and any(is_text(arm) or _is_words(arm) for arm in arms(hint)):
        said.append("put text in quotes")
    if isinstance(node, str) and any(get_origin(arm) in (list, tuple) for arm in arms(hint)):
        said.append(f"write a list: [{node}]")
    return "; ".join(dict.fromkeys(said))


def _tuples(value: Value) -> Value:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _readable(hint: Hint) -> Hint:
    """The annotation that also takes numbers as people write them: "1e-4" for a float, 1e5 for an int."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is float:
        return Annotated[float, BeforeValidator(_real), AllowInfNan(False)]
    if hint is int:  # no larger than a length or an index may be
        return Annotated[int, BeforeValidator(_whole), Ge(-sys.maxsize), Le(sys.maxsize)]
    if hint is Path:
        return Annotated[Path, AfterValidator(lambda path: Path(expanded(str(path))))]
    if origin is None or origin is Literal or str in args:  # beside str, text stays text
        return hint
    if origin is Annotated:
        return Annotated[(_readable(args[0]), *args[1:])]
    inner = tuple(arg if arg is ... else _readable(arg) for arg in args)
    return Union[inner] if len(arms(hint)) > 1 else origin[inner]  # noqa: UP007


def _real(value: Value) -> Value:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _whole(value: Value) -> Value:
    value = _real(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
