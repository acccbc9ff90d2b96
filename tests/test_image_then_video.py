"""Text to video in two stages: one command is the two calls by hand, on one base or on two."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from oracles.planted import Bug, bug_tests
from PIL import Image, ImageSequence
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import seed_of_video
from stepdistill.data.images import window
from stepdistill.evaluation.draw import fingerprint
from stepdistill.evaluation.metrics.motion import image_distance
from stepdistill.families.base import Family
from stepdistill.families.wan import Wan
from stepdistill.families.wan_image import WanImageToVideo
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.regression import Regression
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.pipeline_loras import adapters_on
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import read_contract, teacher, write_contract
from stepdistill.students.draw.first_frame import covering
from stepdistill.students.draw.image_then_video import ImageThenVideo, one_base
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.draw.windows import long_video
from stepdistill.students.load import load_student
from stepdistill.students.write import write_student

PROMPTS, SEED = ["red apple", "rose"], 5
KEPT = TemporaryDirectory()


def written(name: str, family: Family, size: tuple[int, int], gain: float, steps: int = 2) -> Path:
    """A student that renoises, whose LoRA matters and is its own."""
    folder, pipe = Path(KEPT.name) / name, family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4, alpha=2), family.lora_targets(net))
    bone.add("student", Lora())
    tiny.awake(bone, "student", gain)
    flow = DMD2(num_inference_steps=steps, eta=1) if isinstance(family, Wan | WanImageToVideo) else None
    method = flow or Regression(num_inference_steps=steps, ema_decay=None)
    options: Any = {"family": family, "pipe": pipe, "backbone": bone, "role": "student", "method": method}
    write_student(folder, **options, resolution=size)
    return folder


@cache
def base() -> str:
    torch.manual_seed(0)
    folder = Path(KEPT.name) / "base"
    tiny.wan(expand_timesteps=True).save_pretrained(folder)
    return str(folder)


@cache
def image() -> Path:
    """A student of one frame, in three steps."""
    family = Wan(pretrained_teacher_model=base(), num_frames=1, sample_size=(32, 32), max_sequence_length=12)
    return written("image", family, (32, 32), 0.2, 3)


@cache
def video() -> Path:
    """A student of nine frames, on the base of `image`."""
    family = WanImageToVideo(
        pretrained_teacher_model=base(), num_frames=9, sample_size=(32, 32), max_sequence_length=12
    )
    return written("video", family, (32, 32), -0.3)


@cache
def of_one_frame() -> Path:
    """The contract alone of a student of image to video that makes the image only."""
    folder, contract = Path(KEPT.name) / "one frame", read_contract(video())
    folder.mkdir()
    write_contract(folder, replace(contract, family=contract.family | {"num_frames": 1}))
    return folder


@cache
def of_sd() -> Path:
    """An image student of another family, which makes images of another size."""
    folder = Path(KEPT.name) / "sd"
    tiny.pipeline("sd").save_pretrained(folder)
    return written("image of sd", replace(tiny.FAMILIES["sd"], pretrained_teacher_model=str(folder)), (32, 48), 0.2)


def plain(folder: Path, kind: Any, seed: int, prompt: str, **more: object) -> Tensor:
    """What a user of Diffusers draws with a student, in floats (1, F, 3, H, W)."""
    pipe = kind.from_pretrained(base())
    pipe.set_progress_bar_config(disable=True)
    call = load_student(pipe, folder)
    with torch.no_grad(), torch.random.fork_rng():
        return pipe(prompt=prompt, generator=torch.manual_seed(seed), output_type="pt", **{**call, **more})[0]


@cache
def by_hand(seed: int, prompt: str) -> tuple[Tensor, Tensor]:
    """The image (3, H, W), and the video (F, 3, H, W) that continues it."""
    first = plain(image(), diffusers.WanPipeline, seed, prompt)[0]
    later = plain(video(), diffusers.WanImageToVideoPipeline, seed + 2**31, prompt, image=first)
    return first[0], later[0]


def animated(file: Path) -> Tensor:
    """uint8 (F, 3, H, W)."""
    with Image.open(file) as opened:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def generate(*words: object) -> None:
    cli.main(["generate", *map(str, words)])


# one base


def both_draw_as_by_hand() -> None:
    """On one base, in floats, each with its own noise; and again, in turns."""
    both = ImageThenVideo.load(image(), video())
    calls, seeds = (both.image.call(), both.video.call()), [SEED, SEED + 1]
    for _ in range(2):
        images = [drawn.image for drawn in both.draw_images(PROMPTS, seeds, calls[0], batch=1)]
        videos = both.draw_videos(PROMPTS, [seed_of_video(seed) for seed in seeds], calls[1], images)
        for seed, prompt, first, drawn in zip(seeds, PROMPTS, images, videos, strict=True):
            expected = by_hand(seed, prompt)
            assert torch.equal(first, expected[0])
            frames = torch.stack([torch.from_numpy(np.array(frame)) for frame in drawn.image]).permute(0, 3, 1, 2)
            assert torch.equal(frames, to_uint8(expected[1]))


def test_both_draw_as_by_hand():
    both_draw_as_by_hand()


def test_the_base_is_loaded_once_and_the_loras_take_turns(monkeypatch):
    loads: list[str] = []
    load = WanImageToVideo.load
    for family in (Wan, WanImageToVideo):
        monkeypatch.setattr(family, "load", lambda self: loads.append(type(self).__name__) or load(self))
    both = ImageThenVideo.load(image(), video())
    assert loads == ["Wan"] and both.worn == ("student",)
    first, second = both.image.pipe, both.video.pipe
    assert type(second).__name__ == "WanImageToVideoPipeline" and second.config["expand_timesteps"]
    assert all(second.components[name] is first.components[name] for name in ("transformer", "vae", "text_encoder"))
    (drawn,) = both.draw_images(["rose"], [0], both.image.call())
    assert adapters_on(first.transformer) == ["student"]
    list(both.draw_videos(["rose"], [0], both.video.call(), [drawn.image]))
    assert adapters_on(first.transformer) == ["video"]


def test_one_command_writes_both(tmp_path, capsys):
    generate(image(), *PROMPTS, "--video", video(), "--seed", SEED, "-o", tmp_path, "--grid", tmp_path / "grid.png")
    said, rows = capsys.readouterr().out, lines_of(tmp_path)
    apart = []
    for n, row in enumerate(rows):
        first, frames = by_hand(SEED + n, PROMPTS[n])
        png = np.asarray(Image.open(tmp_path / row["image"]).convert("RGB"))
        assert torch.equal(torch.from_numpy(png.copy()).permute(2, 0, 1), to_uint8(first))
        assert torch.equal(animated(tmp_path / row["file"]), to_uint8(frames))
        assert (row["prompt"], row["image_seed"], row["seed"]) == (PROMPTS[n], SEED + n, SEED + n + 2**31)
        clips = to_uint8(frames)[None], to_uint8(first)[None]
        apart.append([image_distance(*clips, frame).item() for frame in (0, 1)])
        assert row["image_distance"] == pytest.approx(apart[n])
        assert row["image_student"] == {"source": str(image()), "sha256": fingerprint(str(image()))}
        assert row["video_student"]["sha256"] == fingerprint(str(video())) != row["image_student"]["sha256"]
    means = np.mean(apart, 0)
    assert f"of 255: {means[0]:.2f} of the first frame, {means[1]:.2f} of the second" in said
    assert "2 videos, 10 calls of the network" in said  # three for each image, two for each video
    assert (tmp_path / "grid.png").exists() and "cut out" not in said


def test_windows_go_on_from_the_video(tmp_path, capsys):
    given = ("--windows", 3, "--overlap", 5, "--then", "cat", "--format", "gif", "--video-steps", 4)
    generate(image(), "rose", "--video", video(), "--seed", SEED, "-o", tmp_path, *given)
    (row,) = lines_of(tmp_path)
    drawer = StudentPipeline.load(video())
    options = DrawOptions(steps=4)
    call = drawer.call(options).plus(image=by_hand(SEED, "rose")[0][None])
    whole = to_uint8(long_video(drawer, ["rose", "cat"], call, 3, 5, SEED + 2**31, options).frames)
    assert len(whole) == 17 and (row["windows"], row["overlap"]) == (3, 5)
    assert row["means"] == pytest.approx([whole[4 * k : 4 * k + 9].double().mean().item() for k in range(3)])
    assert "times that inside" in capsys.readouterr().out


def test_an_option_of_the_image_leaves_the_video_as_trained(tmp_path, capsys):
    generate(image(), "rose", "--video", video(), "--seed", SEED, "-o", tmp_path, "--steps", 1, "--base-steps", 1)
    assert "1 videos, 3 calls of the network" in capsys.readouterr().out


def test_a_negative_prompt_is_the_image_s(tmp_path):
    """It works inside the attention of the one network, which is as it was for the video."""
    generate(image(), "rose", "--video", video(), "-o", tmp_path, "--negative-prompt", "cat")
    drawer = StudentPipeline.load(image())
    with drawer.against("cat", drawer.call().plus(output_type="pt")) as call:
        (drawn,) = drawer.draw(["rose"], [0], call)
    assert not torch.equal(drawn.image[0], by_hand(0, "rose")[0])
    frames = plain(video(), diffusers.WanImageToVideoPipeline, 2**31, "rose", image=drawn.image.clamp(0, 1))[0]
    assert torch.equal(animated(tmp_path / "00000.webp"), to_uint8(frames))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"base_hash": {"float32": "other"}}, False),
        ({"dtype": "bfloat16"}, False),
        ({"lora": None}, False),
        ({"family": {"pretrained_teacher_model": "elsewhere/wan"}}, False),
        ({"family": {"quantization": {"type": "torchao.quantization.Int8WeightOnlyConfig"}}}, False),
        ({"family": {"max_sequence_length": 16}}, True),
    ],
)
def test_a_base_is_one_where_it_is_read_alike(change, same):
    first, second = read_contract(image()), read_contract(video())
    family = second.family | change.get("family", {})
    other = replace(second, **{**change, "family": family})
    assert one_base((teacher(first), first), (teacher(other), other)) is same


def test_a_checkpoint_in_place_of_the_base_is_that_of_both(tmp_path):
    torch.manual_seed(7)
    tiny.wan(expand_timesteps=True).save_pretrained(tmp_path)
    both = ImageThenVideo.load(image(), video(), str(tmp_path))
    assert both.worn == ("student",) and both.video.family.pretrained_teacher_model == str(tmp_path)


# two bases


def test_an_image_of_another_family_is_cropped_as_in_training(tmp_path, capsys):
    generate(of_sd(), "rose", "--video", video(), "--seed", SEED, "-o", tmp_path)
    said, (row,) = capsys.readouterr().out, lines_of(tmp_path)
    assert "images of 32 x 48 pixels for videos of 32 x 32: resized until they cover it" in said
    drawer = StudentPipeline.load(of_sd())
    (drawn,) = drawer.draw(["rose"], [SEED], drawer.call().plus(output_type="pt"))
    begun = drawn.image.clamp(0, 1)[:, :, 8:40][None]
    frames = plain(video(), diffusers.WanImageToVideoPipeline, SEED + 2**31, "rose", image=begun)[0]
    assert torch.equal(animated(tmp_path / row["file"]), to_uint8(frames))
    assert Image.open(tmp_path / row["image"]).size == (48, 32)


def test_a_size_is_that_of_both(tmp_path, capsys):
    generate(of_sd(), "rose", "--video", video(), "-o", tmp_path, "--height", 32, "--width", 32)
    assert "cut out" not in capsys.readouterr().out
    assert Image.open(tmp_path / "00000.png").size == (32, 32) == Image.open(tmp_path / "00000.webp").size


def test_an_image_is_resized_in_floats_by_the_rule_of_files():
    pixels = 0.5 + 0.05 * torch.rand(3, 60, 50, generator=torch.Generator().manual_seed(0))
    bytes_ = to_uint8(pixels)
    file = Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())
    expected = torch.from_numpy(np.array(window(file, (32, 48), 0.5, 0.5, "lanczos"))).permute(2, 0, 1)
    assert (255 * covering(bytes_ / 255, (32, 48)) - expected).abs().max() <= 1.5
    assert torch.equal(covering(pixels, (60, 50)), pixels)
    assert not torch.equal(covering(pixels, (32, 48)), covering(bytes_ / 255, (32, 48)))
    sharp = torch.zeros(3, 20, 20)
    sharp[:, ::4] = 1
    assert covering(sharp, (32, 32)).min() >= 0 and covering(sharp, (32, 32)).max() <= 1


# what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((video, "--video", video), "which makes videos of 9 frames, with --video"),
        ((image, "--video", image), "a student of Wan, expected one that continues an image"),
        ((image, "--video", of_one_frame), "a student of one frame, expected one of several frames"),
        ((image, "--video", video, "--image", "a.png"), "--image a.png with --video, expected one of them"),
        ((image, "--video", video, "--fuse"), "--fuse with --video, expected one of them"),
        ((image, "--video-steps", 2), "--video-steps without --video, expected both"),
        ((image, "--windows", 2), "--windows without --image or --video, expected one of them"),
        ((image, "--video", "nowhere"), "nowhere, which does not exist, expected a student folder or a hub id"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_base_is_loaded(words, said, tmp_path, monkeypatch, capsys):
    given = [str(word()) if callable(word) else str(word) for word in words]
    monkeypatch.setattr(StudentPipeline, "of", lambda *_, **__: pytest.fail("a base is loaded"))
    with pytest.raises(SystemExit):
        generate(*given, "--prompts-file", prompts_file(tmp_path), "-o", tmp_path / "out")
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--windows", 2, "--overlap", 3), "an overlap of 3 frames, expected one of 1, 5"),
        (("--height", 40), "40 x 32"),
        (("--overlap", 5), "--overlap, expected fewer prompts than windows"),
    ],
)
def test_what_does_not_fit_is_refused_before_an_image_is_drawn(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StudentPipeline, "draw", lambda *_, **__: pytest.fail("an image is drawn"))
    with pytest.raises(SystemExit):
        generate(image(), "rose", "--video", video(), "-o", tmp_path / "out", *words)
    assert said in capsys.readouterr().err


def prompts_file(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("rose\n")
    return file


def test_images_of_an_earlier_command_are_kept(tmp_path, capsys):
    (tmp_path / "00000.png").write_bytes(b"of another program")
    with pytest.raises(SystemExit):
        generate(image(), "rose", "--video", video(), "-o", tmp_path)
    assert "00000.png, which exists without stepdistill's mark" in capsys.readouterr().err


BUGS = {
    "the image's LoRA stays on": Bug(ImageThenVideo._begun, "(VIDEO,)", '("student", VIDEO)', both_draw_as_by_hand),
    "the video's LoRA is on": Bug(ImageThenVideo.draw_images, "self.worn or ()", "(VIDEO,)", both_draw_as_by_hand),
    "one seed for both": Bug(seed_of_video, "+ 2**31", "", both_draw_as_by_hand),
    "the image is rounded": Bug(
        ImageThenVideo.draw_images, ".clamp(0, 1)", ".mul(255).round().div(255)", both_draw_as_by_hand
    ),
    "time is told as one": Bug(WanImageToVideo.around, "**settings", "**{}", both_draw_as_by_hand),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError)
