"""Image to video: the first latent frame is given, clean, and never trained."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import WanImageToVideoPipeline
from oracles.planted import Bug, bug_tests
from PIL import Image, ImageSequence
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core.denoise import HELD, free_part, with_held
from stepdistill.core.errors import ConfigError, DataError, EvaluationError, StudentError
from stepdistill.core.pixels import to_uint8
from stepdistill.core.prediction import Estimate
from stepdistill.core.random import fresh_noise, noise_of
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data import FixedCrops, ImageFolder, Prompts, Stream, TeacherSamples
from stepdistill.evaluation.first_frames import FirstFrames
from stepdistill.evaluation.metrics.motion import image_distance, seam_bend
from stepdistill.evaluation.run import evaluate
from stepdistill.evaluation.spec import EvalRun
from stepdistill.families.held_image import held_times
from stepdistill.families.wan_image import WanImageToVideo
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2, normalised
from stepdistill.methods.finetune import score_matching_loss
from stepdistill.methods.regression import Regression
from stepdistill.methods.vsd import VSD
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.call import generate, teacher_call
from stepdistill.students.draw.first_frame import check_first_frame, continued
from stepdistill.students.draw.options import AS_TRAINED
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.steps import View, view
from stepdistill.students.draw.windows import long_video
from stepdistill.students.single import in_memory
from stepdistill.students.snippets import snippet
from stepdistill.students.write import write_student
from stepdistill.training.cache.precompute import precompute
from stepdistill.training.checks import check_run
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.sampling import sample_student, sample_teacher, validation_images
from stepdistill.training.setup import prepare

SHAPE = (4, 3, 8, 8)
MADE = TeacherSamples(source=Prompts(prompts=("rose",)), folder="made", count=2)
LCM = Consistency(num_ddim_timesteps=40)
FAMILY = tiny.CONTINUING["wan_image"]


def image_pipeline() -> WanImageToVideoPipeline:
    torch.manual_seed(0)
    pipe = tiny.wan_image()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def scene() -> tuple[WanImageToVideoPipeline, Backbone, Batch, StepContext]:
    """A backbone with student and fake score awake, a batch whose samples begin with images, and a context."""
    pipe = image_pipeline()
    net = FAMILY.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4), FAMILY.lora_targets(net))
    for role in ("student", "fake"):
        bone.add(role, Lora())
        tiny.awake(bone, role)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cond = {**FAMILY.condition(pipe, ["red apple", "cat face"]), **FAMILY.first_frame(pipe, images)}
    schedule = FAMILY.schedule(pipe.scheduler)
    context = StepContext(
        schedule=schedule,
        null=FAMILY.unconditional(pipe),
        denoiser=lambda role: Denoiser(bone, role, schedule, "flow", FAMILY.call),
        module=lambda role: bone.others[role],
        decode=lambda latents: FAMILY.decode(pipe, latents),
        seed=0,
        step=0,
        device=torch.device("cpu"),
    )
    return pipe, bone, Batch((0, 1), cond, SHAPE), context


def noise(*seed: int) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(*seed))


def other_beginning(x: Tensor) -> Tensor:
    """The same but for the first latent frame."""
    return torch.cat([x[:, :, :1] + 3, x[:, :, 1:]], 2)


# V6


def the_frame_stays_and_what_lies_in_its_place_has_no_effect() -> None:
    _, _, part, context = scene()
    denoise, t = context.guided("student", 3.0), torch.full((2,), 700.0)
    with torch.no_grad():
        est, other = denoise(noise(0), t, part.cond), denoise(other_beginning(noise(0)), t, part.cond)
    assert torch.equal(est.x0[:, :, :1], part.cond[HELD]) and torch.equal(est.x0, other.x0)
    assert torch.allclose(est.velocity[:, :, :1], torch.zeros(1), atol=1e-6)
    assert est.velocity[:, :, 1:].abs().min() > 0


def test_the_frame_stays_and_what_lies_in_its_place_has_no_effect():
    the_frame_stays_and_what_lies_in_its_place_has_no_effect()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_whole_rollout_keeps_it_bit_for_bit(eta):
    _, _, part, context = scene()
    sampler = Sampler(context.schedule.starts(3), eta)
    with torch.no_grad():
        ends = [
            few_step(context.denoiser("student"), context.schedule, sampler, start, part.cond, lambda i: noise(i + 9))
            for start in (noise(0), other_beginning(noise(0)))
        ]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0][:, :, :1], part.cond[HELD])


def the_network_is_told_the_image_and_time_0_there() -> None:
    """An image changes the whole video; the time of the first frame's tokens is 0."""
    pipe, bone, part, context = scene()
    seen: list[Tensor] = []
    net = FAMILY.network(pipe)
    hook = net.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep"]), with_kwargs=True)
    with torch.no_grad():
        t = torch.tensor([300.0, 700.0])
        one = context.denoiser("student")(noise(0), t, part.cond)
        two = context.denoiser("student")(noise(0), t, {**part.cond, HELD: part.cond[HELD] + 1})
    hook.remove()
    assert seen[0].shape == (2, 48) and (seen[0][:, :16] == 0).all()
    assert torch.equal(seen[0][:, 16:], t[:, None].expand(2, 32))
    assert (one.x0 - two.x0)[:, :, 1:].abs().max() > 1e-3


