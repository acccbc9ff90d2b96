"""Settings of Accelerate's launcher are used, refused or reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts
from stepdistill.evaluation.run import joined
from stepdistill.evaluation.spec import EvalSpec
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.regression import Regression
from stepdistill.training.launcher import check_launcher
from stepdistill.training.memory.predict import predict
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import begin

PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# what `accelerate launch` sets where it was asked for nothing
PLAIN = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "train.gradient_accumulation_steps, which is 2"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "train.torch_compile"),
    "ACCELERATE_MIXED_PRECISION": ("fp8", "no, bf16, fp16"),
}


@pytest.fixture(autouse=True)
def plain(monkeypatch) -> None:
    for variable in [name for name in os.environ if name.startswith(("ACCELERATE_", "MASTER_"))]:
        monkeypatch.delenv(variable)
    for variable, value in PLAIN.items():
        monkeypatch.setenv(variable, value)


def spec(**train) -> TrainSpec:
    return TrainSpec(output_dir="unused", gradient_accumulation_steps=2, **train)


@pytest.mark.parametrize("variable", PLUGINS)
def test_plugins_are_refused_wherever_processes_meet(monkeypatch, variable):
    message = rf"got {PLUGINS[variable]}.*{variable}.*configs/accelerate.*shard_base"
    for value in ("true", "True", "1", "yes"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ConfigError, match=message):
            check_launcher(spec())
    with pytest.raises(ConfigError, match=message):
        joined(EvalSpec(output_dir=Path("unused"), device="cpu"))
    monkeypatch.setenv(variable, "false")
    check_launcher(spec())


@pytest.mark.parametrize("variable", SETTINGS)
def test_what_a_config_says_is_not_taken_from_the_launcher(monkeypatch, variable):
    value, expected = SETTINGS[variable]
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{value}.*in the launcher.*expected .*{expected}"):
        check_launcher(spec())


def test_a_run_and_its_prediction_ask(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    family, method = StableDiffusion(pretrained_teacher_model="tiny-sd"), Regression(num_inference_steps=1)
    run = Run(family=family, method=method, data=Prompts(prompts=("rose",)), train=spec())
    for start in (lambda: begin(run.train), lambda: predict(run)):
        with pytest.raises(ConfigError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in the launcher"):
            start()


def test_what_the_config_says_too_is_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    check_launcher(spec(torch_compile=True))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    with pytest.raises(ConfigError, match="EAGER in the launcher"):
        check_launcher(spec(torch_compile=True))


def test_another_precision_in_the_config_wins_and_that_is_said(monkeypatch, caplog):
    for precision in ("bf16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        check_launcher(spec(mixed_precision="no"))
        assert f"train.mixed_precision is no; the launcher's {precision} is not used" in caplog.text
    caplog.clear()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launcher(spec(mixed_precision="bf16"))
    check_launcher(spec())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what it says where nobody was asked
    check_launcher(spec(mixed_precision="fp16"))
    assert not caplog.text


def test_a_launcher_that_starts_one_process_of_several_is_said(monkeypatch, caplog):
    """MULTI_CPU without mpirun."""
    check_launcher(spec())
    assert not caplog.text
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_launcher(spec())
    assert "MULTI_CPU needs mpirun" in caplog.text
    caplog.clear()
    for size in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        with monkeypatch.context() as context:
            context.setenv(size, "2")
            check_launcher(spec())
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    check_launcher(spec())
    assert not caplog.text


@pytest.mark.parametrize("command", [("train", "--dry-run"), ("precompute",)])
def test_deepspeed_is_refused_in_one_line(tmp_path, command):
    """Before accelerate imports it."""
    where = [f"train.output_dir={tmp_path}/out", f"train.cache_dir={tmp_path}/kept"]
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill", command[0], "configs/quickstart.yaml", *where, *command[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_DEEPSPEED": "true"},
    )
    assert done.returncode and "Traceback" not in done.stderr
    assert "got DeepSpeed, which is set in the launcher" in done.stderr
    assert not list(tmp_path.iterdir())
