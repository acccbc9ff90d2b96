"""Plant a bug in a function of the library, to see that a test notices."""

from __future__ import annotations
import __future__

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import dedent


@contextmanager
def planted(function: Callable, old: str, new: str) -> Iterator[None]:
    """Inside, `function` runs with `new` in the place of `old`, which its source must hold exactly once.

    Its code is replaced and not its name, so that every importer runs the bug. Where the library has changed
    and an edit no longer applies, that is an error: bring the bug over to the new code.
    """
    function = inspect.unwrap(function)
    source = dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} holds {old!r} {source.count(old)} times, not once"
    made: dict[str, Callable] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source.replace(old, new), "<bug>", "exec", flags), dict(function.__globals__), made)
    before, function.__code__ = function.__code__, inspect.unwrap(made[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = before
