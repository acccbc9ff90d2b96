"""Evaluation of clips: stores, existing clips, rows of the report, and what is drawn."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate import PartialState
from oracles.clips import MOTIONS, frozen, moving, slowed
from oracles.excess import excess
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core.errors import DataError, EvaluationError, OutputError
from stepdistill.evaluation import measure
from stepdistill.evaluation import run as evaluation
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.measure import Reference, Sampled, measured
from stepdistill.evaluation.metrics.encoders import pixel_features
from stepdistill.evaluation.metrics.image_scores import PromptLikeness, clip_scores, pixel_likeness
from stepdistill.evaluation.metrics.jackknife import ratio_of_means
from stepdistill.evaluation.metrics.motion import frame_features, motion, motion_features, replicates_by_group
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.read import cropped, read_into
from stepdistill.evaluation.run import check_kind, evaluate, extractor_of, motions_of, score_images
from stepdistill.evaluation.spec import EvalRun, EvalSpec
from stepdistill.evaluation.stored_clips import stored_clips
from stepdistill.families.base import Family
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.clip import Clip
from stepdistill.networks.roles import Lora
from stepdistill.students.draw.animation import images_of_clip, save_animation
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.write import write_student

N = 48


def frames_in(folder: Path, clips: Tensor) -> Path:
    """A folder of frame folders."""
    for i, clip in enumerate(clips):
        (folder / f"{i:04d}").mkdir(parents=True)
        for f, image in enumerate(images_of_clip(clip)):
            image.save(folder / f"{i:04d}" / f"{f:02d}.png")
    return folder


@pytest.fixture
def spec(tmp_path) -> EvalSpec:
    return EvalSpec(output_dir=tmp_path / "out", features="pixels", clips=True, feature_batch=20, metrics=())


def test_existing_clips_are_scored_by_frames_and_by_motion(spec, tmp_path):
    """A frozen clip has the frames of a moving one, and not its motion; values are those of the metrics."""
    clips, ref = moving(N, 1), moving(N + 2, 2)
    places = [frames_in(tmp_path / "good", clips), frames_in(tmp_path / "still", frozen(clips))]
    found = score_images(places, replace(spec, reference=str(frames_in(tmp_path / "ref", ref))))
    good, still = (row["metrics"] for row in found["rows"])
    pixels = pixel_features()
    for name, row in (("fd_frames", partial(frame_features, numbers=range(N))), ("fd_motion", motion_features)):
        against = partial(frame_features, numbers=range(N + 2)) if name == "fd_frames" else motion_features
        alone = measured(
            [Sampled(name="x", role="images", features=row(pixels, clips))],
            Reference(stats=Stats.of(against(pixels, ref)), features=None, paired=False, facts={}),
            "fd",
        )
        assert good[name]["value"] == pytest.approx(alone[0]["metrics"]["fd"]["value"], rel=1e-5)
        assert good[name]["ci95"] == pytest.approx(alone[0]["metrics"]["fd"]["ci95"], rel=1e-4)
    assert still["fd_motion"]["value"] > 2 * good["fd_motion"]["value"]
    assert still["fd_frames"]["value"] < 2 * good["fd_frames"]["value"]
    assert good["motion"]["value"] == pytest.approx(motion(clips).mean().item()) and still["motion"]["value"] == 0
    assert found["features"]["id"].endswith("/clips") and found["features"]["key"] == "fd_frames"
    lines = [json.loads(line) for line in (spec.output_dir / "per_sample.jsonl").read_text().splitlines()]
    assert [line["motion"] for line in lines[:N]] == pytest.approx(motion(clips).tolist())
    with (spec.output_dir / "rows.csv").open() as file:
        assert float(next(csv.DictReader(file))["motion"]) == good["fd_motion"]["value"]
    html = (spec.output_dir / "report.html").read_text()
    assert "fd of frames" in html and "fd of motion" in html and "nearly static" not in html


def test_features_do_not_depend_on_the_units(spec, tmp_path):
    """Nor on processes: the frame that is taken is the clip's own."""
    clips, extractor = frames_in(tmp_path / "clips", moving(23, 3)), extractor_of(spec, torch.device("cpu"), clips=True)
    stores = [
        read_into(
            tmp_path / f"of-{size}",
            Images(clips, clips=True),
            replace(spec, feature_batch=size),
            extractor,
            PartialState(),
        )
        for size in (23, 4)
    ]
    for view in (0, 1):
        torch.testing.assert_close(stores[0].features(view), stores[1].features(view))
    assert not torch.equal(stores[0].features(0), stores[0].features(1))
    assert stores[0].features().shape == (23, extractor.identity.dim)
    motions = stores[0].motion()
    assert motions is not None
    torch.testing.assert_close(motions, motion_features(pixel_features(), moving(23, 3)))


