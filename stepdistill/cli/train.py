"""Commands of a run: train, init, data check, data make, precompute, doctor. Heavy imports wait inside."""

from __future__ import annotations

import argparse
import dataclasses
import pkgutil
from types import ModuleType
from typing import Any

from stepdistill import families, methods
from stepdistill.cli.dialect import Run, add_command, add_overwrite, heavy_imports, is_first_process, local_path
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.outputs import check_output_file, expanded

# modules without a class for a config
SHARED = (
    *("base", "unet", "vp", "flow", "pixart", "schedulers", "prompt_limits", "lazy_pipeline", "location", "parts"),
    *("control", "controlled", "sizes", "gan", "reward", "shift_terminal", "image_to_video", "read"),
    *("video", "held_image", "wan_base", "ltx_base", "packed", "qwen_vae", "channel_scale", "rules"),
    *("anchor", "augmentation", "rollout"),
)

DECODING = "decoding"  # a method for teachers that are no pipelines

TRAIN = """\
Overrides follow CONFIG and replace its values:
  train.learning_rate=1e-4      any key by its path; a list as in YAML: train.validation_prompts="[a cat, a dog]"
  --learning-rate 1e-4          the end of a path, if only one path ends so; otherwise an error lists the paths
  --learning-rate=1e-4          the same
  --gradient-checkpointing      a boolean without a value is true
  method.type=my_package.Mine   another class; the keys below it are those of that class

A config with `teacher` in the place of `family` is one of Distilled Decoding, of an autoregressive image model.

examples:
  stepdistill train configs/quickstart.yaml --dry-run
  accelerate launch -m stepdistill train configs/quickstart.yaml --max-train-steps 200 train.seed=1
"""

INIT = """\
methods: {methods}
families: {families}
METHOD decoding, Distilled Decoding of an autoregressive image model, takes no FAMILY and no DATA.
A name is a module. module.Class selects one of several classes. my_package.mine.Mine is your own class.
DATA is a module of stepdistill.data, such as prompts or folder. By default the teacher generates the data: samples, or
trajectories if the method needs them.

example:
  stepdistill init {example} > mine.yaml && stepdistill train mine.yaml --dry-run
"""

CHECK = """\
Reads the data source of a config as training does, and reports the first invalid sample. Overrides are those of
`stepdistill train`.

example:
  stepdistill data check configs/quickstart.yaml --prompts-file prompts.txt
"""

MAKE = """\
Generates the data that training would otherwise generate before its first step: pairs of noise and image
(stepdistill.data.TeacherSamples; InvertedImages for real images), guided trajectories
(stepdistill.data.Trajectories), or the tokens of an autoregressive teacher (a config with `teacher`). An interrupted
command continues where it stopped. The processes of a launcher share the work; their number does not change the files.
Files of another teacher or of other settings are an error.

example:
  accelerate launch -m stepdistill data make configs/recipes/sd21_reflow.yaml
"""

PRECOMPUTE = """\
Reads the whole data source of a config. Writes the embeddings of all its prompts, of the empty prompt and of
train.validation_prompts to train.cache_dir, and with train.cache_latents the latents of its images. Training with the
same train.cache_dir then loads no text encoder, and loads the autoencoder only to decode images. An interrupted command
continues where it stopped, and the processes of a launcher share the work. Entries are keyed by the content of the
model's files and of the data, so they are computed again if either changes. Overrides are those of `stepdistill train`.
Of a config with `teacher`, an autoregressive image model, it draws the tokens in data.folder, as `data make` does.

examples:
  stepdistill precompute mine.yaml --cache-dir caches/mine
  accelerate launch -m stepdistill precompute mine.yaml train.cache_dir=caches/mine --cache-latents
"""

DOCTOR = """\
Reports unexpected trends of losses, gradient norms, and the drift statistics of the validation images (see
train.validation_steps). The run is compared with the reference curve of its recipe, one of configs/**/curves/*.json, or
with FILE. The run may still be in progress. The exit status is 0 if nothing is wrong, else 1.

examples:
  stepdistill doctor runs/mine
  stepdistill doctor runs/mine --reference configs/curves/quickstart.json
  stepdistill doctor runs/good --save-curve configs/curves/mine.json
"""


