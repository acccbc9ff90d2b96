"""LTX-Video's image to video: every step against the pipeline's own, what it draws, runs, and teachers refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracles.planted import Bug, bug_tests
from PIL import Image
from torch import Tensor

from stepdistill.core.denoise import HELD, guided, without_prompt
from stepdistill.core.errors import ConfigError
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data import ImageFolder
from stepdistill.families import held_image
from stepdistill.families.ltx_image import LTXImageToVideo
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.animation import image_of
from stepdistill.students.draw.call import generate, teacher_call
from stepdistill.students.draw.first_frame import continued
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.windows import long_video
from stepdistill.students.snippets import snippet
from stepdistill.students.write import write_student
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec

FAMILY: Any = tiny.CONTINUING["ltx_image"]
HEIGHT, WIDTH = 32, 64  # not square, and not the native size
SHAPE = (4, 3, 8, 16)
CAPTIONS = ["a rose", "octopus"]
SCHEDULE = Rectified(3.0)


@cache
def pipeline(certain: bool = False) -> Any:
    """With every weight away from its start.

    Args:
        certain: the autoencoder's distribution for an image is a point.
    """
    torch.manual_seed(0)
    pipe: Any = tiny.ltx_image()
    for p in pipe.transformer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if certain:
        out = pipe.vae.encoder.conv_out.conv
        out.weight.data[-1], out.bias.data[-1] = 0.0, -80.0
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def images() -> Tensor:
    """Two images (2, 3, H, W) uint8."""
    shape = (2, 3, HEIGHT, WIDTH)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def condition(pipe: Any) -> dict[str, Tensor]:
    """Of two captions and two images."""
    return {**FAMILY.condition(pipe, CAPTIONS), **FAMILY.first_frame(pipe, images() / 127.5 - 1)}


@cache
def called(eta: float, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Two starting noises, and the latents after each step of the pipeline from images and these, one a call."""
    pipe, sampler = pipeline(certain=True), Sampler(SCHEDULE.starts(3), eta)
    noises, steps = [], [[], []]
    for k, caption in enumerate(CAPTIONS):
        generator = torch.Generator().manual_seed(k)
        torch.randn(1, 4, 1, 8, 16, generator=generator)  # what the distribution of the image is sampled with
        noises.append(torch.randn(1, *SHAPE, generator=generator))

        def kept(_: object, i: int, t: Tensor, given: dict[str, Tensor], k: int = k) -> dict[str, Tensor]:
            steps[k].append(FAMILY.unpack(given["latents"], 8, 16).clone())
            return given

        scheduler, call = FAMILY.scheduler(pipe, sampler)
        saved: Any = json.loads(json.dumps(dict(scheduler.config)))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(saved)
        call |= FAMILY.arguments() | FAMILY.guidance(scale) | {"height": HEIGHT, "width": WIDTH}
        torch.manual_seed(7 + k)
        own = torch.Generator().manual_seed(k)
        shown = image_of(images()[k])
        pipe(shown, caption, generator=own, output_type="latent", callback_on_step_end=kept, **call)
    return torch.cat(noises), [torch.cat(parts) for parts in zip(*steps, strict=True)]


def all_steps_are_the_pipeline_s(eta: float, scale: float) -> None:
    """Both images in one batch, from the pipeline's own noises; all states, and the first frame in each."""
    pipe, (noise, steps) = pipeline(certain=True), called(eta, scale)
    cond, net, states = condition(pipe), pipe.transformer, []

    def denoise(x_t: Tensor, t: Tensor, cond: Any) -> Any:
        with torch.no_grad():
            est = estimate("flow", FAMILY.call(net, x_t, t, cond), x_t, t, SCHEDULE)
        return Estimate(*(torch.cat([cond[HELD], part[:, :, 1:]], 2) for part in est))

    def fresh(i: int) -> Tensor:
        rows = []
        for k in range(2):
            torch.manual_seed(7 + k)
            for _ in range(i + 1):
                row = FAMILY.fresh(noise[:1])
            rows.append(row)
        return torch.cat(rows)

    both = guided(denoise, FAMILY.unconditional(pipe), scale)
    sampler = Sampler(SCHEDULE.starts(3), eta)
    states = [few_step(both, SCHEDULE, sampler, noise, cond, fresh, taken=n) for n in (1, 2, 3)]
    for ours, theirs in zip(states, steps, strict=True):
        assert torch.allclose(theirs[:, :, :1], cond[HELD], atol=1e-5)  # the point has a width of e^-15
        assert (ours - theirs)[:, :, 1:].abs().max() / theirs.abs().max() < 1e-5
    assert (steps[-1] - noise)[:, :, 1:].abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_all_steps_are_the_pipeline_s(eta, scale):
    all_steps_are_the_pipeline_s(eta, scale)


