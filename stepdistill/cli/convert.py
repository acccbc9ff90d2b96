"""`stepdistill convert`: a LoRA in another format, or fused. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepdistill.students.lora.names import NETWORKS

CONVERT = """\
IN is a student folder or a LoRA file, in the format of Diffusers, kohya (sd-scripts) or ComfyUI; OUT is a file. Each
layer keeps its alpha, so that strength 1.0 is the same LoRA everywhere. A key that nothing stands for in the other
format is an error, and nothing is written then. `--to fused` writes a student folder with the whole network instead,
for which plain Diffusers needs no LoRA loader.

  sd, sdxl       diffusers, kohya, comfyui
  sd3, flux      diffusers, kohya, comfyui
  pixart         diffusers, comfyui
  sana           diffusers

examples:
  stepdistill convert runs/mine mine.safetensors --to comfyui
  stepdistill convert theirs.safetensors ours.safetensors --to diffusers --family sdxl
  stepdistill convert runs/mine runs/mine-fused --to fused
"""


def declare(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers.

    Args:
        command: (group, name, function, summary, epilog) to a parser.
    """
    parser = command(commands, "convert", _convert, "write a LoRA in another format, or fuse it", CONVERT)
    parser.add_argument("source", metavar="IN", type=Path, help="student folder or .safetensors file")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .safetensors file; of `fused` a new folder")
    parser.add_argument("--to", required=True, choices=["kohya", "comfyui", "diffusers", "fused"])
    parser.add_argument("--family", choices=list(NETWORKS), help="of a file's layers (default: by their names)")


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.lora.files import convert
    from stepdistill.students.lora.fuse import fuse

    if args.to == "fused":
        print(
            f"fused {args.source} into {args.target}: plain Diffusers differs by {fuse(args.source, args.target):.3g}"
        )
    else:
        print(convert(args.source, args.target, args.to, args.family))
        print(f"wrote {args.target}")
