"""`stepdistill eval`: run, score, ref, compare, doctor. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from stepdistill.cli.dialect import (
    add_command,
    add_overwrite,
    height_and_width,
    is_first_process,
    local_path,
    real,
    seed,
    several,
    weighed,
    whole,
)
from stepdistill.core.outputs import check_output_file, expanded
from stepdistill.evaluation.spec import EvalRun, EvalSpec, Weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RUN = """\
Generates images with TEACHER at full steps and in few steps, and with every STUDENT, all from the same prompts and
noise. Measures them against a second set of the teacher's images (--ref teacher) or against a data set. Writes
eval.json, rows.csv, report.html, grids/, stats/ and per_sample.jsonl to OUT. Every difference from the teacher has its
own interval. With --sizes each size has a report of its own in OUT/sizes, and distances of different sizes are never
pooled. An interrupted command continues where it stopped, and the processes of a launcher share the images.

One-step decoders of an autoregressive TEACHER (Janus) have a row for each number of calls, with the log-likelihood of
their tokens under the teacher. Options that they do not have, such as guidance scales, are refused.

examples:
  stepdistill eval run tiny-sd runs/quickstart --num-images 256 --teacher-steps 25 -o runs/eval
  stepdistill eval run your/model runs/a --prompts-file coco.txt --steps 1,2,4 --sizes 1024x1024,832x1216 -o runs/eval
  stepdistill eval run your/model runs/a --prompts-file coco.txt --lora ink.safetensors --lora-strengths 0,1 -o runs/c
  accelerate launch -m stepdistill eval run your/model runs/a --prompts-file coco.txt --protocol coco30k-dmd2 \\
    --ref coco.npz -o runs/coco
"""

SCORE = """\
Measures existing images. Each folder, zip file or array is one row of the report.

example:
  stepdistill eval score samples/ --ref reference.npz -o runs/eval
"""

REF = """\
Writes the statistics of images or of a data set, and the features that they were computed with. pytorch-fid and
clean-fid can read the file.

example:
  stepdistill eval ref coco/val2014 --features inception --eval-res 256 -o coco.npz
"""

COMPARE = """\
Merges evaluations on one page. Distances with other features, another number of images or another reference are shown
in separate columns, and the command prints how they differ.

example:
  stepdistill eval compare runs/eval-a runs/eval-b -o comparison.html --csv comparison.csv
"""

DOCTOR = """\
Lists the features that are available without a download, and where the weights of the others are searched for.

example:
  stepdistill eval doctor
