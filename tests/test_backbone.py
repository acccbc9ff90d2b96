"""Roles on one backbone are separate networks, bit for bit; and the hazards of switching are gone."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from tiny import FAMILIES, awake, backbone, batch, context, pipeline
from torch import nn

from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.vsd import VSD
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import TEACHER, Copy, Ema, Lora, Module, Role

GAN = Gan(r1_weight=0.1, divergence="jensen_shannon")
DMD = DMD2(num_inference_steps=2, guidance_scale=3.0, critic_steps=1, gan=GAN)
LCM = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, ema_decay=0.9, target="ema", loss_type="l2")


@dataclass(frozen=True, kw_only=True)
class Adversarial(Method):
    """Two trained roles and the teacher: a critic learns to score what the student makes, and the reverse.

    The student's gradient goes through the critic, in two phases.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    def roles(self) -> dict[str, Role]:
        return {"student": Lora(), "fake": Lora()}

    def sampler(self, schedule, steps=None):
        raise AssertionError

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        t = torch.full((len(batch.index),), 500.0)
        teacher = context.guided(TEACHER, 2.0)
        xg = context.denoiser("student")(batch.latents, t, batch.cond).x0
        xd = xg.detach().requires_grad_()
        x_t = context.schedule.add_noise(xd, context.noise(batch, "score"), t)
        with torch.no_grad():
            real = teacher(x_t, t, batch.cond).x0
        gap = context.denoiser("fake").frozen()(x_t, t, batch.cond).x0 - real
        (v,) = torch.autograd.grad(gap.square().mean(), xd)
        yield Update("student", (xg * v).sum())
        x_t = context.schedule.add_noise(xd.detach(), context.noise(batch, "critic"), t)
        fake = context.denoiser("fake")(x_t, t, batch.cond)
        yield Update("fake", (fake.x0 - xd.detach()).square().mean())


METHODS = {
    "lcm": LCM,
    "adversarial": Adversarial(),
    "dmd2": DMD,
    "dmd2, weak, teacher's features": replace(
        DMD, weak=0.25, gan=replace(GAN, features="teacher", loss_type="softplus")
    ),
    "dmd2, ladd": replace(DMD, gan=Ladd(misaligned_pairs=True)),
    "lcm, ladd": replace(LCM, gan=Ladd()),
    "vsd": VSD(guidance_scale=(0.5, 4.0)),
}


def gradients(method: Method, name: str, pipe, bones, micro_batches: int) -> dict[str, torch.Tensor]:
    """Each update's gradients of its roles, as the trainer gathers them."""
    batches = [batch(name, pipe, first=2 * k) for k in range(micro_batches)]
    turns = [method.updates(context(name, pipe, bones), part, 0) for part in batches]
    found: dict[str, torch.Tensor] = {}
    number = 0
    while True:
        roles: tuple[str, ...] = ()
        for turn in turns:
            update = next(turn, None)
            if update is not None:
                (update.loss / micro_batches).backward()
                roles = update.roles
        if not roles:
            return found
        for role in roles:
            bone = bones if isinstance(bones, Backbone) else bones[role]
            for key, p in bone.parameters_of(role).items():
                found[f"{number}/{role}/{key}"] = p.grad.clone()
        for bone in [bones] if isinstance(bones, Backbone) else bones.values():
            for p in bone.parameters():
                p.grad = None
        number += 1


def shared_and_separate(method: Method, name: str):
    pipe = pipeline(name)
    net = FAMILIES[name].network(pipe)
    separate = {TEACHER: backbone(name, _with(pipe, name, deepcopy(net)))}
    for role in method.roles():
        separate[role] = backbone(name, _with(pipe, name, deepcopy(net)))
    shared = backbone(name, pipe)
    for role, kind in method.roles().items():
        shared.add(role, kind)
        awake(shared, role)
        separate[role].add(role, kind if isinstance(kind, Module) else Lora())
        if isinstance(kind, Ema):  # it is only read here; and torch has another kernel for weights with gradients
            for p in separate[role].parameters_of(role).values():
                p.requires_grad_(False)
        separate[role].load_state(role, shared.state(role))
    return pipe, shared, separate


def _with(pipe, name: str, net: nn.Module):
    other = copy(pipe)
    other.register_modules(**{FAMILIES[name].network_name: net})
    return other


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("key", METHODS)
def test_roles_equal_copies(key, name):
    """In two micro-batches, without checkpointing and with it; of one method in one, too."""
    method = METHODS[key]
    pipe, shared, separate = shared_and_separate(method, name)
    alone = [(1, False)] if key == "lcm" else []
    for micro_batches, checkpointing in [*alone, (2, False), (2, True)]:
        if checkpointing:
            for bone in [shared, *separate.values()]:
                bone.enable_checkpointing()
        ours = gradients(method, name, pipe, shared, micro_batches)
        theirs = gradients(method, name, pipe, separate, micro_batches)
        assert ours.keys() == theirs.keys() and len(ours) > 20
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        # while all logits are within the hinge's margins, real and fake pull equally at the bias that they share
        assert all(value.abs().sum() > 0 for key, value in ours.items() if not key.endswith("last.bias"))


