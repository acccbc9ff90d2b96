"""The loop's promises: accumulation, processes and resume change nothing; bad ends lose nothing."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import LCM, REGRESSION, make, saved_teacher, weights
from tiny import FakeTeacher, awake, backbone, batch, context, pipeline

from stepdistill.config.dump import config_to_yaml
from stepdistill.config.schema import Factory
from stepdistill.core.cost import Cost
from stepdistill.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLoss,
    StepdistillError,
    StudentError,
)
from stepdistill.core.progress import progress
from stepdistill.core.random import noise_of
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.data import made as chunks
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.methods.base import Method, Update
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.regression import Regression
from stepdistill.networks import lora_layers
from stepdistill.networks.roles import Lora, RoleLora
from stepdistill.students.draw.call import PipelineCall
from stepdistill.training import checkpoint, checks, finish
from stepdistill.training import loop as trainer
from stepdistill.training.checks import check_run
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return saved_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("samples") / "kept"


@pytest.fixture(scope="module")
def whole(teacher, samples, tmp_path_factory) -> Path:
    """A run of four steps from beginning to end."""
    return distill(make(teacher, samples, tmp_path_factory.mktemp("whole") / "out"))


def test_a_run_leaves_a_student_folder(whole):
    names = {file.name for file in whole.iterdir()}
    expected = {"pytorch_lora_weights.safetensors", "distill_config.json", "scheduler", "README.md", "config.yaml"}
    assert expected | {"metrics.jsonl", "checkpoint-1", "checkpoint-4"} <= names
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all({"loss", "lr", "grad_norm/student"} <= row.keys() for row in rows)


def test_resume_is_bit_for_bit(teacher, samples, whole, tmp_path):
    """4 steps = 2 + resume + 2: weights, averages, optimizer and metrics."""
    out = tmp_path / "out"
    distill(make(teacher, samples, out, max_train_steps=2))
    distill(make(teacher, samples, out, resume_from_checkpoint="latest"))
    for role in ("student", "ema"):
        assert torch.equal(weights(out, 4, role), weights(whole, 4, role))
    ours, theirs = (torch.load(f / "checkpoint-4" / "optimizers.pt", weights_only=True) for f in (out, whole))
    for key, state in theirs["student"]["state"].items():
        assert all(torch.equal(value, ours["student"]["state"][key][name]) for name, value in state.items())
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, whole)
    ]
    assert losses[0] == losses[1]


# SGD, since Adam divides rounding by a gradient's own size
# and a norm that every gradient is clipped to: of the mean, and not of each part
CLIPPED = 0.02
TWO_STEPS = {"max_train_steps": 2, "optimizer": Factory("torch.optim.SGD", {"momentum": 0.9, "lr": 10.0})}
TWO_STEPS["max_grad_norm"] = CLIPPED


@pytest.fixture(scope="module")
def regressed(teacher, samples, tmp_path_factory) -> Path:
    """Two steps of regression by one process in one batch."""
    out = tmp_path_factory.mktemp("regressed") / "out"
    return distill(make(teacher, samples, out, REGRESSION, **TWO_STEPS))


def test_accumulation_changes_nothing(teacher, samples, regressed, tmp_path):
    split = TWO_STEPS | {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    _same_gradients(distill(make(teacher, samples, tmp_path / "out", REGRESSION, **split)), regressed)


@pytest.mark.slow
def test_two_processes_change_nothing(teacher, samples, regressed, tmp_path):
    run = make(teacher, samples, tmp_path / "out", REGRESSION, **(TWO_STEPS | {"train_batch_size": 2}))
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(run))
    launch = Path(__file__).parent.parent / "configs" / "accelerate" / "two_processes_cpu.yaml"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    done = subprocess.run(
        [*command, "-m", "stepdistill", "train", str(file)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _same_gradients(tmp_path / "out", regressed)


def _same_gradients(ours: Path, theirs: Path) -> None:
    """Momentum: after one step the gradient itself, after two also that of what the first step made. And the logs."""
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (ours, theirs)]
    assert min(row["grad_norm/student"] for rows in logs for row in rows) > 3 * CLIPPED
    one, two = ([row["loss"] for row in rows] for rows in logs)
    assert one == pytest.approx(two, rel=1e-5)
    for step in (1, 2):
        one, two = (
            torch.cat([value["momentum_buffer"].flatten() for value in state["student"]["state"].values()])
            for f in (ours, theirs)
            for state in [torch.load(f / f"checkpoint-{step}" / "optimizers.pt", weights_only=True)]
        )
        assert (one - two).norm() <= 1e-6 * two.norm(), (step, (one - two).norm() / two.norm())


class Plain(torch.optim.Optimizer):
    """Of another library."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * p.grad