"""


def add_eval_commands(commands: Any) -> None:  # noqa: ANN401
    """Declare the commands in a group of subparsers."""
    command = commands.add_parser("eval", help="measure teacher and students", description="Measure images.")
    parts = command.add_subparsers(metavar="COMMAND", required=True)
    _add_run(parts)

    command = add_command(parts, "score", _score, "measure existing images", SCORE)
    command.add_argument("images", metavar="IMAGES", nargs="+", type=local_path, help="folder, .zip, .npz or .npy")
    command.add_argument("--prompts-file", dest="prompts", metavar="FILE", type=local_path, help="prompts for --clip")
    command.add_argument("--clips", action="store_true", help="folders of clips: videos, animations, or frame folders")
    _measures(command, None, "an .npz of statistics, or images")

    command = add_command(parts, "ref", _ref, "compute statistics of images", REF)
    command.add_argument("images", metavar="IMAGES", type=local_path, help="folder, .zip, .npz or .npy")
    command.add_argument("--clips", action="store_true", help="a folder of clips; the statistics are of frames")
    _features(command)
    command.add_argument("-o", "--output", metavar="FILE.npz", type=local_path, required=True, help="file to write")
    add_overwrite(command)

    command = add_command(parts, "compare", _compare, "merge evaluations on one page", COMPARE)
    command.add_argument("folders", metavar="DIR", nargs="+", type=local_path, help="folders of `run` and `score`")
    command.add_argument("-o", "--output", metavar="FILE.html", type=local_path, required=True, help="the page")
    command.add_argument("--csv", metavar="FILE.csv", type=local_path, help="write the rows as CSV, too")
    add_overwrite(command)

    _weights(add_command(parts, "doctor", _doctor, "list which features are available", DOCTOR))


def _add_run(parts: Any) -> None:  # noqa: ANN401
    command = add_command(parts, "run", _run, "generate and measure images of a teacher and its students", RUN)
    command.add_argument("teacher", metavar="TEACHER", type=expanded, help="pipeline or Janus: folder, id, or bundled")
    command.add_argument("students", metavar="STUDENT", type=expanded, nargs="*", help="student folders or hub ids")
    what = ".txt, .jsonl or .csv (default: the bundled prompts)"
    command.add_argument("--prompts-file", dest="prompts", metavar="FILE", type=local_path, help=what)
    what = "images of each row, with the prompts in turn (default: one for each prompt)"
    command.add_argument("--num-images", dest="num", metavar="N", type=whole(), help=what)
    given = {"type": several(whole()), "default": (), "metavar": "N,..."}
    command.add_argument("--steps", **given, help="students' steps (default: theirs)")
    given = {"type": several(height_and_width), "default": (), "metavar": "HxW,..."}
    command.add_argument("--sizes", **given, help="heights and widths, each a report (default: the students')")
    scales = {"dest": "guidance", "type": several(real()), "default": (), "metavar": "W,..."}
    command.add_argument("--guidance-scale", **scales, help="guidance scales of the students (default: their own)")
    command.add_argument(
        "--lora", metavar="PLACE[:STRENGTH]", type=weighed, help="a style beside the students, and in the teacher"
    )
    what = "its strengths beside the students, each a row (default: STRENGTH)"
    command.add_argument("--lora-strengths", type=several(real()), default=(), metavar="S,...", help=what)
    command.add_argument("--teacher-steps", type=whole(), metavar="N", help="full steps of a pipeline (default: 50)")
    scale = {"dest": "teacher_guidance", "type": real(1), "metavar": "W", "help": "of a pipeline (default: 7.5)"}
    command.add_argument("--teacher-guidance-scale", **scale)
    command.add_argument("--seed", type=seed, default=2, help="seed of the noise of every row (default: 2)")
    command.add_argument("--reference-seed", type=seed, default=1, help="seed of the reference images (default: 1)")
    command.add_argument("--family", metavar="NAME", help="teacher's family (default: its students' or pipeline's)")
    given = {"type": whole(), "default": 8, "metavar": "B"}
    command.add_argument("--batch", **given, help="batch size, at most --feature-batch (default: 8)")
    command.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)")
    command.add_argument("--save-images", action="store_true", help="save every image as PNG in OUT/images")
    command.add_argument("--columns", type=whole(), default=8, metavar="N", help="columns of the grids (default: 8)")
    given = {"type": whole(0), "default": 0, "metavar": "N"}
    command.add_argument("--latency", **given, help="time N images one by one (default: 0)")
    command.add_argument("--export", choices=("geneval", "t2i-compbench", "vbench"), help="save for this benchmark")
    _measures(command, "teacher", "teacher, an .npz of statistics, or images (default: teacher)")


def _measures(command: argparse.ArgumentParser, default: str | None, reference: str) -> None:
    command.add_argument("-o", "--output", metavar="OUT", type=local_path, required=True, help="folder to write")
    add_overwrite(command)
    command.add_argument(
        "--ref", default=default, required=default is None, metavar="REF", type=expanded, help=reference
    )
    command.add_argument(
        "--metrics",
        type=_words,
        metavar="NAME,...",
        help="besides the distance: kid, paired, prdc, vendi, diversity, cmmd, pixels, lpips (default: kid,paired)",
    )
    command.add_argument(
        "--clip", metavar="MODEL", type=expanded, help="folder or hub id for the CLIP score (default: no score)"
    )
    command.add_argument("--strict", action="store_true", help="exit with status 4 if a row is not comparable")
    _features(command)


def _features(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--protocol",
        default="none",
        metavar="NAME",
        help="coco30k-dmd2, coco10k-sdxl, imagenet64-edm, quick: the settings of published figures (default: none)",
    )
    command.add_argument(
        "--features",
        metavar="NAME",
        help="efficientnet-lite0, inception, dinov2-{s,b,l,g}, "
        "clip-{b32,l14,l14-336}, vae, pixels, module:pkg.mod:factory (default: the protocol's)",
    )
    command.add_argument(
        "--resize",
        choices=("clean", "torchmetrics", "pytorch-fid", "tf1"),
        help="resizing for Inception (default: the protocol's)",
    )
    command.add_argument("--eval-res", type=whole(), metavar="PX", help="crop and resize all images to this size first")
    command.add_argument("--feature-batch", type=whole(), default=64, metavar="B", help="(default: 64)")
    command.add_argument("--feature-dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="(default: fp32)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the first accelerator, or the CPU)")
    command.add_argument("--allow-unknown-weights", action="store_true", help="accept other Inception weights, as `fd`")
    _weights(command)


def _weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--inception-weights", metavar="PATH", type=expanded, help="Inception file, ported from TensorFlow"
    )
    command.add_argument("--clip-weights", metavar="PATH", type=expanded, help="CLIP folder for `clip-...` features")
    command.add_argument(
        "--dinov2-weights", metavar="PATH", type=expanded, help="DINOv2 folder for `dinov2-...` features"
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of features and measures, by field of `EvalSpec`."""
    names = ("protocol", "features", "resize", "eval_res", "feature_batch", "feature_dtype", "device")
    given = {name: getattr(args, name) for name in (*names, "allow_unknown_weights")}
    return given | {"weights": _given(args)}


