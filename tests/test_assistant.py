"""The training assistant: on beside every role in training, off elsewhere, and no part of what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import PartialState
from oracles.planted import Bug, planted
from test_sharding import two
from tiny import FAMILIES, awake, backbone, batch, context, pipeline
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stepdistill.core.errors import StudentError
from stepdistill.networks import sharding
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.tensors import Lora as LoraOfFile
from stepdistill.networks.pipeline_loras import assist
from stepdistill.networks.roles import ASSISTANT, TEACHER, Lora


def lora_of(name: str, net: nn.Module) -> LoraOfFile:
    """A random LoRA on a family's targets, of two ranks and alphas, so that its scale matters."""
    generator, made = torch.Generator().manual_seed(3), LoraOfFile()
    for i, target in enumerate(FAMILIES[name].lora_targets(net)):
        weight: Any = net.get_submodule(target).weight
        rank, ones = 2 + i % 2, [1] * (weight.ndim - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.02 * torch.randn(len(weight), rank, *ones, generator=generator)
        made[f"{FAMILIES[name].network_name}.{target}"] = LayerLora(down, up, 3.0 + i % 2)
    return made


def student(name: str, assistant: bool = True) -> Backbone:
    """A backbone with a student that has an effect, and an assistant."""
    pipe = pipeline(name)
    net, bone = FAMILIES[name].network(pipe), backbone(name, pipe)
    if assistant:
        assist(bone, lora_of(name, net), FAMILIES[name].network_name, "assistant")
    bone.add("student", Lora())
    awake(bone, "student")
    return bone


def fuse(bone: Backbone, lora: LoraOfFile) -> None:
    for key, part in lora.items():
        layer: Any = bone.net.get_submodule(key.partition(".")[2])
        layer.base_layer.weight.data += part.product().reshape(layer.base_layer.weight.shape)


def drawn(name: str, bone: Backbone, role: str) -> Tensor:
    pipe = pipeline(name)
    part = batch(name, pipe)
    with torch.no_grad():
        return context(name, pipe, bone).denoiser(role)(part.x0, torch.full((2,), 500.0), part.cond).x0


@pytest.mark.parametrize("name", FAMILIES)
def test_on_is_the_lora_in_the_weights_and_off_is_the_base_bit_for_bit(name):
    plain, bone, fused = student(name, assistant=False), student(name), student(name, assistant=False)
    fuse(fused, lora_of(name, FAMILIES[name].network(pipeline(name))))
    for role in (TEACHER, "student"):
        off = drawn(name, plain, role)
        assert torch.equal(drawn(name, bone, role), off)
        with bone.assisted():
            on = drawn(name, bone, role)
        assert torch.equal(drawn(name, bone, role), off)
        expected, size = drawn(name, fused, role), off.abs().max()
        assert (on - expected).abs().max() < 2e-5 * size < 1e-3 * (on - off).abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_learns_beside_it_and_nothing_else_does(checkpointing):
    """Recomputed blocks have it on, too, and the student's gradients are those of a base with it in its weights."""
    pipe, grads = pipeline("sd"), {}
    part = batch("sd", pipe)
    for kind in ("assisted", "fused"):
        bone = student("sd", assistant=kind == "assisted")
        if kind == "fused":
            fuse(bone, lora_of("sd", pipeline("sd").unet))
        elif checkpointing:
            bone.enable_checkpointing()
        with bone.assisted():  # on a backbone without one it does nothing
            est = context("sd", pipe, bone).denoiser("student")(part.x0, torch.full((2,), 500.0), part.cond)
            est.x0.square().mean().backward()
        grads[kind] = {key: p.grad for key, p in bone.parameters_of("student").items()}
        if kind == "assisted":
            assert all(p.grad is None and not p.requires_grad for p in bone.parameters_of(ASSISTANT).values())
    for key, grad in grads["fused"].items():
        assert (grads["assisted"][key] - grad).abs().max() < 1e-4 * grad.abs().max(), key


def test_it_is_no_role():
    bone, plain = student("sd"), student("sd", assistant=False)
    assert list(bone.declared) == ["student"]
    held = plain.state("student")
    assert bone.state("student").keys() == held.keys()
    assert all(torch.equal(value, held[key]) for key, value in bone.state("student").items())  # same initial weights
    with pytest.raises(ValueError, match="role 'assistant' exists already"):
        bone.add(ASSISTANT, Lora())


def test_a_lora_of_another_network_is_refused():
    bone = backbone("sd", pipeline("sd"))
    with pytest.raises(StudentError, match="layers of this pipeline, of the same shapes"):
        assist(bone, lora_of("sd3", pipeline("sd3").transformer), "unet", "assistant")
    assert not bone.parameters_of(ASSISTANT)


def test_in_half_precision_it_stays_in_float32():
    pipe = pipeline("sd")
    net = pipe.unet.to(torch.bfloat16)
    bone = backbone("sd", pipe)
    assist(bone, lora_of("sd", net), "unet", "assistant")
    assert {p.dtype for p in bone.parameters_of(ASSISTANT).values()} == {torch.float32}


def sharded(rank: int, expected: Tensor) -> None:
    """One of two processes: the base is spread over both, and the assistant is whole on each."""
    PartialState(cpu=True)
    pipe = pipeline("sd3")
    bone = backbone("sd3", pipe)
    assist(bone, lora_of("sd3", pipe.transformer), "transformer", "assistant")
    sharding.shard(bone, torch.device("cpu"), torch.float32)
    bone.add("student", Lora())
    awake(bone, "student")
    assert not any(isinstance(p, DTensor) for p in bone.parameters_of(ASSISTANT).values())
    with bone.assisted():
        assert torch.allclose(drawn("sd3", bone, "student"), expected, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_base_has_it_too():
    bone = student("sd3")
    with bone.assisted():
        two(sharded, drawn("sd3", bone, "student"))


BUGS = {
    "left on": Bug(
        Backbone.assisted,
        "self._beside = []\n",
        "pass\n",
        lambda: test_on_is_the_lora_in_the_weights_and_off_is_the_base_bit_for_bit("sd"),
    ),
    "on beside the student only": Bug(
        Backbone._switch,
        "*self._beside, *([] if",
        "*([] if name == TEACHER else self._beside), *([] if",
        lambda: test_on_is_the_lora_in_the_weights_and_off_is_the_base_bit_for_bit("sd"),
    ),
    "trained, too": Bug(
        Backbone.assist,
        "trainable=False",
        "trainable=True",
        lambda: test_the_student_learns_beside_it_and_nothing_else_does(False),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_noticed(name):
    bug = BUGS[name]
    with planted(bug.function, bug.old, bug.new), pytest.raises(AssertionError):
        bug.test()
