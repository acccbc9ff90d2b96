"""The student folder, loaded into plain Diffusers, draws what the student in memory drew; else writing it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill import student
from stepdistill.card import is_non_commercial, licence_of, warn_of_licence
from stepdistill.contract import FORMAT
from stepdistill.errors import StudentError
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.regression import Regression
from stepdistill.proof import prove
from stepdistill.roles import Copy, Ema, Lora

RANK, ALPHA = 4, 16
SIZE = (32, 32)
CARD = "---\nlicense: cc-by-nc-4.0\n---\n# A base\n"
LCM = Consistency(ema_decay=None)
TCD = Consistency(end="any", ema_decay=None, guidance_scale=1.0, sampling_guidance_scale=3.0)
PCM = Consistency(end="edge", segments=(2,), ema_decay=None)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Family]:
    """Teachers in folders: `sd3` has shift 3, and lacks the largest text encoder."""
    found: dict[str, Family] = {}
    for name, kind, cls in [
        ("sd", "epsilon", StableDiffusion),
        ("sd-v", "v_prediction", StableDiffusion),
        ("sd3", None, StableDiffusion3),
    ]:
        pipe = tiny.pipeline(name.partition("-")[0])
        if kind:
            pipe.scheduler.register_to_config(prediction_type=kind)
        folder = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        found[name] = cls(pretrained_teacher_model=str(folder))
    return found


def trained(family: Family, dtype: torch.dtype = torch.float32, size: float = 0.05):
    """A pipeline whose network has a student that differs from its teacher, with alpha other than rank."""
    pipe = family.load()
    nn.Module.to(family.network(pipe), dtype)
    bone = tiny.backbone("sd" if isinstance(family, StableDiffusion) else "sd3", pipe, RANK, ALPHA)
    bone.add("student", Lora())
    tiny.awake(bone, "student", size)
    return pipe, bone


def write(folder: Path, family: Family, method=LCM, dtype: torch.dtype = torch.float32, **options) -> float:
    pipe, bone = trained(family, dtype)
    options = {"role": "student", "resolution": SIZE, "method": method} | options
    return student.write(folder, family=family, pipe=pipe, backbone=bone, **options)


@pytest.fixture(scope="module")
def written(families, tmp_path_factory):
    """A student folder of each base; tests that change one take a copy."""
    folders = {name: tmp_path_factory.mktemp(f"student-{name}") for name in ("sd", "sd3")}
    for name, folder in folders.items():
        write(folder, families[name], seed=3)
    return folders


def copied(written: dict[str, Path], name: str, to: Path) -> Path:
    return shutil.copytree(written[name], to / "copy")


def visits(family: Family, folder: Path) -> list[float]:
    """The timesteps of a fresh pipeline that was told nothing but what `load_student` returns."""
    pipe, times = family.load(), []

    def before(_, args, kwargs):
        times.append(float(kwargs["timestep"][0]) if "timestep" in kwargs else float(args[1]))

    family.network(pipe).register_forward_pre_hook(before, with_kwargs=True)
    pipe("a rose", output_type="latent", **student.load_student(pipe, folder))
    return times


# the scheduler of each row is the one that the family chose: LCM, TCD with guidance, DDIM; Euler, with noise or not
@pytest.mark.parametrize(
    ("name", "method", "scheduler"),
    [
        ("sd", LCM, "LCMScheduler"),
        ("sd-v", TCD, "TCDScheduler"),
        ("sd", PCM, "DDIMScheduler"),
        ("sd3", LCM, "FlowMatchEulerDiscreteScheduler"),
        ("sd3", replace(TCD, eta=0.0), "FlowMatchEulerDiscreteScheduler"),
        ("sd3", Regression(ema_decay=None), "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_fresh_plain_pipeline_draws_what_was_trained(families, tmp_path, name, method, scheduler):
    family = families[name]
    pipe, bone = trained(family)
    kinds = {type(family.network(pipe).get_submodule(key).base_layer) for key in family.lora_targets_of(bone)}
    assert kinds == ({nn.Linear, nn.Conv2d} if name != "sd3" else {nn.Linear})
    difference = student.write(
        tmp_path, family=family, pipe=pipe, backbone=bone, role="student", method=method, resolution=SIZE
    )
    assert difference < 1e-5
    assert student.verify(tmp_path) < 1e-5

    contract = student.read_contract(tmp_path)
    assert contract.proof and contract.proof.difference == difference
    assert contract.scheduler["_class_name"] == scheduler
    assert (contract.lora.rank, contract.lora.alpha, contract.lora.strength) == (RANK, ALPHA, 1.0)
    times = method.sampler(family.schedule(family.load())).timesteps
    assert len(times) == 4 and contract.timesteps == times
    assert visits(family, tmp_path) == pytest.approx(times, rel=1e-6, abs=0)
    if name != "sd3":
        assert visits(family, tmp_path) == list(times)
