"""Plant a bug in a function of the library, to see that a test notices."""

from __future__ import annotations
import __future__

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import dedent

import pytest


@dataclass(frozen=True)
class Bug:
    """An edit of one function, and the test that must fail under it."""

    function: Callable
    old: str
    new: str
    test: Callable[[], object]


def oracles_of(bugs: Mapping[str, Bug]) -> dict[str, Callable[[], object]]:
    """The distinct tests of bugs, by the first bug that each is to notice.

    A test that fails whatever the code is notices every bug: each runs on the code without a bug as well.
    """
    kinds: dict[object, str] = {}
    for name, bug in bugs.items():
        code = bug.test.__code__
        kinds.setdefault((code.co_code, code.co_consts, code.co_names, code.co_filename), name)
    return {name: bugs[name].test for name in kinds.values()}


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


def bug_tests(bugs: Mapping[str, Bug], *also: type[Exception]) -> tuple[Callable, Callable]:
    """Two tests for a module to hold: its oracles pass on the code as it is, and each bug makes its oracle fail.

    Args:
        also: what an oracle may raise beside AssertionError.
    """

    @pytest.mark.parametrize("name", oracles_of(bugs))
    def passes(name: str) -> None:
        bugs[name].test()

    @pytest.mark.parametrize("name", bugs)
    def noticed(name: str) -> None:
        bug = bugs[name]
        with planted(bug.function, bug.old, bug.new), pytest.raises((AssertionError, *also)):
            bug.test()

    return passes, noticed
