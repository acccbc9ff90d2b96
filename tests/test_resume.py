"""Resume: what may change of a config does, what may not is refused, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LCM, REGRESSION, make, saved_teacher, weights
from tiny import backbone, pipeline

from stepdistill.config.schema import Factory
from stepdistill.core.errors import CheckpointError, ConfigError
from stepdistill.core.files import file_digest
from stepdistill.data import Prompts
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import LoraSpec
from stepdistill.training import resume
from stepdistill.training.checkpoint import checkpoints, find_checkpoint
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec

LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return saved_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("samples") / "kept"


@pytest.fixture(scope="module")
def two(teacher, samples, tmp_path_factory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    return distill(make(teacher, samples, tmp_path_factory.mktemp("two") / "out", REGRESSION, max_train_steps=2))


@pytest.fixture
def copied(two, tmp_path) -> Path:
    """A folder like that of `two`, to go on in."""
    return shutil.copytree(two, tmp_path / "out")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows(out: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (out / "metrics.jsonl").read_text().splitlines()]


def changed(part: Any, path: str, value: object) -> Any:
    """A run, or a part of it, with the value at a path changed."""
    first, _, rest = path.partition(".")
    return replace(part, **{first: changed(getattr(part, first), rest, value) if rest else value})


REFUSED = {
    "family.teacher_loras": ("/somewhere/lora.safetensors",),
    "method": Regression(num_inference_steps=4),
    "method.loss_type": "huber",
    "data.source.prompts": ("rose", "octopus", "red apple"),
    "data.count": 12,
    "data.proportion_empty_prompts": 0.5,
    "lora.rank": 8,
    "lora.alpha": 1.0,
    "lora.target_modules": ("to_q",),
    "lora.roles": {"student": LoraSpec(rank=2)},
    "lora.init_from": "/somewhere/student",
    "train.seed": 1,
    "train.resolution": 64,
    "train.cache_latents": True,
    "train.optimizer": Factory("torch.optim.SGD", {"lr": 1e-3}),
    "train.optimizers": {"student": Factory("torch.optim.AdamW", {"amsgrad": True})},
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_makes_a_run_may_not_change(two, teacher, samples, path, monkeypatch):
    """Refused with both values, before anything is loaded or written."""
    before = files(two)
    run = changed(make(teacher, samples, two, REGRESSION, **LATEST), path, REFUSED[path])
    monkeypatch.setattr(type(run.family), "load", lambda *args: pytest.fail("the teacher is loaded"))
    with pytest.raises(ConfigError, match=r"expected .*=.*, as in .*checkpoint-2.*set them back") as error:
        distill(run)
    where = "train.optimizers.student" if path.startswith("train.optimizer") else path
    assert str(error.value).count(where) >= 2, error.value
    with pytest.raises(ConfigError, match="set them back"):
        dry_run(run)
    assert files(two) == before


def test_a_folder_may_be_named_in_another_way(two, teacher, samples, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(teacher)
    monkeypatch.chdir(samples.parent)
    run = make(tmp_path / "link", Path(samples.name), two, REGRESSION)
    train = replace(run.train, resume_from_checkpoint="latest")
    assert resume.find_source(replace(run, train=train)) is not None


def test_both_values_are_said_and_another_class_stands_for_its_keys(two, teacher, samples):
    run = make(teacher, samples, two, REGRESSION, **LATEST)
    both = changed(changed(run, "lora.rank", 8), "data", Prompts(prompts=("rose",)))
    with pytest.raises(ConfigError) as error:
        resume.find_source(both)
    text = str(error.value)
    assert "lora.rank=8" in text and "lora.rank=4" in text
    assert "data.type=stepdistill.data.prompts.Prompts" in text and "data.folder" not in text


def test_a_teacher_replaced_in_place_is_refused(samples, tmp_path, teacher):
    """Its path is the same; its weights are not."""
    place = shutil.copytree(teacher, tmp_path / "teacher")
    out = distill(make(place, samples, tmp_path / "out", REGRESSION, max_train_steps=1))
    pipeline("sd", seed=1).unet.save_pretrained(place / "unet")
    before = files(out)
    with pytest.raises(ConfigError, match="teacher whose network has the digest"):
        distill(make(place, samples, out, REGRESSION, max_train_steps=2, **LATEST))
    assert files(out) == before


def test_data_changed_in_place_are_refused(tmp_path, teacher):
    """Their path and number are the same; their prompts are not."""
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\nrose\n")
    runs = [make(teacher, tmp_path / "kept", tmp_path / "out", REGRESSION, max_train_steps=n) for n in (1, 2)]
    first, second = (changed(run, "data.source", Prompts(prompts_file=str(file))) for run in runs)
    before = files(distill(first))
    file.write_text("red apple\noctopus\n")
    with pytest.raises(ConfigError, match="data source of 16 samples, captions .*expected 16 samples, captions"):
        distill(changed(second, "train.resume_from_checkpoint", "latest"))
    assert files(tmp_path / "out") == before


def test_the_rate_of_the_config_wins_and_every_change_is_said(copied, teacher, samples, caplog):
    """At a rate of zero nothing moves."""
    train = {"learning_rate": 0.0, "max_grad_norm": 0.5, "checkpointing_steps": 2}
    distill(make(teacher, samples, copied, REGRESSION, **LATEST, **train))
    assert rows(copied, "lr") == [1e-3, 1e-3, 0.0, 0.0]
    assert torch.equal(weights(copied, 4), weights(copied, 2))
    said = next(text for text in caplog.messages if "resuming from" in text)
    for line in ("learning_rate: 0.001 -> 0.0", "max_grad_norm: 1.0 -> 0.5", "max_train_steps: 2 -> 4"):
        assert f"train.{line}" in said
    assert not any(part in said for part in ("data", "lora", "resume_from"))
    assert "learning_rate: 0.0" in (copied / "config.yaml").read_text()


def test_options_of_an_optimizer_are_the_config_s(copied, teacher, samples):
    """What it has gathered is the checkpoint's."""
    options = {"lr": 1e-5, "betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.25}
    optimizers = {"student": Factory("torch.optim.AdamW", options)}
    distill(make(teacher, samples, copied, REGRESSION, **LATEST, max_train_steps=3, optimizers=optimizers))
    before, after = (
        torch.load(copied / f"checkpoint-{n}" / "optimizers.pt", weights_only=True)["student"] for n in (2, 3)
    )
    assert {key: after["param_groups"][0][key] for key in options} == options
    assert after["state"][0]["step"] == 3
    # the third gradient enters with a half, and the first two moments leave with the other
    assert not torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"] / 2)
    gradient = 2 * after["state"][0]["exp_avg"] - before["state"][0]["exp_avg"]
    second = 0.75 * before["state"][0]["exp_avg_sq"] + 0.25 * gradient**2
    torch.testing.assert_close(after["state"][0]["exp_avg_sq"], second)


@pytest.mark.parametrize("schedule", ["cosine", "constant_with_warmup"])
def test_a_schedule_goes_on_bit_for_bit_and_another_one_as_if_it_had_always_been(teacher, samples, tmp_path, schedule):
    train = {"lr_scheduler": schedule, "lr_warmup_steps": 3}
    whole = distill(make(teacher, samples, tmp_path / "whole", REGRESSION, **train))
    cut, other = tmp_path / "cut", tmp_path / "other"
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    distill(make(teacher, samples, cut, REGRESSION, **LATEST, **train))
    assert torch.equal(weights(cut, 4, "ema"), weights(whole, 4, "ema"))
    assert rows(cut, "lr") == rows(whole, "lr")[2:]
    distill(make(teacher, samples, other, REGRESSION, max_train_steps=2))
    distill(make(teacher, samples, other, REGRESSION, **LATEST, **train))
    assert rows(other, "lr") == [1e-3, 1e-3, *rows(whole, "lr")[2:]]


def test_losses_may_be_scaled_from_now_on_or_no_more():
    """Another train.mixed_precision: `bf16` has no state of a scaler, `fp16` needs none to begin with."""
    spec = TrainSpec(output_dir="unused")
    plain = Optimizers(backbone("sd", pipeline("sd")), spec).declare(REGRESSION).build()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled = Optimizers(backbone("sd", pipeline("sd")), spec, scaler).declare(REGRESSION).build()
    roles = {name: plain.backbone.state(name) for name in plain.backbone.declared}
    scaled.restore(roles, plain.state(), plain.scaler.state_dict(), 0)
    assert scaler.get_scale() == 8.0
    plain.restore(roles, scaled.state(), scaler.state_dict(), 0)


def test_a_resumed_optimizer_steps_as_the_config_says():
    """In one kernel or not; the checkpoint may be of the other, and losses may be scaled."""
    bone = backbone("sd", pipeline("sd"))
    plain = TrainSpec(output_dir="unused", optimizer=Factory("torch.optim.AdamW", {"fused": False}))
    ways = {False: Optimizers(bone, plain).declare(REGRESSION).build()}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ways[True] = Optimizers(bone, TrainSpec(output_dir="unused"), scaler).build()
    roles = {name: bone.state(name) for name in bone.declared}
    for fused, optimizers in ways.items():
        optimizers.restore(roles, ways[not fused].state(), {}, 0)
        assert optimizers.by_role["student"].param_groups[0]["fused"] is fused
        for p in bone.parameters_of("student").values():
            p.grad = torch.ones_like(p)
            optimizers.scaler.scale(torch.zeros(()))  # which the first call of a scaler sets up
        optimizers.clip(("student",))
        optimizers.apply(("student",), 0)


def test_what_fails_before_the_first_step_loses_nothing(copied, teacher, samples, monkeypatch):
    """Also of a run that is overwritten."""
    before = files(copied)

    def fails(*args):
        raise RuntimeError("out of memory")

    for name in ("build", "restore"):
        with monkeypatch.context() as patch:
            patch.setattr(Optimizers, name, fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                distill(make(teacher, samples, copied, REGRESSION, **LATEST))
    monkeypatch.setattr(Optimizers, "build", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        distill(make(teacher, samples, copied, REGRESSION, overwrite_output_dir=True))
    assert files(copied) == before


def test_checkpoints_of_another_branch_are_not_gone_on_from(copied, teacher, samples, caplog):
    """They are kept under another name: `latest` is the latest of this run."""
    kept = files(copied / "checkpoint-2")
    run = make(teacher, samples, copied, REGRESSION, resume_from_checkpoint="checkpoint-1", max_train_steps=1)
    distill(changed(run, "train.learning_rate", 1e-5))
    assert find_checkpoint(copied, "latest") == copied / "checkpoint-1"
    assert files(copied / "checkpoint-2.old") == kept
    assert "checkpoint-2 is of later steps, which are trained again" in caplog.text


def test_a_run_goes_on_in_another_folder_that_holds_no_run(two, copied, teacher, samples, tmp_path):
    source = {"resume_from_checkpoint": str(two / "checkpoint-1"), "max_train_steps": 2}
    before = files(copied)
    with pytest.raises(ConfigError, match="holds another run"):
        distill(make(teacher, samples, copied, REGRESSION, **source))
    assert files(copied) == before
    fork = distill(make(teacher, samples, tmp_path / "fork", REGRESSION, **source))
    assert torch.equal(weights(fork, 2), weights(two, 2)) and len(checkpoints(fork)) == 1
    distill(make(teacher, samples, copied, REGRESSION, **source, overwrite_output_dir=True))
    assert [folder.name for folder in checkpoints(copied)] == ["checkpoint-2"]


def test_fewer_steps_than_the_checkpoint_has_are_refused(two, teacher, samples):
    with pytest.raises(ConfigError, match="max_train_steps=1, expected 2 or more"):
        distill(make(teacher, samples, two, REGRESSION, **LATEST, max_train_steps=1))


def test_a_checkpoint_of_an_earlier_version_is_refused(copied, teacher, samples):
    state, manifest = (copied / "checkpoint-2" / name for name in ("state.json", "manifest.json"))
    state.write_text(json.dumps(json.loads(state.read_text()) | {"config": "0123456789ab"}))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": file_digest(state)}))
    with pytest.raises(CheckpointError, match="an earlier version of stepdistill wrote it"):
        distill(make(teacher, samples, copied, REGRESSION, **LATEST))


def test_the_student_that_a_run_started_from_may_be_gone(two, teacher, samples, tmp_path):
    started = shutil.copytree(two, tmp_path / "started")
    runs = [make(teacher, samples, tmp_path / "out", LCM, max_train_steps=n) for n in (1, 2)]
    first, second = (changed(run, "lora.init_from", str(started)) for run in runs)
    distill(first)
    shutil.rmtree(started)
    second = changed(second, "train.resume_from_checkpoint", "latest")
    dry_run(second)
    distill(second)


def test_every_value_of_a_config_is_decided_on(two, teacher, samples):
    """Of all that a run holds, this may change."""
    run: Run = make(teacher, samples, two, REGRESSION)
    paths = resume.settings(resume.to_node(run, Run), run.method.roles())
    free = {path.removeprefix("train.") for path in paths if not resume.is_kept(path)}
    places = ("family.", "method.", "data.", "lora.", "train.")
    assert all(path.startswith(places) or path == "start_from" for path in paths)
    schedule = {"max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm"}
    batch = {"train_batch_size", "gradient_accumulation_steps"}  # at an equal global batch
    machine = {"mixed_precision", "gradient_checkpointing", "shard_base", "torch_compile", "allow_tf32", "cache_dir"}
    arithmetic = {"lora.arithmetic"}  # equal to rounding
    machine |= {"enable_xformers_memory_efficient_attention", "dataloader_num_workers"}
    folder = {"output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}
    folder |= {"overwrite_output_dir", "export_formats", "push_to_hub", "hub_model_id"}
    watched = {"report_to", "tracker_project_name", "validation_prompts", "validation_steps", "validation_seed"}
    watched |= {"teacher_steps", "teacher_guidance_scale", "watch_samples", "watch_stop", "eval_samples"}
    watched |= {"eval_reference", "validation_images"}
    optimizer = {"optimizers.student.weight_decay"}
    assert free == schedule | batch | machine | folder | watched | optimizer | arithmetic
