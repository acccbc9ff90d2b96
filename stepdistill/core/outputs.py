"""Where a command may write: never over an input, never over what this tool did not write. Known before any work."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

from stepdistill.core.errors import OutputError, problem

MARK = b"stepdistill"  # every file that a user names an output holds it near its beginning or end
READ = 2**16  # bytes of a file's beginning and end that are searched for it


def expanded(text: str) -> str:
    """A path, hub id or name, in which `~` is the home folder."""
    return os.path.expanduser(text)


def check_output_folder(folder: Path) -> None:
    """Raise OutputError where `folder` is no folder and cannot become one, or cannot be written to. Makes nothing."""
    expected, todo = "a folder that can be written to", "name another, or change its permissions"
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if _is_there(place))
        if not nearest.is_dir():
            why = f"{nearest} is a file" if nearest.exists() else f"{nearest} is a link to nothing"
            raise OutputError(problem(f"output {folder}", expected, why, "name another, or move the file"))
        with TemporaryFile(dir=nearest):
            pass
    except (OSError, ValueError) as error:  # permissions, a disk that is read only, a name that no disk takes
        why = getattr(error, "strerror", None) or str(error)
        raise OutputError(problem(f"output {str(folder)[:200]!r}", expected, why, todo)) from error


def check_output_file(
    file: Path, inputs: Iterable[Path | str] = (), overwrite: bool = False, mark: bytes = MARK
) -> None:
    """Raise OutputError where a file cannot be written, or must not replace what is there.

    Args:
        inputs: files and folders that are read. What is not there, such as a hub id, is passed over.
        overwrite: whether a file that this tool wrote may be replaced.
        mark: what such a file holds.
    """
    check_output_folder(file.parent)
    expected, todo = "a new file", "name another file"
    try:
        there = _is_there(file)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OutputError(problem(f"output {str(file)[:200]!r}", "the name of a file", why, todo)) from error
    if not there:
        return
    if file.is_dir():
        raise OutputError(problem(f"output {file}, a folder", "the name of a file", "one file is written", todo))
    for source in inputs:
        if is_in(file, Path(source)):
            raise OutputError(problem(f"output {file}", expected, f"it belongs to the input {source}", todo))
    if not is_marked(file, mark):
        got, why = f"output {file}, which exists without stepdistill's mark", "files of others are never replaced"
        todo += ", or move this one; if an earlier version of stepdistill wrote it, remove it by hand"
        raise OutputError(problem(got, expected, why, todo))
    if not overwrite:
        why = "an earlier command wrote it"
        raise OutputError(problem(f"output {file}, which exists", expected, why, f"{todo}, or add --overwrite"))


def check_output_tree(
    folder: Path,
    written: Iterable[str],
    inputs: Iterable[Path | str],
    own: bool,
    overwrite: bool,
    todo: str = "name another folder, or add --overwrite",
) -> None:
    """Raise OutputError where a folder of several outputs cannot be written, or must not replace what is there.

    Args:
        written: patterns of what is written in it.
        inputs: as `check_output_file` has them.
        own: whether what is there of these was written by this tool.
        overwrite: whether that may be replaced, or gone on with.
        todo: what a user does where it may not.
    """
    check_output_folder(folder)
    present = present_in(folder, written)
    got = f"output {folder}, which holds {', '.join(sorted(place.name for place in present)[:5])}"
    for source in map(Path, inputs):
        if is_in(folder, source) and is_in(source, folder):
            why = "its files would be replaced"
            raise OutputError(problem(f"output {folder}, which is an input", "another folder", why, "name another"))
        if any(is_in(source, place) for place in present):
            why = f"it holds the input {source}, which would be replaced"
            raise OutputError(problem(f"output {folder}", "another folder", why, "name another, or move the input"))
    if present and not own:
        why = "they are not the output of an earlier run of this command"
        raise OutputError(problem(got, "a new or empty folder", why, "name another folder, or move them"))
    if present and not overwrite:
        raise OutputError(problem(got, "a new or empty folder", "an earlier command wrote it", todo))


def present_in(folder: Path, written: Iterable[str]) -> list[Path]:
    """What is there in a folder of these patterns."""
    return [place for pattern in written for place in folder.glob(pattern)]


def is_marked(file: Path, mark: bytes = MARK) -> bool:
    """Whether a file was written by this tool: it holds the mark near its beginning or end."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(READ)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - READ))
        return mark in head or mark in stream.read()


def _is_there(place: Path) -> bool:
    """Whether something has this name, a broken link too. Raises OSError, ValueError for a name that no disk takes."""
    try:
        return stat.S_IFMT(place.lstat().st_mode) != 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_in(place: Path, other: Path) -> bool:
    """Whether `place` is `other`, or lies in it; links are followed."""
    if not (os.path.exists(place) and os.path.exists(other)):  # other than Path's, it takes any name
        return False
    return place.samefile(other) or other.resolve() in place.resolve().parents