def add_run_commands(commands: Any) -> None:  # noqa: ANN401
    """Declare the commands in a group of subparsers."""
    command = _with_config(commands, "train", _train, "train a few-step student from a config", TRAIN)
    command.usage = f"{command.usage} [--dry-run]"
    command.add_argument("--dry-run", action="store_true", help="print the config and its memory needs, and stop")

    names = {"methods": module_names(methods), "families": module_names(families)}
    example = " ".join(values[0] for values in names.values())
    epilog = INIT.format(example=example, **{key: ", ".join(values) for key, values in names.items()})
    command = add_command(commands, "init", _init, "print a commented config", epilog)
    command.usage = f"{command.prog} [METHOD FAMILY [DATA] | {DECODING}]"
    command.add_argument("method", metavar="METHOD", nargs="?", help="without it, methods and families are listed")
    command.add_argument("family", metavar="FAMILY", nargs="?", help="family of the teacher")
    command.add_argument("data", metavar="DATA", nargs="?", help="data source (default: samples of the teacher)")

    data = commands.add_parser("data", help="check or generate data", description="Check or generate data.")
    parts = data.add_subparsers(metavar="COMMAND", required=True)
    _with_config(parts, "check", _check, "read a whole data source before training", CHECK)
    _with_config(parts, "make", _make, "generate training data with the teacher", MAKE)

    _with_config(commands, "precompute", _precompute, "encode prompts and images before training", PRECOMPUTE)

    command = add_command(commands, "doctor", _doctor, "report problems of a training run", DOCTOR)
    command.add_argument("folder", metavar="RUN", type=local_path, help="the output_dir of a run")
    command.add_argument(
        "--reference", metavar="FILE", type=local_path, help="curve to compare with (default: the recipe's)"
    )
    command.add_argument(
        "--save-curve", metavar="FILE", type=local_path, help="write the run's curve instead of a report"
    )
    add_overwrite(command)


def _with_config(group: Any, name: str, run: Run, summary: str, epilog: str) -> argparse.ArgumentParser:  # noqa: ANN401
    command = add_command(group, name, run, summary, epilog)
    command.usage = f"{command.prog} CONFIG [key=value | --key value]..."
    command.add_argument("config", metavar="CONFIG", type=expanded, help="YAML file; `stepdistill init` writes one")
    return command


def module_names(package: ModuleType) -> list[str]:
    """The names that `init` accepts: the modules of a package that hold classes for a config."""
    return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name not in SHARED]


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    with heavy_imports():
        from stepdistill.config.dump import config_to_yaml
        from stepdistill.decoding.memory import dry_run_decoder
        from stepdistill.decoding.run import DecodingRun, read_run
        from stepdistill.decoding.train import distill_decoder
        from stepdistill.training.distill import distill, dry_run

    run = read_run(args.config, overrides)
    if not args.dry_run:
        distill_decoder(run) if isinstance(run, DecodingRun) else distill(run)
    elif is_first_process():
        needs = dry_run_decoder(run) if isinstance(run, DecodingRun) else dry_run(run)
        print(config_to_yaml(run), needs, sep="\n")


def _init(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.config.registry import find
    from stepdistill.config.schema import fields
    from stepdistill.config.template import first_paragraph, template
    from stepdistill.training.recipe import Run

    bases = fields(Run)
    if args.method is None:
        for key, package in (("method", methods), ("family", families)):
            for name in module_names(package):
                print(f"{key}  {name:<16} {' '.join(first_paragraph(find(bases[key], name)).split())}")
        print(f"method  {DECODING:<16} Distilled Decoding of an autoregressive image model; it takes no FAMILY.")
        return
    if args.method == DECODING:
        _init_decoding(args.family)
        return
    if args.family is None:
        raise ConfigError(
            problem("no family", "METHOD and FAMILY", "the keys depend on both", "`stepdistill init` lists them")
        )
    chosen = {key: find(bases[key], name) for key, name in (("family", args.family), ("method", args.method))}
    chosen["data"] = find(bases["data"], args.data or _made_for(chosen["method"]))
    print("# accelerate launch -m stepdistill train THIS_FILE")
    print(template(Run, chosen), end="")


def _init_decoding(family: str | None) -> None:
    from stepdistill.decoding.run import decoding_template

    if family is not None:
        why, todo = "its teacher is no pipeline", f"`stepdistill init {DECODING}`"
        raise ConfigError(problem(f"family {family}", "METHOD alone", why, todo))
    print("# accelerate launch -m stepdistill train THIS_FILE")
    print(decoding_template(), end="")


def _made_for(method: type) -> str:
    """The source that generates a method's data with the teacher."""
    required = [f for f in dataclasses.fields(method) if f.default is f.default_factory is dataclasses.MISSING]
    return "trajectories" if not required and "trajectories" in method().needs else "teacher_samples"


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.data import check_source
    from stepdistill.decoding.run import read_run

    print(check_source(read_run(args.config, overrides).data))


def _make(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.decoding.run import DecodingRun, read_run
    from stepdistill.decoding.train import make_pairs
    from stepdistill.training.distill import make_data
    from stepdistill.training.folder import check_data_folders
    from stepdistill.training.setup import prepare

    run = read_run(args.config, overrides)
    if isinstance(run, DecodingRun):
        make_pairs(run)
        return
    check_data_folders(run)
    session = prepare(run)
    make_data(session)
    session.batches.save()
    session.accelerator.end_training()


def _precompute(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.decoding.run import DecodingRun, read_run
    from stepdistill.decoding.train import make_pairs
    from stepdistill.training.cache.precompute import precompute

    run = read_run(args.config, overrides)
    summary = make_pairs(run) if isinstance(run, DecodingRun) else precompute(run)
    if is_first_process():
        print(summary)


def _doctor(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.training.watch.doctor import examine, save_curve

    if args.save_curve:
        check_output_file(args.save_curve, [args.folder], args.overwrite)
        save_curve(args.folder, args.save_curve)
        return
    report, healthy = examine(args.folder, args.reference)
    print(report)
    if not healthy:
        raise SystemExit(1)
