"""Where a student folder may be written as a whole: in a new folder, or in place of a student that was written so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stepdistill.core.files import remove
from stepdistill.core.outputs import check_output_tree
from stepdistill.data.routing import ROUTER
from stepdistill.students.contract import CONTRACT, STUDENTS, WEIGHTS

WHOLE = {CONTRACT, STUDENTS, ROUTER, "README.md", "scheduler", "unet", "transformer"}  # of fused and joined students
EXTRACTION = "extraction.json"  # of an extracted student, with its weights


def check_student_room(folder: Path, inputs: Iterable[Path | str], overwrite: bool) -> None:
    """Raise OutputError where a student folder cannot be written, or must not replace what is there.

    Args:
        inputs: the folders and files that the student is made of.
        overwrite: whether an earlier student may be replaced. A run's folder is none: it holds more than its student.
    """
    names = {place.name for place in folder.iterdir()} if folder.is_dir() else set[str]()
    own = CONTRACT in names and names - WHOLE in (set[str](), {EXTRACTION, WEIGHTS})
    check_output_tree(folder, ["*"], inputs, own, overwrite)


def emptied(folder: Path) -> Path:
    """The folder, new and empty. What `check_student_room` let pass is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in folder.iterdir():
        remove(place)
    return folder