def test_the_network_is_told_the_image_and_time_0_there():
    the_network_is_told_the_image_and_time_0_there()


# losses


def the_normaliser_counts_free_entries() -> None:
    """The held frame is equal in all three: counted, it would make the gradient (F - 1) / F of what it should be."""
    x0, fake, real = (with_held(noise(i), scene()[2].cond) for i in range(3))
    cond = scene()[2].cond
    whole, free = normalised(x0, fake, real, cond), normalised(*(part[:, :, 1:] for part in (x0, fake, real)), {})
    assert torch.equal(free_part(whole, cond), free) and not whole[:, :, :1].any()


def test_the_normaliser_counts_free_entries():
    the_normaliser_counts_free_entries()


def a_critic_is_not_trained_on_the_held_frame() -> None:
    _, _, part, context = scene()
    for loss in (
        lambda x0: score_matching_loss(context, part, "fake", x0),
        lambda x0: VSD(proportion_empty_prompts=0.0).fake_loss(context, part, x0),
    ):
        assert loss(noise(4)).item() == loss(other_beginning(noise(4))).item() > 1e-3


def test_a_critic_is_not_trained_on_the_held_frame():
    a_critic_is_not_trained_on_the_held_frame()


def test_the_student_s_gradient_of_dmd2_is_zero_there():
    _, _, part, context = scene()
    x0 = with_held(noise(5), part.cond).requires_grad_()
    loss, _ = DMD2(guidance_scale=3.0).student_loss("teacher", context, part, Estimate(x0, x0), 999.0)
    loss.backward()
    assert x0.grad is not None and not x0.grad[:, :, :1].any() and x0.grad[:, :, 1:].abs().min() > 0


# against the pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny.wan(expand_timesteps=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_plain_pipeline_continues_an_image_as_in_training(teacher, tmp_path, eta):
    family = replace(FAMILY, pretrained_teacher_model=str(teacher))
    family.check_files()
    pipe = family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4, alpha=2), family.lora_targets(net))
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    method = DMD2(num_inference_steps=3, eta=eta)
    options = {"family": family, "pipe": pipe, "backbone": bone, "role": "student", "method": method}
    assert write_student(tmp_path, **options, resolution=(32, 32)) < 1e-5


