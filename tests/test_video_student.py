"""Students that make videos: a size that is no square, the card's code, and `stepdistill generate`."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image, ImageSequence
from tiny import FAMILIES, awake, backbone, pipeline

from stepdistill.cli import main as cli
from stepdistill.config.schema import fields
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts
from stepdistill.families.base import Family
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import MultiContract, read_contract
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.snippets import multi_snippet
from stepdistill.students.write import write_student
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.resume import find_source

FRAMES, SIZE = 5, (32, 48)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp("wan")
    pipeline("wan").save_pretrained(folder)
    return replace(FAMILIES["wan"], pretrained_teacher_model=str(folder))


def student(family: Family, folder: Path) -> Path:
    pipe = family.load()
    bone = backbone("wan", pipe, 2, 6)
    bone.add("student", Lora())
    awake(bone, "student", 0.2)
    options: Any = {"role": "student", "resolution": SIZE, "method": Regression(num_inference_steps=2, ema_decay=None)}
    write_student(folder, family=family, pipe=pipe, backbone=bone, **options)
    return folder


@pytest.fixture(scope="module")
def written(family, tmp_path_factory) -> Path:
    return student(family, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def still(family, tmp_path_factory) -> Path:
    """A student of the same base that makes images."""
    return student(replace(family, num_frames=1), tmp_path_factory.mktemp("still"))


def drawn(folder: Path, prompt: str, seed: int) -> np.ndarray:
    """The frames (F, H, W, 3) uint8."""
    pipe = StudentPipeline.load(folder)
    (video,) = pipe.draw([prompt], [seed], pipe.call())
    return np.stack([np.asarray(frame) for frame in video.image])


def animated(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def generate(*arguments: object) -> None:
    cli.main(["generate", *map(str, arguments)])


def test_a_student_is_trained_at_a_height_and_a_width(family, tmp_path):
    def run(*size: int, **train: Any) -> Run:
        settings: Any = {"train_batch_size": 1, "report_to": "none", "resolution": size} | train
        return Run(
            family=family,
            method=DMD2(timesteps=(1000, 937.5, 833.3333, 625), guidance_scale=1.0, ema_decay=None),
            data=Prompts(prompts=("rose",)),
            lora=LoraSpec(rank=2),
            train=TrainSpec(output_dir=str(tmp_path), max_train_steps=1, **settings),
        )

    contract = read_contract(distill(run(*SIZE)))
    assert contract.resolution == SIZE == (contract.call["height"], contract.call["width"])
    assert find_source(run(*SIZE, resume_from_checkpoint="latest"))
    with pytest.raises(ConfigError, match=r"train.resolution=\[48, 32\], expected train.resolution=\[32, 48\]"):
        find_source(run(48, 32, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("frames", [FRAMES, 1])
def test_the_card_s_code_makes_what_the_student_does(written, still, tmp_path, monkeypatch, frames):
    monkeypatch.chdir(tmp_path)
    folder = {FRAMES: written, 1: still}[frames]
    card = (folder / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    ours = drawn(folder, "red apple", 0)
    assert ours.shape == (frames, *SIZE, 3)
    if frames == 1:
        assert np.array_equal(np.asarray(names["image"]), ours[0]) and Path("student.png").exists()
        assert "pipeline_tag: text-to-image" in card and "generates\nan image in 2 steps" in card
    else:
        assert all(np.array_equal(a, b) for a, b in zip(names["frames"], ours, strict=True))
        assert animated(Path("student.webp")).shape == ours.shape
        assert "pipeline_tag: text-to-video" in card and "generates\na video in 2 steps" in card
        assert f"| frames | {frames} |" in card and '# diffusers.utils.export_to_video(frames, "student.mp4"' in card


@pytest.mark.parametrize(
    ("frames", "lines"),
    [
        (FRAMES, ("for prompt, frames in zip", ", output_type='pil')", 'frames[0].save(f"{prompt}.webp", save_all')),
        (1, ("for prompt, frames in zip", ", output_type='pil')", 'frames[0].save(f"{prompt}.png")')),
    ],
)
def test_code_of_several_students_saves_videos(written, still, frames, lines):
    contract = read_contract({FRAMES: written, 1: still}[frames])
    shared = {name: getattr(contract, name) for name in fields(MultiContract) if name not in ("kind", "students")}
    code = multi_snippet(MultiContract(students=2, **shared), "folder")
    compile(code, "snippet", "exec")
    assert all(line in code for line in lines), code


def test_the_command_writes_the_videos_that_the_student_draws(written, tmp_path, capsys):
    generate(written, "rose", "cat", "--seed", 3, "-o", tmp_path / "out", "--grid", tmp_path / "grid.png")
    listed = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [(row["file"], row["prompt"]) for row in listed] == [("00000.webp", "rose"), ("00001.webp", "cat")]
    for n, row in enumerate(listed):
        assert np.array_equal(animated(tmp_path / "out" / row["file"]), drawn(written, row["prompt"], 3 + n))
    with Image.open(tmp_path / "out" / "00000.webp") as image:
        image.load()
        assert image.info["duration"] == 62
    assert Image.open(tmp_path / "grid.png").width > 2 * FRAMES * 48  # some frames of each side by side
    assert "2 videos, 2 calls" in capsys.readouterr().out


def test_another_format_replaces_the_files_of_the_first(written, tmp_path):
    generate(written, "rose", "cat", "-o", tmp_path)
    (tmp_path / "00007.gif").write_bytes(b"of another program")
    generate(written, "rose", "-o", tmp_path, "--format", "mp4", "--frame-rate", 8, "--overwrite")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.mp4", "00007.gif", "images.jsonl"]


def test_formats_are_checked_before_anything_is_loaded(written, still, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StudentPipeline, "load", lambda *_: pytest.fail("the base is loaded"))
    monkeypatch.setitem(sys.modules, "av", None)
    cases = [(written, ["--format", "mp4"], "pip install 'stepdistill[video]'")]
    cases += [(still, option, "the student makes images") for option in (["--format", "gif"], ["--frame-rate", "8"])]
    for folder, option, said in cases:
        with pytest.raises(SystemExit):
            generate(folder, "rose", "-o", tmp_path / "out", *option)
        assert said in capsys.readouterr().err


def test_the_guide_s_levels_are_those_of_the_schedulers():
    """Each row of the table that names a scheduler, as Diffusers sets it up for four steps."""
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "video.md").read_text()
    rows = re.findall(r"^\|.*`(\w+)\(([^)]*)\)` \| (.*) \|$", guide, re.M)
    assert len(rows) == 3
    for name, arguments, levels in rows:
        given = {key: float(value) for key, value in (part.split("=") for part in arguments.split(", "))}
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "flow_shift" in given else {}
        scheduler = getattr(diffusers, name)(**given, **flow)
        scheduler.set_timesteps(4)
        assert [f"{t:.1f}".removesuffix(".0") for t in scheduler.timesteps.tolist()] == levels.split(" | ")


def test_a_video_family_s_images_are_png_files(still, tmp_path):
    generate(still, "rose", "-o", tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00000.png")), drawn(still, "rose", 0)[0])
