"""Guidance adapters: nothing at zero, nothing for other roles, the scale of their own forward, and scales between."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from oracles import close
from oracles.planted import planted
from tiny import ADAPTED, FAMILIES, awake, backbone, batch, context, latent_shape, pipeline
from torch import Tensor

from stepdistill.core.denoise import SCALE, guided, with_scale
from stepdistill.core.schedule import expand
from stepdistill.data import GuidedState
from stepdistill.data.bundled import emoji
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Batch
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.guidance_adapters import Hooks, build
from stepdistill.networks.roles import TEACHER, AdapterArch, Adapters, Ema, Lora, LoraSpec

ARCHES: tuple[AdapterArch, ...] = ("cross_attention", "mixed", "offset")
T = torch.tensor([700.0, 300.0])
EACH = pytest.mark.parametrize("name", ADAPTED)
BOTH = pytest.mark.parametrize("arch", ARCHES)


def stirred(bone: Backbone, role: str, size: float = 0.3) -> None:
    """Give adapters that add zero an effect."""
    generator = torch.Generator().manual_seed(7)
    for key, p in bone.parameters_of(role).items():
        if ".out." in key:
            p.data = size * torch.randn(p.shape, generator=generator)


def scene(name: str, arch: AdapterArch = "cross_attention", width: int = 16):
    """A pipeline, its backbone with adapters `student`, and a batch."""
    pipe = pipeline(name)
    bone = backbone(name, pipe)
    bone.add("student", Adapters(arch, width))
    return pipe, bone, batch(name, pipe)


def native(name: str, pipe, bone: Backbone, part: Batch, role: str, w: Tensor | None = None) -> Tensor:
    """A role's output at the batch's latents."""
    denoiser = context(name, pipe, bone).denoiser(role)
    cond = part.cond if w is None else {**part.cond, SCALE: w}
    return denoiser.native(denoiser(part.latents, T, cond), T)


@EACH
@BOTH
def test_at_zero_they_are_the_base_bit_for_bit(name, arch):
    pipe, bone, part = scene(name, arch)
    keys = list(bone.net.state_dict())
    for w in (1.0, 7.5, 100.0):
        student = native(name, pipe, bone, part, "student", torch.full((2,), w))
        assert torch.equal(student, native(name, pipe, bone, part, TEACHER))
    stirred(bone, "student")
    assert not torch.allclose(student, native(name, pipe, bone, part, "student", torch.full((2,), 7.5)), atol=1e-3)
    assert list(bone.net.state_dict()) == keys  # so LoRAs and processors find their places


@EACH
@BOTH
def test_other_roles_know_nothing_of_them(name, arch):
    pipe, bone, part = scene(name, arch)
    bone.add("lora", Lora())
    awake(bone, "lora")
    roles = (TEACHER, "lora")
    before = [native(name, pipe, bone, part, role) for role in roles]
    stirred(bone, "student")
    native(name, pipe, bone, part, "student", torch.full((2,), 3.0))
    assert all(torch.equal(native(name, pipe, bone, part, r), y) for r, y in zip(roles, before, strict=True))
    alone = backbone(name, pipeline(name))  # and the adapters nothing of the LoRA
    alone.add("student", Adapters(arch, 16))
    stirred(alone, "student")
    ours, theirs = (native(name, pipe, b, part, "student", torch.full((2,), 3.0)) for b in (bone, alone))
    assert torch.equal(ours, theirs)


@EACH
@BOTH
def test_each_sample_has_its_own_scale(name, arch):
    pipe, bone, part = scene(name, arch)
    stirred(bone, "student")
    both = native(name, pipe, bone, part, "student", torch.tensor([2.0, 6.0]))
    for i, w in enumerate((2.0, 6.0)):
        same = native(name, pipe, bone, part, "student", torch.full((2,), w))
        close(both[i], same[i], 1e-5)
        close(native(name, pipe, bone, part, "student", torch.full((2, 1), w)), same, 0)
        denoiser = context(name, pipe, bone).denoiser("student")
        close(denoiser.native(with_scale(denoiser, w)(part.latents, T, part.cond), T), same, 0)
    assert (both[1] - native(name, pipe, bone, part, "student", torch.full((2,), 2.0))[1]).abs().max() > 1e-4


def gradients(name: str, arch: AdapterArch, checkpointing: bool, disturbed: bool) -> dict[str, Tensor]:
    pipe, bone, part = scene(name, arch)
    bone.add("fake", Lora())
    awake(bone, "fake")
    stirred(bone, "student")
    if checkpointing:
        bone.enable_checkpointing()
    y = native(name, pipe, bone, part, "student", torch.tensor([2.0, 5.0]))
    if disturbed:
        other = native(name, pipe, bone, part, "student", torch.tensor([9.0, 11.0]))
        native(name, pipe, bone, part, "fake")
        with torch.no_grad():
            native(name, pipe, bone, part, TEACHER)
        with bone.use("student", scale=torch.tensor([11.0, 12.0])):
            y.square().mean().backward()
        del other
    else:
        y.square().mean().backward()
    found = {key: p.grad for key, p in bone.parameters_of("student").items() if p.grad is not None}
    assert len(found) == len(bone.parameters_of("student"))
    assert all(p.grad is None for p in bone.parameters_of("fake").values())
    return found


@EACH
@BOTH
def test_recompute_sees_the_scale_of_its_forward(name, arch):
    plain = gradients(name, arch, False, False)
    assert all(value.abs().sum() > 0 for value in plain.values())
    for checkpointing, disturbed in ((True, False), (False, True), (True, True)):
        other = gradients(name, arch, checkpointing, disturbed)
        assert all(torch.equal(plain[key], other[key]) for key in plain), (checkpointing, disturbed)


@pytest.mark.parametrize("checkpointing", [False, True])
@EACH
def test_roles_equal_copies(name, checkpointing):
    """A LoRA and adapters on one base, in turn and interleaved, against a network each."""
    roles = {"student": Adapters("cross_attention", 16), "lora": Lora()}

    def steps(bones: dict[str, Backbone], pipe) -> dict[str, Tensor]:
        part, w = batch(name, pipe), torch.tensor([2.0, 5.0])
        first = native(name, pipe, bones["student"], part, "student", w)
        second = native(name, pipe, bones["lora"], part, "lora")
        (second - first.detach()).square().mean().backward()
        (first - native(name, pipe, bones["lora"], part, "lora").detach()).square().mean().backward()
        return {f"{r}/{k}": p.grad.clone() for r in roles for k, p in bones[r].parameters_of(r).items()}

    pipe = pipeline(name)
    shared, separate = backbone(name, pipe), {}
    for role, kind in roles.items():
        separate[role] = backbone(name, pipeline(name))
        for bone in (shared, separate[role]):
            bone.add(role, kind)
            stirred(bone, role)
            awake(bone, role)
            if checkpointing and (bone is not shared or role == "lora"):
                bone.enable_checkpointing()
    ours, theirs = steps(dict.fromkeys(roles, shared), pipe), steps(separate, pipe)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_their_state_their_average_and_their_seed():
    _, bone, _ = scene("sd")
    bone.add("ema", Ema("student", 0.5))
    stirred(bone, "student")
    bone.average(["student"], 0)
    for key, value in bone.state("student").items():
        if ".out." in key:
            torch.testing.assert_close(bone.state("ema")[key], 0.5 * value)
    _, again, _ = scene("sd")
    one, two = bone.state("student"), again.state("student")
    assert all(torch.equal(one[key], two[key]) for key in one if ".out." not in key)
    again.load_state("student", one)
    assert all(torch.equal(value, one[key]) for key, value in again.state("student").items())
    pipe, part = pipeline("sd"), batch("sd", pipeline("sd"))
    ours, theirs = (native("sd", pipe, b, part, "student", torch.full((2,), 3.0)) for b in (bone, again))
    assert torch.equal(ours, theirs)


def test_they_must_be_told_and_placed():
    pipe, bone, part = scene("sd")
    with pytest.raises(ValueError, match="called without a guidance scale, expected `guidance_scale`"):
        native("sd", pipe, bone, part, "student")
    with pytest.raises(ValueError, match="no sites"):
        Backbone(copy.deepcopy(bone.net), LoraSpec(), ()).add("student", Adapters("offset", 8))


@pytest.mark.parametrize("arch", ARCHES)
def test_at_the_size_of_stable_diffusion_they_are_at_most_three_percent(arch):
    with torch.device("meta"):
        net = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        sites = FAMILIES["sd"].sites(net)
        more = sum(p.numel() for p in build(Adapters(arch, AdapterGuidance().width), sites).parameters())
    assert len(sites.places) == 16 and 0.02 < more / sum(p.numel() for p in net.parameters()) <= 0.03


def test_half_precision_is_the_network_s_and_not_their_own():
    pipe, bone, part = scene("sd3")
    stirred(bone, "student")
    fine = native("sd3", pipe, bone, part, "student", torch.full((2,), 3.0))
    half = replace(context("sd3", pipe, bone).denoiser("student"), dtype=torch.bfloat16)
    y = half.native(with_scale(half, 3.0)(part.latents, T, part.cond), T)
    y.square().mean().backward()
    assert {p.dtype for p in bone.parameters_of("student").values()} == {torch.float32}
    assert 0 < (y - fine).abs().max() < 0.1 * fine.abs().max()


# training


@cache
def states(name: str):
    """A pipeline and 8 states with the teacher's two outputs there, so that a guided output is arithmetic."""
    pipe = pipeline(name)
    bone, prompts = backbone(name, pipe), ["red apple", "cat face", "rose", "octopus"] * 2
    cond = FAMILIES[name].condition(pipe, prompts)
    generator = torch.Generator().manual_seed(3)
    x_t, t = torch.randn(8, *latent_shape(name), generator=generator), torch.linspace(100, 900, 8).round()
    own = context(name, pipe, bone)
    denoiser = own.denoiser(TEACHER)
    with torch.no_grad():
        c = denoiser.native(denoiser(x_t, t, cond), t)
        u = denoiser.native(guided(denoiser, own.null, 0.0)(x_t, t, cond), t)
    return pipe, cond, x_t, t, u, c


