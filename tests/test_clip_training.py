"""Clips in a run: batches, caches, and what is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clips import caption, moving, write_frames
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image
from tiny import FAMILIES, SIDE, pipeline
from transformers import UMT5EncoderModel

from stepdistill.core.errors import ConfigError, DataError
from stepdistill.core.random import sample_rng
from stepdistill.data import Clips, FixedCrops, ImageFolder, Stream
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.cache.precompute import precompute
from stepdistill.training.checks import check_run
from stepdistill.training.distill import dry_run
from stepdistill.training.loop import training_loop
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare

LCM = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, ema_decay=None, loss_type="l2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher of videos and five clips of 9 frames."""
    folder = tmp_path_factory.mktemp("clips")
    pipeline("wan").save_pretrained(folder / "wan")
    for i in range(5):
        rolled = moving(9 + i, SIDE + 4, SIDE + 9)[i:]
        caption(write_frames(folder / "clips" / str(i), rolled), f"clip {i}")
    return folder


def run_of(place: Path, out: Path, num_frames: int = 5, name: str = "wan", **train) -> Run:
    given = {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none"}
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / name))
    data = Clips(train_data_dir=str(place / "clips"), num_frames=num_frames, resolution=SIDE)
    settings = TrainSpec(**{"output_dir": str(out)} | given | train)
    return Run(family=family, method=LCM, data=data, lora=LoraSpec(rank=4), train=settings)


def latents(run: Run) -> list[torch.Tensor]:
    """Those of the first three steps."""
    read = prepare(run).batches.steps(run.data, 0, 0, 1)
    found = [batch.latents for _ in range(3) for batch in next(read)]
    return [each for each in found if each is not None]


def encoded(place: Path, run: Run) -> list[torch.Tensor]:
    """The same by the pipeline, sample by sample."""
    pipe = WanPipeline.from_pretrained(place / "wan")
    source = FixedCrops(source=run.data) if run.train.cache_latents else run.data
    stream, found = Stream(source, 2, run.train.seed), []
    for step in range(3):
        samples = [
            source.sample(item, sample_rng(run.train.seed, 2 * step + j)) for j, item in enumerate(stream.items(step))
        ]
        pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None])
        assert pixels.shape == (2, 3, 5, SIDE, SIDE)
        found.append(torch.cat([run.family.encode(pipe, row) for row in pixels.split(1)]))
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_batches_hold_the_latents_of_the_drawn_parts(place, tmp_path, cached):
    run = run_of(place, tmp_path, cache_latents=cached)
    found, expected = latents(run), encoded(place, run)
    assert [each.shape for each in found] == [(2, 4, 3, 8, 8)] * 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_cache_on_disk_gives_the_same_without_an_encoder(place, tmp_path, monkeypatch):
    plain = latents(run_of(place, tmp_path / "a", cache_latents=True))
    kept = run_of(place, tmp_path / "b", cache_latents=True, cache_dir=str(tmp_path / "kept"))
    filled = precompute(kept)
    assert (filled.images, filled.lacking) == (5, 0)
    for kind in (AutoencoderKLWan, UMT5EncoderModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *given, **named: pytest.fail("loaded"))
    assert all(map(torch.equal, plain, latents(kept)))


def test_another_frame_rate_has_another_cache(place, tmp_path):
    kept = str(tmp_path / "kept")
    precompute(run_of(place, tmp_path / "a", cache_latents=True, cache_dir=kept))
    run = run_of(place, tmp_path / "b", cache_latents=True, cache_dir=kept)
    slower = replace(run, data=replace(run.data, frame_rate=8.0))
    session = prepare(slower)
    session.batches.fixed(slower.data)
    assert session.batches.latents is not None and len(session.batches.latents.store.missing(["0"])) == 1


def test_a_student_trains_on_clips(place, tmp_path):
    run = run_of(place, tmp_path)
    check_run(run)
    session = prepare(run)
    assert training_loop(session, Optimizers(session.backbone, run.train).declare(run.method).build())
    assert any(value.abs().max() > 0 for key, value in session.backbone.state("student").items() if "lora_B" in key)


def test_numbers_of_frames_are_compared_before_anything_is_loaded(place, tmp_path):
    with pytest.raises(ConfigError, match="num_frames 9 of Clips with family Wan, expected 5, as family.num_frames"):
        check_run(run_of(place, tmp_path, num_frames=9))
    run = run_of(place, tmp_path)
    wrapped = replace(run, data=FixedCrops(source=replace(run.data, num_frames=3)))
    with pytest.raises(ConfigError, match="num_frames 3 of Clips"):
        check_run(wrapped)
    images = replace(run, family=replace(FAMILIES["sd"], pretrained_teacher_model="tiny-sd"))
    with pytest.raises(ConfigError, match="num_frames 5 of Clips with family StableDiffusion, expected images"):
        check_run(images)


def test_clips_that_are_all_too_short_are_refused_before_anything_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *given, **named: pytest.fail("loaded"))
    run = run_of(place, tmp_path / "out")
    longer = replace(run, family=replace(run.family, num_frames=17), data=replace(run.data, num_frames=17))
    said = (
        r"^got 5 clips, none of which can be used, the first .*clips/0: 9 frames, fewer than num_frames 17, expected "
        r"clips of 17 frames: a sample has so many; use longer clips, lower data.num_frames and family.num_frames, or "
        "raise data.frame_rate$"
    )
    for refused in (longer, replace(longer, data=FixedCrops(source=longer.data))):
        with pytest.raises(DataError, match=said):
            check_run(refused)
    with pytest.raises(DataError, match="none of which can be used"):
        dry_run(longer)
    assert not any(tmp_path.iterdir())
    for name, frames in {"a": 9, "b": 17}.items():
        caption(write_frames(tmp_path / "clips" / name, moving(frames, SIDE, SIDE)))
    check_run(replace(longer, data=replace(longer.data, train_data_dir=str(tmp_path / "clips"))))


def test_images_are_no_videos(place, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / "a.png")
    caption(tmp_path / "images" / "a.png")
    run = run_of(place, tmp_path)
    images = replace(run, data=ImageFolder(train_data_dir=str(tmp_path / "images"), resolution=SIDE))
    with pytest.raises(ConfigError, match="images from ImageFolder with family.num_frames 5, expected clips: "):
        check_run(images)
    check_run(replace(images, family=replace(run.family, num_frames=1)))