def test_a_package_that_the_pipeline_fails_without_is_named(teacher, monkeypatch):
    """Without ftfy Diffusers ends in a NameError at any prompt."""
    monkeypatch.setattr("stepdistill.families.parts.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"without the package ftfy, .* pip install 'stepdistill\[video\]'"):
        replace(FAMILY, pretrained_teacher_model=str(teacher)).check_files()


def test_a_pipeline_whose_network_takes_the_image_as_channels_is_refused(tmp_path):
    tiny.wan().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expand_timesteps False, expected True: its network takes the image as"):
        replace(FAMILY, pretrained_teacher_model=str(tmp_path)).check_files()


# runs


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        Image.effect_noise((40, 36), 60 + 10 * i).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("red apple")
    return folder


def run_of(teacher: Path, images: Path, out: Path, method: Method, data: object, **train: object) -> Run:
    spec = {"max_train_steps": 2, "train_batch_size": 2, "report_to": "none", "teacher_steps": 2} | train
    return Run(
        family=replace(FAMILY, pretrained_teacher_model=str(teacher)),
        method=method,
        data=data,  # pyright: ignore[reportArgumentType]
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(output_dir=str(out), **spec),
    )


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_from_captioned_images_alone(teacher, images, tmp_path, cached):
    """DMD2 needs no clips. Validation continues the images that it is given."""
    data = ImageFolder(train_data_dir=str(images), resolution=32)
    shown = {"validation_prompts": ("rose",), "validation_images": (str(images / "0.png"),), "cache_latents": cached}
    method = DMD2(num_inference_steps=2, critic_steps=2)
    out = distill(run_of(teacher, images, tmp_path / "out", method, data, **shown))
    contract = json.loads((out / "distill_config.json").read_text())
    assert contract["proof"]["difference"] < 1e-5 and contract["call"]["num_frames"] == 5
    assert (out / "samples" / "grid.png").exists()


def test_a_validation_image_is_what_the_videos_begin_with(teacher, images, tmp_path):
    data = ImageFolder(train_data_dir=str(images), resolution=32)
    shown = {"validation_prompts": ("a", "b"), "validation_images": (str(images / "0.png"), str(images / "1.png"))}
    method = DMD2(num_inference_steps=2, ema_decay=None)
    session = prepare(run_of(teacher, images, tmp_path / "out", method, data, **shown))
    session.backbone.add("student", Lora())
    for sample in (sample_student, sample_teacher):
        drawn = sample(session, ["b", "a"], [0, 1])
        begun = session.run.family.first_frame(session.batches.parts.vae(""), validation_images(session, ["b", "a"]))
        assert torch.equal(drawn[:, :, :1], begun[HELD])
    assert not torch.equal(begun[HELD][0], begun[HELD][1])
    session.accelerator.end_training()


def test_a_run_from_the_teacher_s_continuations(teacher, images, tmp_path):
    source = ImageFolder(train_data_dir=str(images), resolution=32, center_crop=True)
    data = TeacherSamples(source=source, folder=str(tmp_path / "made"), count=4, num_inference_steps=2)
    run = run_of(teacher, images, tmp_path / "out", Regression(num_inference_steps=2), data)
    distill(run)
    made = data.sample(1, random.Random(0)).latents
    pipe = run.family.load()
    held = run.family.first_frame(pipe, data.image_of(1)[None])[HELD]  # pyright: ignore[reportAttributeAccessIssue]
    assert made is not None and torch.allclose(made[:, :1], held[0], atol=2e-3)  # it is stored in half precision


def test_memory_is_predicted_and_the_first_frames_are_cached(teacher, images, tmp_path):
    data = ImageFolder(train_data_dir=str(images), resolution=32)
    kept = {"cache_latents": True, "cache_dir": str(tmp_path / "kept")}
    run = run_of(teacher, images, tmp_path / "out", DMD2(num_inference_steps=2, critic_steps=2), data, **kept)
    assert "base" in dry_run(run)
    filled = precompute(run)
    assert (filled.images, filled.lacking) == (4, 0)
    session = prepare(run)
    (part,) = next(session.batches.steps(run.data, 0, 0, 1))
    assert part.latents is None and part.shape == SHAPE and part.cond[HELD].shape == (2, 4, 1, 8, 8)
    item = Stream(FixedCrops(source=data), 2, run.train.seed).items(0)[0]
    pixels = FixedCrops(source=data).sample(item, random.Random(0)).pixels
    assert pixels is not None
    assert torch.allclose(
        run.family.first_frame(run.family.load(), pixels[None])[HELD][0], part.cond[HELD][0], atol=1e-6
    )
    session.accelerator.end_training()


@pytest.mark.parametrize(
    ("method", "data", "train", "said"),
    [
        (
            DMD2(),
            Prompts(prompts=("rose",)),
            {},
            "a Prompts source with family WanImageToVideo, expected images or clips",
        ),
        (LCM, None, {}, "images from ImageFolder with family.num_frames 5, expected clips"),
        (Regression(), MADE, {}, "a TeacherSamples source with family WanImageToVideo, .* made from prompts alone"),
        (DMD2(), None, {"validation_prompts": ("a", "b")}, "0 train.validation_images for 2 prompts, expected 2"),
    ],
)
def test_what_lacks_an_image_is_refused(teacher, images, tmp_path, method, data, train, said):
    data = data or ImageFolder(train_data_dir=str(images), resolution=32)
    with pytest.raises(ConfigError, match=said):
        check_run(run_of(teacher, images, tmp_path / "out", method, data, **train))


def test_images_of_another_size_than_the_videos_are_refused(teacher, images, tmp_path):
    data = ImageFolder(train_data_dir=str(images), resolution=(32, 48))
    run = run_of(teacher, images, tmp_path / "out", DMD2(), data)
    with pytest.raises(ConfigError, match=r"sizes \[\(32, 48\)\], expected 32 x 32, that of the videos"):
        distill(run)
    wide = replace(run, train=replace(run.train, resolution=(32, 48)), method=DMD2(num_inference_steps=1))
    assert (distill(wide) / "distill_config.json").exists()


def test_images_for_a_family_of_prompts_are_refused(teacher, images, tmp_path):
    run = run_of(teacher, images, tmp_path / "out", DMD2(), Prompts(prompts=("rose",)), validation_images=("a.png",))
    family = replace(tiny.FAMILIES["wan"], pretrained_teacher_model=str(teacher))
    with pytest.raises(ConfigError, match="train.validation_images with family Wan, expected a family that continues"):
        check_run(replace(run, family=family))


# evaluation


def test_videos_are_measured_beside_the_teacher_s_of_the_same_images(teacher, images, tmp_path):
    records = [{"prompt": f"rose {i}", "image": f"{i % 4}.png"} for i in range(4)]
    prompts = images / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, records)))
    family = replace(FAMILY, pretrained_teacher_model=str(teacher))
    pipe = family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4), family.lora_targets(net))
    bone.add("student", Lora())
    options = {
        "family": family,
        "pipe": pipe,
        "backbone": bone,
        "role": "student",
        "method": DMD2(num_inference_steps=2),
    }
    write_student(tmp_path / "student", **options, resolution=(32, 32))
    given = {"features": "pixels", "feature_batch": 20, "metrics": (), "columns": 2, "teacher_steps": 2, "num": 40}
    spec = EvalRun(
        teacher=str(teacher),
        students=(str(tmp_path / "student"),),
        output_dir=tmp_path / "out",
        prompts=prompts,
        **given,
    )
    found = evaluate(spec)
    assert not found["left_out"] and [row["role"] for row in found["rows"]] == ["teacher", "student"]
    first = FirstFrames(tuple(images / f"{i}.png" for i in range(4)), (32, 32))
    drawer = StudentPipeline.of(family, str(tmp_path / "student"))
    calls = drawer.calls(replace(AS_TRAINED, height=32, width=32))
    texts = [record["prompt"] for record in records] * 10
    clips = drawer.generate(calls, texts, spec.seed, numbers=range(40), first=first)[0]
    expected = image_distance(clips, to_uint8(first(range(40)))).mean().item()
    assert found["rows"][1]["metrics"]["image_distance"]["value"] == pytest.approx(expected)
    prompts.write_text("\n".join(map(json.dumps, [{"prompt": "rose"}, *records])))
    with pytest.raises(EvaluationError, match="prompt 1 of .*prompts.jsonl without an image, expected a record with"):
        evaluate(replace(spec, output_dir=tmp_path / "other"))
    prompts.write_text(json.dumps({"prompt": "rose", "image": "nowhere.png"}))
    with pytest.raises(EvaluationError, match="nowhere.png of prompt 1, expected an image file"):
        evaluate(replace(spec, output_dir=tmp_path / "other"))


