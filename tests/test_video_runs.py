"""Runs of image to video: resumed, in micro-batches and processes, and watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from oracles.planted import planted
from PIL import Image
from runs import weights
from test_image_to_video import FAMILY, other_beginning

from stepdistill.config.dump import config_to_yaml
from stepdistill.config.schema import Factory
from stepdistill.core.denoise import HELD
from stepdistill.data import ImageFolder
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.roles import TEACHER, LoraSpec
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import Session, prepare
from stepdistill.training.watch import measure as watching
from stepdistill.training.watch import rules

DMD = DMD2(num_inference_steps=2, critic_steps=2, guidance_scale=5.0)
SGD = {"max_train_steps": 1, "optimizer": Factory("torch.optim.SGD", {"momentum": 0.9, "lr": 1e-2})}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A random teacher, and images with captions."""
    folder = tmp_path_factory.mktemp("place")
    tiny.wan(expand_timesteps=True).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    for i in range(4):
        Image.effect_noise((40, 36), 60 + 10 * i).convert("RGB").save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(["red apple", "rose"][i % 2])
    return folder


def make(place: Path, out: Path, **train: object) -> Run:
    given = {"max_train_steps": 3, "train_batch_size": 2, "report_to": "none", "checkpointing_steps": 1}
    given |= {"learning_rate": 1e-3, "teacher_steps": 2}
    return Run(
        family=replace(FAMILY, pretrained_teacher_model=str(place / "teacher")),
        method=DMD,
        data=ImageFolder(train_data_dir=str(place / "images"), resolution=32),
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(output_dir=str(out), **(given | train)),
    )


def test_resume_is_bit_for_bit(place, tmp_path):
    """3 steps = 2 + resume + 1; the second part finds the first frames on disk, the whole run makes them again."""
    out, kept = tmp_path / "out", {"cache_latents": True, "cache_dir": str(tmp_path / "cache")}
    distill(make(place, out, max_train_steps=2, **kept))
    distill(make(place, out, resume_from_checkpoint="latest", **kept))
    whole = distill(make(place, tmp_path / "whole", cache_latents=True))
    for role in ("student", "fake", "ema"):
        assert torch.equal(weights(out, 3, role), weights(whole, 3, role))


@pytest.fixture(scope="module")
def one_batch(place, tmp_path_factory) -> Path:
    return distill(make(place, tmp_path_factory.mktemp("one") / "out", **SGD))


def same_gradients(ours: Path, theirs: Path) -> None:
    """Momentum after a step is its gradient, of the student and of the fake score."""
    states = [torch.load(out / "checkpoint-1" / "optimizers.pt", weights_only=True) for out in (ours, theirs)]
    for role in ("student", "fake"):
        one, two = (
            torch.cat([value["momentum_buffer"].flatten() for value in state[role]["state"].values()])
            for state in states
        )
        assert (one - two).norm() <= 1e-5 * two.norm() and two.norm() > 1e-4, role


def test_micro_batches_change_nothing(place, one_batch, tmp_path):
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    same_gradients(distill(make(place, tmp_path / "out", **(SGD | split))), one_batch)


@pytest.mark.slow
def test_two_processes_change_nothing(place, one_batch, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(make(place, tmp_path / "out", **(SGD | {"train_batch_size": 1}))))
    launch = Path(__file__).parent.parent / "configs" / "accelerate" / "two_processes_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    command += ["-m", "stepdistill", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-3000:]
    same_gradients(tmp_path / "out", one_batch)


# the collapse monitor


def frozen(session: Session, prompts: list[str], ids: object, size: tuple[int, int]) -> torch.Tensor:
    """A student whose videos are their first frame."""
    images = watching.sample_teacher(session, prompts, ids, size)[:, :, :1]  # pyright: ignore[reportArgumentType]
    return images.expand(-1, -1, 3, -1, -1)


def watched(place: Path, out: Path) -> list[dict[str, float]]:
    shown = {"validation_prompts": ("rose",), "validation_images": (str(place / "images" / "0.png"),)}
    run = make(place, out, max_train_steps=2, validation_steps=1, watch_samples=2, **shown)
    rows = map(json.loads, (distill(run) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if rules.SCORE in row]


def test_a_static_student_is_reported(place, tmp_path, monkeypatch, caplog):
    moving = watched(place, tmp_path / "moving")
    assert len(moving) == 3 and all(row[rules.PREFIX + rules.MOTION] > 0.2 for row in moving)
    monkeypatch.setattr(watching, "sample_student", frozen)
    caplog.clear()
    still = watched(place, tmp_path / "still")
    assert all(row[rules.PREFIX + rules.MOTION] == 0 for row in still)
    assert "videos are nearly static" in caplog.text


@pytest.fixture(scope="module")
def session(place, tmp_path_factory):
    shown = {"validation_prompts": ("rose",), "validation_images": (str(place / "images" / "0.png"),)}
    made = prepare(make(place, tmp_path_factory.mktemp("session") / "out", **shown))
    yield made
    made.accelerator.end_training()


def the_gap_is_that_of_free_frames(session) -> None:
    """The held frame is given to student and teacher alike, and has no error."""
    context, images = session.context(0), watching.validation_images(session, ["rose"])
    cond = session.batches.with_images(["rose"], images)
    x0 = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    holder = SimpleNamespace(session=session, prompts=["rose"])
    errors = watching.Watch._errors(holder, x0, [0], holder.session.batches.size)  # pyright: ignore[reportArgumentType]
    others = watching.Watch._errors(holder, other_beginning(x0), [0], holder.session.batches.size)  # pyright: ignore[reportArgumentType]
    assert errors == others and cond[HELD].shape[2] == 1
    name, level, top = rules.GAPS[0], rules.LEVELS[0], context.schedule.grid(1)[-1].item()
    eps, t = watching.validation_noise(session, [watching.FIXED]), torch.full((1,), level * top)
    with torch.no_grad():
        found = context.denoiser(TEACHER)(context.schedule.add_noise(x0, eps, t), t, cond).eps
    torch.testing.assert_close(errors[name].item(), (found - eps)[:, :, 1:].square().mean().item())


def test_the_gap_is_that_of_free_frames(session):
    the_gap_is_that_of_free_frames(session)
    errors = watching.Watch._errors
    with planted(errors, "free_part((est.eps - eps).square(), cond)", "(est.eps - eps).square()"):
        with pytest.raises(AssertionError):
            the_gap_is_that_of_free_frames(session)
