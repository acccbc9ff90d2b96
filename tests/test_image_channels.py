"""Wan 2.1's image to video: the image is further channels of the network's input, and tokens of a CLIP."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from oracles.planted import Bug, bug_tests
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core.denoise import guided, without_prompt
from stepdistill.core.errors import ConfigError
from stepdistill.core.prediction import estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data import FixedCrops, ImageFolder, Latents, Stream, TeacherSamples
from stepdistill.data.latents import FILE
from stepdistill.families.shift_terminal import shift_terminal
from stepdistill.families.wan_base import WanBase
from stepdistill.families.wan_concat import IMAGE, TOKENS, WanConcatImageToVideo
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.regression import Regression
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.meta import is_shell
from stepdistill.networks.roles import Copy, Lora, LoraSpec
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.animation import image_of
from stepdistill.students.draw.call import generate, teacher_call
from stepdistill.students.draw.first_frame import continued
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.windows import long_video
from stepdistill.students.single import in_memory
from stepdistill.students.snippets import snippet
from stepdistill.students.write import write_student
from stepdistill.training.cache.precompute import precompute
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare

FAMILY = tiny.CONTINUING["wan_concat"]
SHAPE = (4, 3, 8, 8)
TIMES = Rectified(5.0).starts(3)
CAPTIONS = ["red apple", "a cat"]


@cache
def pipeline(clip: bool) -> WanImageToVideoPipeline:
    """With every weight away from its start, so that nothing is zero."""
    torch.manual_seed(0)
    pipe = tiny.wan_concat(clip)
    for part in (pipe.transformer, *([pipe.image_encoder] if clip else [])):
        for p in part.parameters():
            p.data += 0.05 * torch.randn_like(p)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def images() -> Tensor:
    """Two images (2, 3, 32, 32) uint8."""
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def condition(pipe: WanImageToVideoPipeline) -> Mapping[str, Tensor]:
    """Of two captions and two images."""
    return {**FAMILY.condition(pipe, CAPTIONS), **FAMILY.first_frame(pipe, images() / 127.5 - 1)}


@cache
def called(clip: bool, scale: float) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Two starting noises, and time and latents of each step of the pipeline from them, one image a call."""
    pipe, noise = pipeline(clip), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    steps: list[list[Tensor]] = [[], []]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**shift_terminal(TIMES))
    for k, caption in enumerate(CAPTIONS):

        def kept(_: object, i: int, t: Tensor, given: dict[str, Tensor], k: int = k) -> dict[str, Tensor]:
            steps[k].append(given["latents"].clone())
            return given

        size = {"height": 32, "width": 32, "num_inference_steps": len(TIMES), "output_type": "latent"}
        arguments = FAMILY.arguments() | size | {"guidance_scale": scale, "latents": noise[k : k + 1]}
        pipe(image_of(images()[k]), caption, callback_on_step_end=kept, **arguments)
    return noise, [(t, torch.cat(parts)) for t, *parts in zip(TIMES, *steps, strict=True)]