@pytest.mark.parametrize("kind", ["mp4", "webp"])
def test_files_are_read_as_frames(tmp_path, kind):
    clips = moving(3, 4)
    for i, clip in enumerate(clips):
        save_animation(images_of_clip(clip), tmp_path / f"{i}.{kind}", 8)
    (batch,) = Images(tmp_path, clips=True).batches()
    assert batch.images.shape == clips.shape
    error = (batch.images.float() - clips.float()).abs().mean().item()
    assert error < 4 if kind == "mp4" else error == 0
    (small,) = Images(tmp_path, 16, clips=True).batches()
    assert small.images.shape == (3, 5, 3, 16, 16) and torch.equal(small.images, cropped(batch.images, 16))


def test_the_digest_is_of_every_frame(tmp_path):
    clips = moving(2, 5)
    a, b = (frames_in(tmp_path / name, clips) for name in "ab")
    assert stored_clips(a).sha256() == stored_clips(b).sha256()
    images_of_clip(clips[0])[0].save(b / "0001" / "04.png")
    assert stored_clips(a).sha256() != stored_clips(b).sha256()


def test_clips_that_are_refused(spec, tmp_path):
    mixed = frames_in(tmp_path / "mixed", moving(N, 6))
    (mixed / "0007" / "04.png").unlink()
    with pytest.raises(DataError, match="0000 with 5 frames and 0007 with 4 .* one number of frames"):
        list(Images(mixed, clips=True).batches())
    broken = frames_in(tmp_path / "broken", moving(N, 6))
    (broken / "0007" / "04.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 unreadable of 48 .*0007"):
        list(Images(broken, clips=True).batches())
    for place, words in ((tmp_path / "none", "does not exist"), (tmp_path / "mixed" / "0001", "0 clips in")):
        with pytest.raises(DataError, match=words):
            score_images([place], replace(spec, reference=str(mixed)))
    with pytest.raises(DataError, match="0 clips in"):
        score_images([mixed], replace(spec, reference=str(tmp_path / "mixed" / "0001")))


def test_statistics_of_clips_are_of_frames(spec, tmp_path, capsys):
    """Of frames and of nothing else, so that no distance of motion is told."""
    ref, made = frames_in(tmp_path / "ref", moving(N, 2)), frames_in(tmp_path / "made", moving(N, 1))
    cli.main(["eval", "ref", str(ref), "--clips", "--features=pixels", "-o", str(tmp_path / "ref.npz")])
    capsys.readouterr()
    by_file = score_images([made], replace(spec, reference=str(tmp_path / "ref.npz")))["rows"][0]["metrics"]
    by_clips = score_images([made], replace(spec, reference=str(ref), output_dir=tmp_path / "two"))["rows"][0][
        "metrics"
    ]
    assert by_file["fd_frames"]["value"] == pytest.approx(by_clips["fd_frames"]["value"], rel=1e-6)
    assert "fd_motion" in by_clips and "fd_motion" not in by_file
    images = ["eval", "score", str(made), "--features=pixels", "--ref", str(tmp_path / "ref.npz")]
    with pytest.raises(SystemExit):
        cli.main([*images, "-o", str(tmp_path / "three")])
    assert "pixels@none/area8/clips" in capsys.readouterr().err


