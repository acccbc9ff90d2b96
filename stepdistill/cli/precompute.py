"""`stepdistill precompute`: text embeddings and latents, before training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

HELP = """\
Goes over the config's whole data source, and writes into train.cache_dir the embeddings of all its prompts, of the
empty one and of train.validation_prompts, and with train.cache_latents the latents of its images. Training with the
same train.cache_dir then loads no text encoder, and the autoencoder only to draw images. Started again it goes on
where it was cut; the processes share the work. What is kept is found again by the content of the model's files and of
the data: after a change of either it is computed anew. Overrides are those of `stepdistill train`.

examples:
  stepdistill precompute mine.yaml --cache_dir caches/mine
  accelerate launch -m stepdistill precompute mine.yaml train.cache_dir=caches/mine --cache_latents
"""


def declare(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers.

    Args:
        command: (group, name, function, summary, epilog) to a parser.
    """
    parser = command(commands, "precompute", _run, "encode prompts and images before training", HELP)
    parser.usage = "stepdistill precompute CONFIG [key=value | --key value]..."
    parser.add_argument("config", metavar="CONFIG", help="YAML file")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.config import load as config
    from stepdistill.training.cache.precompute import precompute
    from stepdistill.training.recipe import Run

    run = config.load(Run, args.config, overrides)
    filled = precompute(run)
    if os.environ.get("RANK", "0") == "0":  # one process of those that a launcher started
        print(filled)
