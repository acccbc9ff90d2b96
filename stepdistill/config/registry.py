"""The classes that a config may name: concrete subclasses of a base, by module, class or dotted path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

from stepdistill.config.schema import lacking, nearest, pick
from stepdistill.core.errors import ConfigError


def find(base: type, name: str) -> type:
    """The subclass of `base` that `name` means: a module beside `base`, `module.Class`, or a dotted path.

    Raises:
        ConfigError: with the names there are.
    """
    package, modules = _beside(base)
    head, dot, _ = name.partition(".")
    if dot:
        return pick([base], f"{package.__name__}.{name}" if head in modules else name)
    if head not in modules:
        known = ", ".join(modules)
        raise ConfigError(f"{name}: unknown;{nearest(name, modules)} {package.__name__} has: {known}")
    module = importlib.import_module(f"{package.__name__}.{head}")
    classes = [cls for cls in heirs(base) if cls.__module__ == module.__name__]
    if len(classes) != 1:
        unfinished = [f"{cls.__name__} ({lacking(cls)})" for cls in _below(base) if cls.__module__ == module.__name__]
        has = ", ".join([f"{head}.{cls.__name__}" for cls in classes] or unfinished) or "none"
        raise ConfigError(f"{name}: expected a module with one {base.__name__}, it has: {has}")
    return classes[0]


def every(base: type) -> list[type]:
    """The finished subclasses of `base`: those of all modules beside it, and what else is imported."""
    package, modules = _beside(base)
    for name in modules:
        importlib.import_module(f"{package.__name__}.{name}")
    return heirs(base)


def offered(base: type) -> list[type]:
    """The finished subclasses of `base` in its own package, of those that are imported: what `init` may print."""
    package = _beside(base)[0].__name__
    return [cls for cls in heirs(base) if f"{cls.__module__}.".startswith(f"{package}.")]


def _beside(base: type) -> tuple[ModuleType, list[str]]:
    """The package of `base`, and the names of its modules."""
    home = importlib.import_module(base.__module__)
    package = home if "__path__" in vars(home) else importlib.import_module(home.__name__.rpartition(".")[0])
    return package, [module.name for module in pkgutil.iter_modules(package.__path__)]


def heirs(base: type) -> list[type]:
    """The finished subclasses of `base` that are imported, in the order of their definition."""
    return [cls for cls in _below(base) if not inspect.isabstract(cls)]


def _below(base: type) -> list[type]:
    return [heir for cls in base.__subclasses__() for heir in [cls, *_below(cls)]]
