"""What all commands share: their declaration, the spelling of flags, and the library warnings that are muted."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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
