"""The watch: its statistics are what they say, it fires on what is broken, and it is quiet on what is not."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stepdistill.core import pixels as images
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import LoraSpec
from stepdistill.students.load import load_student
from stepdistill.students.verify import verify_student
from stepdistill.training import sampling
from stepdistill.training import setup as session
from stepdistill.training.distill import distill
from stepdistill.training.logs import Logs
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.watch import measure as watching
from stepdistill.training.watch import rules
from stepdistill.training.watch.measure import SETS, Watch, drift_statistics, ratios, yardstick
from stepdistill.training.watch.rules import SCORE, Yardstick

# --- statistics of images ------------------------------------------------------------------------------------------


def plain(red: float, green: float, blue: float, side: int = 4) -> torch.Tensor:
    return torch.tensor([red, green, blue]).reshape(3, 1, 1).expand(3, side, side)


def test_statistics_of_images_that_can_be_calculated_by_hand():
    red, grey = plain(1, 0, 0), plain(0.5, 0.5, 0.5)
    both = torch.stack([red, grey])
    torch.testing.assert_close(images.saturation(both), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(images.luminance(both), torch.tensor([0.299, 0.5]))
    torch.testing.assert_close(images.contrast(both), torch.zeros(2))
    torch.testing.assert_close(images.high_frequency(both), torch.zeros(2))
    half = torch.cat([plain(0, 0, 0), plain(1, 1, 1)], dim=-1)  # 4 x 8, left black, right white
    assert images.contrast(half).item() == pytest.approx(0.5)
    # the two columns beside the edge differ from their average of 3 x 3 by 1/3: 2 of 8 columns
    assert images.high_frequency(half).item() == pytest.approx(2 / 8 / 9)
    assert images.saturation(torch.stack([red, grey])[None]).shape == (1, 2)


def test_diversity_is_the_mean_distance_within_a_prompt():
    black, white, grey = (plain(x, x, x, 32) for x in (0.0, 1.0, 0.5))
    seeds = torch.stack([torch.stack([black, grey]), torch.stack([white, grey]), torch.stack([grey, grey])])
    # first prompt: black-white 1, black-grey and white-grey 1/2; the second: one image thrice
    torch.testing.assert_close(images.diversity(seeds), torch.tensor([2 / 3, 0.0]))
    with pytest.raises(ValueError, match="at least 2"):
        images.diversity(seeds[:1])


def test_the_spread_is_that_of_sets_of_seeds():
    """Against 4,000 simulated sets: prompts that differ a lot, seeds that differ a little."""
    level, size = torch.tensor([1.0, 2.0, 6.0]), 0.1
    made = level + size * torch.randn(4000, 3)
    found = yardstick([{"saturation": row} for row in made], {})
    assert found.mean["saturation"] == pytest.approx(3.0, rel=0.01)
    assert found.spread["saturation"] == pytest.approx(made.mean(1).std().item() / 3, rel=0.05)
    same = yardstick([{"saturation": level}] * 4, {})
    assert same.spread["saturation"] == rules.FLOOR


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deviations", "fires"),
    [
        ([0, 1, -2, 4.9, 4.9], False),
        ([0, 6], False),  # once
        ([0, 6, 6], True),  # twice running
        ([0, 6, 1, 6], False),
        ([0, -6, 6], True),  # out on both sides is out twice
        ([-20, -15, -9, -8, -8.5], False),  # a blurred beginner on its way
        ([-20, -8, -14, -14], True),  # it turned back
        ([-20, -24, -24], False),  # a little worse than untrained
        ([-20, -26, -26], True),
        ([-20, 12, 12], True),  # beyond the teacher is not excused by the start
        ([-20, -3, 0, -6, -7], True),
        ([0, math.nan, math.nan], True),
        ([40], False),
    ],
)
def test_twice_running(deviations, fires):
    assert rules.alarmed(deviations) == fires


def test_half_and_double_are_equally_far():
    assert rules.deviation(2.0, 0.1) == pytest.approx(-rules.deviation(0.5, 0.1))
    assert rules.deviation(0.0, 0.5) < -rules.BAND  # all is gone, and no teacher's spread is so wide as to allow it
    assert rules.drift_score({"a": -2.0, "b": 4.0}) == 3.0


@pytest.mark.parametrize(
    ("ratios", "fires"),
    [
        ([0.3], False),  # untrained
        ([0.3, 0.3], False),  # and one look
        ([0.9, 0.6, 0.6], False),
        ([0.9, 0.45, 0.45], True),
        ([0.2, 0.3, 0.31], True),  # it stays where it began
        ([0.2, 0.3, 0.4], False),  # on its way
        ([0.2, 0.45, 0.55], False),
        ([1.0, 0.2, 0.9], False),  # once
    ],
)
def test_half_the_motion_is_a_static_student(ratios, fires):
    """However much the teacher's own motion varies, and wherever the student began."""
    deviations = [rules.deviation(ratio, 2.0) for ratio in ratios]
    assert rules.alarming(rules.MOTION, deviations, 2.0) == fires
    assert not rules.alarming("contrast", deviations, 2.0)
    assert "expected 0.5 to" in rules.sentence(rules.MOTION, deviations, 2.0)


