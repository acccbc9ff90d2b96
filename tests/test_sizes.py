"""Several sizes in one run: which step has which, the schedule of each, and what a student folder says of them."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from images import noise
from oracles.context import Flow
from oracles.fakes import Keyed, Stage, batch
from PIL import Image
from tables.render_sizes import sizes_page
from test_settings import CHANGES
from test_workflow import contract

from stepdistill.cli.dialect import height_and_width
from stepdistill.config.load import load_config
from stepdistill.core.errors import ConfigError, DataError, EvaluationError, StudentError
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.data import ImageFolder, InvertedImages, Latents, Prompts, Source, TeacherSamples, Trajectories
from stepdistill.decoding.evaluation import check_options
from stepdistill.evaluation.run import evaluate
from stepdistill.evaluation.sizes import evaluate_at_sizes, over_sizes, report_lines, rows_of_all
from stepdistill.evaluation.spec import EvalRun
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.progressive import ProgressiveHalving
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.card import write_card
from stepdistill.students.contract import CONTRACT, read_contract
from stepdistill.students.draw.options import AS_TRAINED
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.lora.comfyui import workflow
from stepdistill.students.sizes import is_outside, shown_sizes
from stepdistill.students.write import write_student
from stepdistill.training import batches
from stepdistill.training.batches import Batches
from stepdistill.training.cache.keys import Keys
from stepdistill.training.checks import check_loaded
from stepdistill.training.distill import distill
from stepdistill.training.memory import predict as prediction
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.resume import is_kept
from stepdistill.training.setup import prepare
from stepdistill.training.size_checks import check_size_list

CONFIG = Path(__file__).parent.parent / "configs" / "tables" / "sizes" / "tiny_sd_one.yaml"
SIZES = ((32, 32), (24, 40), (40, 24))
PROMPTS = Prompts(prompts=tuple("abcdefgh"))


# --- which step has which --------------------------------------------------------------------------------------------


def batches_of(monkeypatch: pytest.MonkeyPatch, **train: Any) -> Batches:
    """The batches of a run on prompts alone, whose latents are as large as the images."""
    family: Any = SimpleNamespace(
        condition=lambda pipe, prompts: {"mean": torch.zeros(len(prompts), 1)},
        latent_shape=lambda pipe, height, width: (1, height, width),
        scale_factor=lambda pipe: 1,
        ragged=False,
    )
    monkeypatch.setattr(batches, "warn_of_cut", lambda *_: True)
    parts: Any = SimpleNamespace(family=family, pipe=None, text=lambda why: None)
    spec = TrainSpec(**{"output_dir": "out", "train_batch_size": 2, "resolution": SIZES} | train)
    return Batches(parts, spec, Keys(), torch.device("cpu"))


def shapes(made: Batches, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list[set[tuple[int, ...]]]:
    """The shapes in each step."""
    steps = islice(made.steps(PROMPTS, start, rank, world), count)
    return [{batch.shape for batch in micro_batches} for micro_batches in steps]


def test_a_step_has_one_size_in_all_processes_and_micro_batches_and_after_a_resume(monkeypatch):
    made = batches_of(monkeypatch, gradient_accumulation_steps=3)
    alone = shapes(made, 24)
    assert all(len(seen) == 1 for seen in alone)
    assert set().union(*alone) == {(1, *size) for size in SIZES}
    assert [made.drawn.at(step) for step in range(24)] == [shape[1:] for (shape,) in alone]
    for rank in range(2):
        assert shapes(made, 24, rank=rank, world=2) == alone
    assert shapes(made, 14, start=10) == alone[10:]
    whole = batches_of(monkeypatch, train_batch_size=6)  # the same global batch in one part
    assert shapes(whole, 24) == alone
    assert shapes(batches_of(monkeypatch, seed=1), 24) != alone


@pytest.mark.parametrize("weights", [None, (6.0, 3.0, 1.0)])
def test_sizes_come_as_often_as_their_weights_say(monkeypatch, weights):
    drawn = batches_of(monkeypatch, resolution_weights=weights).drawn
    taken = [drawn.at(step) for step in range(6000)]
    total = sum(weights or (1, 1, 1))
    for size, weight in zip(SIZES, weights or (1, 1, 1), strict=True):
        assert taken.count(size) / 6000 == pytest.approx(weight / total, abs=0.02)  # three standard deviations


def test_one_size_draws_nothing(monkeypatch):
    monkeypatch.setattr("stepdistill.training.sizes.step_generator", lambda *_: pytest.fail("a draw"))
    for resolution in (32, (24, 40), ((24, 40),)):
        drawn = batches_of(monkeypatch, resolution=resolution).drawn
        assert drawn.at(7) == drawn.sizes[0] and len(drawn.sizes) == 1


def folder_of_images(place: Path, *sizes: tuple[int, int]) -> str:
    place.mkdir(exist_ok=True)
    for i, (height, width) in enumerate(sizes):
        noise(height, width, i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("a b c d e f g h".split()[i % 8])
    return str(place)


def test_images_go_to_the_nearest_of_the_listed_sizes(tmp_path, monkeypatch):
    place = folder_of_images(tmp_path / "images", (60, 60), (48, 80), (50, 80), (90, 54), (61, 60), (80, 48))
    source = ImageFolder(train_data_dir=place, resolution=((32, 32), (24, 40), (40, 24), (16, 48)))
    assert [source.shapes[b] for b in source.buckets()] == [
        *((32, 32), (24, 40), (24, 40)),
        *((40, 24), (32, 32), (40, 24)),
    ]
    made = batches_of(monkeypatch, resolution=32)
    sizes = made.sizes_of(source, 2)
    assert set(sizes.sizes) == set(SIZES), "a size without images is none"
    monkeypatch.setattr(Batches, "encode", lambda self, samples: {"latents": torch.stack([s.pixels for s in samples])})
    read = islice(made.steps(source, 0, 0, 1), 9)
    assert [sizes.at(step) for step in range(9)] == [part.shape[1:] for (part,) in read]


# --- the schedule of each --------------------------------------------------------------------------------------------


def saved_teachers(place: Callable[[], Path]) -> dict[str, Family]:
    """Saved random pipelines, each in a folder of its own."""
    found = {}
    for name in ("sd", "flux"):
        folder = place()
        tiny.pipeline(name).save_pretrained(folder)
        found[name] = replace(tiny.FAMILIES[name], pretrained_teacher_model=str(folder))
    return found


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Family]:
    return saved_teachers(lambda: tmp_path_factory.mktemp("teacher"))


def run_of(family: Family, out: Path, method: Method | None = None, data: Source = PROMPTS, **train: Any) -> Run:
    given: dict[str, Any] = {"output_dir": str(out), "max_train_steps": 2, "train_batch_size": 1, "resolution": SIZES}
    given |= {"report_to": "none"}
    spec = TrainSpec(**given | train)
    return Run(family=family, method=method or DMD2(), data=data, lora=LoraSpec(rank=2, alpha=3), train=spec)


def test_a_step_has_the_schedule_of_its_size_as_the_pipeline_has_it(teachers, tmp_path):
    sizes = ((32, 32), (128, 64))
    session = prepare(run_of(teachers["flux"], tmp_path, resolution=sizes))
    seen = {session.sizes.at(step): session.context(step) for step in range(12)}
    assert set(seen) == set(sizes)
    for (height, width), context in seen.items():
        count, scheduler, n = height * width // 64, session.pipe.scheduler, 4
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (count - 256)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n), mu=mu)
        assert context.schedule.starts(n) == pytest.approx((1000 * scheduler.sigmas[:-1]).tolist(), rel=1e-5)
        assert context.student_schedule.grid(n).tolist() == seen[32, 32].schedule.grid(n).tolist()
    assert seen[32, 32].schedule.grid(4).tolist() != seen[128, 64].schedule.grid(4).tolist()
    square = next(step for step in range(12) if session.sizes.at(step) == (32, 32))
    assert session.context(square, (128, 64)).schedule.grid(4).tolist() == seen[128, 64].schedule.grid(4).tolist()


class Apart(Keyed):
    """A step at another size than the run's first."""

    @property
    def student_schedule(self) -> NoiseSchedule:
        return Flow(1.7)