def all_steps_are_the_pipeline_s(clip: bool, scale: float) -> None:
    """Each step from the pipeline's own state, both images in one batch of several times; then the whole way."""
    pipe, (noise, steps) = pipeline(clip), called(clip, scale)
    cond, schedule, net = condition(pipe), Rectified(5.0), FAMILY.network(pipeline(clip))

    def denoise(x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return estimate("flow", FAMILY.call(net, x_t, t, cond), x_t, t, schedule)

    both = guided(denoise, FAMILY.unconditional(pipe), scale)
    states = torch.cat([noise, *(x for _, x in steps[:-1])])
    t = torch.tensor(TIMES).repeat_interleave(2)
    est = both(states, t, {key: torch.cat([value] * len(TIMES)) for key, value in cond.items()})
    ends = torch.tensor([*TIMES[1:], 0.0]).repeat_interleave(2)
    sigma = (ends / 1000).view(-1, 1, 1, 1, 1)
    largest = steps[-1][1].abs().max()
    theirs = torch.cat([x for _, x in steps])
    assert ((1 - sigma) * est.x0 + sigma * est.eps - theirs).abs().max() / largest < 1e-5
    made = few_step(both, schedule, Sampler(TIMES), noise, cond, lambda i: noise)
    assert (made - steps[-1][1]).abs().max() / largest < 1e-5
    assert (steps[-1][1][0] - noise[0]).abs().max() > 0.1


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_all_steps_are_the_pipeline_s(clip, scale):
    all_steps_are_the_pipeline_s(clip, scale)


def guided_steps() -> None:
    all_steps_are_the_pipeline_s(True, 4.0)


def test_the_network_sees_the_image_in_both_calls_of_guidance():
    pipe, cond = pipeline(True), condition(pipeline(True))
    null = without_prompt(FAMILY.unconditional(pipe), cond)
    assert torch.equal(null[IMAGE], cond[IMAGE]) and torch.equal(null[TOKENS], cond[TOKENS])
    assert not torch.equal(null["states"], cond["states"])
    noise, t, net = called(True, 1.0)[0], torch.full((2,), 700.0), FAMILY.network(pipe)
    for key in (IMAGE, TOKENS):  # each alone changes the whole video
        other = {**cond, key: cond[key].flip(0)}
        with torch.no_grad():
            apart = FAMILY.call(net, noise, t, cond) - FAMILY.call(net, noise, t, other)
        assert apart.abs().amax((0, 1, 3, 4)).min() > 1e-4, key


def test_every_lora_and_every_weight_of_a_smaller_network_is_reached():
    for clip in (True, False):
        pipe = tiny.wan_concat(clip)
        net = FAMILY.network(pipe)
        targets = FAMILY.lora_targets(net)
        assert any(name.endswith("add_v_proj") for name in targets) == clip and "patch_embedding" not in targets
        bone = Backbone(net, LoraSpec(rank=2), targets, narrow=FAMILY.narrow)
        bone.add("student", Lora())
        tiny.awake(bone, "student")
        bone.add("slim", Copy(width=0.5))
        for role in ("student", "slim"):
            with bone.use(role) as used:
                cond = condition(pipe)
                FAMILY.call(used, torch.randn(2, *SHAPE), torch.tensor([500.0, 300.0]), cond).square().sum().backward()
            without = [key for key, p in bone.parameters_of(role).items() if p.grad is None or not p.grad.any()]
            assert without == [], (role, without)


# teachers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    pipeline(True).save_pretrained(folder)
    return folder


def of(folder: Path | str, **other: Any) -> WanConcatImageToVideo:
    return replace(FAMILY, pretrained_teacher_model=str(folder), **other)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps True, expected False: its network holds"),
        ("model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio 0.9, expected None: it has two networks"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "a WanPipeline in .*, expected a WanImageToVideoPipeline"),
        ("model_index.json", {"image_encoder": [None, None]}, "without image_encoder, expected .*tokens of the image"),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPTextModel"]}, "expected a CLIPVisionModel"),
        ("transformer/config.json", {"in_channels": 4}, "in_channels 4, expected 10"),
        ("transformer/config.json", {"image_dim": 16}, "image_dim 16, expected 8"),
    ],
)
def test_teachers_of_other_kinds_are_refused(teacher, tmp_path, file, changes, match):
    place = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    config = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=match):
        of(place).check_files()