def sampled(name: str, role: str, clips: Tensor) -> Sampled:
    pixels, numbers = pixel_features(), range(len(clips))
    frames, moved = frame_features(pixels, clips, numbers), motion_features(pixels, clips)
    return Sampled(name=name, role=role, features=frames, motion=moved, scores={"motion": motion(clips)})


def test_rows_are_beside_the_teacher_in_motion():
    """Excess and ratio of slow and reversed clips; only the distance within each motion sees the reversed ones."""
    ref, best, kinds = sampled("ref", "reference", moving(120, 1)), moving(120, 2), [*MOTIONS] * 30
    rows = [
        sampled("best", "teacher", best),
        sampled("slow", "student", slowed(best)),
        sampled("back", "student", best.flip(1)),
    ]
    against = Reference(stats=Stats.of(ref.features), features=ref.features, motion=ref.motion, paired=True, facts={})
    teacher, slow, back = (row["metrics"] for row in measured(rows, against, "fd_frames", (), motions=kinds))
    best_moved, slow_moved, back_moved = (
        motion_features(pixel_features(), x) for x in (best, slowed(best), best.flip(1))
    )
    assert ref.motion is not None
    by_hand = excess(slow_moved, ref.motion, best_moved)
    assert list(slow["delta_vs_teacher"]) == ["fd_frames", "fd_motion", "fd_by_motion"]
    assert slow["delta_vs_teacher"]["fd_motion"]["value"] == pytest.approx(by_hand.value)
    assert slow["delta_vs_teacher"]["fd_motion"]["ci95"] == pytest.approx([by_hand.low, by_hand.high])
    ratio = ratio_of_means(motion(slowed(best)), motion(best))
    assert slow["motion_ratio"]["value"] == pytest.approx(ratio.value) and ratio.value < 0.8
    assert back["motion_ratio"]["value"] == pytest.approx(1)
    split = back["delta_vs_teacher"]["fd_by_motion"]
    assert (
        split["ci95"][0] > 5 * abs(back["delta_vs_teacher"]["fd_motion"]["value"])
        and split["ci_method"] == "jackknife-15"
    )
    assert list(back["by_motion"]) == sorted(MOTIONS)
    left, _ = replicates_by_group([back_moved], ref.motion, torch.arange(120) % 4)
    assert back["by_motion"]["left"]["fd_motion"] == pytest.approx(left[0][0, 0].item())  # the first of MOTIONS
    mean = sum(each["fd_motion"] for each in back["by_motion"].values()) / 4
    assert back["fd_by_motion"]["value"] == pytest.approx(mean)
    assert "motion_ratio" not in teacher and "delta_vs_teacher" not in teacher
    still = replace(rows[0], scores={"motion": torch.zeros(120)})
    assert measured([still, rows[1]], against, "fd_frames", ())[1]["metrics"]["motion_ratio"]["value"] is None


BESIDE = test_rows_are_beside_the_teacher_in_motion
ROWS = {
    "features of frames": Bug(measure._of_motion, "row.motion for row", "row.features for row", BESIDE),
    "excess the other way": Bug(measure._of_motion, "table[i] - table[teacher]", "table[teacher] - table[i]", BESIDE),
    "one motion for all": Bug(measure._of_motion, "torch.stack([*each.values()]).mean(0)", "each[0]", BESIDE),
    "all motions as one": Bug(measure._of_motion, "names.index(name)", "0", BESIDE),
    "another row's ratio": Bug(
        measure._of_motion, 'ratio_of_means(row.scores["motion"]', 'ratio_of_means(rows[1].scores["motion"]', BESIDE
    ),
    "motions of another row": Bug(measure._of_motion, "value[i, 0].item()", "value[0, 0].item()", BESIDE),
    "no motion beside the teacher": Bug(measure.measured, ' | moved[i].pop("delta_vs_teacher")', "", BESIDE),
}
test_rows_are_right, test_planted_bugs_are_noticed = bug_tests(ROWS, KeyError)


