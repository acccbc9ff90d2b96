"""The training of the video teacher: its autoencoder's start, its loss, its batches, and a whole run in small."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from stepdistill.data.bundled import build, emoji, moving, video_autoencoder, video_teacher
from stepdistill.data.bundled.teacher import train_teacher
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.data.bundled.video_teacher import VideoLessons, text_states, video_loss


@cache
def pipeline() -> WanPipeline:
    torch.manual_seed(0)
    return build.wan(build.tokenizer(moving.motion_texts(), 800), build.wan_vae(4, (1, 2), 4, 2), 64, 1, 32)


@torch.no_grad()
def test_an_autoencoder_starts_frame_by_frame() -> None:
    torch.manual_seed(0)
    vae = build.wan_vae(4, (1, 2), 4, 2)
    x = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    video_autoencoder.inflate(vae)
    image = vae.encode(x, return_dict=False)[0].mode()
    latents = vae.encode(x.repeat(1, 1, 9, 1, 1), return_dict=False)[0].mode()
    torch.testing.assert_close(latents, image.repeat(1, 1, 5, 1, 1))
    frames = vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(frames, vae.decode(image, return_dict=False)[0].repeat(1, 1, 9, 1, 1))


def test_psnr_is_that_of_each_frame() -> None:
    x = torch.zeros(20, 3, 2, 4, 4)
    off = x + torch.tensor([0.02, 0.2]).view(1, 1, 2, 1, 1)
    vae: Any = SimpleNamespace(
        encode=lambda part, return_dict: (SimpleNamespace(mode=lambda: part),),
        decode=lambda part, return_dict: (off[: len(part)],),
    )
    assert video_autoencoder.psnr(vae, x) == [40.0, 20.0]


def told(held: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a network that answers zeros, and what it was told."""
    seen: dict[str, torch.Tensor] = {}

    def transformer(x: torch.Tensor, times: torch.Tensor, states: torch.Tensor, return_dict: bool) -> Any:
        seen.update(x=x, times=times, states=states)
        return (torch.zeros_like(x),)

    pipe: Any = SimpleNamespace(
        transformer=transformer,
        scheduler=pipeline().scheduler,
        tokenizer=pipeline().tokenizer,
        text_encoder=pipeline().text_encoder,
    )
    torch.manual_seed(1)
    x0 = torch.randn(64, 4, 5, 8, 8)
    seen["x0"] = x0
    return video_loss(pipe, x0, ["cat moving up"] * 64, held), seen


@pytest.mark.parametrize("held", [0, 1, 3])
def test_held_frames_are_clean_at_time_0_and_out_of_the_loss(held: int) -> None:
    loss, seen = told(held)
    times = seen["times"].view(64, 5, 4, 4)
    assert torch.equal(seen["x"][:, :, :held], seen["x0"][:, :, :held])
    assert (times[:, :held] == 0).all() and (times[:, held:] > 0).all()
    assert (times[:, held:] == times[:, -1:, :1, :1]).all()
    sigma = times[:, -1, 0, 0] / 1000
    # the free frames lie on the straight path, whose velocity eps - x0 has the variance 2
    eps = (seen["x"] - (1 - sigma).view(-1, 1, 1, 1, 1) * seen["x0"])[:, :, held:] / sigma.view(-1, 1, 1, 1, 1)
    assert abs(eps.std().item() - 1) < 0.02
    torch.testing.assert_close(loss, (eps - seen["x0"][:, :, held:]).square().mean(), rtol=1e-3, atol=0)
    assert abs(sigma.median().item() - 0.75) < 0.02  # the scheduler's shift of 3


def test_text_is_told_as_the_pipeline_tells_it() -> None:
    captions = ["animal mammal moving left", "lemon", ""]
    theirs, _ = pipeline().encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)
    torch.testing.assert_close(text_states(pipeline(), captions), theirs)


@pytest.fixture(scope="module", autouse=True)
def sheet() -> Iterator[None]:
    """The sheet is unpacked once."""
    whole = emoji.packed_sheet()
    with pytest.MonkeyPatch.context() as patch:
        for module in (video_autoencoder, video_teacher):
            patch.setattr(module, "packed_sheet", lambda: whole)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherSpec]:
    """Four drawings, a small random autoencoder, a small network."""
    folder, whole = tmp_path_factory.mktemp("teacher"), build.wan
    torch.manual_seed(0)
    build.wan_vae(4, (1, 2), 4, 2).save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving, "DRAWINGS", 1)
        patch.setattr(build, "wan", lambda tokens, vae: whole(tokens, vae, 64, 1, 32))
        yield small_spec(folder)


def small_spec(folder: Path) -> TeacherSpec:
    return TeacherSpec(
        pipeline="wan",
        output_dir=str(folder / "teacher"),
        vae_dir=str(folder / "vae"),
        images=1,
        train_batch_size=4,
        max_train_steps=4,
        checkpointing_steps=2,
        warmup=1,
    )


@pytest.fixture(scope="module")
def lessons(small: TeacherSpec, tmp_path_factory: pytest.TempPathFactory) -> VideoLessons:
    return VideoLessons(small, tmp_path_factory.mktemp("work"))


