"""The doctor: what it finds in the files of a run, what it says, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from stepdistill.cli import main as cli
from stepdistill.config.dump import config_to_yaml
from stepdistill.config.load import load_config
from stepdistill.core.errors import CheckpointError
from stepdistill.training.recipe import Run
from stepdistill.training.watch import rules
from stepdistill.training.watch.curves import Curve, differences, matching, settings_of
from stepdistill.training.watch.doctor import examine, save_curve
from stepdistill.training.watch.rules import PREFIX, SCORE, STATISTICS, Yardstick

ROOT = Path(__file__).parent.parent
FACTS = {"teacher_sha256": "f00", "prompts": ["a"], "samples": 4, "steps": 25, "guidance_scale": 7.5}


@pytest.fixture
def recipe(monkeypatch) -> Run:
    monkeypatch.chdir(ROOT)
    return load_config(Run, ROOT / "configs" / "quickstart.yaml", ["train.validation_steps=25"])


@pytest.fixture
def write(recipe, tmp_path, monkeypatch):
    """A function: a run's folder with these values by step, and these ratios at its looks."""

    def folder(name="run", *, loss=None, norm=None, ratios=None, learning_rate=1e-3, proof=True) -> Path:
        out = tmp_path / name
        out.mkdir()
        run = replace(recipe, train=replace(recipe.train, output_dir=str(out), learning_rate=learning_rate))
        (out / "config.yaml").write_text(config_to_yaml(run))
        rows = []
        for i in range(200):
            wobble = 1 + 0.2 * (i % 3 - 1)
            values = {"loss": 0.02 * wobble if loss is None else loss(i)}
            values["grad_norm/student"] = 0.05 * wobble if norm is None else norm(i)
            rows.append({"step": i + 1, **values})
        for i, step in enumerate(range(0, 201, 25)):
            given = {name: 1.0 for name in STATISTICS} | {key: f(i) for key, f in (ratios or {}).items()}
            score = rules.drift_score({key: rules.deviation(value, 0.05) for key, value in given.items()})
            rows.append({"step": step, **{PREFIX + key: value for key, value in given.items()}, SCORE: score})
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Yardstick(dict.fromkeys(STATISTICS, 1.0), dict.fromkeys(STATISTICS, 0.05), FACTS).save(out / "watch.json")
        (out / "distill_config.json").write_text(json.dumps({"proof": {"difference": 0} if proof else None}))
        return out

    monkeypatch.chdir(tmp_path)  # away from the curves of the repository
    return folder


def test_a_good_run_is_called_so(write):
    report, healthy = examine(write())
    assert healthy, report
    assert "200 of 200 steps" in report and report.endswith("nothing is off")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"loss": lambda i: 0.5}, "loss does not move: 0.5 first, 0.5 last"),
        ({"loss": lambda i: 0.01 * 1.03**i}, "loss rises from 0.02"),
        ({"loss": lambda i: float("nan") if i == 7 else 1.0 / (i + 1)}, "loss is not finite"),
        ({"norm": lambda i: 0.05 * (50 if i % 20 == 19 else 1)}, "jump: 10 of 200 steps"),
        ({"norm": lambda i: 0.05 * 1.02**i}, "gradients of student grow"),
        ({"norm": lambda i: 0.0 if i > 99 else 0.1}, "gradients of student have vanished"),
        ({"ratios": {"saturation": lambda i: 1 + 0.1 * i}}, "the saturation is 1.8 times the teacher's, expected"),
        ({"ratios": {"diversity": lambda i: 0.0 if i > 4 else 1.0}}, "the same image (collapse)"),
        ({"ratios": {f"gap_{x}": lambda i: 1 + i for x in (0.1, 0.3)}}, "score gap at 10% of the schedule is 9 times"),
        ({"proof": False}, "was not verified"),
    ],
)
def test_what_is_off_is_said(write, broken, words):
    report, healthy = examine(write(**broken))
    assert not healthy and words in report, report
    assert report.endswith("\n1 thing is off")


