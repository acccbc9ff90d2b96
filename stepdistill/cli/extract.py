"""`stepdistill extract`: a few-step model as a LoRA student of its base. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from typing import Any

from stepdistill.cli.dialect import add_command, add_overwrite, height_and_width, local_path, real, several, whole
from stepdistill.core.outputs import expanded

EXTRACT = """\
TUNED is a few-step model that was trained as a whole network: a pipeline, or a folder with its network alone. The
difference of its weights from those of BASE is cut to a rank, layer by layer, and written as a student folder, which
every other command takes. Nothing is trained. How TUNED is sampled is nowhere in its files, so it has to be said:
where its steps start, and how much of each step is fresh noise. Wrong values blur the images or make them too
contrasty.

With --prompts-file the linear layers are cut by the error of their outputs, at the inputs that they get when TUNED
generates these prompts. Convolutions are always cut by the error of their weights.

Layers that differ and are none of the family's LoRA targets are listed and left out, unless --all is given. Prints how
much of the layers' change is kept, and how much of the distance between the estimates x0 of TUNED and BASE is left.
extraction.json has the figures of every layer.

examples:
  stepdistill extract runs/mine-fused --base tiny-sd --rank 8 --timesteps 999,749,499,249 --eta 0.3 -o runs/rank-8
  stepdistill extract some/turbo --base some/model --rank 64 --steps 4 --eta 0 --prompts-file prompts.txt -o runs/turbo
"""


def add_extract_command(commands: Any) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers."""
    command = add_command(commands, "extract", _extract, "extract a few-step model as a LoRA from its base", EXTRACT)
    what = "pipeline folder, hub id or .safetensors file, or a folder with the network"
    command.add_argument("tuned", metavar="TUNED", type=expanded, help=what)
    base = command.add_mutually_exclusive_group(required=True)
    base.add_argument("--base", metavar="BASE", type=expanded, help="pipeline that TUNED was trained from")
    base.add_argument("--config", metavar="CONFIG", type=local_path, help="a run's config, whose family is the base")
    command.add_argument("--family", metavar="NAME", help="family of BASE (default: its pipeline's)")
    command.add_argument("-o", "--output", metavar="OUT", type=local_path, required=True, help="a new folder")
    command.add_argument("--rank", type=whole(), metavar="R", required=True, help="rank of the LoRA")
    starts = command.add_mutually_exclusive_group(required=True)
    starts.add_argument("--steps", type=whole(), metavar="N", help="steps, which start where those of BASE's solver do")
    starts.add_argument("--timesteps", type=several(real(0)), metavar="T,...", help="timestep of each step, descending")
    command.add_argument("--eta", type=real(0, 1), required=True, help="fresh noise in each step, from 0 to 1")
    command.add_argument("--guidance-scale", type=real(1), default=1.0, metavar="W", help="of TUNED (default: 1, none)")
    command.add_argument("--prompts-file", metavar="FILE", type=local_path, help=".txt, .jsonl or .csv; see above")
    command.add_argument("--all", action="store_true", help="a LoRA for every layer that differs")
    command.add_argument("--size", metavar="HxW", type=height_and_width, help="height and width (default: BASE's)")
    command.add_argument("--batch", type=whole(), default=4, metavar="N", help="batch size (default: 4)")
    command.add_argument("--device", help="(default: cuda if available, else cpu)")
    add_overwrite(command)


def _extract(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.config.load import load_config
    from stepdistill.core.devices import usable_device
    from stepdistill.core.errors import ConfigError, problem
    from stepdistill.evaluation.plan import family_of
    from stepdistill.evaluation.records import prompt_of, read_records
    from stepdistill.students.extract import extract_student
    from stepdistill.students.extracted import Extracted
    from stepdistill.students.proof import PROMPTS
    from stepdistill.training.recipe import Run

    if args.config and args.family:
        why, todo = "the config names the family", "leave one of them out"
        raise ConfigError(problem("--family with --config", "one of them", why, todo))
    device = usable_device(args.device)
    records = read_records(args.prompts_file) if args.prompts_file else []
    try:
        method = Extracted(
            tuned=args.tuned,
            sha256="",
            whitened=bool(records),
            num_inference_steps=args.steps or len(args.timesteps),
            timesteps=args.timesteps,
            eta=args.eta,
            sampling_guidance_scale=args.guidance_scale,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    extraction = extract_student(
        args.tuned,
        load_config(Run, args.config).family if args.config else family_of(args.base, args.family, ()),
        args.output,
        method=method,
        rank=args.rank,
        prompts=[prompt_of(record) for record in records] or PROMPTS,
        every=args.all,
        resolution=args.size,
        device=device,
        batch=args.batch,
        overwrite=args.overwrite,
    )
    print(extraction)
    print(f"wrote {args.output}")
