"""Runs that train an assistant, and that fine-tune with one: on in training steps, off in validation and at the end."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_chain import family_of, place, run_of  # noqa: F401 - a fixture
from test_pso_offline import OFFLINE

from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.evaluation.plan import sampling_plans
from stepdistill.evaluation.spec import EvalRun
from stepdistill.methods.adapter import Assistant
from stepdistill.methods.finetune import FineTune
from stepdistill.networks.roles import ASSISTANT
from stepdistill.students.chain import LAST
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.load import load_student
from stepdistill.training.distill import distill
from stepdistill.training.lora_checks import check_assistant
from stepdistill.training.memory import forecast
from stepdistill.training.memory.predict import predict
from stepdistill.training.recipe import Run
from stepdistill.training.resume import find_source
from stepdistill.training.sampling import sample_student, sample_teacher
from stepdistill.training.setup import prepare


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:  # noqa: F811
    """The folder of teacher and student, with an assistant of the student."""
    method = Assistant(ema_decay=None, num_inference_steps=5)
    distill(with_train(run_of(place, "sd", place / "sd-assistant", method=method), learning_rate=0.1))
    return place


def with_train(run: Run, **values: object) -> Run:
    return replace(run, train=replace(run.train, **values))


def tuning(folder: Path, out: Path, **train: object) -> Run:
    """A fine-tuning of the student on a few latents."""
    data = TeacherSamples(source=Prompts(prompts=("rose",)), folder=str(folder / "made"), count=4)
    run = run_of(folder, "sd", out, method=FineTune(ema_decay=None))
    return with_train(replace(run, data=replace(data, num_inference_steps=2)), **train)


def test_it_is_on_in_training_steps_and_nowhere_else(folder, tmp_path):
    family, drawn, losses = family_of(folder, "sd"), {}, {}
    for key, assistant in (("on", str(folder / "sd-assistant")), ("off", None)):
        run = tuning(folder, tmp_path / key, assistant=assistant, learning_rate=0.0)
        distill(run)
        lines = (tmp_path / key / "metrics.jsonl").read_text().splitlines()
        losses[key] = [json.loads(line)["loss"] for line in lines]
        student, first = (family.read_lora(source) for source in (tmp_path / key, folder / "sd-student"))
        # the student before is all that a learning rate of zero leaves
        assert all((layer.product() - first[name].product()).abs().max() < 1e-6 for name, layer in student.items())
        session = prepare(run.resolved())
        session.backbone.add("student", *session.run.method.roles().values())
        drawn[key] = torch.cat([draw(session, ["rose"], [0]) for draw in (sample_student, sample_teacher)])
    assert torch.equal(drawn["on"], drawn["off"])

    session = prepare(tuning(folder, tmp_path).resolved())  # what the step does, on a base with it in the weights
    for name, layer in family.read_lora(folder / "sd-assistant" / LAST).items():
        weight = session.backbone.net.get_submodule(name.partition(".")[2]).weight
        assert isinstance(weight, torch.Tensor)
        weight.data += layer.product().reshape(weight.shape)
    session.backbone.add("student", *session.run.method.roles().values())
    steps = session.batches.steps(session.run.data, 0, 0, 1)
    for step, (on, off) in enumerate(zip(losses["on"], losses["off"], strict=True)):
        (only,) = session.run.method.updates(session.context(step), next(steps)[0], step)
        assert on == pytest.approx(only.loss.item(), rel=1e-4) and abs(on - off) > 1e-2 * on


def test_an_assistant_is_for_training_only(folder):
    assistant = folder / "sd-assistant"
    contract = read_contract(assistant)
    assert (contract.use, read_contract(folder / "sd-student").use) == ("training", "sampling")
    assert len(contract.timesteps) == 5 and (assistant / LAST).exists()
    with pytest.raises(StudentError, match="a training assistant, expected a student to draw with.*adapter_name='assi"):
        load_student(family_of(folder, "sd").load(), assistant)
    with pytest.raises(StudentError, match="a training assistant"):
        StudentPipeline.load(assistant)
    with pytest.raises(StudentError, match="a training assistant"):
        sampling_plans(EvalRun(teacher="tiny-sd", students=(str(assistant),), output_dir=folder))
    assert load_student(family_of(folder, "sd").load(), assistant, ASSISTANT)["guidance_scale"] == 1.0
    assert "training assistant" in (assistant / "README.md").read_text()


def test_what_does_not_fit_an_assistant_is_refused(folder, tmp_path, caplog):
    run = tuning(folder, tmp_path, assistant=str(folder / "sd-assistant"))
    check_assistant(run)
    assert not caplog.records
    with pytest.raises(ConfigError, match="train.assistant with PSOOffline, expected a method that only denoises"):
        check_assistant(replace(run, method=OFFLINE))
    with pytest.raises(StudentError, match="sd-student, which is a student, expected a training assistant"):
        check_assistant(with_train(run, assistant=str(folder / "sd-student")))
    with caplog.at_level(logging.WARNING):
        check_assistant(replace(run, start_from=None))
    assert "trained for another few-step model" in caplog.text
    caplog.clear()
    check_assistant(with_train(run, assistant=str(folder / "sd-assistant" / LAST)))  # a file says nothing of itself
    check_assistant(replace(with_train(run, assistant=None), method=OFFLINE))
    assert not caplog.records
    check_assistant(with_train(run, assistant=None))
    assert "FineTune without train.assistant undoes the few steps" in caplog.text


def test_a_checkpoint_has_no_assistant_and_a_resumed_run_has_the_same(folder, tmp_path):
    run = tuning(folder, tmp_path / "out", assistant=str(folder / "sd-assistant"), checkpointing_steps=1)
    distill(run)
    assert [file.name for file in (tmp_path / "out" / "checkpoint-1").glob("*.safetensors")] == ["student.safetensors"]
    again = with_train(run, resume_from_checkpoint="latest")
    assert find_source(again.resolved()) is not None
    with pytest.raises(ConfigError, match="train.assistant=null"):
        find_source(with_train(again, assistant=None).resolved())


def test_a_prediction_counts_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "_peak", lambda rehearsal, tracker: (0, 0))
    run = tuning(folder, tmp_path)
    plain, beside = (
        predict(with_train(run, assistant=source).resolved()) for source in (None, str(folder / "sd-assistant"))
    )
    lora = family_of(folder, "sd").read_lora(folder / "sd-assistant" / LAST)
    size = sum(layer.down.numel() + layer.up.numel() for layer in lora.values())
    assert beside.parts[0].parameters - plain.parts[0].parameters == size