@pytest.mark.parametrize(
    ("fine", "words"),
    [
        ({"loss": lambda i: 0.02 * (1 + (i > 100) * 4) * (1 + i % 2)}, "normal if the method moves on to harder"),
        ({"ratios": {"contrast": lambda i: 0.2 + 0.02 * i}}, "still far, but no farther than before"),
        ({"ratios": {"contrast": lambda i: 2.0 if i in (3, 4) else 1.0}}, "was off at step 100, and has recovered"),
        (
            {"ratios": {"contrast": lambda i: 2.0 if i > 7 else 1.0}},
            "is 2 times the teacher's: a second time in a row is off",
        ),
        ({"norm": lambda i: 50.0 if i in (99, 150) else 0.05}, "nothing is off"),
        ({"loss": lambda i: 0.01 * i - 0.1}, "nothing is off"),
        ({"ratios": {key: lambda i: 1.08 if i > 5 else 1.0 for key in STATISTICS}}, "best/, of step 25"),
    ],
)
def test_what_is_only_worth_knowing_is_not_off(write, fine, words):
    report, healthy = examine(write(**fine))
    assert healthy and words in report, report


def test_a_run_without_watch_or_end_is_read_too(write):
    out = write()
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if SCORE not in line][:12]
    (out / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "lo')  # as a run writes while it is read
    (out / "distill_config.json").unlink()
    report, healthy = examine(out)
    assert healthy
    assert "12 of 200 steps" in report and "too few for a trend" in report
    assert "the collapse monitor was off" in report and "no student is written yet" in report


# --- reference curves ------------------------------------------------------------------------------------------------


def test_a_run_is_compared_with_the_curve_of_its_recipe(write):
    save_curve(write("good"), Path("configs/curves/quickstart.json"))
    report, healthy = examine(write("again"))
    assert healthy and "compared with configs/curves/quickstart.json" in report
    report, healthy = examine(write("other", loss=lambda i: 0.06 * (1 + i % 2), norm=lambda i: 0.3 + 0.1 * (i % 2)))
    assert not healthy
    assert "loss is 4.5 times that of configs/curves/quickstart.json" in report
    assert "grad_norm/student is 7 times" in report
    report, healthy = examine(write("signed", loss=lambda i: 0.02 * (i % 2) - 0.01))  # as a hinge's term is
    assert healthy, report


def test_images_are_compared_with_the_curve_s(write):
    pale = {"contrast": lambda i: 0.5 + 0.01 * i}
    save_curve(write("good"), Path("configs/curves/quickstart.json"))
    report, healthy = examine(write("pale", ratios=pale))  # steadily nearer, so the watch alone is quiet
    assert not healthy and "the contrast is 0.58 times the teacher's at step 200, and 1 times in" in report


def test_a_stage_that_is_harder_is_no_fault_where_the_curve_has_it_too(write):
    rising = {"loss": lambda i: 0.02 * (20 if i > 100 else 1) * (1 + i % 2)}
    assert not examine(write("alone", **rising))[1]
    save_curve(write("good", **rising), Path("configs/curves/quickstart.json"))
    assert examine(write("again", **rising))[1]


def test_other_settings_need_the_reference_by_name_and_are_said(write):
    file = Path("configs/curves/quickstart.json")
    save_curve(write("good"), file)
    out = write("fast", learning_rate=0.03)
    difference = "train.learning_rate is 0.03 here and 0.001 there"
    assert f"the closest is {file}, where {difference}" in examine(out)[0]
    report, _ = examine(out, file)
    assert f"differs slightly from the reference: {difference}" in report and "compared with" in report


def test_every_shipped_curve_is_of_the_recipe_beside_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted(Path("configs").rglob("curves/*.json"))
    assert files
    for file in files:
        recipe = file.parent.parent / f"{file.stem}.yaml"
        run = yaml.safe_load(config_to_yaml(load_config(Run, recipe, [])))
        assert not differences(settings_of(run), Curve.read(file).course), f"{recipe} has changed: write {file} again"
        assert matching(settings_of(run), Path("configs")) == (file, [])


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_s_status(write, capsys):
    cli.main(["doctor", str(write("good")), "--save-curve", "good.json"])
    assert Curve.read(Path("good.json")).training[-1]["step"] == 200
    cli.main(["doctor", str(write("again")), "--reference", "good.json"])
    assert "compared with good.json" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", str(write("bad", loss=lambda i: 0.5))])
    assert stopped.value.code == 1 and "does not move" in capsys.readouterr().out


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", str(tmp_path)])
    assert stopped.value.code == 2 and "expected the output_dir of a run" in capsys.readouterr().err
    (tmp_path / "curve.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no readable curve"):
        Curve.read(tmp_path / "curve.json")
