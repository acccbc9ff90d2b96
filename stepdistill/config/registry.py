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
    if head in modules:
        module = importlib.import_module(f"{package.__name__}.{head}")
        below = [cls for cls in _below(base) if cls.__module__ == module.__name__]
        classes = [cls for cls in heirs(base) if cls in below]
        if len(classes) == 1:
            return classes[0]
        if below:
            has = [_short(cls, classes) for cls in classes] or [f"{cls.__name__} ({lacking(cls)})" for cls in below]
            raise ConfigError(f"{name}: expected a module with one {base.__name__}, it has: {', '.join(has)}")
    every(base)
    known = [_short(cls, offered(base)) for cls in offered(base)]
    raise ConfigError(f"{name}: unknown;{nearest(name, known)} {package.__name__} has: {', '.join(sorted(known))}")


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


def _short(cls: type, classes: list[type]) -> str:
    """The name of a class's module, with its own where the module has several of these classes."""
    module = cls.__module__.rpartition(".")[2]
    return module if [other.__module__ for other in classes].count(cls.__module__) == 1 else f"{module}.{cls.__name__}"


def _beside(base: type) -> tuple[ModuleType, list[str]]:
    """The package of `base`, and the names of its modules."""
    home = importlib.import_module(base.__module__)
    package = home if "__path__" in vars(home) else importlib.import_module(home.__name__.rpartition(".")[0])
    return package, [module.name for module in pkgutil.iter_modules(package.__path__)]


def heirs(base: type) -> list[type]:
    """The finished subclasses of `base` that are imported, in the order of their definition."""
    return [cls for cls in _below(base) if not inspect.isabstract(cls)]


def _below(base: type) -> list[type]:
    # once, though a class may have two bases below `base`
    return list(dict.fromkeys(heir for cls in base.__subclasses__() for heir in [cls, *_below(cls)]))
