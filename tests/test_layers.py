"""The rooms of the library and the rule between them: a file imports from its own room or from rooms to the left."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stepdistill"
ROOMS = "core config networks data families methods students evaluation training decoding cli".split()
APART = {"families", "methods"}  # neither imports the other
DOORS = {"stepdistill", "stepdistill.__main__"}  # what `import stepdistill` and `python -m stepdistill` open
HEAVY = ("peft", "diffusers", "transformers")
LATE = ("matplotlib", "diffusers.pipelines.auto_pipeline", "torchmetrics", "tensorboard")  # not before the first step


def modules() -> dict[str, Path]:
    """The file of every module of the library, by dotted name."""
    named = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    assert len(named) > len(ROOMS), f"no modules in {PACKAGE}"
    return named


MODULES = modules()


def imported(tree: ast.AST, named: Mapping[str, object]) -> Iterator[str]:
    """The modules among `named` that a tree imports, wherever in it: in functions and for types only, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in named)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in named or node.module in named:
                    yield full if full in named else str(node.module)


def room(name: str) -> str:
    return name.split(".")[1]


def wrong(importer: str, target: str) -> bool:
    """Whether an import crosses the rule."""
    if target in DOORS:
        return True
    here, there = room(importer), room(target)
    return ROOMS.index(there) > ROOMS.index(here) or {here, there} == APART


GRAPH = {name: set(imported(ast.parse(file.read_text()), MODULES)) - {name} for name, file in MODULES.items()}


def test_every_file_is_in_a_room():
    assert {room(name) for name in MODULES if name not in DOORS} == set(ROOMS)
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py"} and len(entries) <= 13


def test_imports_point_to_the_left():
    crossing = [
        f"{name} -> {target}" for name in MODULES if name not in DOORS for target in GRAPH[name] if wrong(name, target)
    ]
    assert not crossing


@pytest.mark.parametrize(
    "line",
    [
        "from stepdistill.training.recipe import Run",
        "def f():\n    from stepdistill.training import recipe",
        "if TYPE_CHECKING:\n    import stepdistill.training.recipe",
        "from stepdistill.methods.base import Method",
        "import stepdistill",
    ],
)
def test_a_wrong_import_is_seen(line: str):
    (target,) = imported(ast.parse(line), MODULES)
    assert wrong("stepdistill.families.base", target)


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"{' -> '.join(error.args[1])}")


def test_only_networks_knows_peft():
    knowing = {name for name, file in MODULES.items() if "peft" in imported_heads(file)}
    assert knowing and {room(name) for name in knowing} == {"networks"}


def imported_heads(file: Path) -> set[str]:
    """The first words of all that a file imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("light", ["core", "methods"])
def test_maths_and_methods_load_no_network_library(light: str):
    names = [name for name in MODULES if name not in DOORS and room(name) == light]
    assert len(names) > 2
    script = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    script += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_loads_no_library_of_its_end():
    """And no collection of garbage looks through the libraries: they are frozen once they are there."""
    script = (
        "import gc, sys\nfrom stepdistill.cli.dialect import heavy_imports\n"
        "with heavy_imports():\n    import stepdistill.training.distill, stepdistill.families.sd\n"
        f"print([name for name in {LATE} if name in sys.modules], gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "before = gc.get_freeze_count()\n"
        "with heavy_imports():\n    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True True"


def test_no_public_name_is_defined_twice():
    """No exception is needed: a class or function is found by its name alone."""
    places: dict[str, list[str]] = {}
    for name, file in MODULES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name)
    assert len(places) > 100
    assert not {name: where for name, where in places.items() if len(where) > 1}