def test_batches_are_clips_images_and_held_beginnings(lessons: VideoLessons) -> None:
    assert lessons.latents.shape == (2, 4, 8, 1, 4, 5, 8, 8)
    batches = [lessons.batch(random.Random(seed)) for seed in range(600)]
    kinds = {"image": 0, "text": 0, "first": 0, "longer": 0}
    from_the_start = {row.float().numpy().tobytes() for row in lessons.latents[0].flatten(0, 2)}
    for x0, captions, held in batches:
        whole = x0.shape == (4, 4, 5, 8, 8)
        kind = "image" if x0.shape == (16, 4, 1, 8, 8) else ("text", "first", "longer")[min(held, 2)]
        kinds[kind] += 1
        assert len(captions) == len(x0) and held < 5 and (whole or held == 0)
        if kind == "text":
            assert {row.numpy().tobytes() for row in x0} <= from_the_start
    assert abs(kinds["image"] - 60) < 25 and abs(kinds["text"] - 300) < 45
    assert abs(kinds["first"] - 144) < 40 and abs(kinds["longer"] - 96) < 35
    words = [caption for _, captions, _ in batches for caption in captions]
    assert 0.08 < words.count("") / len(words) < 0.12


def test_a_caption_is_that_of_its_clip(lessons: VideoLessons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "latents", lessons.latents.clone())
    # each clip's first number says which drawing and motion it is of
    lessons.latents[..., 0, 0, 0, 0] = torch.arange(32.0).view(4, 8)[None, ..., None]
    for seed in range(100):
        x0, captions, _ = lessons.batch(random.Random(seed))
        for row, caption in zip(x0, captions, strict=True):
            drawing, motion = divmod(int(row[0, 0, 0, 0]), 8)
            words = caption.removesuffix(" " + moving.MOTIONS[motion])
            assert not any(words.endswith(other) for other in moving.MOTIONS)
            assert set(words.split()) <= set(f"{lessons.drawn[drawing].name} {lessons.drawn[drawing].subgroup}".split())


def test_a_run_that_was_cut_goes_on_to_the_same_teacher(small: TeacherSpec, tmp_path: Path) -> None:
    whole = train_teacher(small)
    shutil.copytree(whole.with_name("teacher.work"), tmp_path / "cut.work")
    (tmp_path / "cut.work" / "state.pt").unlink()
    half = TeacherSpec(**{**vars(small), "output_dir": str(tmp_path / "cut")})
    stopping = VideoLessons.loss

    def cut(self: VideoLessons, pipe: Any, rng: random.Random) -> torch.Tensor:
        if (tmp_path / "cut" / "training.json").exists():  # after the first checkpoint
            raise KeyboardInterrupt
        return stopping(self, pipe, rng)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(video_teacher.VideoLessons, "loss", cut)
        train_teacher(half)
    again = train_teacher(half)
    for part in ("transformer", "text_encoder"):
        (file,) = (whole / part).glob("*.safetensors")
        ours, theirs = load_file(file), load_file(again / part / file.name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    card = (whole / "README.md").read_text()
    assert "text-to-video" in card and "num_frames=9" in card and "4 steps" in card
    assert WanPipeline.from_pretrained(whole).config["expand_timesteps"]


def test_the_autoencoder_s_training_goes_on_and_scales_its_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = build.wan_vae
    monkeypatch.setattr(build, "wan_vae", lambda *_: whole(4, (1, 2), 4, 2))
    monkeypatch.setattr(video_autoencoder, "SAVED", 2)
    drawn = video_autoencoder.draw
    monkeypatch.setattr(video_autoencoder, "draw", lambda sheet, rng, n, *frames: drawn(sheet, rng, min(n, 2), *frames))
    spec = TeacherSpec(pipeline="wan", output_dir=str(tmp_path), vae_steps=2, vae_clip_steps=2)
    learn = video_autoencoder.reconstruction
    files = []
    for name, stop in (("whole", 9), ("cut", 3)):
        (tmp_path / name).mkdir()
        seen: list[torch.Size] = []

        def loss(vae: Any, x: torch.Tensor) -> Any:
            seen.append(x.shape)  # noqa: B023
            if len(seen) == stop:  # noqa: B023
                raise KeyboardInterrupt
            return learn(vae, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(video_autoencoder, "reconstruction", loss)
            if name == "cut":
                with pytest.raises(KeyboardInterrupt):
                    video_autoencoder.train_video_autoencoder(spec, tmp_path / name, tmp_path / name / "vae")
                stop = 9
            video_autoencoder.train_video_autoencoder(spec, tmp_path / name, tmp_path / name / "vae")
        assert [shape[2] for shape in seen] == [1, 1, 9, 9] + [9] * (name == "cut")
        files.append(load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "whole" / "vae")
    x = video_autoencoder.draw(emoji.packed_sheet(), random.Random("0 scale"), 2)
    latents = vae.encode(x, return_dict=False)[0].mode().detach()
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    scaled = (latents - mean) / std
    torch.testing.assert_close(scaled.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.01)
    torch.testing.assert_close(scaled.std((0, 2, 3, 4)), torch.ones(4), rtol=0, atol=0.01)
