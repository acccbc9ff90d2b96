"""`stepdistill generate`: images or videos of a student folder. Heavy imports wait inside."""

from __future__ import annotations

import argparse
from typing import Any

from stepdistill.cli.dialect import add_command, add_overwrite, local_path, real, seed, several, weighed, whole
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.outputs import expanded

GENERATE = """\
Loads the base model into a plain Diffusers pipeline, then the student, and generates images with the student's
scheduler, noise levels and guidance. Image n has the seed SEED + n. It is the image that the card's code generates
with `torch.manual_seed(SEED + n)`, for any --batch. Writes 00000.png and so on to OUT, and images.jsonl with the prompt
and the seed of each image. --overwrite replaces all images that an earlier command left in OUT, and nothing else.
Names the images that the base model's safety checker flagged, which are black. Prints a warning for steps that the
student was not trained for. A negative prompt is applied by guidance if the student uses guidance, otherwise inside
attention (NASA or NAG). A ControlNet of the base controls the student, too. It sees the same control image, which has
the size of the output, for every prompt. A student that makes videos writes an animation (00000.webp and so on) for
each, and --grid shows some frames of it.

--video VIDEO makes videos of the prompts with two students, one after the other: STUDENT makes an image of each, and
VIDEO, a student of image to video, continues it. A base that both are of is loaded once. The image is written, too, and
has the seed SEED + n. The video has another seed, which is in images.jsonl. --windows, --overlap, --then,
--match-first-window and --video-steps are for the videos, a size is for both, and the other options of sampling are for
the images.

A student of an autoregressive image model (Distilled Decoding) is a pipeline of its own. It is loaded without running
the code in its folder. --steps is the number of its calls, at most those that it was trained for, which is the default.
--teacher-steps M lets its teacher draw the last M tokens that each later call keeps again, which costs M calls of the
teacher for each. --base is another place of the same teacher. Guidance is in the weights, and the options of diffusion
are refused.

examples:
  stepdistill generate runs/quickstart "cat face" rose --grid sheet.png
  stepdistill generate runs/video "a cat walks" --image cat.png -o videos
  stepdistill generate runs/video "a cat walks" --then "it sits down" --image cat.png --windows 2 --overlap 5
  stepdistill generate runs/magic-image "a dog runs" --video runs/magic-video --windows 2 --overlap 5 -o videos
  stepdistill generate me/student --prompts-file prompts.txt --num-images-per-prompt 4 --batch 8 -o images
  stepdistill generate runs/mine "a cat" --lora styles/ink.safetensors:0.8 --strength 0.9 --fuse
  stepdistill generate runs/decoder "red apple" --steps 2 --teacher-steps 4
  stepdistill generate runs/mine "a cat" "a dog" --controlnet lllyasviel/sd-controlnet-canny --control-image edges.png
"""


