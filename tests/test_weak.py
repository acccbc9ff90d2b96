"""Weak-to-strong matching: the fake score's LoRA, at a part of its strength, in the real score of DMD2."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from oracles.planted import Bug, bug_tests
from tiny import awake, backbone, batch, context, pipeline
from torch import Tensor, nn

from stepdistill.core import denoise
from stepdistill.core.denoise import guided
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import Rectified
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks import lora_layers
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Copy, Ema, Lora, LoraSpec

SHAPE = (2, 3, 2, 2)  # C, F, h, w
PIXELS, WORDS, RANK, ALPHA = 24, 5, 4, 6.0  # a scale of 1.5
DMD = DMD2(num_inference_steps=2, guidance_scale=3.0, critic_steps=1, weak=0.25)


def linear(arithmetic: lora_layers.Arithmetic = "merged") -> tuple[Backbone, Batch, StepContext]:
    """A network of one layer of a video's pixels and its prompt: what it puts out is linear in its LoRA."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(layer=nn.Linear(PIXELS + WORDS, PIXELS)))
    bone = Backbone(net, LoraSpec(rank=RANK, alpha=ALPHA, arithmetic=arithmetic), ["layer"])
    for role in ("student", "fake"):
        bone.add(role, Lora())
        awake(bone, role, 0.2)

    def call(net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net(torch.cat([x_t.flatten(1), cond["text"]], 1)).view_as(x_t)

    schedule = Rectified()
    scene = StepContext(
        schedule=schedule,
        null={"text": torch.randn(1, WORDS)},
        denoiser=lambda role: Denoiser(bone, role, schedule, "flow", call),  # pyright: ignore[reportArgumentType]
        module=lambda role: bone.others[role],
        decode=lambda latents: latents,
        seed=0,
        step=0,
        device=torch.device("cpu"),
    )
    return bone, Batch((0, 1, 2, 3), {"text": torch.randn(4, WORDS)}, SHAPE), scene


def x0_by_hand(bone: Backbone, strength: float, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """`x0 = x_t - sigma (W + strength alpha / r B A) x_t` of a flow."""
    layer = bone.net.layer
    a, b = (layers["fake"].weight for layers in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight + strength * ALPHA / RANK * b @ a
    y = torch.cat([x.flatten(1), text], 1) @ weight.T + layer.base_layer.bias
    return x - (t / 1000)[:, None, None, None, None] * y.view_as(x)


@pytest.mark.parametrize("arithmetic", ["merged", "apart"])
@pytest.mark.parametrize("w", [1.0, 5.0])
@pytest.mark.parametrize("weak", [0.25, 0.6])
def test_the_gradient_is_smaller_and_has_its_fixed_point(weak, w, arithmetic):
    """V5: g' = (1 - weak) g before it is normalised, whatever the guidance; 5 x 0.6 is beyond 1."""
    bone, part, scene = linear(arithmetic)
    method = replace(DMD, weak=weak, guidance_scale=w)
    sample = torch.randn(4, *SHAPE)
    x0 = sample.clone().requires_grad_()
    with bone.unchanged():  # as in a run
        loss, _ = method.student_loss(TEACHER, scene, part, Estimate(x0, x0), 999.0)
    loss.backward()
    s = scene.schedule.random_times(scene.draw(part, "score t"), 20.0, 980.0)
    x_s = scene.schedule.add_noise(sample, scene.noise(part, "score eps"), s)
    text, none = part.cond["text"], scene.null["text"].expand(4, -1)
    with torch.no_grad():
        fake = x0_by_hand(bone, 1, x_s, s, text)
        cond, uncond = (x0_by_hand(bone, 0, x_s, s, each) for each in (text, none))
        strong = uncond + w * (cond - uncond)
        n = (sample - (1 - weak) * strong - weak * fake).abs().mean((1, 2, 3, 4), keepdim=True)
        expected = (1 - weak) * (fake - strong) / n
    assert x0.grad is not None and (fake - cond).abs().mean() > 0.1
    torch.testing.assert_close(x0.grad * x0.numel(), expected, atol=1e-5, rtol=1e-4)


def real_score(name: str, method: DMD2) -> tuple[Backbone, Backbone, Tensor, Tensor, list[Tensor]]:
    """Of a random network: the two backbones, of which the second's fake LoRA is weaker by hand; the real score and
    what it should be; the fake score before and after."""
    pipe = pipeline(name)
    bone = backbone(name, pipe)
    bone.add("fake", Lora())
    awake(bone, "fake")
    part, scene = batch(name, pipe), context(name, pipe, bone)
    weaker = deepcopy(bone)
    for key, p in weaker.parameters_of("fake").items():
        p.data *= method.weak if "lora_B" in key else 1
    by_hand = context(name, pipe, weaker)
    t = torch.full((2,), 600.0)

    def x0(scene: StepContext, role: str) -> Tensor:
        return scene.denoiser(role)(part.latents, t, part.cond).x0

    with torch.no_grad(), bone.unchanged():
        before = x0(scene, "fake")
        real = method.real_score(TEACHER, scene)(part.latents, t, part.cond).x0
        after = x0(scene, "fake")
        guide = guided(scene.denoiser(TEACHER), scene.null, method.guidance_scale)(part.latents, t, part.cond).x0
        direction = guide - x0(scene, TEACHER)
        expected = x0(by_hand, "fake") + (1 - method.weak) * direction if method.weak else guide
    return bone, weaker, real, expected, [before, after]


@pytest.mark.parametrize("name", ["sd", "wan"])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_only_the_prediction_with_the_prompt_moves(name, w):
    _, _, real, expected, (before, after) = real_score(name, replace(DMD, guidance_scale=w))
    torch.testing.assert_close(real, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(before, after)
    _, _, strong, _, _ = real_score(name, replace(DMD, guidance_scale=w, weak=0.0))
    assert (real - strong).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_without_it_the_real_score_is_the_guided_teacher_bit_for_bit(name):
    _, _, real, expected, _ = real_score(name, replace(DMD, weak=0.0))
    assert torch.equal(real, expected)


def test_a_strength_ends_with_its_call_also_after_an_error():
    bone, part, scene = linear()
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 500.0)
    fake = scene.denoiser("fake")
    with torch.no_grad():
        before = fake(x, t, part.cond).x0
        nothing = fake.at_strength(0.0)(x, t, part.cond).x0
        torch.testing.assert_close(nothing, scene.denoiser(TEACHER)(x, t, part.cond).x0)
        with pytest.raises(KeyError):
            fake.at_strength(0.5)(x, t, {})
        assert torch.equal(fake(x, t, part.cond).x0, before)


def nothing_more() -> None:
    """What is formed at another strength is not kept; what the pass at full strength formed is, also afterwards."""
    bone, part, scene = linear()
    x, t = torch.randn(4, *SHAPE), torch.full((4,), 500.0)
    with torch.no_grad(), bone.unchanged():
        DMD.real_score(TEACHER, scene)(x, t, part.cond)
        assert not bone._kept.values
        scene.denoiser("fake")(x, t, part.cond)
        full = list(bone._kept.values.values())
        DMD.real_score(TEACHER, scene)(x, t, part.cond)
        still = list(bone._kept.values.values())
    assert len(full) == len(still) == 1 and still[0] is full[0]


def test_no_weights_are_kept_at_another_strength():
    nothing_more()


def test_what_has_no_strength_is_refused():
    pipe = pipeline("sd")
    bone = backbone("sd", pipe)
    for role, kind in {"fake": Lora(), "ema": Ema("fake", 0.5), "whole": Copy()}.items():
        bone.add(role, kind)
    part, scene = batch("sd", pipe), context("sd", pipe, bone)
    with pytest.raises(ValueError, match=r"'teacher' at strength 0.5: expected a LoRA.* it is the frozen base"):
        scene.denoiser(TEACHER).at_strength(0.5)
    with pytest.raises(ValueError, match=r"'whole' at strength 0.5: expected a LoRA.* it is a Copy"):
        scene.denoiser("whole").at_strength(0.5)
    weak = scene.denoiser("ema").at_strength(0.5)
    with pytest.raises(ValueError, match="no_grad"):
        weak(part.latents, torch.full((2,), 500.0), part.cond)


@pytest.mark.parametrize("weak", [-0.1, 1.0, 1.5])
def test_a_strength_that_leaves_no_gradient_is_refused(weak):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        DMD2(weak=weak)


def test_waypoints_are_no_place_for_it():
    with pytest.raises(ValueError, match=r"matching.weak is 0.25"):
        DisBack(matching=DMD2(weak=0.25))


def ratio() -> None:
    test_the_gradient_is_smaller_and_has_its_fixed_point(0.6, 5.0, "merged")


def moved() -> None:
    test_only_the_prediction_with_the_prompt_moves("wan", 3.0)


REAL = DMD2.real_score
BUGS = {
    "the teacher alone": Bug(DMD2.student_loss, "self.real_score(target, context)", "context.denoiser(target)", ratio),
    "guidance in full": Bug(REAL, "(1 - self.weak) * (self.guidance_scale - 1)", "(self.guidance_scale - 1)", ratio),
    "the rest of the strength": Bug(REAL, "at_strength(self.weak)", "at_strength(1 - self.weak)", ratio),
    "guidance by the fake score": Bug(REAL, "guided_by(weak, context.denoiser(target)", "guided_by(weak, weak", moved),
    "guidance turned around": Bug(denoise.guided_by, "x + (y - c)", "x - (y - c)", moved),
    "one kept weight for all strengths": Bug(lora_layers.at_strength, "kept.open, False", "kept.open, True", moved),
    "a weak weight that is kept": Bug(lora_layers.at_strength, "kept.open, False", "kept.open, True", nothing_more),
    "nothing is kept any more": Bug(lora_layers.at_strength, "kept.open = opened", "kept.open = False", nothing_more),
    "a strength that stays": Bug(lora_layers.at_strength, "layer.set_scale(name, 1.0)", "pass", moved),
    "a LoRA without its alpha": Bug(
        lora_layers.at_strength, "layer.set_scale(name, strength)", "layer.scaling[name] = strength", ratio
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
