"""`stepdistill view`: what each step of teacher and student takes for the final image."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

VIEW = """\
A line of frames for the teacher at full steps, for the teacher at the student's steps and for the student: the image
that sampling would end at, as each step estimates it, with the step's noise level above. The last frame of a line is
the image itself. A student usually decides in its first step what the teacher decides in many.

example:
  stepdistill view runs/quickstart "cat face" "red apple" --teacher-steps 25 -o view.png
"""

Command = Callable[[argparse.Namespace, list[str]], None]
Make = Callable[..., argparse.ArgumentParser]


def declare(commands: Any, command: Make) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers.

    Args:
        command: (group, name, function, summary, epilog) to a parser.
    """
    parser = command(commands, "view", _view, "show what each step takes for the final image", VIEW)
    parser.add_argument("folder", metavar="FOLDER", help="a student folder or hub id")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+")
    parser.add_argument("-o", "--output", dest="out", metavar="FILE.png", type=Path, required=True, help="to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noises (default: 0)")
    parser.add_argument("--teacher-steps", type=int, default=50, metavar="N", help="at its best (default: 50)")
    parser.add_argument("--teacher-guidance", type=float, default=7.5, metavar="W", help="(default: 7.5)")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="frames of a line at most (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")


def _view(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.contract import read_contracts, teacher
    from stepdistill.students.draw.steps import View, view, view_sheet
    from stepdistill.students.single import folder_of

    folder = folder_of(args.folder)
    wanted = View(
        prompts=args.prompts,
        seed=args.seed,
        teacher_steps=args.teacher_steps,
        teacher_guidance=args.teacher_guidance,
        columns=args.columns,
    )
    blocks = view(teacher(read_contracts(folder)[0]).load().to(args.device), folder, wanted)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    view_sheet(blocks, args.prompts, max(1, 96 // blocks[0][0].frames.shape[-1])).save(args.out)
    print(args.out)