def test_statistics_of_clips_are_means_over_frames():
    drawn = torch.rand(2, 3, 4, 3, 8, 8)
    found, frames = drift_statistics(drawn), [drift_statistics(drawn[:, :, f]) for f in range(4)]
    for name in rules.IMAGE:
        torch.testing.assert_close(found[name], torch.stack([each[name] for each in frames]).mean(0))


def test_motion_of_latents_by_hand():
    latents = torch.zeros(2, 4, 3, 8, 8)
    latents[0, :, 1] = -2.0  # there and back
    latents[1, 0] = 7.0
    assert watching.latent_motion(latents).tolist() == [2.0, 0.0]


def test_every_statistic_has_words():
    for name in (*rules.STATISTICS, rules.MOTION):
        for z in (-9.0, 9.0):
            text = rules.sentence(name, [0.0, z, z], 0.1)
            assert rules.title(name) in text and f"{math.exp(z / 10):.3g} times" in text and ";" in text
    assert "0.607 to 1.65" in rules.sentence("contrast", [0.0, 9.0], 0.1)


# --- on images of the bundled teacher ------------------------------------------------------------------------------

PROMPTS = ("animal mammal", "heart", "food fruit", "sky weather")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> session.Session:
    """The bundled teacher with an untrained student, and its yardstick in the folder."""
    out = tmp_path_factory.mktemp("scene")
    run = Run(
        family=StableDiffusion(pretrained_teacher_model="tiny-sd"),
        method=Regression(num_inference_steps=2),
        data=TeacherSamples(source=Prompts(prompts=PROMPTS), folder="tiny-sd-samples", count=1024),
        lora=LoraSpec(rank=2, alpha=3),
        train=TrainSpec(
            output_dir=str(out),
            report_to="none",
            validation_prompts=PROMPTS,
            validation_steps=1,
            teacher_steps=4,
            teacher_guidance_scale=3.0,
        ),
    )
    made = session.prepare(run)
    Optimizers(made.backbone, run.train).declare(run.method).build()
    Watch(made, Logs(made.accelerator, out, 0), 0)
    return made


DRAWN: dict[tuple[int, ...], torch.Tensor] = {}


def taught(scene: session.Session, ids) -> torch.Tensor:
    """The teacher's latents at these seeds."""
    key = tuple(ids)
    if key not in DRAWN:
        DRAWN[key] = sampling.sample_teacher(scene, list(PROMPTS), key)
    return DRAWN[key]


def saturated(scene: session.Session, ids) -> torch.Tensor:
    """The teacher's images with far too much colour, as latents."""
    drawn = sampling.to_images(scene, taught(scene, ids))
    grey = images.luma(drawn)[:, None]
    return scene.run.family.encode(scene.pipe, ((grey + 20 * (drawn - grey)).clamp(0, 1) * 2 - 1))


STUDENTS = {
    "teacher": lambda scene, ids: taught(scene, ids),
    "saturated": saturated,
    "overdone": lambda scene, ids: 1.7 * taught(scene, ids),
    "nan": lambda scene, ids: taught(scene, ids) * math.nan,
    "collapsed": lambda scene, ids: taught(scene, range(len(ids))),  # one seed for all
    "blurred": lambda scene, ids: F.avg_pool2d(taught(scene, ids), 3, 1, 1, count_include_pad=False),
}


MEASURED: dict[str, dict[str, torch.Tensor]] = {}  # each of these students is measured once for all tests
measure = Watch._measure