def test_images_have_nothing_of_motion():
    rows = [Sampled(name=role, role=role, features=torch.randn(60, 3)) for role in ("teacher", "student")]
    ref = torch.randn(60, 3)
    against = Reference(stats=Stats.of(ref), features=ref, paired=True, facts={})
    for row in measured(rows, against, "fd", ()):
        assert not {key for key in row["metrics"] if "motion" in key}
    assert list(row["metrics"]["delta_vs_teacher"]) == ["fd"]


def test_motions_come_with_the_prompts():
    records = [{"prompt": f"a dog moving {name}", "motion": name} for name in ("left", "right")]
    assert motions_of(records * 10) == (["left", "right"] * 10, [])
    assert motions_of(records * 9) == ([], ["fd_by_motion: 9 clips of motion 'left', and an interval needs 10"])
    assert motions_of([*records * 10, {"prompt": "a cat"}]) == motions_of([]) == ([], [])


def test_scores_of_a_clip_are_means_over_its_frames(tmp_path):
    clip, clips = Clip(str(tiny.clip(tmp_path / "clip")), torch.device("cpu")), moving(3, 7)
    scores = PromptLikeness(clip, "tiny", "", ["a", "red apple", "cat"])(clips, range(3))
    each = clip_scores(clip, clips.flatten(0, 1), [p for p in ("a", "red apple", "cat") for _ in range(5)])
    assert scores["clip"] == pytest.approx(each.reshape(3, 5).mean(1).tolist())
    assert all(0 < value < 1 - 1e-4 for value in scores["consistency"] + scores["consistency_first"])
    still = PromptLikeness(clip, "tiny", "", ["a", "b", "c"])(frozen(clips), range(3))
    assert still["consistency"] == still["consistency_first"] == pytest.approx([1, 1, 1])
    images = PromptLikeness(clip, "tiny", "", ["a", "b", "c"])(clips[:, 0], range(3))
    assert list(images) == ["clip"]
    darker = (clips.float() * 0.9).to(torch.uint8)
    whole = pixel_likeness(lambda numbers: clips[list(numbers)])(darker, range(3))
    frames = pixel_likeness(lambda numbers: clips.flatten(0, 1)[list(numbers)])(darker.flatten(0, 1), range(15))
    for name in ("psnr", "ssim"):
        assert whole[name] == pytest.approx(torch.tensor(frames[name]).reshape(3, 5).mean(1).tolist())


