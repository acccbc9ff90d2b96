"""The `stepdistill` command. Heavy imports wait inside."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from stepdistill import families, methods
from stepdistill.cli import convert as conversion
from stepdistill.cli import eval as evaluation
from stepdistill.cli import generate, precompute, view
from stepdistill.config import load as config
from stepdistill.core.errors import MissingWeights, StepdistillError

TRAIN = """\
overrides come after CONFIG and win over it:
  train.learning_rate=1e-4      any key by its path; lists as in YAML: train.prompts="[a cat, a dog]"
  --learning_rate 1e-4          the end of a path, where only one path ends so (else an error lists them)
  --learning_rate=1e-4          the same
  --gradient_checkpointing      a boolean alone means true
  method.type=my_package.Mine   another class; the keys below it are that class's

examples:
  stepdistill train configs/quickstart.yaml --dry-run
  accelerate launch -m stepdistill train configs/quickstart.yaml --max_train_steps 200 train.seed=1
"""

INIT = """\
methods: {methods}
families: {families}
Each name is a module; module.Class picks one of several classes, my_package.mine.Mine is a class of your own.
DATA is a module of stepdistill.data: prompts, folder, ...; the default, teacher_samples or trajectories as the method
needs, is made by the teacher.

example:
  stepdistill init {example} > mine.yaml && stepdistill train mine.yaml --dry-run
"""

CHECK = """\
Reads the config's data source as training would, and names the first bad sample. Overrides are those of
`stepdistill train`.

example:
  stepdistill data check mine.yaml --prompts_file prompts.txt
"""

MAKE = """\
Pairs of noise and image (stepdistill.data.TeacherSamples, or InvertedImages from real ones) or guided trajectories
(stepdistill.data.Trajectories), as training would make them before its first step. Started again it goes on where it
was cut; each process makes every n-th file, and any number of processes makes the same files. What lies there of
another teacher or setting is refused.

example:
  accelerate launch -m stepdistill data make configs/recipes/sd21_reflow.yaml
"""

VERIFY = """\
Loads the folder into a fresh plain Diffusers pipeline and compares its output with the library's own sampler; the same
for each other format in the folder. Prints the largest difference by format, relative to the teacher's largest value;
above the tolerance the status is 1.

example:
  stepdistill verify runs/mine
"""

MULTI = """\
Joins the students of K runs that differ in `data.student` of a stepdistill.data.Partition, in any order. OUT gets
`students/<k>/`, `router.json`, and a card. `stepdistill.load_student(pipe, OUT)(prompts)` draws each prompt with its
student.

example:
  stepdistill multi runs/all runs/part-0 runs/part-1