@pytest.fixture
def watch(scene, tmp_path, monkeypatch, caplog):
    """A function: the watch after looks at these students, one a step; and what it warned of."""
    folder = Path(scene.run.train.output_dir)

    def after(*students: str, **train) -> tuple[Watch, list[str]]:
        out = tmp_path / "out"
        (out / "best").mkdir(parents=True)
        (out / "best" / "watch.json").write_text('{"step": 9, "score": 0}')  # of another run, to be forgotten
        shutil.copy(folder / "watch.json", out)  # so that the teacher need not draw again
        spec = replace(scene.run.train, output_dir=str(out), **train)
        monkeypatch.setattr(scene, "run", replace(scene.run, train=spec))
        monkeypatch.setattr(watching, "plot_drift", lambda *args: None)  # most of a look's time here
        made = None
        for step, name in enumerate(students):

            def measured(self, make, number, name=name):
                if number:
                    return measure(self, make, number)
                if name not in MEASURED:
                    MEASURED[name] = measure(self, make, number)
                return MEASURED[name]

            monkeypatch.setattr(Watch, "_measure", measured)
            monkeypatch.setattr(
                watching, "sample_student", lambda s, prompts, ids, size, name=name: STUDENTS[name](s, ids)
            )
            if made is None:
                made = Watch(scene, Logs(scene.accelerator, out, 0), 0)
            else:
                after.asked.append(made.look(step))
        assert made is not None
        return made, [record.message for record in caplog.records if record.levelno == logging.WARNING]

    after.asked = []
    return after


def test_quiet_on_the_teacher_under_other_seeds(watch):
    made, said = watch("teacher", "teacher", "teacher")
    assert not said
    (row, *_) = rules.read_metrics(made.logs.file)
    assert row[SCORE] < 2.5
    assert {f"watch/{name}" for name in rules.STATISTICS} < row.keys()


def test_quiet_on_other_sets_of_the_teacher_too(scene, watch):
    made, _ = watch("teacher")
    for number in (SETS + 1, SETS + 2):
        found = ratios(made._measure(sampling.sample_teacher, number), made.teacher)
        far = {name: rules.deviation(value, made.teacher.spread[name]) for name, value in found.items()}
        assert all(abs(z) < rules.BAND for z in far.values()), far


@pytest.mark.parametrize(
    ("student", "word"),
    [
        ("saturated", "saturation"),
        ("overdone", "score gap at 10% of the schedule"),
        ("collapsed", "diversity"),
        ("blurred", "high-frequency energy"),
    ],
)
def test_fires_on_a_broken_student(watch, student, word):
    made, said = watch("teacher", student, student, student)
    (sentence,) = [text for text in said if f"the {word} is" in text]  # said once, not at every look
    assert sentence.startswith("step 2, twice running") and "times the teacher's, expected" in sentence


def test_once_is_no_alarm(watch):
    assert not watch("teacher", "collapsed", "teacher", "collapsed")[1]


def test_a_beginner_may_be_off(watch):
    assert not watch("blurred", "blurred", "teacher", "teacher")[1]


def test_best_is_kept_and_never_the_untrained_one(watch):
    made, _ = watch("teacher", "collapsed", "teacher", "blurred")
    kept = json.loads((made.out / "best" / "watch.json").read_text())
    scores = {row["step"]: row[SCORE] for row in rules.read_metrics(made.logs.file)}
    assert kept == {"step": 2, "score": scores[2]}
    assert not (made.out / "best.stepdistill.part").exists()


def test_a_student_of_nans_is_off_and_never_the_best(watch):
    made, said = watch("teacher", "nan", "nan", "blurred")
    assert json.loads((made.out / "best" / "watch.json").read_text())["step"] == 3
    assert any("the saturation is nan times" in text for text in said)


def test_it_asks_to_stop_at_an_alarm_and_looks_once_at_a_step(watch):
    made, _ = watch("teacher", "teacher", "saturated", "saturated", watch_stop=True)
    assert watch.asked == [False, False, True]
    lines = made.logs.file.read_text().splitlines()
    assert not made.look(3)
    assert made.logs.file.read_text().splitlines() == lines


def test_the_gap_is_the_teacher_s_error(scene, watch):
    """Of samples that are pure noise the teacher predicts little: the mean error exceeds its own samples' manifold."""
    made, _ = watch("teacher")
    noisy = made._errors(torch.randn(len(PROMPTS), *scene.batches.shape), range(len(PROMPTS)), (32, 32))
    own = made._errors(taught(scene, range(len(PROMPTS))), range(len(PROMPTS)), (32, 32))
    for name in ("gap_0.1", "gap_0.3", "gap_0.5"):
        assert noisy[name].mean() > 1.5 * own[name].mean()
    assert all(value.shape == (len(PROMPTS),) for value in own.values())


# --- in a run --------------------------------------------------------------------------------------------------------