def one(name: str, bone: Backbone, w: Tensor, step: int = 0):
    """The method's update at these states under scales w (8,)."""
    pipe, cond, x_t, t, u, c = states(name)
    scale = expand(w, c)
    target = torch.where(scale == 1, c, u + scale * (c - u))
    part = Batch(tuple(range(8)), cond, latent_shape(name), state=GuidedState(x_t, t, w, target))
    (update,) = AdapterGuidance(width=16).updates(context(name, pipe, bone), part, step)
    return update


@BOTH
def test_one_is_no_guidance_whatever_they_have_learnt(arch):
    pipe, bone, part = scene("sd", arch)
    stirred(bone, "student")
    ours = native("sd", pipe, bone, part, "student", torch.ones(2))
    assert torch.equal(ours, native("sd", pipe, bone, part, TEACHER))


@EACH
@BOTH
def test_without_guidance_the_first_loss_is_zero_and_else_it_grows_with_the_square(name, arch):
    """O-d2: at the start the student is the conditional output, off by (w - 1) (cond - uncond)."""
    bone = backbone(name, pipeline(name))
    bone.add("student", Adapters(arch, 16))
    assert one(name, bone, torch.ones(8)).loss == 0
    _, _, _, _, u, c = states(name)
    for w in (2.0, 3.0, 7.5):
        expected = (w - 1) ** 2 * (c - u).square().mean().item()
        assert one(name, bone, torch.full((8,), w)).loss.item() == pytest.approx(expected, rel=1e-4)