@pytest.mark.parametrize(
    ("factory", "fused"),
    [
        (Factory("torch.optim.AdamW", {"weight_decay": 0.1}), True),
        (Factory("torch.optim.SGD", {"momentum": 0.9}), True),
        (Factory("torch.optim.AdamW", {"foreach": True}), None),
        (Factory("torch.optim.AdamW", {"fused": False}), False),
        (Factory("torch.optim.Adagrad"), None),  # whose kernel is for CPUs alone
        (Factory(f"{__name__}.Plain"), None),
    ],
)
def test_torch_s_optimizers_step_in_one_kernel(factory, fused):
    """With the result of single tensors, to rounding."""
    ends = []
    for each in (factory, replace(factory, kwargs=factory.kwargs | ({"fused": False} if fused else {}))):
        bone = backbone("sd", pipeline("sd"))
        bone.add("student", Lora())
        awake(bone, "student")
        optimizers = Optimizers(bone, TrainSpec(output_dir="unused", learning_rate=0.01, optimizer=each)).build()
        assert optimizers.by_role["student"].param_groups[0].get("fused") is (False if ends and fused else fused)
        for step in range(3):
            for p in bone.parameters_of("student").values():
                p.grad = (20 * p.detach()).sin()
            optimizers.apply(("student",), step)
        ends.append(torch.cat([p.detach().flatten() for p in bone.parameters_of("student").values()]))
    assert torch.allclose(*ends, atol=1e-6)


def test_micro_batches_keep_no_graph():
    """The graph of one micro-batch is gone before the next is built."""
    pipe = pipeline("sd")
    optimizers = Optimizers(backbone("sd", pipe), TrainSpec(output_dir="unused"))
    optimizers.backbone.add("student", Lora())
    awake(optimizers.backbone, "student")
    optimizers.by_role["student"] = torch.optim.SGD(list(optimizers.params("student").values()), lr=0.0)
    optimizers.schedulers["student"] = torch.optim.lr_scheduler.ConstantLR(optimizers.by_role["student"])
    alive: list[int] = []

    class Counting:
        def updates(self, scene, part, step):
            gc.collect()
            alive.append(sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects()))
            yield from replace(LCM, ema_decay=None).updates(scene, part, step)

    micro_batches = [batch("sd", pipe, first=2 * k) for k in range(4)]
    trainer.train_step(Counting(), optimizers, context("sd", pipe, optimizers.backbone), micro_batches)  # pyright: ignore
    # what is left is the suspended generator's own loss and output, whose buffers backward has freed
    assert all(after - before <= 4 for before, after in zip(alive[:-1], alive[1:], strict=True)), alive