def written(folder: Path, family: WanImageToVideo, size: tuple[int, int]) -> Path:
    """A student that renoises, whose LoRA matters."""
    pipe = family.load()
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4, alpha=2), family.lora_targets(net))
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    options = {"family": family, "pipe": pipe, "backbone": bone, "role": "student"}
    write_student(folder, **options, method=DMD2(num_inference_steps=2), resolution=size)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    family = replace(FAMILY, pretrained_teacher_model=str(teacher))
    return written(tmp_path_factory.mktemp("student"), family, (32, 48))


def test_the_code_of_the_card_and_generate_make_the_same_video(student, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = Image.open(images / "2.png").resize((48, 32))
    first.save("first.png")
    code = snippet(read_contract(student), student)
    assert 'load_image("first.png"),  # of 48 x 32 pixels' in code
    exec(code, made := {})
    cli.main(["generate", str(student), "red apple", "rose", "--image", "first.png", "-o", "out", "--grid", "grid.png"])
    with Image.open("out/00000.webp") as animation:
        frames = [np.asarray(animation.convert("RGB")) for _ in ImageSequence.Iterator(animation)]
    theirs = [np.asarray(frame) for frame in made["frames"]]
    assert len(theirs) == 5 and frames[0].shape == (32, 48, 3) and (Path("out") / "00001.webp").exists()
    kept = [frame for k, frame in enumerate(theirs) if k == 0 or (frame != theirs[k - 1]).any()]
    assert all((a == b).all() for a, b in zip(frames, kept, strict=True))


def test_an_image_of_another_shape_is_cropped_and_not_stretched(student, images):
    call = StudentPipeline.load(student).call()
    Image.new("RGB", (200, 32), "red").save(images / "wide.png")
    wide = Image.open(images / "wide.png").convert("RGB")
    wide.paste("blue", (0, 0, 70, 32))
    wide.save(images / "wide.png")
    assert continued(call, images / "wide.png").arguments["image"].getcolors() == [(48 * 32, (255, 0, 0))]
    (images / "broken.png").write_text("no image")
    with pytest.raises(DataError, match="broken.png, expected an image file"):
        continued(call, images / "broken.png")


def test_its_steps_are_not_shown(student):
    with pytest.raises(StudentError, match="a student of WanImageToVideo, expected one that takes prompts alone"):
        view(image_pipeline(), student, View(prompts=["rose"]))


@pytest.mark.parametrize(
    ("family", "image", "said"),
    [(FAMILY, None, "pass it with --image"), (tiny.FAMILIES["wan"], "a.png", "leave it out")],
)
def test_generate_is_told_whether_it_needs_an_image(family, image, said):
    with pytest.raises(StudentError, match=said):
        check_first_frame(family, None if image is None else Path(image))


def test_a_call_without_its_image_is_refused(teacher):
    family = replace(FAMILY, pretrained_teacher_model=str(teacher))
    pipe = family.load()
    with pytest.raises(ConfigError, match="pipeline without images, expected one image for each prompt"):
        generate(pipe, teacher_call(family, pipe, 2, 1.0, "teacher"), ["rose"], 0)


BUGS = {
    "the estimate is not held": Bug(
        Denoiser.queried, "with_held(part, cond)", "part", the_frame_stays_and_what_lies_in_its_place_has_no_effect
    ),
    "the input is not held": Bug(
        WanImageToVideo.call, "with_held(x_t, cond)", "x_t", the_frame_stays_and_what_lies_in_its_place_has_no_effect
    ),
    "one time for all": Bug(held_times, "] = 0", "] *= 1", the_network_is_told_the_image_and_time_0_there),
    "the mean over all": Bug(
        normalised, "free_part((x0 - real).abs(), cond)", "(x0 - real).abs()", the_normaliser_counts_free_entries
    ),
    "the critic sees it": Bug(
        score_matching_loss, "free_part(eps, batch.cond)", "eps", a_critic_is_not_trained_on_the_held_frame
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError)


# longer videos


@pytest.fixture(scope="module")
def longer(teacher, tmp_path_factory) -> Path:
    """A student of nine frames."""
    folder = tmp_path_factory.mktemp("longer")
    family = replace(FAMILY, pretrained_teacher_model=str(teacher), num_frames=9)
    return written(folder, family, (32, 32))


@pytest.mark.parametrize("overlap", [1, 5])
def test_windows_go_on_from_the_end_of_the_one_before(longer, images, overlap):
    """The first is the plain call's; what is encoded of the overlap is held in the next, by the student as trained."""
    drawer = StudentPipeline.load(longer)
    family, call = drawer.family, continued(drawer.call(), images / "1.png")
    whole, drift = long_video(drawer, ["red apple", "rose"], call, 3, overlap, seed=4)
    assert whole.shape == (9 + 2 * (9 - overlap), 3, 32, 32)
    (plain,) = drawer.draw(["red apple"], [4], call.plus(output_type="pt"))
    assert torch.equal(whole[:9], plain.image.float())
    assert not torch.equal(whole[9:], long_video(drawer, ["red apple"], call, 3, overlap, seed=4).frames[9:])
    held = family.encode_frames(drawer.pipe, 2 * whole[9 - overlap : 9].transpose(0, 1)[None] - 1)
    assert held.shape[2] == 1 + (overlap - 1) // 2
    backbone = in_memory(longer, read_contract(longer), family)[1]
    schedule, fresh = family.schedule(drawer.native), fresh_noise(4, 1)
    ends = few_step(
        Denoiser(backbone, "student", schedule, "flow", family.call, grad=False),
        schedule,
        read_contract(longer).sampler(),
        noise_of(4, 1, (4, 5, 8, 8))[None],
        {**family.condition(drawer.pipe, ["rose"]), HELD: held},
        lambda _: torch.randn(1, 4, 5, 8, 8, generator=fresh),
    )
    with torch.no_grad():
        expected = (family.decode(drawer.pipe, ends) / 2 + 0.5).clamp(0, 1)[0].transpose(0, 1)[overlap:]
    assert torch.allclose(whole[9 : 9 + len(expected)], expected, atol=1e-4)
    (latents,) = drawer.draw(["red apple"], [4], call.plus(output_type="latent"))
    each = [part[:, held.shape[2] :].flatten(1) for part in (latents.image, ends[0])]
    assert drift.means.shape == drift.spreads.shape == (3, 4)
    assert torch.allclose(drift.means[:2], torch.stack([part.mean(1) for part in each]), atol=1e-4)
    assert torch.allclose(drift.spreads[:2], torch.stack([part.std(1, correction=0) for part in each]), atol=1e-4)


@pytest.mark.parametrize("overlap", [1, 5])
def test_matched_windows_have_the_latent_channels_of_the_first(longer, images, overlap, monkeypatch):
    """What is held stays; what is new is moved before it is decoded, and the next window begins with that."""
    drawer, decoded = StudentPipeline.load(longer), list[Tensor]()
    call, decode = continued(drawer.call(), images / "1.png"), WanImageToVideo.decode

    def watched(family: WanImageToVideo, pipe: object, latents: Tensor) -> Tensor:
        decoded.append(latents)
        return decode(family, pipe, latents)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(WanImageToVideo, "decode", watched)
    free = long_video(drawer, ["red apple", "rose"], call, 3, overlap, seed=4)
    bound = long_video(drawer, ["red apple", "rose"], call, 3, overlap, seed=4, match_first_window=True)
    assert torch.equal(free.frames[:9], bound.frames[:9]) and not torch.equal(free.frames[9:], bound.frames[9:])
    held, (before, _, after, last) = 1 + (overlap - 1) // 2, decoded
    for name in ("means", "spreads"):
        one, other = getattr(free.latents, name), getattr(bound.latents, name)
        assert torch.equal(one[0], other[0]) and (one[1:] - one[:1]).abs().max() > 1e-3
        assert torch.allclose(other, other[:1].expand_as(other), atol=1e-5)
    assert torch.equal(before[:, :, :held], after[:, :, :held])
    own, first = (
        [part[:, None, None, None] for part in values]
        for values in (
            (before[0, :, held:].mean((1, 2, 3)), before[0, :, held:].std((1, 2, 3), correction=0)),
            (free.latents.means[0], free.latents.spreads[0]),
        )
    )
    by_hand = (before[0, :, held:] - own[0]) / own[1] * first[1] + first[0]
    assert torch.allclose(after[0, :, held:], by_hand, atol=1e-4)
    again = drawer.family.encode_frames(drawer.pipe, 2 * bound.frames[-9:][:overlap].transpose(0, 1)[None] - 1)
    assert torch.allclose(last[:, :, :held], again, atol=1e-4)


def test_an_overlap_that_is_not_encoded_whole_is_refused(longer, images):
    """Wan's encoder takes one frame and then four at a time, whatever its factor, and drops what is left over."""
    drawer = StudentPipeline.load(longer)
    call = continued(drawer.call(), images / "1.png")
    for overlap in (0, 2, 3, 9):
        with pytest.raises(ConfigError, match=f"an overlap of {overlap} frames, expected one of 1, 5"):
            long_video(drawer, ["rose"], call, 2, overlap)
    with pytest.raises(ConfigError, match="3 frames to encode, expected a multiple of 4, and one"):
        drawer.family.encode_frames(drawer.pipe, torch.zeros(1, 3, 3, 32, 32))  # pyright: ignore[reportAttributeAccessIssue]


def test_the_command_writes_a_long_video_and_says_how_it_is_joined(longer, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["generate", str(longer), "red apple", "--image", str(images / "1.png"), "--seed", "4", "-o", "out"]
    cli.main([*given, "--windows", "3", "--overlap", "5", "--then", "rose", "--format", "gif"])
    said = capsys.readouterr().out
    assert "times that inside; by window: mean grey level" in said and said.count(",") >= 4
    (line,) = map(json.loads, (tmp_path / "out" / "images.jsonl").read_text().splitlines())
    assert (line["windows"], line["overlap"], len(line["means"])) == (3, 5, 3) and line["seam_bend"] > 0
    assert line["match_first_window"] is False
    drawer = StudentPipeline.load(longer)
    call = continued(drawer.call(), images / "1.png")
    video = long_video(drawer, ["red apple", "rose"], call, 3, 5, seed=4)
    whole = to_uint8(video.frames)
    for name, values in video.latents._asdict().items():
        assert np.allclose(line[f"latent_{name}"], values)
    (first, second, third), units = video.latents.means, video.latents.spreads
    away = [(((means - first) / units[0]) ** 2).mean().sqrt() for means in (second, third)]
    share = [(spreads / units[0]).mean() for spreads in units[1:]]
    assert f"mean off the first window's by 0.00, {away[0]:.2f}, {away[1]:.2f} of its spread" in said
    assert f"; spread 1.00, {share[0]:.2f}, {share[1]:.2f} of its own" in said
    parts = [whole[4 * k : 4 * k + 9].double() for k in range(3)]
    assert line["means"] == pytest.approx([part.mean().item() for part in parts])
    bend = seam_bend(whole[None].double(), 9, 5)
    assert line["seam_bend"] == pytest.approx((bend.seam / bend.inside).item())
    for odd in (["--overlap", "5"], ["--then", "rose"], ["--windows", "2", "--then", "a", "--then", "b"]):
        with pytest.raises(SystemExit):
            cli.main([*given, "--overwrite", *odd])
        assert "fewer prompts than windows, of which there are several" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*given, "--overwrite", "--match-first-window"])
    assert "--match-first-window of one window, expected several windows" in capsys.readouterr().err
    cli.main([*given, "--overwrite", "--windows", "2", "--match-first-window", "--format", "gif"])
    (line,) = map(json.loads, (tmp_path / "out" / "images.jsonl").read_text().splitlines())
    assert line["match_first_window"] is True and np.allclose(*line["latent_means"], atol=1e-5)