def add_generate_command(commands: Any) -> None:  # noqa: ANN401
    """Declare the command in a group of subparsers."""
    command = add_command(commands, "generate", _generate, "generate images with a student", GENERATE)
    command.add_argument("student", metavar="STUDENT", type=expanded, help="student folder or hub id")
    command.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to generate")
    command.add_argument(
        "--prompts-file", metavar="FILE", type=local_path, help="further prompts: .txt, .jsonl or .csv"
    )
    command.add_argument("-o", "--output", metavar="OUT", type=local_path, default="images", help="(default: images)")
    command.add_argument(
        "--grid", metavar="FILE", type=local_path, help="all images on one sheet, a column for each prompt"
    )
    add_overwrite(command)
    command.add_argument("--seed", type=seed, default=0, help="seed of the first image (default: 0)")
    command.add_argument("--num-images-per-prompt", type=whole(), default=1, metavar="N", help="(default: 1)")
    command.add_argument("--batch", type=whole(), default=4, metavar="N", help="batch size (default: 4)")
    command.add_argument(
        "--image", metavar="FILE", type=local_path, help="what the videos of an image-to-video student begin with"
    )
    command.add_argument(
        "--video", metavar="VIDEO", type=expanded, help="student of image to video that continues the images as videos"
    )
    command.add_argument("--windows", type=whole(), metavar="N", help="make the video N windows long (default: 1)")
    command.add_argument("--overlap", type=whole(), metavar="N", help="frames that each window repeats (default: 1)")
    command.add_argument(
        "--then", metavar="TEXT", action="append", default=[], help="prompt of the next window; may be repeated"
    )
    command.add_argument(
        "--match-first-window",
        action="store_true",
        help="give later windows the first one's mean and spread of each latent channel",
    )
    command.add_argument("--format", choices=("webp", "gif", "mp4"), help="of videos (default: webp); mp4 needs PyAV")
    rate = "frames a second of videos (default: the student's where its network is told any, else 16)"
    command.add_argument("--frame-rate", type=real(1, 120), metavar="N", help=rate)
    steps = command.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=whole(), metavar="N", help="number of sampling steps")
    command.add_argument("--video-steps", type=whole(), metavar="N", help="number of sampling steps of VIDEO")
    steps.add_argument("--timesteps", type=several(real(0)), metavar="T,...", help="timestep of each step, descending")
    steps.add_argument("--sigmas", type=several(real(0)), metavar="S,...", help="noise level of each step, descending")
    command.add_argument(
        "--guidance-scale", type=real(), metavar="W", help="uncond + W (cond - uncond); 1 disables guidance"
    )
    command.add_argument("--negative-prompt", metavar="TEXT", help="what images should not show")
    command.add_argument("--negative-scale", type=real(), metavar="A", help="negative prompt strength without guidance")
    command.add_argument("--negative-mode", choices=("nasa", "nag"), default="nasa", help="(default: nasa)")
    command.add_argument("--eta", type=real(0, 1), help="fresh noise in each step, from 0 to 1")
    command.add_argument("--height", type=whole(), metavar="PIXELS", help="(default: the student's)")
    command.add_argument("--width", type=whole(), metavar="PIXELS", help="(default: the student's)")
    command.add_argument(
        "--base-steps", type=whole(0), metavar="N", help="first steps by the base model, for diversity"
    )
    command.add_argument(
        "--teacher-steps", type=whole(0), metavar="M", help="tokens that the teacher draws again before each later call"
    )
    command.add_argument(
        "--base", metavar="PLACE", type=expanded, help="another checkpoint of the base (default: the contract's)"
    )
    command.add_argument("--strength", type=real(), help="strength of the student's LoRA (default: the contract's)")
    command.add_argument(
        "--lora",
        metavar="PLACE[:STRENGTH]",
        type=weighed,
        action="append",
        default=[],
        help="another LoRA, such as a style; may be repeated",
    )
    command.add_argument(
        "--controlnet", metavar="PLACE", type=expanded, help="ControlNet of the base: folder or hub id"
    )
    command.add_argument("--control-image", metavar="FILE", type=local_path, help="what the ControlNet sees")
    command.add_argument(
        "--controlnet-conditioning-scale", type=real(0), metavar="S", help="strength of the ControlNet (default: 1)"
    )
    command.add_argument("--fuse", action="store_true", help="fuse the LoRAs into the network for faster sampling")
    command.add_argument("--device", help="(default: cuda if available, else cpu)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 without cuda)")


def _generate(args: argparse.Namespace, overrides: list[str]) -> None:
    from stepdistill.cli.generate_decoder import generate_decoder
    from stepdistill.cli.generate_draw import DrawingStage, check_outputs, each_of, each_of_both, write_each
    from stepdistill.core.devices import usable_device
    from stepdistill.evaluation.records import prompt_of, read_records
    from stepdistill.students.contract import DECODER, kind_of, read_contracts, teacher
    from stepdistill.students.draw.animation import frame_rate_of
    from stepdistill.students.draw.control import controlled, read_control
    from stepdistill.students.draw.first_frame import check_first_frame, continued
    from stepdistill.students.draw.image_then_video import check_stages
    from stepdistill.students.draw.pipeline import DrawOptions
    from stepdistill.students.draw.windows import Windows, check_windows
    from stepdistill.students.load import folder_of

    prompts = [*args.prompts]
    if args.prompts_file:
        prompts += [prompt_of(record) for record in read_records(args.prompts_file)]
    if not prompts:
        todo = "write prompts after STUDENT, or pass --prompts-file"
        raise ConfigError(problem("no prompt", "at least one", "there is nothing to generate", todo))
    device = usable_device(args.device)
    if kind_of(folder_of(args.student)) == DECODER:
        generate_decoder(args, prompts, device)
        return
    if args.teacher_steps is not None:
        why, todo = "its teacher draws no tokens", "leave it out; --base-steps lets the base draw the first steps"
        raise ConfigError(problem("--teacher-steps", "a student of an autoregressive image model", why, todo))
    _check_control(args)
    _check_stages(args)
    control = read_control(args.control_image) if args.controlnet else None
    family = teacher(read_contracts(folder_of(args.video or args.student))[0])
    if args.video:
        check_stages(args.student, args.video)
    else:
        check_first_frame(family, args.image)
    _check_windows(args)
    suffix = _suffix(args, family)
    stale = check_outputs(args, len(prompts) * args.num_images_per_prompt, suffix)
    repeated = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]
    both, student = _students(args, device)
    names = ("steps", "timesteps", "sigmas", "guidance_scale", "eta", "height", "width")
    drawn_with = DrawOptions(**{name: getattr(args, name) for name in names})
    call = student.call(drawn_with)
    if control is not None:
        scale = args.controlnet_conditioning_scale
        call = controlled(student, call, control, 1.0 if scale is None else scale)
    last, last_call = student, continued(call, args.image) if args.image else call
    if both:
        drawn_with = DrawOptions(steps=args.video_steps, height=args.height, width=args.width)
        last, last_call = both.video, both.video.call(drawn_with)
    long = None
    if (args.windows or 1) > 1:
        long = Windows(args.windows, args.overlap or 1, tuple(args.then), drawn_with, args.match_first_window)
        check_windows(last, last_call, long.overlap)
    stage = DrawingStage(last, last_call, long)
    drawn = each_of_both(both, call, stage, repeated, args) if both else each_of(stage, repeated, args)
    networks = {"network": [one.family.network(one.pipe) for one in (student, last)]}
    write_each(drawn, repeated, args, stale, suffix, networks, frame_rate_of(family))


