"""What `stepdistill generate` draws with a student of an autoregressive image model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from stepdistill.cli.generate_draw import Drawn, check_outputs, seeds_of, write_each
from stepdistill.core.errors import ConfigError, problem
from stepdistill.decoding.contract import DecoderContract, read_decoder
from stepdistill.decoding.folder.pipeline import OneStepPipeline, read_prompts
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.load import load_decoder
from stepdistill.decoding.with_teacher import contract_teacher, draw_with_teacher, most_teacher_steps
from stepdistill.students.draw.filters import DrawnImage
from stepdistill.students.load import folder_of

# the options that a decoder has; the others have no effect on it, and are refused
OWN = {"run", "student", "prompts", "prompts_file", "output", "grid", "overwrite", "seed", "num_images_per_prompt"}
OWN |= {"batch", "steps", "teacher_steps", "base", "device", "dtype"}
DEFAULTS = {"negative_mode": "nasa"}  # of the others, where it is not none


def generate_decoder(args: argparse.Namespace, prompts: Sequence[str], device: torch.device) -> None:
    """Draw and write images of prompts, each `args.num_images_per_prompt` times.

    Raises:
        ConfigError: an option has no effect on a decoder, or a value that the student was not trained for; a prompt is
            too long; or the teacher is another one.
        OutputError: what is there must stay.
        StudentError: the folder is not a whole decoder.
    """
    contract = read_decoder(folder_of(args.student))
    _check_options(args, contract)
    repeated = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]
    stale = check_outputs(args, len(repeated), ".png")
    pipe, _ = load_decoder(args.student, device)
    _check_prompts(pipe, prompts)
    networks, teacher = {"student": [pipe.language_model]}, None
    if args.teacher_steps:
        teacher = contract_teacher(contract, args.base, device)
        networks["teacher"] = [teacher.model.model.language_model]
    write_each(each_of_decoder(pipe, teacher, repeated, args), repeated, args, stale, ".png", networks, 1)


def _check_options(args: argparse.Namespace, contract: DecoderContract) -> None:
    """Raise ConfigError for the first option that a decoder does not take, or not with this value."""
    for name, value in vars(args).items():
        if name not in OWN and not (value is None or value is False or value == [] or value == DEFAULTS.get(name)):
            got, expected = f"--{name.replace('_', '-')}", "no option of sampling but --steps and --teacher-steps"
            why = "the student of an autoregressive image model draws tokens, and its guidance is in its weights"
            raise ConfigError(problem(got, expected, why, "leave it out"))
    if args.dtype not in (None, "float32"):
        why, todo = "its tokens are those of its weights, which are float32", "leave it out"
        raise ConfigError(problem(f"--dtype {args.dtype} for a decoder", "float32", why, todo))
    trained = len(contract.keeps)
    calls = args.steps or trained
    if calls > trained:
        why = "a call keeps as many tokens as in training"
        raise ConfigError(
            problem(f"--steps {calls}", f"at most {trained}", why, "name fewer, or train another student")
        )
    most = most_teacher_steps(contract.keeps[:calls])
    if (args.teacher_steps or 0) > most:
        got, why = f"--teacher-steps {args.teacher_steps} with --steps {calls}", "that is the smallest gap of its calls"
        todo = "name fewer" if most else "raise --steps, or leave it out"
        raise ConfigError(problem(got, f"at most {most}", why, todo))
    if args.base is not None and not args.teacher_steps:
        why, todo = "without it the teacher draws nothing", "pass --teacher-steps, or leave --base out"
        raise ConfigError(problem("--base without --teacher-steps", "both", why, todo))


def each_of_decoder(
    pipe: OneStepPipeline, teacher: TokenTeacher | None, prompts: Sequence[str], args: argparse.Namespace
) -> Drawn:
    """What a student draws, image n from the noise that the card's code draws with its seed.

    Args:
        teacher: of `args.teacher_steps`; none of 0.
    """
    seeds, calls = seeds_of(prompts, args), args.steps or len(pipe.config["keeps"])
    for start in range(0, len(prompts), args.batch):
        some, own = prompts[start : start + args.batch], seeds[start : start + args.batch]
        noise = pipe.draw_noise(len(own), [torch.Generator().manual_seed(seed) for seed in own])
        if teacher is None:
            images = pipe(list(some), noise=noise, num_inference_steps=calls, return_dict=False)[0]
        else:
            images = pipe.images(*draw_with_teacher(pipe, teacher, some, noise, args.teacher_steps, calls))
        facts = {"teacher_steps": args.teacher_steps} if teacher else {}
        for image, seed in zip(images, own, strict=True):
            yield DrawnImage(image, False), {"seed": seed, **facts}


def _check_prompts(pipe: OneStepPipeline, prompts: Sequence[str]) -> None:
    """Raise ConfigError for one that is too long, before any image is drawn."""
    try:
        read_prompts(pipe.processor, prompts, pipe.config["max_sequence_length"])
    except ValueError as error:
        raise ConfigError(f"{error}: its end would not be seen; shorten it") from error