def make(out: Path, **train) -> Run:
    given = {
        "output_dir": str(out),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-4,
        "report_to": "none",
        "checkpointing_steps": 1,
        "validation_prompts": PROMPTS[:2],
        "validation_steps": 2,
        "teacher_steps": 5,
        "watch_samples": 2,
    }
    return Run(
        family=StableDiffusion(pretrained_teacher_model="tiny-sd"),
        method=Regression(num_inference_steps=2),
        data=TeacherSamples(
            source=Prompts(prompts_file="configs/tables/prompts.txt"), folder="tiny-sd-samples", count=1024
        ),
        lora=LoraSpec(rank=2, alpha=3),
        train=TrainSpec(**(given | train)),
    )


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    """The prompts' path is relative."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent.parent)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return distill(make(tmp_path_factory.mktemp("whole") / "out"))


def looks(out: Path) -> list[dict[str, float]]:
    kept = [row for row in rules.read_metrics(out / "metrics.jsonl") if SCORE in row]
    return [{key: row[key] for key in row if key == "step" or key.startswith(rules.PREFIX)} for row in kept]


def test_a_run_is_watched_from_before_its_first_step_to_its_last(whole):
    assert [row["step"] for row in looks(whole)] == [0, 2, 4]
    assert (whole / "samples" / "watch.png").stat().st_size > 10_000
    assert json.loads((whole / "best" / "watch.json").read_text())["step"] in (2, 4)


def test_the_watch_changes_nothing_in_training(whole, tmp_path):
    out = distill(make(tmp_path / "out", watch_samples=0, validation_steps=None, validation_prompts=()))
    for name in ("student.safetensors",):
        one, two = (load_file(folder / "checkpoint-4" / name) for folder in (out, whole))
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert not looks(out) and not (out / "best").exists() and not (out / "watch.json").exists()


def test_best_loads_into_a_plain_pipeline_and_can_be_proven(whole):
    pipe = StableDiffusion(pretrained_teacher_model="tiny-sd").load()
    pipe.set_progress_bar_config(disable=True)
    call = load_student(pipe, whole / "best")
    assert pipe("heart", **call, output_type="np").images.shape == (1, 32, 32, 3)
    assert verify_student(whole / "best") < 1e-4


def test_resume_goes_on_as_if_it_had_never_stopped(whole, tmp_path, monkeypatch):
    """Also after a signal at a step of validation: it saves and leaves, and the look comes first on going on."""
    out = shutil.copytree(whole, tmp_path / "out")
    file = out / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines() if not ('"step": 2' in line and SCORE in line)]
    file.write_text("".join(line + "\n" for line in kept))
    monkeypatch.delattr(watching, "sample_teacher")  # the yardstick is in the folder
    later = {"step": 4, "score": -1.0}  # of another branch, and better than any
    (out / "best" / "watch.json").write_text(json.dumps(later))
    distill(make(out, resume_from_checkpoint="checkpoint-2"))
    assert looks(out) == looks(whole)
    ours, theirs = (json.loads((folder / "best" / "watch.json").read_text()) for folder in (out, whole))
    assert ours == theirs


def test_a_far_too_high_learning_rate_stops_the_run(tmp_path, caplog):
    steps = {"max_train_steps": 18, "validation_steps": 3, "checkpointing_steps": None}
    out = distill(make(tmp_path / "out", **steps, learning_rate=0.1, watch_stop=True))
    last = looks(out)[-1]["step"]
    assert 6 <= last < 18
    assert (out / f"checkpoint-{last}" / "manifest.json").exists()
    assert not (out / "distill_config.json").exists()
    assert "twice running" in caplog.text and "the collapse monitor stops the run" in caplog.text


def test_odd_settings_are_refused():
    with pytest.raises(ValueError, match="watch_samples is 1"):
        TrainSpec(output_dir="x", watch_samples=1)
    with pytest.raises(ValueError, match="watch_stop needs validation_steps"):
        TrainSpec(output_dir="x", watch_stop=True)


def test_a_yardstick_of_other_settings_is_drawn_anew(tmp_path):
    file = tmp_path / "watch.json"
    made = Yardstick({"a": 1 / 3}, {"a": random.random()}, {"prompts": ["x"]})
    made.save(file)
    assert Yardstick.read(file) == made
    file.write_text("{")
    assert Yardstick.read(file) is None


def test_statistics_cover_what_is_documented():
    assert set(drift_statistics(torch.rand(2, 3, 3, 8, 8))) == set(rules.IMAGE)
