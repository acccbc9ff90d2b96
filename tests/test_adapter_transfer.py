"""Guidance adapters of the bundled teacher guide what was fine-tuned from it, and go together with a style."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stepdistill.data.bundled import emoji
from stepdistill.families.sd import StableDiffusion
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import TEACHER, Adapters, Lora, LoraSpec

FAMILY = StableDiffusion(pretrained_teacher_model="tiny-sd")
T = torch.linspace(100, 900, 8).round()


@dataclass
class Scene:
    """The bundled teacher with adapters and a style LoRA, and 8 states of noised drawings."""

    bone: Backbone
    latents: Tensor
    grey: Tensor
    noised: partial[Tensor]
    cond: dict[str, Tensor]
    null: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.x_t = self.noised(
            self.latents, torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(1))
        )

    @torch.no_grad()
    def both(self) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional output of the network as it is now, adapters off."""
        null, cond = (FAMILY.call(self.bone.net, self.x_t, T, each) for each in (self.null, self.cond))
        return null, cond

    def once(self, w: Tensor) -> Tensor:
        """One pass with the adapters, whatever LoRA is on."""
        off, self.bone._hooks.now = self.bone._hooks.now, self.bone._context("student", w)
        y = FAMILY.call(self.bone.net, self.x_t, T, self.cond)
        self.bone._hooks.now = off
        return y

    @torch.no_grad()
    def r_squared(self, w: float) -> float:
        """`1 - |y - y_w|^2 / |y_c - y_w|^2`, all by the network as it is now."""
        u, c = self.both()
        two = u + w * (c - u)
        return 1 - ((self.once(torch.full((8,), w)) - two).norm() / (c - two).norm()).item() ** 2

    def see_grey(self, parameters: Iterable[nn.Parameter], rate: float, steps: int = 10) -> None:
        """Train on with the plain denoising loss, on drawings without their colours."""
        tuned, generator = list(parameters), torch.Generator().manual_seed(5)
        optimizer = torch.optim.Adam(tuned, lr=rate)
        for p in tuned:
            p.requires_grad_(True)
        for _ in range(steps):
            eps = torch.randn(self.grey.shape, generator=generator)
            loss = (FAMILY.call(self.bone.net, self.noised(self.grey, eps), T, self.cond) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for p in tuned:
            p.requires_grad_(False)


@pytest.fixture(scope="module")
def fitted() -> tuple[Scene, dict[str, Tensor]]:
    """Adapters that equal two passes on the states, and the network's weights before anything else is trained."""
    pipe = FAMILY.load()
    net, schedule = FAMILY.network(pipe), FAMILY.schedule(pipe.scheduler)
    bone = Backbone(net, LoraSpec(rank=8), FAMILY.lora_targets(net), sites=FAMILY.sites(net))
    bone.add("student", Adapters("mixed", 48))
    bone.add("style", Lora())
    rng, sheet = random.Random(0), emoji.packed_sheet()
    drawn = {drawing.subgroup: drawing for drawing in emoji.subjects()}
    names = sorted(drawn)[:8]
    pixels = emoji.pixels([emoji.image(sheet, drawn[name], rng) for name in names])
    cond = dict(FAMILY.condition(pipe, names))
    found = Scene(
        bone,
        FAMILY.encode(pipe, pixels),
        FAMILY.encode(pipe, pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
        partial(schedule.add_noise, t=T),
        cond,
        {key: value.expand_as(cond[key]) for key, value in FAMILY.unconditional(pipe).items()},
    )
    with bone.use(TEACHER):
        (u, c), generator = found.both(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(list(bone.parameters_of("student").values()), lr=1e-2)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100)
        for _ in range(100):
            w = 1 + 7 * torch.rand(8, generator=generator)
            loss = (found.once(w) - (u + w[:, None, None, None] * (c - u))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pace.step()
    return found, {key: value.clone() for key, value in net.state_dict().items()}


SCALES = (2.5, 5.0, 7.3)


def test_they_guide_a_checkpoint_that_was_fine_tuned(fitted):
    scene, weights = fitted
    with scene.bone.use(TEACHER):
        before = scene.both()[1]
        assert min(map(scene.r_squared, SCALES)) > 0.9
        scene.see_grey((p for key, p in scene.bone.net.named_parameters() if "lora_" not in key), 1e-4)
        u, c = scene.both()
        assert (c - before).norm() > 0.5 * (c - u).norm()  # it moved by as much as guidance does
        assert min(map(scene.r_squared, SCALES)) > 0.7
    scene.bone.net.load_state_dict(weights)


def test_they_guide_together_with_a_style(fitted):
    scene, weights = fitted
    with scene.bone.use(TEACHER):
        before = scene.both()[1]
    with scene.bone.use("style"):
        scene.see_grey(scene.bone.parameters_of("style").values(), 1e-3)
        u, c = scene.both()
        assert (c - before).norm() > 0.3 * (c - u).norm()
        assert min(map(scene.r_squared, SCALES)) > 0.8
    scene.bone.net.load_state_dict(weights)
