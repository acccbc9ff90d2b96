"""Real images and their noise: the teacher's ODE upwards, kept once, and down again to the image."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, VIDEOS, FakeTeacher, pipeline

from stepdistill.core.denoise import guided
from stepdistill.core.errors import ConfigError, DataError
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import follow
from stepdistill.data import ImageFolder, InvertedImages, check_source
from stepdistill.methods import reflow
from stepdistill.methods.reflow import Reflow
from stepdistill.networks.roles import TEACHER, Lora
from stepdistill.students.contract import read_contract
from stepdistill.training import finish, sampling
from stepdistill.training.checks import provided
from stepdistill.training.distill import distill, make_data
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.sampling import relative_straightness
from stepdistill.training.setup import prepare

SIDE = 32  # SANA takes multiples of it


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inverted")
    for name in FAMILIES:
        pipeline(name).save_pretrained(folder / name)
    rng = random.Random(0)
    for i in range(5):
        (folder / "images").mkdir(exist_ok=True)
        image = Image.new("RGB", (SIDE + 4, SIDE), tuple(rng.randrange(256) for _ in range(3)))
        image.save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"colour {i}")
    return folder


def source(place: Path, folder: Path, **fields) -> InvertedImages:
    images = ImageFolder(train_data_dir=str(place / "images"), resolution=SIDE)
    return InvertedImages(**{"source": images, "folder": str(folder), "count": 7, "num_inference_steps": 4} | fields)


def stage_of(place: Path, data: InvertedImages, name: str):
    still = {"num_frames": 1} if name in VIDEOS else {}  # images are videos of one frame
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / name), **still)
    spec = TrainSpec(
        output_dir=str(Path(data.folder).parent / "out"),
        report_to="none",
        max_train_steps=2,
        train_batch_size=2,
        resolution=SIDE,
    )
    return prepare(Run(family=family, method=Reflow(), data=data, train=spec))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_pair_has_both_ends_of_a_path_of_the_teacher(place, tmp_path, name):
    data = source(place, tmp_path / "pairs")
    session = stage_of(place, data, name)
    make_data(session)
    images = data.source
    sample = data.sample(6, random.Random(0))  # of the second image: there are five
    assert sample.prompt == "colour 1"
    assert {"pairs", "prompts"} <= provided(data)
    pixels = images.sample(1, random.Random(0)).pixels  # one colour: the crop makes no difference
    schedule = session.context(0).schedule
    times = schedule.grid(4)
    with torch.no_grad():
        latents = session.run.family.encode(session.pipe, pixels[None])
        x = schedule.add_noise(latents, noise_of(0, 6, session.batches.shape)[None], times[:1])
        top = follow(session.denoiser(TEACHER), schedule, times.tolist(), x, session.batches.condition(["colour 1"]))
    torch.testing.assert_close(sample.latents, x[0], atol=2e-3, rtol=2e-3)  # stored in half precision
    torch.testing.assert_close(sample.noise, top[0], atol=4e-3, rtol=4e-3)
    assert (sample.noise - sample.latents).abs().max() > 0.1


@pytest.mark.parametrize("straight", [True, False])
def test_training_runs_on_them_and_bent_paths_lose_the_first_noise(place, tmp_path, caplog, monkeypatch, straight):
    """The paths of a random network are nearly straight; the threshold is moved below them."""
    if not straight:
        monkeypatch.setattr(reflow, "STRAIGHT", 1e-9)
    monkeypatch.setattr(finish, "relative_straightness", partial(relative_straightness, count=8))  # 256 in a run
    data = source(place, tmp_path / "pairs")
    run = stage_of(place, data, "sd").run
    with caplog.at_level(logging.WARNING, "stepdistill"):
        out = distill(replace(run, method=Reflow(first_noise=True)))
    contract = read_contract(out)
    assert contract.first_noise == straight
    assert contract.scheduler["_class_name"] == ("FirstNoiseDDIMScheduler" if straight else "DDIMScheduler")
    assert ("sampled with ordinary steps" in caplog.text) != straight


def test_straightness_is_of_the_guided_student_from_noises_that_nothing_else_has(place, tmp_path, monkeypatch):
    session = stage_of(place, source(place, tmp_path / "pairs"), "sd")
    make_data(session)
    session.backbone.add("student", Lora())
    method = Reflow(sampling_guidance_scale=3.0, ema_decay=None)
    session, rows = replace(session, run=replace(session.run, method=method)), []

    def paths(denoise, schedule, x_t, cond):
        t = torch.full((len(x_t),), 500.0)
        expected = guided(session.denoiser("student"), session.context(0).null, 3.0)(x_t, t, cond)
        torch.testing.assert_close(denoise(x_t, t, cond).x0, expected.x0)
        rows.extend(x_t)
        return SimpleNamespace(straightness=float(len(rows)), cost=2.0)

    monkeypatch.setattr(sampling, "paths", paths)
    with torch.no_grad():
        assert relative_straightness(session, count=3) == (2 * 2 + 1 * 3) / (3 * 2)  # two, and one more
    rows += [noise_of(seed, i, session.batches.shape) for seed in range(3) for i in range(3)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 12


def test_more_or_fewer_later_and_no_other_images(place, tmp_path):
    def never(*given):
        pytest.fail("made again")

    def make(prompts, pixels, noise):
        return noise, pixels.new_full(noise.shape, float(len(prompts)))

    source(place, tmp_path).fill(FakeTeacher(make, (4, 8, 8), "t"))
    source(place, tmp_path, count=5).fill(FakeTeacher(never, (4, 8, 8), "t"))
    assert len(source(place, tmp_path, count=5)) == 5
    source(place, tmp_path, count=70).fill(FakeTeacher(make, (4, 8, 8), "t"))
    assert source(place, tmp_path, count=70).sample(69, random.Random(0)).prompt == "colour 4"
    for fields, said in (({"seed": 1}, "seed"), ({"num_inference_steps": 5}, "num_inference_steps")):
        with pytest.raises(DataError, match=f"other {said}"):
            source(place, tmp_path, **fields).fill(FakeTeacher(never, (4, 8, 8), "t"))
    with pytest.raises(DataError, match="other teacher"):
        source(place, tmp_path).fill(FakeTeacher(never, (4, 8, 8), "another"))
    other = ImageFolder(train_data_dir=str(place / "images"), resolution=SIDE, max_train_samples=3)
    with pytest.raises(DataError, match="other images"):
        source(place, tmp_path, source=other).fill(FakeTeacher(never, (4, 8, 8), "t"))


def test_a_image_that_does_not_read_gives_its_place(place, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for file in (place / "images").iterdir():
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    data = source(tmp_path, tmp_path / "pairs", count=3)
    with caplog.at_level(logging.WARNING, "stepdistill"):
        data.fill(FakeTeacher(lambda prompts, pixels, noise: (noise, noise), (4, 8, 8), "t"))
    assert [data.sample(i, random.Random(0)).prompt for i in range(3)] == ["colour 0", "colour 2", "colour 2"]
    assert "1.png" in caplog.text
    assert "5 samples" in check_source(data)


def test_images_of_another_size_than_the_student_s_are_refused(place, tmp_path):
    larger = ImageFolder(train_data_dir=str(place / "images"), resolution=2 * SIDE)
    session = stage_of(place, source(place, tmp_path / "pairs", source=larger), "sd")
    with pytest.raises(ConfigError, match="got images of 64 x 64 pixels, expected 32 x 32.*train.resolution"):
        make_data(session)


def test_images_of_several_sizes_are_refused(place, tmp_path):
    buckets = ImageFolder(train_data_dir=str(place / "images"), resolution=64, aspect_buckets=True)
    with pytest.raises(ConfigError, match="images of one size"):
        source(place, tmp_path, source=buckets)