def test_another_length_of_prompts_is_refused_where_the_network_counts_on_it(teacher, tmp_path, monkeypatch):
    """Diffusers takes it without a word, and takes tokens of the prompt for those of the image."""
    with pytest.raises(ConfigError, match="max_sequence_length 226, expected 512: the network takes all tokens but"):
        of(teacher, max_sequence_length=226).check_files()
    pipeline(False).save_pretrained(tmp_path)
    of(tmp_path, max_sequence_length=226).check_files()
    monkeypatch.setattr("stepdistill.families.parts.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="without the package ftfy"):
        of(teacher).check_files()


def test_a_lora_of_text_to_video_leaves_the_image_s_layers_and_that_is_said(teacher, tmp_path, caplog):
    """Diffusers fills what it lacks with zeros, which is the same."""
    bone = tiny.backbone("wan", tiny.pipeline("wan"))
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    config = bone.net.peft_config["student"].to_dict()
    tiny.FAMILIES["wan"].save_lora(tmp_path, bone.state("student"), config)
    family = of(teacher, teacher_loras=(str(tmp_path),))
    with caplog.at_level(logging.WARNING):
        ours = FAMILY.network(family.load())
    assert "has no layers add_k_proj or add_v_proj, which attend to the image" in caplog.text
    plain = WanImageToVideoPipeline.from_pretrained(teacher)
    cond, x_t, t = condition(pipeline(True)), torch.randn(2, *SHAPE), torch.tensor([500.0, 900.0])
    with torch.no_grad():
        before = FAMILY.call(plain.transformer, x_t, t, cond)
        plain.load_lora_weights(tmp_path)
        theirs, made = FAMILY.call(plain.transformer, x_t, t, cond), FAMILY.call(ours, x_t, t, cond)
    assert torch.allclose(made, theirs, atol=1e-5) and (theirs - before).abs().max() > 0.01


# students


def written(folder: Path, family: WanConcatImageToVideo, size: tuple[int, int], **method: Any) -> float:
    """A student whose LoRA matters; returns the difference that its proof found."""
    pipe = family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4, alpha=2), family.lora_targets(net))
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    options = {"family": family, "pipe": pipe, "backbone": bone, "role": "student"}
    return write_student(folder, **options, method=DMD2(**method), resolution=size)


@pytest.mark.parametrize(("clip", "eta"), [(True, 0.0), (True, 1.0), (False, 1.0)])
def test_a_plain_pipeline_continues_an_image_as_in_training(tmp_path, clip, eta):
    pipeline(clip).save_pretrained(tmp_path / "teacher")
    found = written(tmp_path / "student", of(tmp_path / "teacher"), (32, 48), num_inference_steps=3, eta=eta)
    assert found < 1e-5


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    written(folder, of(teacher), (32, 48), num_inference_steps=2)
    return folder


