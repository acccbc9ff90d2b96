"""The `stepdistill` command. Heavy imports wait inside."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from stepdistill.cli.convert import add_folder_commands
from stepdistill.cli.dialect import quieten, spelled
from stepdistill.cli.eval import add_eval_commands
from stepdistill.cli.extract import add_extract_command
from stepdistill.cli.generate import add_generate_command
from stepdistill.cli.train import add_run_commands
from stepdistill.cli.view import add_view_command
from stepdistill.core.errors import MissingWeights, StepdistillError

# what is wrong with a disk, and not with this program
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    An error that the user can correct is printed without a traceback, and so is one of the disk. The exit status is
    then 2, or 3 if weights are missing that no others can replace.
    """
    parser, (words, wrong) = _parser(), spelled(sys.argv[1:] if argv is None else argv)
    if wrong:
        parser.error(wrong)
    args, overrides = parser.parse_known_args(words)
    if overrides and "config" not in args:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    quieten()
    try:
        args.run(args, overrides)
    except StepdistillError as error:
        print(f"stepdistill: {error}", file=sys.stderr)
        raise SystemExit(3 if isinstance(error, MissingWeights) else 2) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        print(f"stepdistill: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stepdistill",
        description="Turn a 20-50-step diffusion pipeline into a 1-8-step one.",
        epilog="example:\n  stepdistill train configs/quickstart.yaml\n\n"
        "`stepdistill COMMAND --help` describes a command. `-` and `_` are the same in the names of flags.\n"
        "STEPDISTILL_VERBOSE=1 in the environment shows the warnings of other libraries.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_run_commands(commands)
    add_folder_commands(commands)
    add_extract_command(commands)
    add_generate_command(commands)
    add_view_command(commands)
    add_eval_commands(commands)
    return parser
