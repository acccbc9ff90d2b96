"""What `stepdistill generate` draws with students that are loaded, and the files that it writes."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.core.cost import count_calls
from stepdistill.core.errors import OutputError, problem
from stepdistill.core.outputs import MARK, check_output_file, is_marked
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import seed_of_video
from stepdistill.evaluation.draw import fingerprint
from stepdistill.evaluation.metrics.motion import image_distance, seam_bend
from stepdistill.students.draw.animation import images_of_clip, save_animation
from stepdistill.students.draw.base_first import base_first
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.filters import DrawnImage
from stepdistill.students.draw.first_frame import covering
from stepdistill.students.draw.image_then_video import ImageThenVideo, size_of_call
from stepdistill.students.draw.latent_drift import ChannelStatistics, from_first
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.sheet import check_image_file, image_grid, save_image
from stepdistill.students.draw.windows import LongVideo, Windows

Drawn = Iterator[tuple[DrawnImage, dict[str, Any]]]  # with what images.jsonl says of it beside its prompt


class DrawingStage(NamedTuple):
    """A student, its call, and how many windows its videos have; None of images and short videos."""

    student: StudentPipeline
    call: PipelineCall
    long: Windows | None = None


def check_outputs(args: argparse.Namespace, count: int, suffix: str) -> list[Path]:
    """The images of an earlier command, which go. Raises OutputError where what is there must stay."""
    given = (args.student, args.video, args.base, args.prompts_file, args.controlnet, args.control_image, args.image)
    places = (*given, *(place for place, _ in args.lora))
    inputs = [place for place in places if place is not None]
    suffixes = [".png", suffix] if args.video else [suffix]
    written = [args.output / f"{n:05d}{end}" for n in range(count) for end in suffixes]
    named = [file for file in sorted(args.output.glob("*.*")) if re.fullmatch(r"\d{5,}\.(png|webp|gif|mp4)", file.name)]
    stale = [file for file in named if is_marked(file)]
    for file in dict.fromkeys([*written, *stale, args.output / "images.jsonl"]):
        check_output_file(file, inputs, args.overwrite)
    if args.grid:
        check_image_file(args.grid, inputs, args.overwrite)
        if args.grid.resolve() in [file.resolve() for file in written]:
            why = "an image has that name"
            raise OutputError(problem(f"--grid {args.grid}", "another file", why, "name another"))
    return stale


def each_of(stage: DrawingStage, prompts: Sequence[str], args: argparse.Namespace) -> Drawn:
    """What one student draws."""
    (student, call, long), seeds = stage, seeds_of(prompts, args)
    with _as_asked(student, call, args) as call:
        drawn = long.draw(student, prompts, seeds, call) if long else student.draw(prompts, seeds, call, args.batch)
        for seed, one in zip(seeds, drawn, strict=True):
            shown, seams = _shown(one, stage)
            yield shown, {"seed": seed, **seams}


def each_of_both(
    both: ImageThenVideo, image: PipelineCall, stage: DrawingStage, prompts: Sequence[str], args: argparse.Namespace
) -> Drawn:
    """What two students draw, one after the other; the images are written, too.

    Args:
        image: the call of the first student.
        stage: the second.
    """
    seeds = seeds_of(prompts, args)
    with _as_asked(both.image, image, args) as call:
        images = list(tqdm(both.draw_images(prompts, seeds, call, args.batch), total=len(prompts), desc="Images"))
    files = [args.output / f"{n:05d}.png" for n in range(len(images))]
    for drawn, file in zip(images, files, strict=True):
        save_image(images_of_clip(to_uint8(drawn.image[None]))[0], file)
    pixels, size = [drawn.image for drawn in images], size_of_call(stage.call)
    _say_sizes(pixels, size)
    sources = (("image_student", args.student), ("video_student", args.video))
    students = {name: {"source": str(place), "sha256": fingerprint(str(place))} for name, place in sources}
    later = [seed_of_video(seed) for seed in seeds]
    apart: list[tuple[float, float]] = []
    given = (prompts, later, stage.call, pixels)
    videos = both.draw_long_videos(*given, stage.long) if stage.long else both.draw_videos(*given)
    for n, video in enumerate(videos):
        shown, seams = _shown(video, stage)
        apart.append(_distances(shown.image, covering(pixels[n], size)))
        facts = {
            "seed": later[n],
            "image": files[n].name,
            "image_seed": seeds[n],
            "image_distance": apart[n],
            **students,
        }
        yield DrawnImage(shown.image, images[n].flagged), facts | seams
    first, second = np.mean(apart, 0)
    print(f"mean distance from the image, of 255: {first:.2f} of the first frame, {second:.2f} of the second")


def write_each(
    drawn: Drawn,
    prompts: Sequence[str],
    args: argparse.Namespace,
    stale: Sequence[Path],
    suffix: str,
    networks: Mapping[str, Sequence[nn.Module]],
    frame_rate: float,
) -> None:
    """Write what is drawn, `images.jsonl` and the sheet, and say what it took.

    Args:
        stale: files of an earlier command, which go.
        suffix: of the files.
        networks: whose calls are counted, each once, by what the summary calls them.
        frame_rate: frames a second of videos, where the command names none.
    """
    what = "images" if suffix == ".png" else "videos"
    args.output.mkdir(parents=True, exist_ok=True)
    images_of_grid, lines, began = [], [], time.perf_counter()
    with ExitStack() as stack:
        costs = {
            name: [stack.enter_context(count_calls(net)) for net in dict.fromkeys(nets)]
            for name, nets in networks.items()
        }
        for file in stale:
            file.unlink()
        for n, (one, facts) in enumerate(tqdm(drawn, total=len(prompts), desc=what.title())):
            frames, file = one.image if isinstance(one.image, list) else [one.image], args.output / f"{n:05d}{suffix}"
            if suffix == ".png":
                save_image(frames[0], file)
            else:
                save_animation(frames, file, args.frame_rate or frame_rate)
            line = {"file": file.name, "prompt": prompts[n], "software": MARK.decode(), **facts}
            lines.append(line | {"flagged": True} if one.flagged else line)
            images_of_grid += [frames] if args.grid else []
    (args.output / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.grid:
        save_image(_sheet(images_of_grid, prompts, args.num_images_per_prompt), args.grid)
    calls = ", ".join(f"{sum(cost.calls for cost in some)} calls of the {name}" for name, some in costs.items())
    print(f"{args.output}: {len(prompts)} {what}, {calls}, {time.perf_counter() - began:.1f} s")
    if flagged := [line["file"] for line in lines if "flagged" in line]:
        names = ", ".join(flagged)
        print(f"{len(flagged)} of them were flagged by the base's safety checker and are black: {names}")


def seeds_of(prompts: Sequence[str], args: argparse.Namespace) -> list[int]:
    """The seed of each image."""
    return [args.seed + n for n in range(len(prompts))]


@contextmanager
def _as_asked(student: StudentPipeline, call: PipelineCall, args: argparse.Namespace) -> Iterator[PipelineCall]:
    """The call, with a negative prompt and first steps of the base where the options ask for them."""
    against = student.against(args.negative_prompt, call, args.negative_scale, args.negative_mode)
    mixed = nullcontext() if args.base_steps is None else base_first(student.pipe, args.base_steps)
    with against as call, mixed:
        yield call


def _say_sizes(images: Sequence[Tensor], size: tuple[int, int]) -> None:
    """Print what becomes of images that do not have the size of the videos."""
    height, width = images[0].shape[-2:]
    if (height, width) != size:
        how = "resized until they cover it, and their centres are cut out"
        print(f"images of {height} x {width} pixels for videos of {size[0]} x {size[1]}: {how}")


def _distances(frames: Sequence[Image.Image], image: Tensor) -> tuple[float, float]:
    """How far the first two frames of a video are from the image (3, H, W) that it begins with."""
    clip = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames[:2]])).permute(0, 3, 1, 2)[None]
    first, second = (image_distance(clip, to_uint8(image)[None], frame).item() for frame in (0, 1))
    return first, second


def _shown(drawn: DrawnImage | LongVideo, stage: DrawingStage) -> tuple[DrawnImage, dict[str, Any]]:
    """What is written, with what images.jsonl says of the windows."""
    if isinstance(drawn, DrawnImage):
        return drawn, {}
    frames = to_uint8(drawn.frames)
    return DrawnImage(images_of_clip(frames), False), _seams(frames.double(), drawn.latents, stage)


def _seams(video: Tensor, latents: ChannelStatistics, stage: DrawingStage) -> dict[str, Any]:
    """How the windows of a video (T, 3, H, W) are joined, and how they drift from the first one; printed, too."""
    _, call, long = stage
    assert long is not None
    window, overlap = call.arguments["num_frames"], long.overlap
    bend = seam_bend(video[None], window, overlap)
    ratio = (bend.seam / bend.inside).item()
    parts = [video[k * (window - overlap) :][:window] for k in range(long.windows)]
    means, spreads = [part.mean().item() for part in parts], [part.std().item() for part in parts]
    print(f"seam bend {ratio:.2f} times that inside; by window: mean grey level", end=" ")
    print(", ".join(f"{mean:.1f}" for mean in means), "; spread", ", ".join(f"{spread:.1f}" for spread in spreads))
    off, share = (", ".join(f"{value:.2f}" for value in values.tolist()) for values in from_first(latents))
    print(f"latent channels by window: mean off the first window's by {off} of its spread; spread {share} of its own")
    facts = {"windows": long.windows, "overlap": overlap, "match_first_window": long.match_first_window}
    drift = {"seam_bend": ratio, "means": means, "spreads": spreads}
    return facts | drift | {f"latent_{name}": values.tolist() for name, values in latents._asdict().items()}


def _sheet(clips: Sequence[Sequence[Image.Image]], prompts: Sequence[str], each: int) -> Image.Image:
    pixels = torch.from_numpy(np.stack([[np.asarray(frame) for frame in clip] for clip in clips])).movedim(-1, -3)
    rows = [(f"image {k + 1}", pixels[k::each]) for k in range(each)]
    return image_grid(rows, prompts[::each], max(1, 96 // clips[0][0].width))