def _students(args: argparse.Namespace, device: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Both students of --video, or None, and STUDENT, in the precision that is asked for."""
    from stepdistill.students.draw.image_then_video import ImageThenVideo
    from stepdistill.students.draw.pipeline import StudentPipeline

    options = (args.base, device, args.strength, args.lora)
    if args.video:
        both = ImageThenVideo.load(args.student, args.video, *options, args.controlnet)
        _cast(both.video, args.dtype)
        _cast(both.image, args.dtype)
        return both, both.image
    student = StudentPipeline.load(args.student, *options, args.fuse, args.controlnet)
    _cast(student, args.dtype)
    return None, student


def _cast(student: Any, name: str | None) -> None:  # noqa: ANN401
    """Give a student's pipeline the precision of this name, by default its contract's where there is a GPU."""
    import torch

    usual = "float32" if student.pipe.device.type == "cpu" or student.contract is None else student.contract.dtype
    if (name or usual) != "float32":
        student.pipe.to(getattr(torch, name or usual))


def _suffix(args: argparse.Namespace, family: Any) -> str:  # noqa: ANN401
    """Of the files that are written. Raises ConfigError for options of videos where the student makes images."""
    from stepdistill.students.draw.animation import require_encoder

    if family.arguments().get("num_frames", 1) == 1:
        if args.format or args.frame_rate:
            why, todo = "the student makes images, which are PNG files", "leave them out"
            raise ConfigError(problem("--format or --frame-rate", "neither", why, todo))
        return ".png"
    if args.format == "mp4":
        require_encoder()
    return f".{args.format or 'webp'}"


def _check_windows(args: argparse.Namespace) -> None:
    """Raise ConfigError for options of windows that have no effect."""
    windows = args.windows or 1
    if windows == 1 and (args.overlap or args.then) or len(args.then) >= windows > 1:
        got = f"--windows {windows} with " + (f"{len(args.then)} --then" if args.then else "--overlap")
        why, todo = "each --then is the prompt of one more window", "raise --windows, or leave them out"
        raise ConfigError(problem(got, "fewer prompts than windows, of which there are several", why, todo))
    if windows == 1 and args.match_first_window:
        why, todo = "it changes those after the first one", "raise --windows, or leave it out"
        raise ConfigError(problem("--match-first-window of one window", "several windows", why, todo))
    if windows > 1 and not args.image and not args.video:
        why, todo = "only a student of image to video goes on from frames", "pass --image or --video, or no --windows"
        raise ConfigError(problem("--windows without --image or --video", "one of them", why, todo))


def _check_stages(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go with --video, or need it."""
    if args.video is None and args.video_steps:
        why = "it is the number of steps of the second student"
        raise ConfigError(problem("--video-steps without --video", "both", why, "pass --steps for STUDENT's"))
    if args.video is not None and args.image:
        why, todo = "STUDENT makes the image", f"leave it out, or call `stepdistill generate {args.video}` with --image"
        raise ConfigError(problem(f"--image {args.image} with --video", "one of them", why, todo))
    if args.video is not None and args.fuse:
        why = "a LoRA that is fused cannot take turns with another one"
        raise ConfigError(problem("--fuse with --video", "one of them", why, "leave --fuse out"))


def _check_control(args: argparse.Namespace) -> None:
    """Raise ConfigError where one of a ControlNet and its image is missing."""
    if args.controlnet and not args.control_image:
        why, todo = "a ControlNet needs an image to see", "pass --control-image, or leave --controlnet out"
        raise ConfigError(problem("--controlnet without --control-image", "both", why, todo))
    if not args.controlnet and (args.control_image or args.controlnet_conditioning_scale is not None):
        why, todo = "nothing would use them", "pass --controlnet"
        raise ConfigError(problem("options of a ControlNet without --controlnet", "both", why, todo))
