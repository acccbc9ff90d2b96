"""The reference: every key of a config, every command, and every room of the library."""

from __future__ import annotations

import argparse
import ast
import os
import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

from stepdistill.cli import main as cli
from stepdistill.config.registry import every, offered
from stepdistill.config.schema import dotted
from stepdistill.config.template import template
from stepdistill.data import Source
from stepdistill.decoding.janus import Janus
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.pairs import TokenPairs
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.recipe import TrainSpec

DECODING = {"teacher": Janus, "method": DistilledDecoding, "data": TokenPairs}
PACKAGE = Path(__file__).parent.parent.parent / "stepdistill"


def pages() -> dict[str, str]:
    """Markdown by path below docs/."""
    made = {"reference/config.md": _config(), "reference/commands.md": _commands()}
    return made | {f"reference/api/{room.name}.md": _room(room) for room in rooms()}


def rooms() -> list[Path]:
    return sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))


def section(name: str, cls: type, typed: bool = True) -> str:
    """The YAML of a class below its key, as `stepdistill init` prints it, in lines that a page has room for."""
    lines = [f"type: {dotted(cls)}"] * typed + template(cls, {}).splitlines()
    body = [line for _, group in groupby(lines, _comment) for line in _folded(list(group))]
    return f"```yaml\n{name}:\n{textwrap.indent(chr(10).join(body), '  ')}\n```"


def _comment(line: str) -> str:
    """The start of a comment's line; nothing where it is none that may be folded."""
    match = re.match(r" *# (?!or type:)", line)
    return match[0] if match else ""


def _folded(lines: list[str]) -> list[str]:
    if not (start := _comment(lines[0])):
        return lines
    text = " ".join(line.removeprefix(start) for line in lines)
    return textwrap.wrap(text, 84, initial_indent=start, subsequent_indent=start)


def _config() -> str:
    body = ["# Config", "Every key, as `stepdistill init METHOD FAMILY [DATA]` prints it. A class is named by `type:`."]
    for name, base in (("family", Family), ("method", Method), ("data", Source)):
        body.append(f"## {name}")
        for cls in shipped(base):
            body += [f"### {cls.__name__}", section(name, cls)]
    for name, cls in (("lora", LoraSpec), ("train", TrainSpec)):
        body += [f"## {name}", section(name, cls, typed=False)]
    text = "A config of Distilled Decoding, as `stepdistill init decoding` prints it, has `teacher` in the place of"
    body += ["## Distilled Decoding", f"{text} `family`. Of `train` it takes what that prints."]
    body += [section(name, cls, typed=False) for name, cls in DECODING.items()]
    return "\n\n".join(body) + "\n"


def shipped(base: type) -> list[type]:
    """The finished subclasses of `base` in its room, by name."""
    every(base)
    return sorted(offered(base), key=lambda cls: cls.__name__.lower())


def _commands() -> str:
    body = ["# Commands", "What `--help` of each command prints. `-` and `_` are the same in every flag."]
    with patch.dict(os.environ, COLUMNS="88", NO_COLOR="1"):
        for words, parser in commands(cli._parser()):
            body.append(f"{'#' * min(len(words) + 1, 3)} {' '.join(words)}")
            body.append(f"```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(body) + "\n"


def commands(parser: argparse.ArgumentParser, *above: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """A parser and those of its subcommands, by the words that one types."""
    words = (*above, parser.prog.split()[-1])
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from commands(child, *words)


def _room(room: Path) -> str:
    files = sorted(file for file in room.rglob("*.py") if file.stem != "__init__")
    names = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]
    about = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    return "\n\n".join([f"# {room.name}", about, *(f"::: {name}" for name in names)]) + "\n"