def _given(args: argparse.Namespace) -> Weights:
    return Weights(args.inception_weights, args.clip_weights, args.dinov2_weights)


def _measured(args: argparse.Namespace, default: tuple[str, ...]) -> dict[str, Any]:
    metrics = default if args.metrics is None else args.metrics
    picked = {"reference": args.ref, "clip": args.clip, "metrics": metrics}
    return _chosen(args) | picked | {"output_dir": args.output}


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.evaluation.inputs import check_draws

    names = ("teacher", "family", "prompts", "num", "steps", "guidance", "teacher_steps", "teacher_guidance", "seed")
    more = ("lora", "lora_strengths", "reference_seed", "batch", "dtype", "save_images", "columns", "latency", "export")
    given = {name: getattr(args, name) for name in (*names, *more, "sizes")}
    spec = EvalRun(students=tuple(args.students), **given, **_measured(args, ("kid", "paired")))
    check_draws(spec)
    read = [args.teacher, *args.students, *([args.lora[0]] if args.lora else [])]
    _open(args, read, overwrite=False)
    from stepdistill.decoding.evaluation import check_decoders, draws_decoders, evaluate_decoders  # it loads torch
    from stepdistill.evaluation.sizes import evaluate_at_sizes

    if decoders := draws_decoders(spec):
        check_decoders(spec)  # before an earlier evaluation is removed
    _open(args, read, args.overwrite)
    _print_rows(evaluate_decoders(spec) if decoders else evaluate_at_sizes(spec), args)


def _score(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.evaluation.inputs import check_score

    spec = EvalSpec(clips=args.clips, **_measured(args, ("kid",)))
    check_score(args.images, spec, args.prompts)
    _open(args, args.images, args.overwrite)
    from stepdistill.evaluation.run import score_images  # after the checks: it loads torch

    _print_rows(score_images(args.images, spec, args.prompts), args)


def _open(args: argparse.Namespace, places: Sequence[Path | str], overwrite: bool) -> None:
    """The first process checks the output folder, and removes an earlier evaluation from it, if asked to.

    The others would see the folder while it is emptied.
    """
    from stepdistill.evaluation.inputs import open_evaluation

    inputs = [place for place in (*places, args.ref, args.prompts, args.clip) if place is not None]
    if is_first_process():
        open_evaluation(args.output, inputs, overwrite)


def _print_rows(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the rows; with --strict exit with status 4 if one is not comparable."""
    from accelerate import PartialState

    PartialState().destroy_process_group()  # leaving gloo's threads running aborts some exits
    if not results:  # only the first process has results
        return
    from stepdistill.evaluation.sizes import report_lines, rows_of_all

    print("\n".join(report_lines(results)))
    print(f"\n{args.output / 'report.html'}")
    if args.strict and not all(row["comparable"] for row in rows_of_all(results)):
        raise SystemExit(4)


def _ref(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.evaluation.inputs import open_statistics

    work = open_statistics(args.images, args.output, args.overwrite, args.clips)
    spec = EvalSpec(output_dir=work, clips=args.clips, **_chosen(args))
    from stepdistill.evaluation.run import write_statistics  # after the checks: it loads torch

    write_statistics(args.images, spec, args.output)
    print(args.output)


def _compare(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.evaluation.compare import compare_evaluations
    from stepdistill.evaluation.report.fields import CSV_MARK

    check_output_file(args.output, args.folders, args.overwrite)
    if args.csv:
        check_output_file(args.csv, args.folders, args.overwrite, CSV_MARK)
    for line in compare_evaluations(args.folders, args.output, args.csv):
        print(f"in separate columns, because the rows differ in {line}")
    print(args.output)


def _doctor(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.evaluation.metrics.extractors import availability

    for line in availability(_given(args)):
        print(f"{line.name:<22} {'ok' if line.ok else 'missing':<8} {line.where}")
