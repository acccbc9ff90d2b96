"""`stepdistill generate`: draw with a student folder."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

GENERATE = """\
Loads the base into a plain Diffusers pipeline, and the student into it, and draws under the student's own contract:
its scheduler, noise levels and guidance. Image n has the seed SEED + n: it is what the card's snippet draws with
`torch.manual_seed(SEED + n)`, whatever else is in its batch. OUT gets 00000.png and so on, and images.jsonl with the
prompt and seed of each. What is drawn away from the contract is warned of. A negative prompt goes by guidance where
there is any, else by attention: NASA, or NAG, see `stepdistill.students.draw.negative_prompt`.

examples:
  stepdistill generate runs/quickstart "cat face" rose --grid sheet.png
  stepdistill generate me/student --prompts_file prompts.txt --num_images_per_prompt 4 --batch 8 -o images
  stepdistill generate runs/mine "a cat" --lora styles/ink.safetensors:0.8 --strength 0.9 --fuse
"""


def declare(group: Any, make: Callable[..., argparse.ArgumentParser]) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers."""
    command = make(group, "generate", _generate, "draw with a student", GENERATE)
    command.add_argument("student", metavar="STUDENT", help="student folder or hub id")
    command.add_argument("prompts", metavar="PROMPT", nargs="*")
    command.add_argument("--prompts_file", metavar="FILE", type=Path, help=".txt, .jsonl or .csv")
    command.add_argument("-o", "--out", metavar="OUT", type=Path, default=Path("images"), help="(default: images)")
    command.add_argument("--grid", metavar="FILE", type=Path, help="all images on a sheet, a column a prompt")
    command.add_argument("--seed", type=int, default=0, help="of the first image (default: 0)")
    command.add_argument("--num_images_per_prompt", type=int, default=1, metavar="N", help="(default: 1)")
    command.add_argument("--batch", type=int, default=4, metavar="N", help="images in one call (default: 4)")
    steps = command.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, metavar="N", help="number of steps, as the method takes them")
    steps.add_argument("--timesteps", type=_numbers, metavar="T,...", help="where steps start, descending")
    steps.add_argument("--sigmas", type=_numbers, metavar="S,...", help="the same as shares of noise")
    command.add_argument("--guidance_scale", type=float, metavar="W", help="of uncond + W (cond - uncond); 1 is none")
    command.add_argument("--negative_prompt", metavar="TEXT", help="what images should not show")
    command.add_argument("--negative_scale", type=float, metavar="A", help="of it where there is no guidance")
    command.add_argument("--negative_mode", choices=("nasa", "nag"), default="nasa", help="(default: nasa)")
    command.add_argument("--eta", type=float, help="share of each step that is noised again")
    command.add_argument("--height", type=int, metavar="PIXELS")
    command.add_argument("--width", type=int, metavar="PIXELS")
    command.add_argument("--base_steps", type=int, metavar="N", help="first steps that the base takes: more variety")
    command.add_argument("--base", metavar="PLACE", help="another checkpoint of the base (default: the contract's)")
    command.add_argument("--strength", type=float, help="of the student's LoRA (default: the contract's)")
    command.add_argument(
        "--lora",
        metavar="PLACE[:STRENGTH]",
        type=_weighed,
        action="append",
        default=[],
        help="a style, or another student",
    )
    command.add_argument("--fuse", action="store_true", help="merge the LoRAs into the network: faster")
    command.add_argument("--device", help="(default: cuda where there is one)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 without cuda)")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _weighed(text: str) -> tuple[str, float]:
    """A place and a strength, 1 where none is said."""
    place, colon, strength = text.rpartition(":")
    try:
        return (place, float(strength)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    import torch

    from stepdistill.core.errors import ConfigError, problem
    from stepdistill.evaluation.records import prompt_of, read_records
    from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline

    prompts = [*args.prompts]
    if args.prompts_file:
        prompts += [prompt_of(record) for record in read_records(args.prompts_file)]
    if not prompts:
        todo = "write prompts behind the student, or give --prompts_file"
        raise ConfigError(problem("no prompt", "at least one", "there is nothing to draw", todo))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    student = StudentPipeline.load(args.student, args.base, device, args.strength, args.lora, args.fuse)
    usual = "float32" if device == "cpu" or student.contract is None else student.contract.dtype
    if (args.dtype or usual) != "float32":
        student.pipe.to(getattr(torch, args.dtype or usual))
    names = ("steps", "timesteps", "sigmas", "guidance_scale", "eta", "height", "width")
    call = student.call(DrawOptions(**{name: getattr(args, name) for name in names}))
    repeated = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]
    _draw(student, repeated, args, call)


def _draw(student: Any, prompts: list[str], args: argparse.Namespace, call: Any) -> None:  # noqa: ANN401
    from tqdm.auto import tqdm

    from stepdistill.core.cost import count_calls
    from stepdistill.students.draw.base_first import base_first

    args.out.mkdir(parents=True, exist_ok=True)
    seeds, made, lines, began = [args.seed + n for n in range(len(prompts))], [], [], time.perf_counter()
    against = student.against(args.negative_prompt, call, args.negative_scale, args.negative_mode)
    mixed = nullcontext() if args.base_steps is None else base_first(student.pipe, args.base_steps)
    with count_calls(student.family.network(student.pipe)) as cost, against as call, mixed:
        images = tqdm(student.draw(prompts, seeds, call, args.batch), total=len(prompts), desc="Images")
        for n, image in enumerate(images):
            image.save(args.out / f"{n:05d}.png")
            lines.append({"file": f"{n:05d}.png", "prompt": prompts[n], "seed": seeds[n]})
            made += [image] if args.grid else []
    (args.out / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.grid:
        _sheet(made, prompts, args.num_images_per_prompt).save(args.grid)
    seconds = time.perf_counter() - began
    print(f"{args.out}: {len(prompts)} images, {cost.calls} calls of the network, {seconds:.1f} s")


def _sheet(images: list[Any], prompts: list[str], each: int) -> Any:  # noqa: ANN401
    import numpy as np
    import torch

    from stepdistill.students.draw.sheet import image_grid

    made = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    rows = [(f"image {k + 1}", made[k::each]) for k in range(each)]
    return image_grid(rows, prompts[::each], max(1, 96 // images[0].width))
