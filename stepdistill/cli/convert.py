"""Commands of student folders: verify, convert, multi. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from typing import Any

from stepdistill.cli.dialect import add_command, add_overwrite, local_path, real
from stepdistill.networks.lora.names import NETWORKS

VERIFY = """\
Loads the folder into a plain Diffusers pipeline and compares its output with the library's own sampler. Every other
format in the folder is compared in the same way. Prints the largest difference of each format, relative to the
teacher's largest value. The exit status is 1 if a difference is above the tolerance.

A student of an autoregressive image model is opened by plain Diffusers in a process of its own, with
trust_remote_code=True, which runs the code in the folder: read it first. Its tokens are compared with those that the
library draws without that code, from the same noise, for each number of calls that it was trained for. The exit status
is 1 if any token differs, or the images by more than the tolerance.

examples:
  stepdistill verify runs/mine
  stepdistill verify runs/decoder
"""

CONVERT = """\
IN is a student folder, or a LoRA file in the format of Diffusers, kohya (sd-scripts) or ComfyUI. OUT is a file. Each
layer keeps its alpha, so a strength of 1.0 has the same effect in every format. A key that has no name in the other
format is an error, and nothing is written. `--to fused` writes a student folder with the whole network, which plain
Diffusers loads without a LoRA loader. These formats are supported:

  sd, sdxl       diffusers, kohya, comfyui
  sd3, flux      diffusers, kohya, comfyui
  klein          diffusers, kohya (as in musubi-tuner), comfyui
  pixart         diffusers, comfyui
  sana           diffusers
  z_image, krea2 diffusers, kohya, comfyui

examples:
  stepdistill convert runs/mine mine.safetensors --to comfyui
  stepdistill convert theirs.safetensors ours.safetensors --to diffusers --family sdxl
  stepdistill convert runs/mine runs/mine-fused --to fused
"""

MULTI = """\
Joins the students of K runs whose configs differ in `data.student` of a stepdistill.data.Partition, in any order.
Writes `students/<k>/`, `router.json` and a card to OUT. `stepdistill.load_student(pipe, OUT)(prompts)` generates each
image with the student of its prompt.

example:
  stepdistill multi runs/all runs/part-0 runs/part-1
"""


def add_folder_commands(commands: Any) -> None:  # noqa: ANN401
    """Declare the commands in a group of subparsers."""
    command = add_command(commands, "verify", _verify, "check that plain Diffusers loads a student", VERIFY)
    command.add_argument("folder", metavar="FOLDER", type=local_path, help="the output_dir of a run")
    command.add_argument(
        "--tolerance", type=real(0), help="largest accepted difference (default: as in training, 1e-4)"
    )

    command = add_command(commands, "convert", _convert, "write a LoRA in another format, or fuse it", CONVERT)
    command.add_argument("source", metavar="IN", type=local_path, help="student folder or .safetensors file")
    command.add_argument(
        "target", metavar="OUT", type=local_path, help="a .safetensors file; for `fused`, a new folder"
    )
    command.add_argument("--to", required=True, choices=["kohya", "comfyui", "diffusers", "fused"], help="format")
    command.add_argument("--family", choices=list(NETWORKS), help="family of a LoRA file (default: by its layer names)")
    add_overwrite(command)

    command = add_command(commands, "multi", _multi, "join the students of a partition in one folder", MULTI)
    command.add_argument("folder", metavar="OUT", type=local_path, help="a new folder")
    command.add_argument("students", metavar="STUDENT", type=local_path, nargs="+", help="the output_dir of each run")
    command.add_argument("--move", action="store_true", help="move the folders instead of copying them")
    add_overwrite(command)


def _verify(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.contract import DECODER, kind_of
    from stepdistill.students.proof import FLOAT32
    from stepdistill.students.verify import verify_formats

    limit = FLOAT32 if args.tolerance is None else args.tolerance
    if kind_of(args.folder) == DECODER:
        _verify_decoder(args, limit)
        return
    differences = verify_formats(args.folder)
    print(f"largest difference of plain Diffusers from the library's sampler: {differences['diffusers']:.3g}")
    for name, difference in differences.items():
        if name != "diffusers":
            what = "ComfyUI workflow" if name == "workflow" else f"{name} file"
            print(f"largest difference with the {what}: {difference:.3g}")
    if not all(difference <= limit for difference in differences.values()):
        raise SystemExit(1)


def _verify_decoder(args: argparse.Namespace, limit: float) -> None:
    from stepdistill.decoding.verify import verify_decoder

    check = verify_decoder(args.folder)
    for calls, share in check.shares.items():
        print(f"tokens of plain Diffusers that are the library's, {calls} call{'s' * (calls > 1)}: {share:.2%}")
    print(f"largest difference of the images, of values from 0 to 1: {check.images:.3g}")
    if not (all(share == 1 for share in check.shares.values()) and check.images <= limit):
        raise SystemExit(1)


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.core.outputs import check_output_file
    from stepdistill.students.lora.files import convert_lora
    from stepdistill.students.lora.fuse import fuse_student

    if args.to == "fused":
        difference = fuse_student(args.source, args.target, args.overwrite)
        print(f"wrote {args.target}: its largest difference from {args.source} is {difference:.3g}")
    else:
        check_output_file(args.target, [args.source], args.overwrite)
        print(convert_lora(args.source, args.target, args.to, args.family))
        print(f"wrote {args.target}")


def _multi(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.several import join_students

    joined = join_students(args.folder, args.students, args.move, args.overwrite)
    print(f"joined {len(args.students)} students in {joined}")