def test_the_code_of_the_card_and_generate_make_the_same_video(student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_of(images()[0]).resize((48, 32)).save("first.png")
    exec(snippet(read_contract(student), student), made := {})
    cli.main(["generate", str(student), "red apple", "--image", "first.png", "-o", "out"])
    with Image.open("out/00000.webp") as animation:
        frames = [np.asarray(animation.convert("RGB")) for _ in ImageSequence.Iterator(animation)]
    theirs = [np.asarray(frame) for frame in made["frames"]]
    kept = [frame for k, frame in enumerate(theirs) if k == 0 or (frame != theirs[k - 1]).any()]
    assert len(theirs) == 5 and all((a == b).all() for a, b in zip(frames, kept, strict=True))


def test_evaluation_gives_the_pipeline_images_and_not_tensors(teacher):
    """Of a tensor Diffusers' processor of CLIP divides the values by 255 once more."""
    family, pipe = of(teacher), pipeline(True)
    call = teacher_call(family, pipe, 2, 3.0, "teacher")
    ours = generate(pipe, call, CAPTIONS, 0, images=images() / 255)[0]
    own, pipe.scheduler = pipe.scheduler, call.scheduler
    for k, caption in enumerate(CAPTIONS):
        begun = {"image": image_of(images()[k]), "prompt": caption, "latents": noise_of(0, k, SHAPE)[None]}
        theirs = pipe(**begun, height=32, width=32, output_type="pt", **call.arguments).frames[0]
        assert ((theirs.clamp(0, 1) * 255).round().to(torch.uint8) == ours[k]).all()
    pipe.scheduler = own


def test_a_window_goes_on_from_the_last_frame_alone(student, tmp_path):
    drawer, file = StudentPipeline.load(student), tmp_path / "first.png"
    image_of(images()[0]).resize((48, 32)).save(file)
    family, call = drawer.family, continued(drawer.call(), file)
    whole, drift = long_video(drawer, CAPTIONS, call, 2, 1, seed=4)
    assert whole.shape == (9, 3, 32, 48)
    (plain,) = drawer.draw(CAPTIONS[:1], [4], call.plus(output_type="pt"))
    assert torch.equal(whole[:5], plain.image.float())
    backbone, schedule = in_memory(student, read_contract(student), family)[1], family.schedule(drawer.native)
    begun, fresh = family.first_frame(drawer.pipe, 2 * whole[4:5] - 1), fresh_noise(4, 1)  # pyright: ignore[reportAttributeAccessIssue]
    ends = few_step(
        Denoiser(backbone, "student", schedule, "flow", family.call, grad=False),
        schedule,
        read_contract(student).sampler(),
        noise_of(4, 1, (4, 3, 8, 12))[None],
        {**family.condition(drawer.pipe, CAPTIONS[1:]), **begun},
        lambda _: torch.randn(1, 4, 3, 8, 12, generator=fresh),
    )
    with torch.no_grad():
        expected = (family.decode(drawer.pipe, ends) / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)[1:]
    assert torch.allclose(whole[5:], expected, atol=1e-4)
    new = ends[:, :, 1:].flatten(2)  # the first latent frame is generated, too, and is not in the video
    assert torch.allclose(drift.means[1], new.mean(2)[0], atol=1e-4)
    assert torch.allclose(drift.spreads[1], new.std(2, correction=0)[0], atol=1e-4)
    with pytest.raises(ConfigError, match="an overlap of 5 frames, expected one of 1: .* its network sees"):
        long_video(drawer, CAPTIONS, call, 2, 5)


# runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for i in range(4):
        Image.effect_noise((40, 36), 60 + 10 * i).convert("RGB").save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("red apple")
    return place


def run_of(teacher: Path, out: Path, method: Any, data: Any, **train: Any) -> Run:
    spec = {"max_train_steps": 2, "train_batch_size": 2, "report_to": "none", "teacher_steps": 2} | train
    return Run(
        family=of(teacher),
        method=method,
        data=data,
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(output_dir=str(out), **spec),
    )


def test_a_run_from_cached_images_loads_neither_autoencoder_nor_clip(teacher, folder, tmp_path):
    """What the network sees of the images is in the cache, for a length of videos and an image encoder."""
    data = ImageFolder(train_data_dir=str(folder), resolution=32)
    kept = {"cache_latents": True, "cache_dir": str(tmp_path / "kept")}
    run = run_of(teacher, tmp_path / "out", DMD2(num_inference_steps=2, critic_steps=2), data, **kept)
    said = dry_run(run)
    assert "image_encoder" in said and "base" in said
    assert (precompute(run).images, precompute(run).lacking) == (4, 0)
    session = prepare(run)
    (part,) = next(session.batches.steps(run.data, 0, 0, 1))
    assert is_shell(session.pipe.vae) and is_shell(session.pipe.image_encoder)
    assert part.latents is None and part.shape == SHAPE and set(part.cond) == {"states", IMAGE, TOKENS}
    item = Stream(FixedCrops(source=data), 2, run.train.seed).items(0)[0]
    pixels = FixedCrops(source=data).sample(item, random.Random(0)).pixels
    assert pixels is not None
    for key, value in FAMILY.first_frame(pipeline(True), pixels[None]).items():
        assert torch.allclose(part.cond[key][0], value[0], atol=1e-6), key
    session.accelerator.end_training()
    other = run_of(tmp_path / "other", tmp_path / "out", run.method, data, **kept)
    shutil.copytree(teacher, tmp_path / "other")
    settings = tmp_path / "other" / "image_processor" / "preprocessor_config.json"
    if not settings.exists():
        (settings,) = (tmp_path / "other" / "image_processor").glob("*.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_normalize": False}))
    assert prepare_missing(other) == prepare_missing(replace(run, family=replace(run.family, num_frames=9))) == 4


