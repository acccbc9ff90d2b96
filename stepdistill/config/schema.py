"""A dataclass's signature as the schema of a config: annotations, leaves, and classes by dotted path."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from stepdistill.config.kinds import Place
from stepdistill.core.errors import ConfigError, problem

Hint: TypeAlias = Any  # an annotation
Value: TypeAlias = Any  # what a config holds, or what is made of it


@dataclasses.dataclass(frozen=True)
class Factory:
    """A callable named by its dotted path, such as an optimizer class, with keyword arguments.

    Args:
        type: dotted path of a class or function.
        kwargs: keyword arguments by name, in YAML beside `type`.

    Raises:
        ConfigError: the path does not exist, or the callable has no such argument.
    """

    type: str
    kwargs: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        target = locate(self.type)
        try:
            known = inspect.signature(target).parameters
        except (TypeError, ValueError) as error:
            why = f"its signature cannot be read ({error})"
            raise ConfigError(problem(self.type, "a class or function", why, "name another one")) from error
        for name, value in self.kwargs.items():
            if name in known:
                default = known[name].default
                number = isinstance(default, int | float) and not isinstance(default, bool)
                if number and isinstance(value, bool | str):
                    why = f"the default of {self.type} is {name}={default}"
                    raise ConfigError(problem(f"{name}={value!r}", "a number", why, "write it without quotes"))
            elif not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                guess = nearest(name, known)
                raise ConfigError(f"{self.type}: unknown {name};{guess} It has: {', '.join(known)}")

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        """Call it; the config's own keyword arguments win over `kwargs`."""
        return locate(self.type)(*args, **{**kwargs, **self.kwargs})


@functools.cache
def fields(cls: type) -> Mapping[str, Hint]:
    """Annotation by name of every field that a config may set."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def is_structure(hint: Hint) -> bool:
    """Whether a mapping in YAML stands for an instance of this annotation."""
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or inspect.isabstract(hint))


def structures(hint: Hint) -> list[type]:
    """The dataclasses and abstract classes anywhere in an annotation."""
    return [hint] if is_structure(hint) else [cls for arg in get_args(hint) for cls in structures(arg)]


def arms(hint: Hint) -> list[Hint]:
    """The members of a union, or the annotation alone. `Annotated` is kept around scalars only."""
    if get_origin(hint) in (Union, UnionType):
        return [arm for member in get_args(hint) for arm in arms(member)]
    inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return [inner] if is_structure(inner) else [hint]


def is_text(hint: Hint) -> bool:
    """Whether an annotation takes any text."""
    return get_args(hint)[0] is str if get_origin(hint) is Annotated else hint is str


def places(value: Value, hint: Hint = Any) -> Iterator[str]:
    """Every path, hub id or name in an instance: the texts of its fields that are annotated `Place`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, Factory):
        for name, of_field in fields(type(value)).items():
            yield from places(getattr(value, name), of_field)
    elif isinstance(value, str):
        yield from [value] if any(Place in (arm, *get_args(arm)) for arm in arms(hint)) else ()
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from places(item, hint)


def describe(hint: Hint) -> str:
    """An annotation as text for an error message."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, UnionType):
        return " | ".join(describe(arm) for arm in args)
    if hint is NoneType or hint is ...:
        return "null" if hint is NoneType else "..."
    if isinstance(origin, type):
        return f"{origin.__name__}[{', '.join(describe(arg) for arg in args)}]"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def dotted(cls: type) -> str:
    """The path that `type:` names a class by."""
    return f"{cls.__module__}.{cls.__qualname__}"


def locate(path: str) -> Value:
    """The object at a dotted path. Raises ConfigError with the nearest name where there is none."""
    name, _, last = path.rpartition(".")
    if not name or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(problem(repr(path), "package.module.Name", "the name is imported", "write the full path"))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not f"{name}.".startswith(f"{missing}."):
            raise ConfigError(f"{path}: {name} needs {missing}, which is not installed") from error
        parent, _, leaf = missing.rpartition(".")
        beside = pkgutil.iter_modules(vars(importlib.import_module(parent)).get("__path__", [])) if parent else []
        raise ConfigError(f"{path}: no module {missing};{nearest(leaf, [m.name for m in beside])}") from error
    try:
        return getattr(module, last)
    except AttributeError as error:
        raise ConfigError(f"{path}: {name} has no {last};{nearest(last, dir(module))}") from error


def pick(bases: Sequence[type], path: Value) -> type:
    """The class of a node: the one that `type: path` names, or with None the first of `bases`, if all are concrete."""
    names = " or ".join("class or function" if base is Factory else base.__name__ for base in bases)
    if path is None:
        if not any(inspect.isabstract(base) or base is Factory for base in bases):
            return bases[0]
        known = [cls for base in bases if base is not Factory for cls in [base, *base.__subclasses__()]]
        heirs = [dotted(cls) for cls in known if not inspect.isabstract(cls)]
        such = f", such as {', '.join(heirs)}" if heirs else ""
        raise ConfigError(f"got no `type`, expected `type:` and the dotted path of a {names}{such}")
    cls = locate(str(path))
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and issubclass(cls, tuple(bases))):
        raise ConfigError(problem(path, f"a dataclass that is a {names}", "this key takes no other class", "change it"))
    if inspect.isabstract(cls):
        todo = "define them, or name a subclass"
        raise ConfigError(problem(path, f"a concrete {names}", lacking(cls), todo))
    return cls


def lacking(cls: type) -> str:
    """The names that an abstract class does not define, in words."""
    return f"it lacks {', '.join(sorted(vars(cls)['__abstractmethods__']))}"


def leaves(schema: type, node: Value, path: str = "") -> dict[str, Hint]:
    """Annotation by dotted path of every plain field, with the classes that `type:` names in this config."""
    hints_by_path: dict[str, Hint] = {}
    for name, hint in fields(schema).items():
        here = f"{path}.{name}" if path else name
        child = node.get(name) if isinstance(node, Mapping) else None
        bases = [arm for arm in arms(hint) if is_structure(arm)]
        if not bases:
            hints_by_path[here] = hint
        elif Factory not in bases and (child is not None or NoneType not in arms(hint)):
            try:
                cls = pick(bases, child.get("type") if isinstance(child, Mapping) else None)
            except ConfigError:  # reported where the node is built
                continue
            hints_by_path |= leaves(cls, child, here)
    return hints_by_path


def nearest(name: object, known: Iterable[str], paths: Iterable[str] = ()) -> str:
    """` did you mean ...?`: the nearest of `known`, else one of `paths` that ends in `name`; else nothing."""
    matches = difflib.get_close_matches(str(name), list(known), 1)
    matches += [path for path in paths if path.rpartition(".")[2] == name]
    return f" did you mean {matches[0]}?" if matches else ""