@pytest.fixture
def run(tmp_path) -> EvalRun:
    """Of a Wan pipeline with random weights and a student of it, on prompts of two motions."""
    pipe, family = tiny.pipeline("wan"), replace(tiny.FAMILIES["wan"], pretrained_teacher_model=str(tmp_path / "wan"))
    pipe.save_pretrained(tmp_path / "wan")
    pipe = family.load()
    bone = tiny.backbone("wan", pipe)
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    method = Consistency(ema_decay=None, num_ddim_timesteps=8)
    given = {
        "family": family,
        "pipe": pipe,
        "backbone": bone,
        "role": "student",
        "resolution": (32, 32),
        "method": method,
    }
    write_student(tmp_path / "near", **given)
    records = [{"prompt": f"{what} {way}", "motion": way} for what in ("cat", "rose") for way in ("left", "right")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return EvalRun(
        teacher=str(tmp_path / "wan"),
        students=(str(tmp_path / "near"),),
        output_dir=tmp_path / "out",
        prompts=tmp_path / "prompts.jsonl",
        num=40,
        teacher_steps=2,
        steps=(1,),
        batch=20,
        features="pixels",
        feature_batch=20,
        metrics=("paired", "diversity"),
        columns=3,
    )


def test_a_video_student_is_drawn_and_measured(run):
    found = evaluate(replace(run, save_images=True, export="vbench"))
    teacher, few, student = found["rows"]
    assert (teacher["role"], few["role"], student["role"]) == ("teacher", "teacher", "student")
    assert not found["left_out"] and student["image"]["height"] == student["image"]["width"] == 32
    for name in ("fd_frames", "fd_motion", "fd_by_motion"):
        low, high = student["metrics"]["delta_vs_teacher"][name]["ci95"]
        assert low < student["metrics"]["delta_vs_teacher"][name]["value"] < high
    assert list(student["metrics"]["by_motion"]) == ["left", "right"]
    out = run.output_dir
    saved = Images(out / "images" / "near_1-step", clips=True)
    (clips,) = (batch.images for batch in saved.batches())
    assert clips.shape == (40, 5, 3, 32, 32)
    pipe = StudentPipeline.of(tiny_family(run), run.students[0])
    calls = pipe.calls(replace(DrawOptions(steps=1), height=32, width=32))
    texts = [json.loads(line)["prompt"] for line in run.prompts.read_text().splitlines()] * 10
    again = pipe.generate(calls, texts, run.seed, batch=20)[0]
    assert torch.equal(clips, again)
    assert student["metrics"]["motion"]["value"] == pytest.approx(motion(clips).mean().item())
    features = torch.from_numpy(np.load(out / "work" / "near_1-step" / "features.npy"))
    torch.testing.assert_close(features[:, 198:], motion_features(pixel_features(), clips))
    assert sorted(file.name for file in (out / "grids").iterdir()) == ["near.png", "near.webp"]
    assert len(list((out / "vbench" / "near_1-step").glob("cat left-*.mp4"))) == 10
    assert "data:image/webp;base64," in (out / "report.html").read_text()
    before = (out / "eval.json").read_text()
    evaluate(replace(run, save_images=True, export="vbench"))  # nothing is drawn again
    assert [row["metrics"] for row in json.loads(before)["rows"]] == [
        row["metrics"] for row in json.loads((out / "eval.json").read_text())["rows"]
    ]
    scored = score_images([out / "images" / "near_1-step"], replace(run_spec(run), output_dir=out.parent / "scored"))
    assert scored["rows"][0]["metrics"]["motion"] == student["metrics"]["motion"]


def tiny_family(run: EvalRun) -> Family:
    return replace(tiny.FAMILIES["wan"], pretrained_teacher_model=run.teacher)


def run_spec(run: EvalRun) -> EvalSpec:
    """Of the same clips, against those of the teacher's few steps."""
    names = {"features": run.features, "feature_batch": run.feature_batch, "metrics": ()}
    return EvalSpec(clips=True, reference=str(run.output_dir / "images" / "teacher_1-step"), **names, output_dir=Path())


def test_one_frame_is_an_image(run, monkeypatch):
    one = replace(tiny_family(run), num_frames=1)
    monkeypatch.setattr(evaluation, "family_of", lambda *args: one)
    found = evaluate(replace(run, students=(), steps=(1,)))
    assert found["features"]["key"] == "fd" and "motion" not in found["rows"][0]["metrics"]
    assert [file.suffix for file in (run.output_dir / "grids").iterdir()] == [".png"]


def test_exports_and_features_are_of_one_kind(tmp_path, monkeypatch):
    run = EvalRun(teacher="tiny-sd", output_dir=tmp_path, features="pixels")
    for export, clips in (("vbench", False), ("geneval", True)):
        with pytest.raises(EvaluationError, match=f"export {export} of"):
            check_kind(replace(run, export=export), clips)
    with pytest.raises(EvaluationError, match="codes clips as a whole"):
        check_kind(replace(run, features="vae"), True)
    check_kind(replace(run, export="vbench"), True)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(OutputError, match="PyAV"):
        check_kind(replace(run, export="vbench"), True)