def prepare_missing(run: Run) -> int:
    """Images that its cache lacks."""
    session = prepare(run)
    session.batches.fixed(run.data)
    session.accelerator.end_training()
    assert session.batches.latents is not None
    return len(session.batches.latents.store.missing([str(i) for i in range(4)]))


def test_a_run_from_captioned_images_alone(teacher, folder, tmp_path):
    data = ImageFolder(train_data_dir=str(folder), resolution=32)
    shown = {"validation_prompts": ("rose",), "validation_images": (str(folder / "0.png"),)}
    out = distill(run_of(teacher, tmp_path / "out", DMD2(num_inference_steps=2, critic_steps=2), data, **shown))
    contract = json.loads((out / "distill_config.json").read_text())
    assert contract["proof"]["difference"] < 1e-5 and contract["call"]["max_sequence_length"] == 512
    assert (out / "samples" / "grid.png").exists()


def test_a_run_from_the_teacher_s_continuations_sees_the_images_they_were_made_from(teacher, folder, tmp_path):
    source = ImageFolder(train_data_dir=str(folder), resolution=32, center_crop=True)
    data = TeacherSamples(source=source, folder=str(tmp_path / "made"), count=4, num_inference_steps=2)
    run = run_of(teacher, tmp_path / "out", Regression(num_inference_steps=2), data)
    assert "base" in dry_run(run)
    distill(run)
    session = prepare(run)
    part = session.batches.batch_of([data.sample(i, random.Random(0)) for i in (1, 2)], [1, 2])
    begun = FAMILY.first_frame(pipeline(True), torch.stack([data.image_of(i) for i in (1, 2)]))
    assert all(torch.allclose(part.cond[key], value, atol=1e-5) for key, value in begun.items())
    assert part.latents is not None and part.latents.shape == (2, *SHAPE)
    session.accelerator.end_training()


def test_latents_alone_begin_with_their_own_first_frame(teacher, tmp_path):
    """The autoencoder is causal: the first latent frame decodes to the first frame of the video."""
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(7))
    save_file({"latents": latents}, tmp_path / FILE)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    run = run_of(teacher, tmp_path / "out", DMD2(num_inference_steps=2), Latents(folder=str(tmp_path)))
    session = prepare(run)
    part = session.batches.batch_of([run.data.sample(i, random.Random(0)) for i in (0, 1)], [0, 1])
    with torch.no_grad():
        first = FAMILY.decode(session.pipe, latents)[:, :, 0].clamp(-1, 1)
    assert torch.allclose(part.cond[IMAGE], FAMILY.first_frame(session.pipe, first)[IMAGE], atol=1e-5)
    assert part.latents is not None and torch.equal(part.latents, latents)
    session.accelerator.end_training()


CALL, FIRST = WanConcatImageToVideo.call, WanConcatImageToVideo.first_frames
BUGS = {
    "the mask behind the image": Bug(CALL, "[x_t, mask, image]", "[x_t, image, mask]", guided_steps),
    "the mask at the end": Bug(CALL, "mask[:, :, 0]", "mask[:, :, -1]", guided_steps),
    "the mask is 0 where the image is known": Bug(CALL, "mask[:, :, 0] = 1", "mask[:, :, 1:] = 1", guided_steps),
    "times in another order": Bug(CALL, "timestep=t", "timestep=t.flip(0)", guided_steps),
    "no tokens": Bug(CALL, "cond.get(TOKENS)", "0 * cond[TOKENS]", guided_steps),
    "the last states of CLIP": Bug(FIRST, "hidden_states[-2]", "hidden_states[-1]", guided_steps),
    "a tensor for CLIP": Bug(FIRST, "to_uint8((", "((", guided_steps),
    "black frames": Bug(FIRST, "frames.new_zeros(", "-frames.new_ones(", guided_steps),
    "latents in the autoencoder's scale": Bug(WanBase.encode_frames, "(latents - mean) / std", "latents", guided_steps),
    "the image is dropped with the prompt": Bug(
        without_prompt, "in null else value", "in null else 0 * value", guided_steps
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
