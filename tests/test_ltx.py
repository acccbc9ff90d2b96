"""LTX-Video: every step against the pipeline's own, levels, tokens, frames, and teachers that are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline
from oracles.planted import Bug, bug_tests
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.cli.main import main
from stepdistill.core.errors import ConfigError
from stepdistill.core.pixels import clips_of
from stepdistill.core.prediction import estimate_at_levels
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.data import Clips
from stepdistill.families import ltx_base
from stepdistill.families.ltx import LTX
from stepdistill.families.shift_terminal import shift_terminal
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.roles import Lora
from stepdistill.students.write import write_student
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.video_checks import check_clip_frames

FAMILY: Any = tiny.FAMILIES["ltx"]
PROMPTS = ["a rose", "octopus"]  # of different lengths: the mask matters
HEIGHT, WIDTH = 32, 64  # not square: rows and columns must not be exchanged


def ltx(timed: bool = False) -> Any:
    """A random pipeline, whose weights all have an effect."""
    torch.manual_seed(0)
    pipe: Any = tiny.ltx(timed)
    for p in pipe.transformer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, sampler: Sampler, w: float, noise: Tensor, **changed: object) -> list[Tensor]:
    """The pipeline's latents (B, C, F, h, w) after each step, with the scheduler of a saved config."""
    seen: list[Tensor] = []

    def kept(pipe, i, t, state):
        seen.append(FAMILY.unpack(state["latents"], HEIGHT // 4, WIDTH // 4))
        return state

    stock, call = FAMILY.scheduler(pipe, sampler)
    given: Any = json.loads(json.dumps(dict(stock.config)))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(given)
    call |= {"latents": FAMILY.pack(noise), "output_type": "latent", "height": HEIGHT, "width": WIDTH}
    torch.manual_seed(5)
    pipe(PROMPTS, **{**FAMILY.arguments(), **FAMILY.guidance(w), **call, **changed}, callback_on_step_end=kept)
    return seen


def ours(pipe: Any, sampler: Sampler, w: float, noise: Tensor) -> list[Tensor]:
    """`y = eps - x0` solved for x0 and eps, and `(1 - s) x0 + s eps`, or `(1 - s) x0 + s z`, by hand."""
    cond, null = FAMILY.condition(pipe, PROMPTS), FAMILY.unconditional(pipe)
    x, seen, levels = noise, [], [t / 1000 for t in sampler.timesteps] + [0.0]
    torch.manual_seed(5)
    for sigma_t, sigma_s in zip(levels, levels[1:], strict=False):
        t = torch.full((2,), 1000 * sigma_t)
        with torch.no_grad():
            y = FAMILY.call(pipe.transformer, x, t, cond)
            if w > 1:
                empty = {key: value.expand_as(cond[key]) for key, value in null.items()}
                u = FAMILY.call(pipe.transformer, x, t, empty)
                y = u + w * (y - u)
        x0, eps = estimate_at_levels("flow", y, x, torch.tensor([1 - sigma_t] * 2), torch.tensor([sigma_t] * 2))
        if sampler.eta:
            eps = FAMILY.unpack(torch.randn_like(FAMILY.pack(x)), *x.shape[-2:])
        x = (1 - sigma_s) * x0 + sigma_s * eps
        seen.append(x)
    return seen


def worst(sampler: Sampler, w: float, **changed: object) -> float:
    """The largest difference after any step, over the largest latent."""
    pipe = ltx()
    noise = torch.randn(2, *FAMILY.latent_shape(pipe, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(3))
    mine, others = ours(pipe, sampler, w, noise), theirs(pipe, sampler, w, noise, **changed)
    assert len(mine) == len(others) == len(sampler.timesteps)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize(("n", "eta"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_every_step_is_that_of_the_pipeline(n, eta, w):
    assert worst(Sampler(Rectified(3.0).starts(n), eta=eta), w) < 1e-5


def test_the_frame_rate_is_the_network_s():
    """At another frame rate than the family's the pipeline makes another video."""
    assert worst(Sampler(Rectified(3.0).starts(2)), 1.0, frame_rate=8) > 1e-3


def visited(config: Any, n: int) -> list[float]:
    """The timesteps that the pipeline leads a saved scheduler to."""
    pipe, given = ltx(), json.loads(json.dumps(dict(config)))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(given)
    pipe("a", height=32, width=32, num_frames=1, num_inference_steps=n, output_type="latent", guidance_scale=1.0)
    return pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0, 25.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_shift_alone_gives_the_trained_levels(shift, n):
    """The pipeline gives the even levels itself: neither `shift_terminal` nor a dynamic shift is left."""
    times = Rectified(shift).starts(n)
    for scheduler, call in (
        FAMILY.scheduler(ltx(), Sampler(times)),
        replace(FAMILY, shift=shift).solver(ltx(), n),
    ):
        config: Any = scheduler.config
        assert config["shift_terminal"] is None and not config["use_dynamic_shifting"]
        assert config["shift"] == pytest.approx(shift if n > 1 else 1.0) and call == {"num_inference_steps": n}
        assert visited(config, n) == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize("times", [(1000.0, 900.0), (1000.0, 757.0, 522.0)])
def test_two_levels_may_be_any_and_three_most(times):
    assert visited(FAMILY.scheduler(ltx(), Sampler(times))[0].config, len(times)) == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize(
    "times", [(999.0,), (999.0, 500.0), (1000.0, 900.0, 300.0), (1000.0, 937.5, 833.33, 700.0), (1000.0, 0.0)]
)
def test_other_levels_are_refused(times):
    with pytest.raises(ConfigError, match="up to two that begin at 1000, or evenly spaced ones with a shift"):
        FAMILY.scheduler(ltx(), Sampler(times))


def test_a_shift_that_depends_on_the_size_is_refused_with_its_value_at_the_family_s():
    """The hub's scheduler has one. The value is what the pipeline would take."""
    dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05}
    scheduler = FlowMatchEulerDiscreteScheduler(**dynamic, shift_terminal=0.1)
    family = LTX(pretrained_teacher_model="a/teacher")
    mu = 0.95 + (2.05 - 0.95) * (21 * 16 * 22 - 1024) / (4096 - 1024)
    told = f"set family.shift; the scheduler's is {math.exp(mu):.3g} at 161 frames of 512 x 704"
    with pytest.raises(ConfigError, match=told):
        family.schedule(scheduler)
    assert replace(family, shift=6.0).schedule(scheduler).shift == 6.0
    assert family.schedule(FlowMatchEulerDiscreteScheduler(shift=5.0)).shift == 5.0


# frames and tokens


def test_frames_of_pixels_and_of_latents():
    pipe = ltx()
    assert FAMILY.latent_shape(pipe, 32, 96) == (4, 3, 8, 24)
    assert replace(FAMILY, num_frames=1).latent_shape(pipe, 32, 32) == (4, 1, 8, 8)
    pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio = 8, 32  # those of the hub
    assert replace(FAMILY, num_frames=161).latent_shape(pipe, 512, 704) == (4, 21, 16, 22)
    for frames, expected in ((10, "9 or 17"), (8, "1 or 9"), (160, "153 or 161")):
        with pytest.raises(ConfigError, match=f"num_frames {frames}, expected {expected}"):
            replace(FAMILY, num_frames=frames).latent_shape(pipe, 64, 64)
    for height, width in ((32, 48), (16, 32)):
        with pytest.raises(ConfigError, match="multiples of 32"):
            FAMILY.latent_shape(pipe, height, width)


def the_tokens_are_the_pipeline_s() -> None:
    latents = torch.randn(2, 4, 3, 5, 7)
    packed = FAMILY.pack(latents)
    assert packed.shape == (2, 105, 4) and packed.is_contiguous()
    assert torch.equal(packed, LTXPipeline._pack_latents(latents))
    assert torch.equal(FAMILY.unpack(packed, 5, 7), latents)


def test_tokens():
    the_tokens_are_the_pipeline_s()


class Still(FlowMatchEulerDiscreteScheduler):
    """Leaves the latents as they are."""

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        return (sample,)


def latents_are_the_pipeline_s(timed: bool = False) -> None:
    """The decoder is the pipeline's own; the code of an image alone is the first latent frame of a video."""
    pipe, generator, family = ltx(timed), torch.Generator().manual_seed(0), replace(FAMILY, decode_timestep=0.3)
    video = torch.rand(2, 3, 5, 32, 32, generator=generator) * 2 - 1
    latents, vae = family.encode(pipe, video), pipe.vae
    coded = vae.encode(video).latent_dist.mode()
    expected = LTXPipeline._normalize_latents(coded, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    assert torch.allclose(latents, expected, atol=1e-6) and latents.shape == (2, 4, 3, 8, 8)
    still = replace(family, num_frames=1)
    assert torch.allclose(still.encode(pipe, video[:, :, 0]), latents[:, :, :1], atol=1e-6)
    pipe.scheduler = Still()
    call = family.arguments() | {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}
    made = pipe(PROMPTS, latents=family.pack(latents), output_type="pt", **call)[0]
    with torch.no_grad():
        pixels = family.decode(pipe, latents)
    assert torch.allclose(clips_of(pixels / 2 + 0.5).clamp(0, 1), made, atol=1e-6)
    if timed:  # the time reaches the decoder
        with torch.no_grad():
            assert (replace(family, decode_timestep=0.0).decode(pipe, latents) - pixels).abs().max() > 1e-3


@pytest.mark.parametrize("timed", [False, True])
def test_latents_are_those_of_the_pipeline_and_an_image_is_the_first_frame(timed):
    latents_are_the_pipeline_s(timed)


def test_samples_of_other_frames_are_refused():
    pipe = ltx()
    with pytest.raises(ConfigError, match="samples of 1 frames, expected 5"):
        FAMILY.encode(pipe, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="4 frames to encode, expected a multiple of 2, and one: LTX-Video's encoder"):
        replace(FAMILY, num_frames=4).encode(pipe, torch.zeros(1, 3, 4, 32, 32))


# teachers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ltx")
    ltx().save_pretrained(folder)
    return folder


def edited(teacher: Path, place: Path, file: str, changes: dict[str, object]) -> Path:
    copy = Path(shutil.copytree(teacher, place / "teacher"))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return copy


@pytest.mark.parametrize("kind", ["LTXImageToVideoPipeline", "LTXConditionPipeline"])
def test_folders_of_the_other_pipelines_have_the_same_parts(teacher, tmp_path, kind):
    place = edited(teacher, tmp_path, "model_index.json", {"_class_name": kind})
    family = replace(FAMILY, pretrained_teacher_model=str(place))
    family.check_files()
    pipe = family.load()
    assert type(pipe) is LTXPipeline and torch.equal(pipe.vae.latents_std, torch.tensor([0.9, 1.1, 1.3, 0.7]))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("transformer/config.json", {"patch_size": 2}, "patch_size 2, expected 1"),
        ("transformer/config.json", {"in_channels": 8}, "in_channels 8, expected 4"),
        ("transformer/config.json", {"caption_channels": 64}, "caption_channels 64, expected 32"),
        ("vae/config.json", {"in_channels": 12}, "in_channels 12, expected 3"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "a WanPipeline in .*, expected a LTXPipeline"),
    ],
)
def test_teachers_of_other_kinds_are_refused(teacher, tmp_path, file, changes, match):
    place = edited(teacher, tmp_path, file, changes)
    with pytest.raises(ConfigError, match=match):
        replace(FAMILY, pretrained_teacher_model=str(place)).check_files()


def test_a_single_file_without_its_text_encoder_is_refused(tmp_path):
    """The published files hold the network and the autoencoder alone."""
    names = ("model.diffusion_model.patchify_proj.weight", "vae.decoder.conv_in.conv.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "ltx.safetensors")
    family = replace(FAMILY, pretrained_teacher_model=str(tmp_path / "ltx.safetensors"))
    with pytest.raises(ConfigError, match="no tensor whose name begins with text_encoders.*as a folder or hub id"):
        family.check_files()


# what a student makes, and what it learns from


def test_files_have_the_frame_rate_that_the_network_is_told(tmp_path):
    """Of the command, and of the code in the card; a rate that is asked for counts more."""
    pipe = ltx()
    pipe.save_pretrained(tmp_path / "teacher")
    family, bone = replace(FAMILY, pretrained_teacher_model=str(tmp_path / "teacher")), tiny.backbone("ltx", pipe)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    method = Consistency(num_ddim_timesteps=4, guidance_scale=1.0)
    options: dict[str, Any] = {"family": family, "pipe": pipe, "backbone": bone, "role": "student", "method": method}
    write_student(tmp_path / "student", **options, resolution=(32, 32))
    card = (tmp_path / "student" / "README.md").read_text()
    assert "duration=250," in card and "fps=4)" in card and "frame_rate=4," in card and "num_frames=5," in card
    for asked, shown in (([], 250), (["--frame-rate", "10"], 100)):
        main(["generate", str(tmp_path / "student"), "a", "-o", str(tmp_path / "out"), "--overwrite", *asked])
        with Image.open(tmp_path / "out" / "00000.webp") as animation:
            animation.load()
            assert animation.info["duration"] == shown


def test_clips_have_the_frame_rate_that_the_network_is_told(tmp_path):
    train = TrainSpec(output_dir=str(tmp_path / "out"), max_train_steps=1)
    clips = Clips(train_data_dir=str(tmp_path), num_frames=5, resolution=32, frame_rate=8.0)
    run = Run(family=FAMILY, method=Consistency(), data=clips, train=train)
    for rate in (8.0, None):  # without one, each file keeps its own
        with pytest.raises(ConfigError, match=f"data.frame_rate {rate}, expected 4, as family.frame_rate says"):
            check_clip_frames(replace(run, data=replace(clips, frame_rate=rate)))
    check_clip_frames(replace(run, data=replace(clips, frame_rate=4.0)))


# planted bugs


def guided_steps() -> None:
    assert worst(Sampler(Rectified(3.0).starts(2)), 3.0) < 1e-5


def decoded() -> None:
    latents_are_the_pipeline_s()


def decoded_at_a_time() -> None:
    latents_are_the_pipeline_s(timed=True)


def trained_levels() -> None:
    test_a_shift_alone_gives_the_trained_levels(3.0, 4)


NETWORK, SCALE, SIDES = LTX.velocity, "(time / self.frame_rate, space, space)", "height=height,\n        width=width"
TOKENS, STATISTICS = the_tokens_are_the_pipeline_s, "(pipe.vae.latents_mean, pipe.vae.latents_std)"
BUGS = {
    "the rope is in frames": Bug(NETWORK, SCALE, "(time, space, space)", guided_steps),
    "the rope is in latents": Bug(NETWORK, SCALE, "(time / self.frame_rate, 1.0, 1.0)", guided_steps),
    "factors are exchanged": Bug(NETWORK, "time, space =", "space, time =", guided_steps),
    "the mask is dropped": Bug(NETWORK, 'cond["mask"]', 'torch.ones_like(cond["mask"])', guided_steps),
    "sides are exchanged": Bug(NETWORK, SIDES, "height=width,\n        width=height", guided_steps),
    "columns first": Bug(LTX.pack, "latents.flatten(2)", "latents.transpose(3, 4).flatten(2)", TOKENS),
    "frames last": Bug(LTX.pack, "latents.flatten(2)", "latents.permute(0, 1, 3, 4, 2).flatten(2)", TOKENS),
    "noise in another order": Bug(LTX.pack, ".contiguous()", "", TOKENS),
    "mean and deviation are exchanged": Bug(
        ltx_base._statistics, STATISTICS, "(pipe.vae.latents_std, pipe.vae.latents_mean)", decoded
    ),
    "scaled the other way": Bug(LTX.decode, "std / pipe", "std * pipe", decoded),
    "not scaled": Bug(LTX.encode_frames, "* pipe.vae.config.scaling_factor", "", decoded),
    "the decoder is told another time": Bug(LTX.decode, "self.decode_timestep)", "0.0)", decoded_at_a_time),
    "noise is decoded": Bug(LTX.arguments, '_scale": 0.0', '_scale": None', decoded_at_a_time),
    "the grid ends lower": Bug(LTX.scheduler, "1 / n)", "1 / (n + 1))", trained_levels),
    "Wan's grid": Bug(shift_terminal, "if last is not None", "if False", trained_levels),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(
    BUGS, ConfigError, RuntimeError, TypeError
)
