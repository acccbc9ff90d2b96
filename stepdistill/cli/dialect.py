"""What all commands share: their declaration, the spelling of flags, and the library warnings that are muted."""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepdistill.core.outputs import expanded

Run = Callable[[argparse.Namespace, list[str]], None]
FREE = ("train", "precompute", "data")  # commands whose other flags are keys of the config
RENAMED = {  # earlier spellings
    "--out": "--output",
    "--prompts": "--prompts-file",
    "--num": "--num-images",
    "--guidance": "--guidance-scale",
    "--teacher-guidance": "--teacher-guidance-scale",
}
VERBOSE = "STEPDISTILL_VERBOSE"  # an environment variable that keeps the libraries' warnings
SEEDS = 2**32 - 1  # the largest seed that every library takes
LIBRARIES = ("torch", "torchao", "transformers", "diffusers", "peft", "accelerate", "huggingface_hub")


def add_command(group: Any, name: str, run: Run, summary: str, epilog: str) -> argparse.ArgumentParser:  # noqa: ANN401
    """Declare a command in a group of subparsers.

    Args:
        run: called with the arguments, and with the overrides of a config where the command takes them.
        summary: one line, in lower case; the description is the same as a sentence.
        epilog: the text of `--help` below the flags.
    """
    command = group.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def spelled(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with `-` for `_` in the names of flags, and an error message if a flag has an earlier spelling."""
    words, wrong, command = list[str](), None, next(iter(argv), None)
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            if name in RENAMED and command not in FREE:
                wrong = wrong or f"{name} is called {RENAMED[name]}"
        words.append(f"{name}{equals}{value}")
    return words, wrong


def local_path(text: str) -> Path:
    """A path as a command means it: `~` is the home folder."""
    return Path(expanded(text))


def whole(low: int = 1, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number in a range."""

    def number(text: str) -> int:
        try:
            return int(_within(int(text), low, high))
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number{_span(low, high)}") from None

    return number


def real(low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """The type of an argument that is a finite number in a range."""

    def number(text: str) -> float:
        try:
            return _within(float(text), low, high)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number{_span(low, high)}") from None

    return number


def several(one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an argument that is a list of different values, separated by commas."""

    def values(text: str) -> tuple[Any, ...]:
        found = tuple(one(part.strip()) for part in text.split(",") if part.strip())
        if not found or len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected different values, such as 1,2,4")
        return found

    return values


def height_and_width(text: str) -> tuple[int, int]:
    """The height and width in pixels of `HxW`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected height and width in pixels, such as 832x1216")
    return int(found[1]), int(found[2])


def weighed(text: str) -> tuple[str, float]:
    """A LoRA's place and strength, by default 1, from `PLACE[:STRENGTH]`."""
    place, colon, strength = text.rpartition(":")
    try:
        return (expanded(place), real()(strength)) if colon else (expanded(text), 1.0)
    except argparse.ArgumentTypeError:
        return expanded(text), 1.0


seed = whole(0, SEEDS)


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """Declare `--overwrite`; `stepdistill.core.outputs` has its rule."""
    command.add_argument("--overwrite", action="store_true", help="replace what an earlier command wrote there")


def _within(value: float, low: float | None, high: float | None) -> float:
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError
    return value


def _span(low: float | None, high: float | None) -> str:
    if low is None:
        return ""
    return f" of {low} or more" if high is None else f" from {low} to {high}"


def is_first_process() -> bool:
    """Whether this is the first, or the only one, of the processes that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without garbage collection, and leave what is there at the end out of all later ones.

    Each would look through all that torch and its like define, a second of CPU until the first step. Where torch is
    loaded already, this does nothing.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quieten() -> None:
    """Mute warnings that libraries give on import and that say nothing about the user's run.

    Set STEPDISTILL_VERBOSE=1 to see them.
    """
    if os.environ.get(VERBOSE):
        return
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(LIBRARIES)})(\.|$)")
    # a student beside its average, or beside a style, is a second adapter on purpose
    warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
    # torchao registers an enum in a way that torch calls out of date, and says which kernels it has no build of;
    # transformers says that it processes images without torchvision
    quantizer, processors = "diffusers.quantizers.torchao.torchao_quantizer", "transformers.utils.import_utils"
    for name in ("torch.utils._pytree", "torchao", quantizer, processors):
        logging.getLogger(name).setLevel(logging.ERROR)