def test_guidance_keeps_the_image_and_each_image_changes_the_whole_video():
    pipe, cond = pipeline(), condition(pipeline())
    assert torch.equal(without_prompt(FAMILY.unconditional(pipe), cond)[HELD], cond[HELD])
    noise, t = torch.randn(2, *SHAPE), torch.full((2,), 700.0)
    with torch.no_grad():
        one, two = (FAMILY.call(pipe.transformer, noise, t, c) for c in (cond, {**cond, HELD: cond[HELD].flip(0)}))
    assert (one - two).abs().amax((0, 1, 3, 4)).min() > 1e-4


# teachers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A folder of text to video, of the same parts."""
    folder = tmp_path_factory.mktemp("ltx")
    tiny.ltx(scaling=1.0).save_pretrained(folder)
    return folder


def of(folder: Path, **other: Any) -> LTXImageToVideo:
    return replace(FAMILY, pretrained_teacher_model=str(folder), **other)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scaling_factor": 0.8}, "a vae of .* with scaling_factor 0.8, expected 1.0"),
        ({"encoder_causal": False}, "a vae of .* with encoder_causal False, expected True"),
    ],
)
def test_autoencoders_that_the_pipeline_takes_otherwise_are_refused(teacher, tmp_path, changes, match):
    place = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    config = place / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ConfigError, match=match):
        of(place).check_files()


# students


def written(folder: Path, family: LTXImageToVideo, eta: float, size: tuple[int, int] = (HEIGHT, WIDTH)) -> float:
    """The difference between a student whose LoRA matters and its folder in a plain pipeline."""
    pipe = family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4, alpha=2), family.lora_targets(net))
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    options: dict[str, Any] = {"family": family, "pipe": pipe, "backbone": bone, "role": "student"}
    return write_student(folder, **options, method=DMD2(num_inference_steps=3, eta=eta), resolution=size)


@pytest.fixture(scope="module")
def students(teacher, tmp_path_factory) -> dict[float, Path]:
    """By eta."""
    made = {eta: tmp_path_factory.mktemp("student") for eta in (0.0, 1.0)}
    for eta, folder in made.items():
        assert written(folder, of(teacher), eta) < 1e-5
    return made


@pytest.fixture
def first(tmp_path) -> Path:
    image_of(images()[0]).save(tmp_path / "first.png")
    return tmp_path / "first.png"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_code_of_the_card_and_the_command_draw_the_same(students, first, monkeypatch, eta):
    """Of several prompts each is drawn alone: the pipeline takes one image a call."""
    monkeypatch.chdir(first.parent)
    code = snippet(read_contract(students[eta]), students[eta])
    assert "LTXImageToVideoPipeline.from_pretrained" in code and "frame_rate=4," in code
    exec(code, made := {})
    student = StudentPipeline.load(students[eta])
    drawn = [video for video, _ in student.draw(["red apple", "rose"], [0, 0], continued(student.call(), first))]
    for one, other in zip(drawn[0], made["frames"], strict=True):
        assert one.tobytes() == other.tobytes()
    assert drawn[1][-1].tobytes() != drawn[0][-1].tobytes()


