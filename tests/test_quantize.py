"""A base in fewer bits: the LoRA on it learns in float32, and the student folder is proven on that base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, SIDE, awake, backbone, batch, context, pipeline

from stepdistill.config.schema import Factory
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.score_matching import TeacherScoreMatching
from stepdistill.networks.quantize import dense, quantized
from stepdistill.networks.roles import TEACHER, Ema, LoraSpec
from stepdistill.students.base_model import base_hash
from stepdistill.students.verify import verify_student
from stepdistill.training.checks import check_run
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

INT8 = Factory("torchao.quantization.Int8WeightOnlyConfig")


@pytest.fixture(params=["sd", "sd3", "flux", "sana"])
def family(request, tmp_path):
    pipeline(request.param).save_pretrained(tmp_path / "teacher")
    place = str(tmp_path / "teacher")
    return request.param, replace(FAMILIES[request.param], pretrained_teacher_model=place, quantization=INT8)


def run_of(family, folder: Path, method=None) -> Run:
    return Run(
        family=family,
        method=method or DMD2(),
        data=TeacherSamples(
            folder=str(folder / "samples"), source=Prompts(prompts=("rose",)), count=2, num_inference_steps=2
        ),
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(
            output_dir=str(folder / "out"),
            max_train_steps=2,
            train_batch_size=2,
            learning_rate=1e-2,
            resolution=SIDE,
            report_to="none",
            gradient_checkpointing=True,
        ),
    )


def test_the_base_is_eight_bits_and_near_and_its_roles_learn_in_float32(family):
    name, small = family
    pipe, plain = small.load(), replace(small, quantization=None).load()
    net, whole = small.network(pipe), small.network(plain)
    # a LoRA on a quantised layer is PEFT's own kind of layer, so the keys of both are compared after it
    held = {type(p).__name__ for p in net.parameters()}
    assert "Int8Tensor" in held and all(p.dtype == torch.float32 for p in net.parameters())
    steps = max(
        ((dense(p) - q).abs().max() / q.abs().max()).item()
        for p, q in zip(net.parameters(), whole.parameters(), strict=True)
        if type(p).__name__ == "Int8Tensor"
    )
    assert 0 < steps < 0.5 / 127 * 1.1  # half a step of symmetric eight bits, by rows
    assert base_hash(pipe, small) != base_hash(plain, small)

    method, ours, theirs = DMD2(), backbone(name, pipe), backbone(name, plain)
    for bone in (ours, theirs):
        for role, kind in method.roles().items():
            bone.add(role, kind)
            awake(bone, role)
    before = {key: dense(p).clone() for key, p in ours.net.named_parameters() if "lora_" not in key}
    grads: list[dict[str, torch.Tensor]] = []
    for pipeline_, bone in ((pipe, ours), (plain, theirs)):
        for update in method.updates(context(name, pipeline_, bone), batch(name, pipeline_), 0):
            update.loss.backward()
        own = [role for role, kind in method.roles().items() if not isinstance(kind, Ema)]
        grads.append({f"{r}/{k}": p.grad for r in own for k, p in bone.parameters_of(r).items()})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert grad is not None and grad.dtype == torch.float32, key
    ours_, theirs_ = (torch.cat([g.flatten() for g in each.values()]) for each in grads)
    # a base that is a little off gives gradients that are a little off: not others, and not none
    assert torch.nn.functional.cosine_similarity(ours_, theirs_, dim=0) > 0.9
    assert all(torch.equal(dense(p), before[k]) for k, p in ours.net.named_parameters() if k in before)
    assert ours.parameters_of(TEACHER) == {}


def test_a_run_on_a_quantised_base_is_proven_on_it(family, tmp_path):
    _, small = family
    out = distill(run_of(small, tmp_path))
    contract = json.loads((out / "distill_config.json").read_text())
    assert contract["family"]["quantization"] == {"type": INT8.type, "kwargs": {}}
    assert contract["proof"]["difference"] <= 1e-4
    assert verify_student(out) <= 1e-4


def test_what_cannot_be_quantised_is_refused(tmp_path, monkeypatch):
    pipeline("sd").save_pretrained(tmp_path / "teacher")
    teacher = replace(FAMILIES["sd"], pretrained_teacher_model=str(tmp_path / "teacher"), quantization=INT8)
    with pytest.raises(ConfigError, match="quantization with TeacherScoreMatching.* as a whole network"):
        check_run(run_of(teacher, tmp_path, TeacherScoreMatching()))
    with pytest.raises(ConfigError, match="quantization of a teacher with teacher_loras"):
        replace(teacher, teacher_loras=("a/style",)).load()
    (tmp_path / "one.safetensors").touch()
    with pytest.raises(ConfigError, match="quantization of a single file"):
        replace(teacher, pretrained_teacher_model=str(tmp_path / "one.safetensors")).load()


def test_a_config_of_diffusers_is_taken_as_it_is():
    mapping = quantized(Factory("diffusers.QuantoConfig", {"weights_dtype": "int8"}), "unet").quant_mapping
    assert mapping is not None and type(mapping["unet"]).__name__ == "QuantoConfig"
    mapping = quantized(INT8, "unet").quant_mapping
    assert mapping is not None and type(mapping["unet"]).__name__ == "TorchAoConfig"
