"""`stepdistill eval run --lora`: a style in the teacher and beside the students, at several strengths."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_eval_run import PROMPTS, students, taught, teachers  # noqa: F401 - fixtures

from stepdistill.cli import main as cli
from stepdistill.core.errors import ConfigError, EvaluationError, StudentError
from stepdistill.evaluation.run import evaluate, extractor_of
from stepdistill.evaluation.spec import SEED_B, EvalRun
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.networks.roles import Adapters
from stepdistill.students.draw.call import teacher_call
from stepdistill.students.draw.options import DrawOptions
from stepdistill.students.draw.pipeline import StudentPipeline

N = 40  # images


@pytest.fixture(scope="module")
def styled(teachers, students, tmp_path_factory) -> EvalRun:  # noqa: F811
    """The student `near`, with the LoRA of `far` as a style: 0.5 in the teacher, 0 and 1 beside the student."""
    folder = tmp_path_factory.mktemp("styled")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return EvalRun(
        teacher=teachers["sd"].pretrained_teacher_model,
        students=(students[0],),
        lora=(students[1], 0.5),
        lora_strengths=(0.0, 1.0),
        output_dir=folder / "out",
        prompts=folder / "prompts.txt",
        num=N,
        teacher_steps=1,
        steps=(1,),
        batch=N,
        features="pixels",
        feature_batch=N,
    )


@pytest.fixture(scope="module")
def found(styled) -> dict[str, Any]:
    return evaluate(styled)


def features(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / "work" / name / "features.npy")


def test_rows_are_named_by_the_strength(styled, found):
    assert [(row["name"], row.get("lora")) for row in found["rows"]] == [
        *(("teacher, 1 step, far 0.5", 0.5), ("near, 1 step, far 0", 0.0), ("near, 1 step, far 1", 1.0)),
    ]
    assert (found["teacher"]["lora"], found["teacher"]["lora_strength"]) == styled.lora
    rows = list(csv.DictReader((styled.output_dir / "rows.csv").open()))
    assert [row["lora"] for row in rows] == ["0.5", "0.0", "1.0"]
    assert "LoRA strength" in (styled.output_dir / "report.html").read_text()


def test_images_are_those_of_the_pipeline_with_both(styled, found):
    both = StudentPipeline.load(styled.students[0], loras=[(styled.lora[0], 1.0)])
    pixels, out = extractor_of(styled, torch.device("cpu")), styled.output_dir
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(N)]

    def drawn(calls) -> np.ndarray:
        return pixels(both.generate(calls, prompts, SEED_B, N)[0]).numpy()

    student, call = both.calls(DrawOptions(steps=1)), teacher_call(both.family, both.pipe, 1, 7.5, "")
    taught = [replace(call, scheduler=both.native)]
    assert np.array_equal(features(out, "near_1-step_far-1"), drawn(student))
    both.weigh({"lora-0": 0.5}, strength=0.0)
    assert np.allclose(features(out, "teacher_1-step_far-0.5"), drawn(taught), atol=0.01)  # rounding of 8 bits
    both.weigh({"lora-0": 0.0})
    alone = drawn(student)
    assert np.array_equal(features(out, "near_1-step_far-0"), alone)
    assert np.abs(alone - features(out, "near_1-step_far-1")).max() > 0.1


def test_a_reference_with_a_style_is_another_one(styled, found, tmp_path):
    plain = evaluate(replace(styled, lora=None, lora_strengths=(), students=(), output_dir=tmp_path / "out"))
    assert plain["reference"]["sha256"] != found["reference"]["sha256"]
    assert "lora" not in plain["teacher"] and all("lora" not in row for row in plain["rows"])
    stored = json.loads((styled.output_dir / "work" / "near_1-step_far-1" / "facts.json").read_text())
    assert stored["lora"][1] == 1.0 and len(stored["lora"][0]) == 64
    with pytest.raises(EvaluationError, match="begun with other lora"):  # the same rows of a file that has changed
        evaluate(replace(styled, lora=(str(renamed(styled.students[0], tmp_path / "far")), 0.5)))


def renamed(folder: str, link: Path) -> Path:
    link.symlink_to(folder)
    return link


def test_what_takes_no_style_is_refused_before_anything_is_drawn(styled, teachers, tmp_path):  # noqa: F811
    fresh = replace(styled, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lora_strengths \[0.5\] without a LoRA"):
        EvalRun(teacher="tiny-sd", output_dir=tmp_path, lora_strengths=(0.5,))
    adapters = taught(teachers["sd"], tmp_path / "agd", AdapterGuidance(width=4), role=Adapters("mixed", 4))
    with pytest.raises(StudentError, match="a student that is one LoRA"):
        evaluate(replace(fresh, students=(str(adapters),)))
    with pytest.raises(StudentError, match="nowhere"):
        evaluate(replace(fresh, lora=("nowhere.safetensors", 1.0)))
    assert not list(tmp_path.glob("out/work/*"))


def test_the_command_reads_place_and_strengths(monkeypatch, tmp_path):
    seen: list[EvalRun] = []
    monkeypatch.setattr("stepdistill.evaluation.sizes.evaluate", lambda spec: seen.append(spec) or {})
    base = ["eval", "run", "tiny-sd", "-o", str(tmp_path / "out")]
    cli.main([*base, "--lora", "me/ink:0.8", "--lora-strengths", "0,0.5"])
    cli.main([*base, "--lora", "ink.safetensors"])
    assert [(spec.lora, spec.lora_strengths) for spec in seen] == [
        *((("me/ink", 0.8), (0.0, 0.5)), (("ink.safetensors", 1.0), ())),
    ]