@pytest.mark.parametrize("timed", [False, True])
def test_drawn_for_evaluation_from_the_image_and_the_noise_of_its_number(timed):
    """The image's latents are in the `latents` of the call; an autoencoder that is told a time takes no list."""
    pipe: Any = tiny.ltx_image(timed)
    call = teacher_call(FAMILY, pipe, 2, 3.0, "teacher")
    begun = images() / 255
    drawn, _ = generate(pipe, call, CAPTIONS, 0, size=(HEIGHT, WIDTH), images=begun)
    sampler, noise = Sampler(SCHEDULE.starts(2)), torch.stack([noise_of(0, i, SHAPE) for i in range(2)])

    def denoise(x_t: Tensor, t: Tensor, cond: Any) -> Any:
        est = estimate("flow", FAMILY.call(pipe.transformer, x_t, t, cond), x_t, t, SCHEDULE)
        return Estimate(*(torch.cat([cond[HELD], part[:, :, 1:]], 2) for part in est))

    with torch.no_grad():
        both = guided(denoise, FAMILY.unconditional(pipe), 3.0)
        ends = few_step(both, SCHEDULE, sampler, noise, condition(pipe))
        expected = (FAMILY.decode(pipe, ends) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert (drawn / 255 - expected).abs().max() < 0.51 / 255 + 1e-5


@pytest.mark.parametrize("overlap", [1, 3])
def test_windows_begin_with_whole_chunks(students, first, overlap):
    student = StudentPipeline.load(students[1.0])
    call = continued(student.call(), first)
    whole = long_video(student, ["red apple", "rose"], call, 2, overlap, seed=4).frames
    assert whole.shape == (5 + 5 - overlap, 3, HEIGHT, WIDTH)
    (plain,) = student.draw(["red apple"], [4], call.plus(output_type="pt"))
    assert torch.equal(whole[:5], plain.image.float())
    family: Any = student.family
    pipe = student.pipe
    cond = {
        **family.condition(pipe, ["rose"]),
        **family.first_frames(pipe, 2 * whole[None, 5 - overlap : 5].transpose(1, 2) - 1),
    }
    assert cond[HELD].shape[2] == 1 + (overlap - 1) // 2
    fresh = fresh_noise(4, 1)

    def denoise(x_t: Tensor, t: Tensor, cond: Any) -> Any:
        est = estimate("flow", family.call(pipe.transformer, x_t, t, cond), x_t, t, SCHEDULE)
        return Estimate(*(torch.cat([cond[HELD], part[:, :, cond[HELD].shape[2] :]], 2) for part in est))

    with torch.no_grad():
        start, drawn = noise_of(4, 1, SHAPE)[None], lambda _: torch.randn(1, *SHAPE, generator=fresh)
        ends = few_step(denoise, SCHEDULE, read_contract(students[1.0]).sampler(), start, cond, drawn)
        expected = (family.decode(pipe, ends) / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)[overlap:]
    assert torch.allclose(whole[5:], expected, atol=1e-4)
    with pytest.raises(ConfigError, match="an overlap of 2 frames, expected one of 1, 3"):
        long_video(student, ["rose"], call, 2, 2)


def test_a_run_from_captioned_images_alone(teacher, tmp_path):
    for i in range(2):
        Image.effect_noise((HEIGHT, HEIGHT), 60 + 20 * i).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("rose")
    spec = {"max_train_steps": 2, "train_batch_size": 2, "report_to": "none", "teacher_steps": 2}
    spec |= {"validation_prompts": ("rose",), "validation_images": (str(tmp_path / "0.png"),), "cache_latents": True}
    run = Run(
        family=of(teacher),
        method=DMD2(num_inference_steps=2, critic_steps=2, guidance_scale=3.0),
        data=ImageFolder(train_data_dir=str(tmp_path), resolution=HEIGHT, center_crop=True),
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(output_dir=str(tmp_path / "out"), **spec),
    )
    assert "base" in dry_run(run)
    out = distill(run)
    contract = read_contract(out)
    assert contract.proof is not None and contract.proof.difference < 1e-5 and contract.call["frame_rate"] == 4
    assert (out / "samples" / "grid.png").exists()


# planted bugs


def plain_steps() -> None:
    all_steps_are_the_pipeline_s(0.0, 3.0)


def renoised_steps() -> None:
    all_steps_are_the_pipeline_s(1.0, 1.0)


def started_from_the_image() -> None:
    test_drawn_for_evaluation_from_the_image_and_the_noise_of_its_number(False)


FRESH = "torch.cat([latents[:, :, :1], torch.randn_like(latents[:, :, 1:].contiguous())], 2)"
BUGS = {
    "the input is not held": Bug(LTXImageToVideo.call, "with_held(x_t, cond)", "x_t", plain_steps),
    "one time for all": Bug(held_image.held_times, "] = 0", "] *= 1", plain_steps),
    "the second frame is held, too": Bug(held_image.held_times, "shape[2]]", "shape[2] + 1]", plain_steps),
    "fresh noise of all frames": Bug(LTXImageToVideo.fresh, FRESH, "torch.randn_like(latents)", renoised_steps),
    "fresh noise in the order of tokens": Bug(
        LTXImageToVideo.fresh,
        FRESH,
        "self.unpack(torch.randn_like(self.pack(latents)), *latents.shape[-2:])",
        renoised_steps,
    ),
    "the pipeline is given noise alone": Bug(
        LTXImageToVideo.started, "with_held(noise, self.first_frame(pipe, images))", "noise", started_from_the_image
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError, ValueError)