def test_switching_away_before_backward_loses_no_gradient():
    """PEFT's own switch would: T7, T8 and T9 of the users' study."""
    for checkpointing in (False, True):
        pipe = pipeline("sd")
        bone = backbone("sd", pipe)
        bone.add("student", Lora())
        bone.add("fake", Lora())
        awake(bone, "student")
        if checkpointing:
            bone.enable_checkpointing()
        part, scene = batch("sd", pipe), context("sd", pipe, bone)
        t = torch.full((2,), 300.0)
        loss = scene.denoiser("student")(part.latents, t, part.cond).x0.square().mean()
        with torch.no_grad():
            scene.denoiser(TEACHER)(part.latents, t, part.cond)
            scene.denoiser("fake")(part.latents, t, part.cond)
        with bone.use("fake"):
            loss.backward()
        assert all(p.grad is not None for p in bone.parameters_of("student").values())
        assert all(p.grad is None for p in bone.parameters_of("fake").values())
        assert all(p.requires_grad for r in ("student", "fake") for p in bone.parameters_of(r).values())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_lora_begins_as_the_teacher_and_the_teacher_stays(name):
    pipe = pipeline(name)
    part = batch(name, pipe)
    t = torch.full((2,), 700.0)
    net = FAMILIES[name].network(pipe)
    with torch.no_grad():
        plain = FAMILIES[name].call(net, part.latents, t, part.cond)
    bone = backbone(name, pipe)
    bone.add("student", Lora())

    def call(role):
        with torch.no_grad(), bone.use(role) as own:
            return FAMILIES[name].call(own, part.latents, t, part.cond)

    assert torch.equal(call("student"), plain) and torch.equal(call(TEACHER), plain)
    awake(bone, "student")
    assert torch.equal(call(TEACHER), plain)
    assert not torch.allclose(call("student"), plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roles_on_a_base_in_half_precision_are_float32(dtype):
    """An update of 1e-4 of a weight is lost in eight bits."""
    pipe = pipeline("sd3")
    net = nn.Module.to(FAMILIES["sd3"].network(pipe), dtype)
    bone = backbone("sd3", pipe)
    for name, role in {"student": Lora(), "ema": Ema("student", 0.5), "copy": Copy()}.items():
        bone.add(name, role)
        assert {p.dtype for p in bone.parameters_of(name).values()} == {torch.float32}
    own = {id(p) for name in bone.declared for p in bone.parameters_of(name).values()}
    assert {p.dtype for p in net.parameters() if id(p) not in own} == {dtype}


def test_frozen_gives_gradients_to_inputs_only():
    pipe = pipeline("sd")
    bone = backbone("sd", pipe)
    bone.add("fake", Lora())
    awake(bone, "fake")
    for checkpointing in (False, True):
        if checkpointing:
            bone.enable_checkpointing()
        part = batch("sd", pipe)
        x = part.latents.clone().requires_grad_()
        context("sd", pipe, bone).denoiser("fake").frozen()(x, torch.full((2,), 300.0), part.cond).x0.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert all(p.grad is None and p.requires_grad for p in bone.parameters_of("fake").values())


def test_use_restores_everything_after_an_error():
    bone = backbone("sd", pipeline("sd"))
    bone.add("student", Lora())
    with pytest.raises(RuntimeError, match="inside"), bone.use("student", grad=False):
        raise RuntimeError("inside")
    assert bone._current == (TEACHER, True)
    assert all(p.requires_grad for p in bone.parameters_of("student").values())


def test_average_moves_once_and_only_with_its_source():
    bone = backbone("sd", pipeline("sd"))
    bone.add("student", Lora())
    bone.add("ema", Ema("student", 0.75))
    assert not any(p.requires_grad for p in bone.parameters_of("ema").values())
    before = {key: p.clone() for key, p in bone.state("ema").items()}
    awake(bone, "student", 1.0)
    bone.average(["fake"], 0)
    assert all(torch.equal(before[key], p) for key, p in bone.state("ema").items())
    bone.average(["student"], 0)
    for key, value in bone.state("student").items():
        torch.testing.assert_close(bone.state("ema")[key], 0.75 * before[key] + 0.25 * value)


def test_copies_and_modules_are_roles_too():
    pipe = pipeline("sd")
    bone = backbone("sd", pipe)
    bone.add("student", Copy())
    bone.add("ema", Ema("student", 0.5))
    bone.add("head", Module(lambda tap: nn.Linear(tap.side, 1)))
    part, scene = batch("sd", pipe), context("sd", pipe, bone)
    t = torch.full((2,), 300.0)
    student, teacher = (scene.denoiser(r)(part.latents, t, part.cond).x0 for r in ("student", TEACHER))
    assert torch.equal(student, teacher)
    student.sum().backward()
    assert all(p.grad is not None for p in bone.parameters_of("student").values())
    assert len(bone.parameters_of("head")) == 2 and all(p.requires_grad for p in bone.parameters_of("head").values())
    assert bone.parameters_of(TEACHER) == {}


def test_initial_weights_depend_on_seed_and_name_only():
    first, second = (backbone("sd", pipeline("sd")) for _ in range(2))
    first.add("student", Lora())
    torch.rand(7)
    second.add("other", Lora())
    second.add("student", Lora())
    one, two = first.state("student"), second.state("student")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    third = backbone("sd", pipeline("sd"))
    third.seed = 1
    third.add("student", Lora())
    for other in (second.state("other"), third.state("student")):
        assert all(not torch.equal(one[key], other[key]) for key in one if "lora_A" in key)


def test_misuse_says_what_is_wrong():
    bone = backbone("sd", pipeline("sd"))
    bone.add("student", Lora())
    with pytest.raises(ValueError, match="exists already"):
        bone.add("student", Lora())
    with pytest.raises(ValueError, match="not declared before"):
        bone.add("ema", Ema("nobody", 0.9))
    with pytest.raises(ValueError, match="names match, .* do not"):
        bone.load_state("student", {})