"""

DOCTOR = """\
Says in words what rises or falls that should not: losses, gradient norms, and what the watch saw in the images (see
train.validation_steps). The run is compared with the reference curve of its recipe, one of configs/**/curves/*.json or
FILE. A run that is still going on can be asked about, too. The status is 0 where nothing is off, else 1.

examples:
  stepdistill doctor runs/mine
  stepdistill doctor runs/mine --reference configs/curves/quickstart.json
  stepdistill doctor runs/good --save-curve configs/curves/mine.json
"""


def train(argv: Sequence[str]) -> None:
    """`stepdistill train` with these arguments: CONFIG, overrides, `--dry-run`."""
    main(["train", *argv])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. What the user can put right is printed without a traceback, with exit status 2; 3 where weights
    are missing that no other can stand for."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    if overrides and "config" not in args:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        args.run(args, overrides)
    except StepdistillError as error:
        print(f"stepdistill: {error}", file=sys.stderr)
        raise SystemExit(3 if isinstance(error, MissingWeights) else 2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stepdistill",
        description="Turn a 20-50-step diffusion pipeline into a 1-8-step one.",
        epilog="example:\n  stepdistill train configs/quickstart.yaml\n\n`stepdistill COMMAND --help`: more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(commands, "train", _train, "train a few-step student from a config", TRAIN)
    command.usage = "stepdistill train CONFIG [key=value | --key value]... [--dry-run]"
    command.add_argument("config", metavar="CONFIG", help="YAML file; `stepdistill init` writes one")
    command.add_argument("--dry-run", action="store_true", help="stop at the config and the memory it needs")

    names = {"methods": _modules(methods), "families": _modules(families)}
    example = " ".join(found[0] for found in names.values() if found)
    epilog = INIT.format(example=example, **{key: ", ".join(found) for key, found in names.items()})
    command = _command(commands, "init", _init, "print a commented config", epilog)
    command.add_argument("method", metavar="METHOD")
    command.add_argument("family", metavar="FAMILY")
    command.add_argument("data", metavar="DATA", nargs="?", help="default: what the teacher makes for the method")

    data = commands.add_parser("data", help="check a data source, or make it", description="Check or make data.")
    parts = data.add_subparsers(metavar="COMMAND", required=True)
    command = _command(parts, "check", _check, "read all of it, before anything is trained", CHECK)
    command.usage = "stepdistill data check CONFIG [key=value | --key value]..."
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command = _command(parts, "make", _make, "let the teacher make what a config trains on", MAKE)
    command.usage = "stepdistill data make CONFIG [key=value | --key value]..."
    command.add_argument("config", metavar="CONFIG", help="YAML file")

    precompute.declare(commands, _command)

    command = _command(commands, "verify", _verify, "prove that plain Diffusers loads a student", VERIFY)
    command.add_argument("folder", metavar="FOLDER", type=Path, help="the output_dir of a run")
    command.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (default: 1e-4)")

    command = _command(commands, "multi", _multi, "join the students of a partition in one folder", MULTI)
    command.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    command.add_argument("students", metavar="STUDENT", type=Path, nargs="+", help="the output_dir of one run each")
    command.add_argument("--move", action="store_true", help="move the folders instead of copying what is needed")

    command = _command(commands, "doctor", _doctor, "say what is off with a run", DOCTOR)
    command.add_argument("folder", metavar="RUN", type=Path, help="the output_dir of a run")
    command.add_argument("--reference", metavar="FILE", type=Path, help="curve to compare with (default: by recipe)")
    command.add_argument("--save-curve", metavar="FILE", type=Path, help="write the run's own curve, and no report")

    generate.declare(commands, _command)
    conversion.declare(commands, _command)
    evaluation.declare(commands, _command)
    view.declare(commands, _command)
    return parser


def _modules(package: ModuleType) -> list[str]:
    abstract = ("base", "unet", "vp", "flow")
    return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in abstract]


Run = Callable[[argparse.Namespace, list[str]], None]


def _command(
    group: argparse._SubParsersAction, name: str, run: Run, summary: str, epilog: str
) -> argparse.ArgumentParser:
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


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.training.distill import distill, dry_run
    from stepdistill.training.recipe import Run

    run = config.load(Run, args.config, overrides)
    if os.environ.get("RANK", "0") == "0":  # one process of those that a launcher started
        print(config.to_yaml(run), flush=True)
    if args.dry_run:
        print(dry_run(run))
    else:
        distill(run)


def _init(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.config.registry import find
    from stepdistill.config.schema import fields
    from stepdistill.config.template import template
    from stepdistill.training.recipe import Run

    bases = fields(Run)
    chosen = {key: find(bases[key], name) for key, name in (("family", args.family), ("method", args.method))}
    chosen["data"] = find(bases["data"], args.data or _made_for(chosen["method"]))
    print("# accelerate launch -m stepdistill train THIS_FILE")
    print(template(Run, chosen), end="")


def _made_for(method: type) -> str:
    """The source that the teacher makes for a method."""
    required = [f for f in dataclasses.fields(method) if f.default is f.default_factory is dataclasses.MISSING]
    return "trajectories" if not required and "trajectories" in method().needs else "teacher_samples"


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.data import check_source
    from stepdistill.training.recipe import Run

    print(check_source(config.load(Run, args.config, overrides).data))


def _make(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.training.distill import make_data
    from stepdistill.training.recipe import Run
    from stepdistill.training.setup import prepare

    session = prepare(config.load(Run, args.config, overrides))
    make_data(session)
    session.batches.save()
    session.accelerator.end_training()


def _verify(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.verify import verify

    found = verify(args.folder)
    print(f"largest difference between plain Diffusers and the student's own sampler: {found['diffusers']:.3g}")
    for name, difference in found.items():
        if name != "diffusers":
            print(f"the same of the {name} file: {difference:.3g}")
    if not all(difference <= args.tolerance for difference in found.values()):
        raise SystemExit(1)


def _multi(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.students.several import join

    print(f"joined {len(args.students)} students in {join(args.out, args.students, args.move)}")


def _doctor(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.training.watch.doctor import examine, save_curve

    if args.save_curve:
        save_curve(args.folder, args.save_curve)
        return
    report, healthy = examine(args.folder, args.reference)
    print(report)
    if not healthy:
        raise SystemExit(1)