def test_an_update_forms_each_weight_once_and_the_next_forms_it_again(monkeypatch):
    """LCM calls the student for its estimate and for its target; so does the next micro-batch."""
    calls = []
    form = lora_layers.add_lora
    monkeypatch.setattr(lora_layers, "add_lora", lambda *args: calls.append(1) or form(*args))
    monkeypatch.setattr(lora_layers.LoraShape, "merges", lambda self, limit: True)
    bone = backbone("sd", pipeline("sd"))
    bone.add("student", Lora())
    awake(bone, "student")
    optimizers = Optimizers(bone, TrainSpec(output_dir="unused", learning_rate=0.1)).build()
    layers = sum(isinstance(module, tuple(lora_layers.KINDS.values())) for module in bone.modules())
    micro_batches = [batch("sd", pipeline("sd"), first=2 * k) for k in range(2)]
    method, scene = replace(LCM, ema_decay=None, target="student"), context("sd", pipeline("sd"), bone)
    losses = []
    for _ in range(2):
        losses.append(trainer.train_step(method, optimizers, scene, micro_batches)["loss"])
    assert len(calls) == 2 * layers > 20 and losses[0] != losses[1]


class Poisoned(Regression):
    """Its loss is not a number in the third step."""

    def updates(self, context, batch, step):
        for update in Regression.updates(self, context, batch, step):
            yield Update(update.roles, update.loss * (float("nan") if step == 2 else 1.0), **update.logs)


