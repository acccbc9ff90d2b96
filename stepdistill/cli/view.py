"""`stepdistill view`: the final image as each step of teacher and student estimates it. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from typing import Any

from stepdistill.cli.dialect import add_command, add_overwrite, local_path, real, seed, whole
from stepdistill.core.outputs import expanded

VIEW = """\
Writes a row of frames for the teacher at full steps, for the teacher at the student's steps, and for the student. A
frame is the final image as a step estimates it, with the timestep of that step above it. The last frame of a row is
the generated image. A student usually settles in its first step what the teacher settles in many.

example:
  stepdistill view runs/quickstart "cat face" "red apple" --teacher-steps 25 -o view.png
"""


def add_view_command(commands: Any) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers."""
    command = add_command(commands, "view", _view, "show the final image as each step estimates it", VIEW)
    command.add_argument("folder", metavar="FOLDER", type=expanded, help="student folder or hub id")
    command.add_argument("prompts", metavar="PROMPT", nargs="+", help="three rows each")
    command.add_argument("-o", "--output", metavar="FILE.png", type=local_path, required=True, help="file to write")
    command.add_argument("--seed", type=seed, default=0, help="seed of the starting noise (default: 0)")
    command.add_argument("--teacher-steps", type=whole(), default=50, metavar="N", help="full steps (default: 50)")
    command.add_argument("--teacher-guidance-scale", type=real(1), default=7.5, metavar="W", help="(default: 7.5)")
    command.add_argument("--columns", type=whole(2), default=8, metavar="N", help="most frames in a row (default: 8)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    add_overwrite(command)


def _view(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.core.devices import usable_device
    from stepdistill.students.contract import read_contracts, teacher
    from stepdistill.students.draw.sheet import check_image_file, save_image
    from stepdistill.students.draw.steps import View, view, view_sheet
    from stepdistill.students.load import folder_of

    check_image_file(args.output, [args.folder], args.overwrite)
    device = usable_device(args.device)
    folder = folder_of(args.folder)
    wanted = View(
        prompts=args.prompts,
        seed=args.seed,
        teacher_steps=args.teacher_steps,
        teacher_guidance=args.teacher_guidance_scale,
        columns=args.columns,
    )
    blocks = view(teacher(read_contracts(folder)[0]).load().to(device), folder, wanted)
    save_image(view_sheet(blocks, args.prompts, max(1, 96 // blocks[0][0].frames.shape[-1])), args.output)
    print(args.output)