KINDS = sorted({type(change.method) for change in CHANGES}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_s_levels_are_one_list_over_all_sizes(kind, monkeypatch):
    """In training steps, too, whose own schedule is that of their size."""
    method, asked = next(change.method for change in CHANGES if type(change.method) is kind), []
    of_kind = kind.sampler

    def sampler(self: Method, schedule: NoiseSchedule, steps: int | None = None) -> Any:
        asked.append(schedule)
        return of_kind(self, schedule, steps)

    monkeypatch.setattr(kind, "sampler", sampler)
    monkeypatch.setattr("stepdistill.methods.reflow.lpips", lambda *_: lambda a, b: (a - b).abs().flatten(1).mean(1))
    monkeypatch.setattr("stepdistill.methods.vsd.clip", lambda *_: pytest.skip("a CLIP"))
    stage = Stage(Flow(3.0), {})
    for step in range(4):
        context = stage.context(step)
        context = Apart(**vars(context))
        for update in method.updates(context, batch(3, 7), step):
            update.loss.backward()
    assert all(isinstance(schedule, Flow) and schedule.shift == 1.7 for schedule in asked)


GRIDS: dict[str, Method] = {
    "consistency": Consistency(num_ddim_timesteps=7, ema_decay=None),
    "halving": ProgressiveHalving(steps=(8, 4), stage_steps=2),
}


@pytest.mark.parametrize("method", GRIDS.values(), ids=GRIDS)
def test_a_student_learns_on_the_grid_that_it_is_sampled_on(method):
    """Not on that of the step's size, between whose levels those of the contract may lie."""
    stage, seen = Stage(Flow(3.0), {}), set()

    def denoiser(role: str) -> Any:
        fake = stage.context(0).denoiser(role)

        def call(x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> Any:
            seen.update(t.tolist())
            return fake(x_t, t, cond)

        return call if role == "student" else fake

    for step in range(4):
        given: dict[str, Any] = {**vars(stage.context(step)), "denoiser": denoiser}
        context = Apart(**given)
        list(method.updates(context, batch(3, 7), step))
    allowed = {round(t, 3) for n in (7, 8, 16) for t in Flow(1.7).grid(n).tolist()}
    assert seen and {round(t, 3) for t in seen} <= allowed


# --- what is refused -------------------------------------------------------------------------------------------------

LISTS = {
    "resolution=[]": "resolution is []: expected at least one size",
    "resolution=[[32, 32], [24, 40], [32, 32]]": "names [32, 32] twice",
    "resolution=[[32, 32], [0, 40]]": "greater than or equal to 1",
    "resolution=[32, 32, 32]": "got [32, 32, 32]",
    "resolution_weights=[1, 2]": "has 2 numbers for one size",
    "resolution=[[32, 32], [24, 40]] resolution_weights=[1, 2, 3]": "has 3 numbers for 2 sizes",
    "resolution=[[32, 32], [24, 40]] resolution_weights=[1, 0]": "greater than 0",
}


@pytest.mark.parametrize("given", LISTS)
def test_a_list_that_is_wrong_is_one_line(given):
    overrides = [f"train.{part}" for part in given.replace("] res", "]|res").split("|")]
    with pytest.raises(ConfigError) as error:
        load_config(Run, CONFIG, ["train.resolution=32", *overrides])
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 1 and LISTS[given] in lines[0], error.value


def sources(place: Path) -> dict[str, tuple[Source, str]]:
    images = ImageFolder(train_data_dir=folder_of_images(place / "images", (32, 32)), resolution=32)
    return {
        "TeacherSamples": (TeacherSamples(source=PROMPTS, folder=str(place / "a")), "has one"),
        "Trajectories": (Trajectories(source=PROMPTS, folder=str(place / "b")), "has one"),
        "InvertedImages": (InvertedImages(source=images, folder=str(place / "c")), "has one"),
        "ImageFolder": (images, "move the list to data.resolution"),
        "Latents": (Latents(folder=str(place / "d")), "remove train.resolution"),
    }


def test_data_of_one_size_takes_no_list(tmp_path):
    family = StableDiffusion(pretrained_teacher_model="none")
    for name, (source, why) in sources(tmp_path).items():
        with pytest.raises(ConfigError) as error:
            check_size_list(run_of(family, tmp_path, data=source))
        assert f"3 sizes for a {name} source" in str(error.value) and why in str(error.value)
        check_size_list(run_of(family, tmp_path, data=source, resolution=((24, 40),)))
    check_size_list(run_of(family, tmp_path))


def test_images_are_inverted_at_one_size_and_a_list_has_each_ratio_once(tmp_path):
    place = folder_of_images(tmp_path, (32, 32))
    several = ImageFolder(train_data_dir=place, resolution=((32, 32), (24, 40)))
    with pytest.raises(ConfigError, match="several sizes in data.source.*inverted and stored at one size"):
        InvertedImages(source=several, folder=str(tmp_path / "made"))
    for sizes in ((), ((32, 32), (64, 64))):
        with pytest.raises(DataError, match="nearest aspect ratio"):
            assert ImageFolder(train_data_dir=place, resolution=sizes).shapes
    with pytest.raises(DataError, match="with aspect_buckets"):
        assert replace(several, aspect_buckets=True).shapes


def test_each_size_is_one_that_the_pipeline_takes(teachers, tmp_path):
    run = run_of(teachers["sd"], tmp_path, resolution=((32, 32), (24, 40), (28, 40)))
    with pytest.raises(ConfigError, match="images of 28 x 40 pixels"):
        check_loaded(prepare(run))
    images = ImageFolder(train_data_dir=folder_of_images(tmp_path, (32, 32), (28, 40)), resolution=((32, 32), (28, 40)))
    with pytest.raises(ConfigError, match="images of 28 x 40 pixels"):
        check_loaded(prepare(run_of(teachers["sd"], tmp_path, data=images, resolution=32)))


def test_a_resumed_run_keeps_its_sizes_and_weights():
    assert is_kept("train.resolution") and is_kept("train.resolution_weights")


# --- the student -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(teachers, tmp_path_factory) -> Path:
    """Of a run at three sizes."""
    out = tmp_path_factory.mktemp("run") / "out"
    train = {"validation_prompts": ("rose", "cat"), "validation_steps": 2, "teacher_steps": 2, "watch_samples": 4}
    method = DMD2(num_inference_steps=2, critic_steps=1)
    run = run_of(teachers["sd"], out, method, export_formats=("comfyui",), **train)
    return distill(run)


def test_the_contract_holds_the_sizes_and_an_old_one_loads(student, tmp_path):
    made = read_contract(student)
    assert made.resolution == (32, 32) and made.sizes == SIZES
    fields = json.loads((student / CONTRACT).read_text())
    del fields["sizes"]
    (tmp_path / CONTRACT).write_text(json.dumps(fields))
    assert read_contract(tmp_path) == replace(made, sizes=())


def test_card_and_workflow_name_them(student, tmp_path):
    card = (student / "README.md").read_text()
    assert "| trained sizes | 32 x 32, 40 x 24, 24 x 40 pixels (width x height); the noise levels are the same" in card
    assert "| resolution | 32 x 32 pixels |" in card
    one = replace(read_contract(student), sizes=((32, 32),))
    write_card(tmp_path, one)
    assert "trained sizes" not in (tmp_path / "README.md").read_text()
    latent = json.loads((student / "comfyui_workflow.json").read_text())["latent"]
    assert latent["_meta"]["title"] == "size; also trained at 40 x 24, 24 x 40"
    assert (latent["inputs"]["width"], latent["inputs"]["height"]) == (32, 32)
    assert workflow(contract(), "x")["latent"]["_meta"]["title"] == "size"


def test_validation_and_watch_look_at_the_most_elongated_too(student):
    names = {file.name for file in (student / "samples").glob("step-*.png")}
    assert names == {"step-000002.png", "step-000002-24x40.png"}
    square, wide = (Image.open(student / "samples" / f"step-000002{end}.png").size for end in ("", "-24x40"))
    assert wide[0] > square[0] and wide[1] < square[1]
    facts = json.loads((student / "watch.json").read_text())["facts"]
    assert facts["sizes"] == [[32, 32], [24, 40]]


OUTSIDE = {
    (32, 32): False,
    (24, 40): False,
    (32, 30): False,  # less than 5 % off
    (24, 42): False,
    (24, 44): True,  # the ratio
    (44, 24): True,
    (16, 24): True,  # the area
    (40, 40): True,
}


@pytest.mark.parametrize("size", OUTSIDE)
def test_a_size_is_outside_by_its_area_or_its_ratio(size):
    assert is_outside(size, SIZES) is OUTSIDE[size]


def test_sampling_outside_of_the_trained_sizes_warns_with_the_list(student, caplog):
    loaded, drawn = StudentPipeline.load(student), []
    for height, width in ((32, 32), (24, 40), (16, 64)):
        with caplog.at_level(logging.WARNING):
            loaded.call(replace(AS_TRAINED, height=height, width=width))
        drawn.append([r.message for r in caplog.records if "was trained at" in r.message])
        caplog.clear()
    assert not drawn[0] and not drawn[1]
    assert "64 x 16 pixels" in drawn[2][0] and "32 x 32, 40 x 24, 24 x 40" in drawn[2][0]
    old = replace(loaded, contracts=(replace(loaded.contracts[0], sizes=()),))
    old.call(replace(AS_TRAINED, height=16, width=64))
    assert not [r for r in caplog.records if "was trained at" in r.message], "an old folder does not know"


class Transposed(StableDiffusion):
    """A family that is wrong away from the square alone."""

    def call(self, net, x_t, t, cond):
        height, width = x_t.shape[-2:]
        y = super().call(net, x_t, t, cond)
        return y if height == width else y.flip(-1)


class Broken(StableDiffusion):
    """A family whose outputs away from the square are no numbers."""

    def call(self, net, x_t, t, cond):
        y = super().call(net, x_t, t, cond)
        return y if x_t.shape[-1] == x_t.shape[-2] else y * float("nan")


def test_the_proof_fails_where_only_an_elongated_size_is_wrong(teachers, tmp_path):
    for sizes, fails in (((), False), (SIZES, True)):
        family = Transposed(**vars(teachers["sd"]))
        pipe = family.load()
        bone = tiny.backbone("sd", pipe)
        bone.add("student", Lora())
        tiny.awake(bone, "student")
        given: dict[str, Any] = {"family": family, "pipe": pipe, "backbone": bone, "role": "student"}
        given |= {"method": Regression(num_inference_steps=2), "resolution": (32, 32), "sizes": sizes}
        if fails:
            with pytest.raises(StudentError, match="a difference of"):
                write_student(tmp_path, **given)
        else:
            assert write_student(tmp_path, **given) < 1e-5


def test_a_difference_that_is_not_a_number_at_the_second_size_is_not_lost(teachers, tmp_path):
    family = Broken(**vars(teachers["sd"]))
    pipe = family.load()
    bone = tiny.backbone("sd", pipe)
    bone.add("student", Lora())
    given: dict[str, Any] = {"family": family, "pipe": pipe, "backbone": bone, "role": "student", "sizes": SIZES}
    with pytest.raises(StudentError, match="nan"):
        write_student(tmp_path, method=Regression(num_inference_steps=2), resolution=(32, 32), **given)


def test_shown_sizes():
    assert shown_sizes((32, 32), SIZES) == ((32, 32), (24, 40))
    assert shown_sizes((24, 40), SIZES) == ((24, 40),)
    assert shown_sizes((32, 32), ()) == ((32, 32),)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_predicted_at_the_size_with_the_most_tokens(teachers, tmp_path, monkeypatch):
    def shape(data: Source = PROMPTS, **train: Any) -> tuple[int, ...]:
        run, seen = run_of(teachers["sd"], tmp_path / "out", Regression(), data, **train), []

        def forecast(loop: Any, *_: object) -> prediction.Prediction:
            seen.append(next(loop.batches)[0].shape)
            return prediction.Prediction((), 0, 0)

        def encode(self: Batches, samples: Any) -> dict[str, torch.Tensor]:
            return {"latents": torch.zeros(1, 4, *(side // 4 for side in samples[0].pixels.shape[-2:]))}

        monkeypatch.setattr(prediction, "check_sampling", lambda *_: None)
        monkeypatch.setattr(prediction, "forecast", forecast)
        monkeypatch.setattr(Batches, "encode", encode)
        monkeypatch.setattr(Batches, "condition", lambda self, prompts: {})
        prediction.predict(run)
        return seen[0]

    assert shape(resolution=((32, 32), (24, 40), (64, 40))) == (4, 16, 10)
    assert shape(resolution=((32, 32), (24, 40)), resolution_weights=(1e-9, 1.0)) == (4, 8, 8)
    place = folder_of_images(tmp_path / "images", *[(32, 32)] * 6, (40, 64))
    images = ImageFolder(train_data_dir=place, resolution=((32, 32), (40, 64)))
    assert shape(images, resolution=32) == (4, 10, 16)


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(teachers, student, tmp_path) -> EvalRun:
    (tmp_path / "prompts.txt").write_text("rose\ncat\nowl\npear")
    return EvalRun(
        teacher=str(teachers["sd"].pretrained_teacher_model),
        students=(str(student),),
        output_dir=tmp_path / "out",
        prompts=tmp_path / "prompts.txt",
        num=40,
        teacher_steps=2,
        batch=20,
        features="pixels",
        feature_batch=20,
        sizes=((32, 32), (24, 40)),
    )


def test_each_size_has_a_report_of_its_own_and_no_distance_is_pooled(asked):
    contents = evaluate_at_sizes(asked)
    for name, size in (("32x32", (32, 32)), ("24x40", (24, 40))):
        alone = evaluate(replace(asked, sizes=(size,), output_dir=asked.output_dir.parent / name))
        written = json.loads((asked.output_dir / "sizes" / name / "eval.json").read_text())
        for found in (contents["sizes"][name], written):
            assert [row["metrics"] for row in found["rows"]] == [row["metrics"] for row in alone["rows"]]
            assert {tuple(row["image"].values())[:2] for row in found["rows"]} == {size}
    (row,) = contents["over_sizes"]
    each = {size: one["rows"][1]["metrics"]["delta_vs_teacher"]["fd"] for size, one in contents["sizes"].items()}
    worst = max(each, key=lambda size: each[size]["value"])
    assert row["worst"] == {"size": worst, **each[worst]}
    assert row["mean"] == pytest.approx(sum(value["value"] for value in each.values()) / 2)
    assert json.loads((asked.output_dir / "sizes.json").read_text()) == json.loads(json.dumps(contents))
    page = (asked.output_dir / "report.html").read_text()
    assert "24x40" in page and "32x32" in page and len((asked.output_dir / "rows.csv").read_text().splitlines()) == 5
    lines = report_lines(contents)
    assert lines[-1].startswith(f"{row['name']}: excess over all sizes: mean") and f"at {worst}" in lines[-1]
    assert len(rows_of_all(contents)) == 4
    again = evaluate_at_sizes(asked)
    assert again["over_sizes"] == contents["over_sizes"], "it goes on where it was"


def test_the_worst_is_the_largest_excess():
    def contents(*values: float) -> dict[str, Any]:
        rows = [
            {"name": f"row {i}", "metrics": {"delta_vs_teacher": {"fd": {"value": value, "ci95": [value, value]}}}}
            for i, value in enumerate(values)
        ]
        return {"features": {"key": "fd"}, "rows": [{"name": "teacher", "metrics": {}}, *rows]}

    first, second = over_sizes({"8x8": contents(1.0, 5.0), "8x16": contents(3.0, -1.0), "16x8": contents(2.0, 2.0)})
    assert (first["mean"], first["worst"]["size"], first["worst"]["value"]) == (2.0, "8x16", 3.0)
    assert (second["mean"], second["worst"]["size"]) == (2.0, "8x8")


def test_sizes_of_an_evaluation_are_refused_in_one_line(asked):
    with pytest.raises(ConfigError, match="images of 28 x 40 pixels"):
        evaluate_at_sizes(replace(asked, sizes=((32, 32), (28, 40))))
    assert not asked.output_dir.exists(), "before anything is drawn"
    with pytest.raises(ConfigError, match="expected different ones"):
        replace(asked, sizes=((32, 32), (32, 32)))
    asked.output_dir.mkdir()
    (asked.output_dir / "eval.json").touch()
    with pytest.raises(EvaluationError, match="an evaluation at one size"):
        evaluate_at_sizes(asked)
    for text in ("32", "32x", "0x32", "32x32x32", "32 x 32"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected height and width in pixels"):
            height_and_width(text)
    assert height_and_width("24x40") == (24, 40)
    with pytest.raises(ConfigError, match="--sizes for an autoregressive"):
        check_options(replace(asked, features=None, teacher_steps=None))


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_names_width_and_height_and_the_worst_of_each_student():
    def row(size: list[int], *excesses: float) -> dict[str, Any]:
        arms = {
            arm: {"excess": value, "ci95": [value - 1, value + 1], "paired": value / 10}
            for arm, value in zip(("start", "one", "many"), excesses, strict=True)
        }
        return {"teacher": "t", "size": size, **arms, "gain": excesses[1] - excesses[2], "gain_ci95": [1.0, 3.0]}

    rows = {"t/24x40": row([24, 40], 9, 8, 6), "t/32x32": row([32, 32], 5, 3, 4)}
    lines = sizes_page(rows).splitlines()
    assert lines[2].startswith("| t: 32 x 32 | 5 [4, 6] | 3 [2, 4] | 4 [3, 5] | -1 [1, 3]")
    assert lines[3].startswith("| t: 40 x 24 | 9 [8, 10] | 8 [7, 9] | 6 [5, 7] | 2 [1, 3]")
    assert lines[-1] == "| t | 9, 7 | 8, 6 | 6, 5 |"