def fitted(name: str = "sd", steps: int = 120, hole=(4.5, 5.5)) -> Backbone:
    """Adapters that were trained on scales of 1 to 8, but for those in the hole."""
    bone = backbone(name, pipeline(name))
    bone.add("student", Adapters("mixed", 32))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(list(bone.parameters_of("student").values()), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for step in range(steps):
        w = 1 + torch.rand(8, generator=generator) * (7 - hole[1] + hole[0])
        w = torch.where(w > hole[0], w + hole[1] - hole[0], w)
        one(name, bone, w, step).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return bone


@torch.no_grad()
def r_squared(name: str, bone: Backbone, w: float) -> float:
    """1 - |student - guided|^2 / |cond - guided|^2 at the states, in one pass against two."""
    _, _, _, _, u, c = states(name)
    return 1 - one(name, bone, torch.full((8,), w)).loss.item() / ((w - 1) ** 2 * (c - u).square().mean().item())


def held_out(name: str = "sd") -> None:
    """O-d3: one pass is two-pass guidance at scales that were never trained on."""
    bone = fitted(name)
    found = {w: r_squared(name, bone, w) for w in (1.5, 2.5, 4.75, 5.0, 5.25, 7.3)}
    assert min(found[w] for w in (4.75, 5.0, 5.25)) > 0.95 and min(found.values()) > 0.8, found
    pipe, cond, x_t, t, _, _ = states(name)
    student = context(name, pipe, bone).denoiser("student")
    with torch.no_grad():  # O-d6, as far as a network of this size goes: nearly straight in w
        low, mid, high = (student.native(with_scale(student, w)(x_t, t, cond), t) for w in (4.0, 5.0, 6.0))
    assert (high - 2 * mid + low).norm() < 0.35 * (high - low).norm() / 2


def test_one_pass_is_two_at_scales_that_were_never_trained():
    held_out()


def test_prompts_and_images_that_were_never_trained_are_guided_too():
    """Fresh states in every step; then others, with other prompts, at scales in the hole and beside it.

    R^2 is 0.60 to 0.69 after these few steps, and 0.65 to 0.77 after three times as many: far from the 0.95 at states
    that are trained on again and again, as above.
    """
    pipe, generator = pipeline("sd"), torch.Generator().manual_seed(0)
    bone = backbone("sd", pipe)
    bone.add("student", Adapters("mixed", 32))
    own = context("sd", pipe, bone)
    teacher, method = own.denoiser(TEACHER), AdapterGuidance(width=32)
    words = sorted({drawing.subgroup for drawing in emoji.subjects()})
    cond = FAMILIES["sd"].condition(pipe, words)
    unseen = torch.arange(0, len(words), 6)
    seen = torch.tensor([i for i in range(len(words)) if i % 6])

    def draw(pool: Tensor, size: int):
        some = pool[torch.randint(len(pool), (size,), generator=generator)]
        c, x_t = {"states": cond["states"][some]}, torch.randn(size, 4, 8, 8, generator=generator)
        t = torch.randint(50, 950, (size,), generator=generator).float()
        with torch.no_grad():
            y_c = teacher.native(teacher(x_t, t, c), t)
            y_u = teacher.native(guided(teacher, own.null, 0.0)(x_t, t, c), t)
        return x_t, t, c, y_u, y_c

    def missed(state, w: Tensor) -> Tensor:
        x_t, t, c, y_u, y_c = state
        two = y_u + w[:, None, None, None] * (y_c - y_u)
        part = Batch(tuple(range(len(w))), c, (4, 8, 8), state=GuidedState(x_t, t, w, two))
        (update,) = method.updates(own, part, 0)
        return update.loss

    optimizer = torch.optim.Adam(list(bone.parameters_of("student").values()), lr=2e-2)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=120)
    for _ in range(120):
        w = 1 + 6 * torch.rand(16, generator=generator)
        missed(draw(seen, 16), torch.where(w > 4.5, w + 1, w)).backward()
        optimizer.step()
        pace.step()
        optimizer.zero_grad()
    state = draw(unseen, 64)
    guidance = (state[4] - state[3]).square().mean().item()
    with torch.no_grad():
        found = {w: 1 - missed(state, torch.full((64,), w)).item() / ((w - 1) ** 2 * guidance) for w in (2.5, 5.0, 7.3)}
    assert min(found.values()) > 0.5, found


def told_by_features_alone() -> None:
    """What the features of w are for: without the factor w - 1, which carries most of it, they must interpolate.

    Measured here: R^2 at 2.5 is 0.86; with features of 1000 w, as released code has them by default, it is -0.5, and
    -31 at 1.5. With the factor both are 0.92, so the test above cannot tell them apart.
    """
    with planted(Hooks._site, "(w - 1) / UNIT", "1.0 + 0 * w"):
        bone = fitted()
        found = {w: r_squared("sd", bone, w) for w in (2.5, 4.75, 5.0, 5.25)}
    assert min(found.values()) > 0.8, found


def test_features_of_scales_interpolate():
    told_by_features_alone()