@pytest.mark.parametrize("rate", [1e-3, 1e-6])
def test_a_fingerprint_sees_a_step_of_adam_up_and_down(rate):
    """In every tensor with two numbers or more, whose plain sum stays."""
    optimizers = Optimizers(backbone("sd", pipeline("sd")), TrainSpec(output_dir="unused"))
    before = optimizers.fingerprint()
    sizes = {}
    for key, p in optimizers.backbone.net.named_parameters():
        sizes[f"base/{key}"] = p.numel()
        p.data.view(-1)[: p.numel() // 2 * 2] += rate * torch.tensor([1.0, -1.0]).repeat(p.numel() // 2)
    now = optimizers.fingerprint()
    assert now.keys() == sizes.keys() and len(now) > 50
    assert not [key for key in now if sizes[key] > 1 and now[key] == before[key]]


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")  # each waits for a device


def reads_of(method: Method, step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of the library that read a tensor in a step of two micro-batches."""
    pipe = pipeline("sd")
    bone = backbone("sd", pipe)
    optimizers = Optimizers(bone, TrainSpec(output_dir="unused")).declare(method).build()
    scene, parts, callers = context("sd", pipe, bone, step), [batch("sd", pipe), batch("sd", pipe)], list[str]()

    def watched(name: str, read):
        def call(*args, **kwargs):
            frame = sys._getframe(1)
            while frame is not None and "stepdistill" not in Path(frame.f_code.co_filename).parts:
                frame = frame.f_back
            callers.append("" if frame is None else frame.f_code.co_name)
            return read(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in READS:
            patched.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        trainer.train_step(method, optimizers, scene, parts)
    return callers


@pytest.mark.parametrize(
    ("method", "updates"),
    [(LCM, 1), (DMD2(num_inference_steps=2, critic_steps=1), 2), (DMD2(num_inference_steps=2, critic_steps=2), 1)],
)
def test_a_step_reads_one_tensor_an_update(method, updates, monkeypatch):
    """Loss, norms and logs at once, before the weights change; a read waits for all that the device has to do."""
    assert reads_of(method, 1, monkeypatch).count("train_step") == updates


def test_a_non_finite_loss_stops_and_saves(teacher, samples, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(NonFiniteLoss, match="step 3.*student"):
        distill(make(teacher, samples, out, Poisoned(num_inference_steps=2), checkpointing_steps=None))
    assert checkpoint.broken(out / "checkpoint-2") is None
    assert torch.load(out / "non_finite.pt", weights_only=True)["step"] == 2
    assert torch.isfinite(weights(out, 2)).all()


class Interrupted(Regression):
    """A signal arrives in its second step."""

    def updates(self, context, batch, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield from Regression.updates(self, context, batch, step)


def test_a_signal_finishes_the_step_and_saves(teacher, samples, tmp_path):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)
    distill(make(teacher, samples, out, Interrupted(num_inference_steps=2), checkpointing_steps=None))
    assert [f.name for f in checkpoint.checkpoints(out)] == ["checkpoint-2"]
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_leaves_at_once():
    stop = trainer.Stop()
    stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


class Dead(Regression):
    """Its loss does not reach the student."""

    def updates(self, context, batch, step):
        for update in Regression.updates(self, context, batch, step):
            yield Update(update.roles, update.loss.detach().requires_grad_(), **update.logs)


def test_a_role_without_gradients_is_an_error(teacher, samples, tmp_path):
    with pytest.raises(StepdistillError, match="no gradient for"):
        distill(make(teacher, samples, tmp_path / "out", Dead()))


def test_a_student_that_does_not_move_is_an_error(teacher, samples, tmp_path):
    frozen = Factory("torch.optim.SGD", {"lr": 1e-30})
    with pytest.raises(StepdistillError, match="did not change"):
        distill(make(teacher, samples, tmp_path / "out", optimizer=frozen))


def test_a_student_that_no_scheduler_samples_is_refused_before_training(teacher, samples, tmp_path, monkeypatch):
    """In bfloat16, too, whose own rounding would hide it in the proof."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # of other tests, which have another precision
    folder = shutil.copytree(teacher, tmp_path / "zero")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    run = make(folder, samples, tmp_path / "out", Regression(timesteps=(999, 499, 99)), mixed_precision="bf16")
    for command in (dry_run, distill):
        with pytest.raises(ConfigError, match=r"EulerDiscreteScheduler .*choose other timesteps"):
            command(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lora", "said"),
    [({"roles": {"student": RoleLora(target_modules=("to_v",))}}, "role 'student' holds.*do not, the first")]
    + [({"target_modules": ("to_q",)}, "do not, the first")],
)
def test_a_start_that_does_not_fit_is_refused_in_a_dry_run_as_well(teacher, samples, whole, tmp_path, lora, said):
    run = make(teacher, samples, tmp_path / "out")
    run = replace(run, lora=replace(run.lora, init_from=str(whole), **lora))
    errors = []
    for command in (dry_run, distill):
        with pytest.raises(StudentError, match=said) as error:
            command(run)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_start_that_fits_takes_no_memory(teacher, samples, whole, tmp_path):
    run = make(teacher, samples, tmp_path / "out")
    assert dry_run(replace(run, lora=replace(run.lora, init_from=str(whole)))) == dry_run(run)


def test_the_folder_of_another_run_is_refused(teacher, samples, whole):
    with pytest.raises(ConfigError, match="holds another run.*resume_from_checkpoint"):
        distill(make(teacher, samples, whole))


def test_another_global_batch_cannot_resume(teacher, samples, whole):
    with pytest.raises(ConfigError, match="global batch of 2"):
        distill(make(teacher, samples, whole, train_batch_size=2, resume_from_checkpoint="latest"))


def test_samples_of_other_settings_are_refused(teacher, samples, whole, tmp_path):
    run = make(teacher, samples, tmp_path / "out")
    with pytest.raises(StepdistillError, match="guidance_scale"):
        distill(replace(run, data=replace(run.data, guidance_scale=5.0)))


def test_an_overwritten_folder_keeps_nothing_to_resume(teacher, samples, tmp_path):
    out = tmp_path / "out"
    distill(make(teacher, samples, out, REGRESSION, max_train_steps=3))
    distill(make(teacher, samples, out, REGRESSION, max_train_steps=1, overwrite_output_dir=True))
    assert [f.name for f in checkpoint.checkpoints(out)] == ["checkpoint-1"]


def test_a_missing_reference_is_said_before_anything_is_loaded(teacher, samples, tmp_path):
    for file in (None, str(tmp_path / "nothing.safetensors")):
        run = make(teacher, samples, tmp_path / "out", eval_samples=40, eval_reference=file)
        with pytest.raises(ConfigError, match="eval_reference.*eval_samples to 0"):
            check_run(run)


def test_another_teacher_s_reference_is_refused_before_training(teacher, samples, tmp_path):
    run = make(teacher, samples, tmp_path / "out", eval_samples=40, eval_reference="tiny-sd-reference.safetensors")
    with pytest.raises(ConfigError, match="teacher_sha256"):
        distill(run)
    assert not (tmp_path / "out").exists()


def test_a_run_measures_its_student_under_the_noises_of_the_floor(monkeypatch, teacher, samples, tmp_path, capsys):
    """Not those of the reference, beside which a student would look better than its teacher."""
    reference, floor, few, student = (
        torch.randn(80, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(4)
    )
    prompts, drawn = [f"prompt {i}" for i in range(80)], []

    def drawing(pipe, call, prompts, seed):
        drawn.append((pipe.name, call.name, prompts, seed))
        return {"plain": student, "teacher": few}[pipe.name][: len(prompts)], Cost(100, 400, 5.0, 2)

    extractor = Mock(side_effect=lambda images: images)
    extractor.identity = Identity("x", "0" * 64, "file", 3, "pool3", "clean", "", "fp32", 64)
    stored = StoredFeatures({"floor": floor, "reference": reference}, prompts, {"teacher_sha256": "0"})
    stored.save(tmp_path / "reference.safetensors")
    monkeypatch.setattr(finish, "generate", drawing)
    monkeypatch.setattr(finish, "efficientnet_lite0", lambda: extractor)
    options = {"eval_samples": 70, "eval_reference": str(tmp_path / "reference.safetensors")}
    pipes = [Mock(device=torch.device("cpu")) for _ in range(2)]
    pipes[0].name, pipes[1].name = "teacher", "plain"
    calls = {name: PipelineCall(name, None, {}, Mock()) for name in ("full", "few", "own")}
    run = make(teacher, samples, tmp_path / "out", **options)
    found = finish.measure(run, stored, *pipes, calls, [calls["own"]])
    counts = (64, 70, 70)  # the teacher's own images are stored: some are drawn for what they cost
    who = zip(("teacher", "teacher", "plain"), calls, counts, strict=True)
    assert drawn == [(pipe, name, prompts[:n], SEED_B) for pipe, name, n in who]
    for row, own, n in zip(found["rows"], (floor, few, student), counts, strict=True):
        expected = frechet(Stats.of(own[:70]), Stats.of(reference[:70]))
        assert row["metrics"]["fd"]["value"] == pytest.approx(expected, rel=1e-6)
        assert (row["cost"]["calls"], row["cost"]["nfe"], row["cost"]["seconds_per_image"]) == (50, 400 / n, 5.0 / n)
    assert [row["role"] for row in found["rows"]] == ["teacher", "teacher", "student"]
    assert found["left_out"] == ["diversity: some prompt has a single image"]
    for count, words in ((7, []), (35, ["interval of diversity"])):  # prompts, of which each has several seeds
        again = replace(stored, prompts=[f"prompt {i % count}" for i in range(80)])
        found = finish.measure(run, again, *pipes, calls, [calls["own"]])
        index = torch.arange(70) % count
        spread = [feature_diversity(own[:70], index) for own in (floor, student)]
        told = found["rows"][2]["metrics"]["diversity_vs_teacher"]
        assert told["value"] == pytest.approx(spread[1] / spread[0], rel=1e-6)
        assert (told["ci95"] is None) == bool(words) and [text.split(":")[0] for text in found["left_out"]] == words
        with monkeypatch.context() as patch:
            patch.setattr(finish, "read_contract", Mock())
            patch.setattr(finish, "snippet", Mock(return_value=""))
            finish._print(tmp_path, found | {"proof": 0.0})
        printed = capsys.readouterr().out
        low, high = told["ci95"] or (None, None)
        value = f"{told['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
        assert re.search(rf"own .*  excess .*  diversity / teacher's {re.escape(value)}\n", printed)
        assert ("left out: interval of diversity" in printed) == bool(words)


def test_the_card_shows_what_the_end_of_the_run_measured(monkeypatch, teacher, samples, whole, tmp_path):
    """And not what was measured before the run went on."""
    reference, floor = (torch.rand(40, 1280, generator=torch.Generator().manual_seed(i)) for i in range(2))
    stored = StoredFeatures({"reference": reference, "floor": floor}, ["rose", "octopus"] * 20, {"teacher_sha256": "0"})
    stored.save(tmp_path / "reference.safetensors")
    for module in (finish, checks):
        monkeypatch.setattr(module, "load_reference", lambda *_: stored)
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "eval.json").write_text("{}")
    given = {"eval_reference": str(tmp_path / "reference.safetensors"), "eval_samples": 40, "teacher_steps": 2}
    distill(make(teacher, samples, out, resume_from_checkpoint="latest", **given))
    row = json.loads((out / "eval.json").read_text())["rows"][-1]
    low, high = row["metrics"]["diversity_vs_teacher"]["ci95"]
    assert low < high and f" [{low:.3f}, {high:.3f}] |\n" in (out / "README.md").read_text()


def test_samples_go_on_where_they_were_cut_and_are_shared_out(tmp_path):
    source = TeacherSamples(source=Prompts(prompts=("rose", "octopus")), folder=str(tmp_path / "kept"), count=200)
    seen: list[tuple[int, float]] = []

    def generate(prompts, noise):
        seen.append((len(prompts), noise[0, 0, 0, 0].item()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return 2 * noise

    with pytest.raises(KeyboardInterrupt):
        source.fill(FakeTeacher(generate), 0, 1)
    for rank in (0, 1):
        source.fill(FakeTeacher(generate), rank, 2)
    # each chunk once, but for the one that was cut
    assert [size for size, _ in seen].count(64) == 4 and [size for size, _ in seen].count(8) == 1
    assert len({first for _, first in seen}) == 4
    whole = replace(source, folder=str(tmp_path / "whole"))
    whole.fill(FakeTeacher(lambda prompts, noise: 2 * noise), 0, 1)
    for i in (0, 63, 64, 199):
        one, two = (s.sample(i, random.Random(0)) for s in (source, whole))
        assert one.prompt == two.prompt and torch.equal(one.latents, two.latents)
        torch.testing.assert_close(one.latents, 2 * one.noise, rtol=1e-3, atol=1e-3)  # kept as halves
    (tmp_path / "whole" / "samples.json").unlink()
    calls: list[int] = []
    whole.fill(FakeTeacher(lambda prompts, noise: calls.append(1) or noise, digest="another teacher"), 0, 1)
    assert len(calls) == 4  # without their facts, chunks are not trusted


def test_there_may_be_more_samples_later_or_fewer(tmp_path):
    source = TeacherSamples(source=Prompts(prompts=("rose", "octopus")), folder=str(tmp_path / "kept"), count=70)
    made: list[int] = []

    def generate(prompts, noise):
        made.append(len(prompts))
        return 2 * noise

    for count in (70, 30, 100, 200):
        replace(source, count=count).fill(FakeTeacher(generate), 0, 1)
    assert made == [64, 6, 36, 64, 64, 8]  # a chunk that was cut short is made again, whole
    few = replace(source, count=30)
    assert len(few) == 30 and torch.equal(few.sample(29, random.Random(0)).noise, noise_of(0, 29, (1, 2, 2)))
    for other, words in (
        (replace(source, guidance_scale=2.0), "other guidance_scale: .7.5."),
        (replace(source, num_inference_steps=2), "other num_inference_steps"),
        (replace(source, source=Prompts(prompts=("rose", "octopuses"))), "other prompts"),
        (replace(source, source=replace(source.source, proportion_empty_prompts=0.5)), "other prompts"),
        (replace(source, seed=1), "other seed"),
    ):
        with pytest.raises(DataError, match=words):
            other.fill(FakeTeacher(generate), 0, 1)
    with pytest.raises(DataError, match="other shape"):
        source.fill(FakeTeacher(generate, (1, 4, 4)), 0, 1)
    with pytest.raises(DataError, match="other teacher"):
        source.fill(FakeTeacher(generate, digest="another"), 0, 1)


def test_a_full_disk_leaves_what_is_complete(tmp_path, monkeypatch):
    source = TeacherSamples(source=Prompts(prompts=("rose", "octopus")), folder=str(tmp_path / "kept"), count=200)
    real, room = chunks.save_file, [2]

    def save_file(tensors, file, facts):
        real(tensors, file, facts)
        room[0] -= 1
        if room[0] < 0:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks, "save_file", save_file)
    with pytest.raises(DataError, match=r"No space left.*the first 128 samples are complete.*data.count=128"):
        source.fill(FakeTeacher(lambda prompts, noise: 2 * noise), 0, 1)
    assert sorted(f.name for f in (tmp_path / "kept").iterdir()) == [
        *("chunk-00000.safetensors", "chunk-00001.safetensors", "samples.json")
    ]
    usable = replace(source, count=128)
    usable.fill(FakeTeacher(lambda prompts, noise: pytest.fail("nothing is missing")), 0, 1)
    assert usable.sample(127, random.Random(0)).latents.shape == (1, 2, 2)


def test_the_teacher_is_compared_at_the_scale_that_it_is_followed_at(teacher, samples, whole, tmp_path, caplog):
    run = make(teacher, samples, tmp_path / "out")
    assert run.teacher_guidance_scale == LCM.guidance_scale == 3.0
    unguided = replace(LCM, guidance_scale=1.0, sampling_guidance_scale=2.0)  # the student is guided itself
    assert replace(run, method=unguided).teacher_guidance_scale == 2.0
    assert replace(run, method=Regression(), data=replace(run.data, guidance_scale=4.0)).teacher_guidance_scale == 4.0
    assert replace(run, method=Regression(), data=Prompts(prompts=("rose",))).teacher_guidance_scale == 7.5
    assert "teacher_guidance_scale: 3.0" in (whole / "config.yaml").read_text()
    check_run(run)
    assert not caplog.records
    other = replace(run, train=replace(run.train, teacher_guidance_scale=5.0))
    check_run(other)
    assert other.teacher_guidance_scale == 5.0
    assert "teacher_guidance_scale is 5, but the student learns from its teacher at guidance_scale 3" in caplog.text


def test_a_bar_in_a_file_is_a_line_in_half_a_minute(capsys):
    for _ in progress(range(1000), title="Training", unit="step", shown=True):
        pass
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]
    assert len(lines) == 2 and "1000/1000" in lines[-1]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save(folder: Path, step: int) -> None:
    roles = {"student": {"a": torch.ones(3) * step}}
    assert checkpoint.save_checkpoint(folder / f"checkpoint-{step}", roles, {}, {"step": step})


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, caplog):
    for step in (5, 10):
        save(tmp_path, step)
    file = tmp_path / "checkpoint-10" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert "checkpoint-10" in caplog.text and "has changed since it was written" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        checkpoint.find_checkpoint(tmp_path, "checkpoint-10")
    (tmp_path / "checkpoint-5" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of them complete"):
        checkpoint.find_checkpoint(tmp_path, "latest")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, caplog):
    save(tmp_path, 5)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert not checkpoint.save_checkpoint(
        tmp_path / "checkpoint-10", {"student": {"a": torch.ones(3)}}, {}, {"step": 10}
    )
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-5"] and "No space left" in caplog.text
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"


def test_rotation_spares_the_source_of_a_resume(tmp_path):
    for step in (5, 10, 100, 20):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, 2, tmp_path / "checkpoint-5")
    assert [f.name for f in checkpoint.checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
