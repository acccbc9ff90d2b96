"""All networks of a step are told the image in the same way: clean, in each call, with a prompt and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import tiny
import torch
from oracles.planted import Bug, bug_tests
from torch import Tensor, nn

from stepdistill.core import denoise
from stepdistill.core.denoise import HELD
from stepdistill.families.held_image import HeldImageToVideo
from stepdistill.families.wan_concat import IMAGE, TOKENS
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.finetune import score_matching_loss
from stepdistill.methods.gan import Gan
from stepdistill.methods.tdm import TDM
from stepdistill.methods.vsd import VSD
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Lora, LoraSpec

FRAMES, SIDE = 3, 8  # of latents
METHODS = {
    "dmd2": DMD2(num_inference_steps=2, guidance_scale=3.0, critic_steps=1, gan=Gan()),
    "weak to strong": DMD2(num_inference_steps=2, guidance_scale=3.0, critic_steps=1, weak=0.25),
    "tdm": TDM(num_inference_steps=2, guidance_scale=3.0),
    "vsd": VSD(guidance_scale=3.0),
}
Given = tuple[str, tuple[Tensor, ...]]  # a role, and what its network is given of the images, for each row


@cache
def scene(name: str) -> tuple[Backbone, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """A backbone with student and fake score awake, the conditions of two images with prompts, and without."""
    family, pipe = tiny.CONTINUING[name], tiny.pipeline(name)
    net = family.network(pipe)
    bone = Backbone(net, LoraSpec(rank=4), family.lora_targets(net), family.tap(net))
    for role in ("student", "fake"):
        bone.add(role, Lora())
        tiny.awake(bone, role)
    bone.add("head", METHODS["dmd2"].roles()["head"])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cond = {**family.condition(pipe, ["red apple", "cat face"]), **family.first_frame(pipe, images)}
    return bone, cond, family.unconditional(pipe)


def told(name: str, method: Method) -> list[Given]:
    """What the networks of one step of the method are given of the images."""
    (bone, cond, null), family, found = scene(name), tiny.CONTINUING[name], list[Given]()
    schedule = family.schedule(tiny.pipeline(name).scheduler)

    def denoiser(role: str) -> Denoiser:
        def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            hook = net.register_forward_pre_hook(lambda _, args, named: note(role, args, named), with_kwargs=True)
            try:
                return family.call(net, x_t, t, cond)
            finally:
                hook.remove()

        return Denoiser(bone, role, schedule, "flow", call)

    def note(role: str, args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        given = args[0] if args else named["hidden_states"]
        if isinstance(family, HeldImageToVideo):
            first = named["timestep"].unflatten(1, (FRAMES, -1))[:, 0]
            found.append((role, (family.unpack(given, SIDE, SIDE)[:, :, :1], first.abs().amax(1))))
        else:
            found.append((role, (given[:, 4:], named["encoder_hidden_states_image"])))

    context = StepContext(
        schedule=schedule,
        null=null,
        denoiser=denoiser,
        module=lambda role: bone.others[role],
        decode=lambda latents: latents,
        seed=0,
        step=0,
        device=torch.device("cpu"),
    )
    shape = (4, FRAMES, SIDE, SIDE)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    for _ in method.updates(context, Batch((0, 1), cond, shape, latents), 0):
        pass
    return found


def expected(name: str) -> tuple[Tensor, ...]:
    """What a network is to be given of the two images: the clean frame, all at time 0, or channels and tokens."""
    cond = scene(name)[1]
    if HELD in cond:
        return cond[HELD], torch.zeros(2)
    mask = torch.zeros(2, 2, *cond[IMAGE].shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, cond[IMAGE]], 1), cond[TOKENS]


def all_are_told_the_same(name: str, method: Method) -> None:
    found = told(name, method)
    assert {role for role, _ in found} == {"student", "fake", TEACHER}
    for role, given in found:
        for part, clean in zip(given, expected(name), strict=True):
            assert torch.equal(part, torch.cat([clean] * (len(part) // 2))), role


@pytest.mark.parametrize("name", tiny.CONTINUING)
@pytest.mark.parametrize("method", METHODS)
def test_all_networks_are_told_the_same_image(name, method):
    """V2 (ii)."""
    all_are_told_the_same(name, METHODS[method])


def held() -> None:
    all_are_told_the_same("wan_image", METHODS["dmd2"])


def beside() -> None:
    all_are_told_the_same("wan_concat", replace(METHODS["dmd2"], gan=None))


BUGS = {
    "a fake score without the image": Bug(
        score_matching_loss,
        "eps, t), t, batch.cond)",
        "eps, t), t, batch.cond | {'image': 0 * batch.cond['image']})",
        beside,
    ),
    "a noised image in the student's loss": Bug(
        DMD2.student_loss,
        '("fake")(x_s, s, batch.cond)',
        '("fake")(x_s, s, batch.cond | {"held": x_s[:, :, :1]})',
        held,
    ),
    "no image without a prompt": Bug(denoise.without_prompt, "else value", "else 0 * value", beside),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
