"""DMD2's adversarial terms in value and gradient, against their formulas: both losses, both judges, approximate R1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import close
from oracles.context import Flow, stable_diffusion
from oracles.fakes import Seen, Stage, batch, updates
from torch import Tensor

from stepdistill.core.losses import discriminator_loss, generator_loss
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan
from stepdistill.methods.rollout import simulate

SCHEDULES = {"table": stable_diffusion(), "flow": Flow(3.0)}
PART = batch(3, 7, 8)
LOGITS = torch.tensor([[-3.0], [-0.5], [0.5], [3.0]], dtype=torch.float64)


def test_hinge_by_hand():
    """Real logits are to be above 1, and those of the student below -1; the student raises its own without an end."""
    fake, real = (LOGITS.clone().requires_grad_() for _ in range(2))
    loss = discriminator_loss("hinge", fake, real)
    close(loss, (0 + 0.5 + 1.5 + 4) / 4 + (4 + 1.5 + 0.5 + 0) / 4)
    loss.backward()
    close(fake.grad, [[0.0], [0.25], [0.25], [0.25]])
    close(real.grad, [[-0.25], [-0.25], [-0.25], [0.0]])
    own = LOGITS.clone().requires_grad_()
    generator_loss("hinge", own).backward()
    close(generator_loss("hinge", LOGITS + 1), -1.0)
    close(own.grad, [[-0.25]] * 4)


def test_softplus_by_hand():
    """Its optimum is the log-ratio of real to fake: where both are as likely, the gradients at 0 cancel."""
    fake, real, own = (LOGITS.clone().requires_grad_() for _ in range(3))
    discriminator_loss("softplus", fake, real).backward()
    generator_loss("softplus", own).backward()
    share = torch.sigmoid(LOGITS) / 4
    close(fake.grad, share)
    close(real.grad, share - 0.25)
    close(own.grad, share - 0.25)


def logits(stage: Stage, gan: Gan, x0: Tensor, purpose: str, shake: float = 0.0) -> Tensor:
    """The head's logits (B,) at `x0` with noise of its own and `shake` more, by the fakes' formulas."""
    context = stage.context(0)
    t = stage.schedule.random_times(context.draw(PART, f"{purpose} t"), *stage.schedule.span)
    alpha_t, sigma_t = (level.reshape(-1, 1, 1, 1) for level in stage.schedule(t))
    x_t = alpha_t * x0 + sigma_t * context.noise(PART, f"{purpose} eps")
    if shake:
        x_t = x_t + shake * context.noise(PART, f"{purpose} shake")
    features = stage[gan.features] * x_t + PART.cond["mean"] + (t / 1000).reshape(-1, 1, 1, 1)
    return 3 * stage["head"] * features.sin().flatten(1).mean(1)


def sample(stage: Stage, method: DMD2) -> Tensor:
    """What the student makes, with its graph."""
    context = stage.context(0)
    x_t, t, _ = simulate(context, PART, method.sampler(stage.schedule), context.noise(PART, "start"))
    return context.denoiser("student")(x_t, t, PART.cond).x0


def both(method: DMD2, stage: Stage, **zero: float) -> list[tuple[Seen, Seen]]:
    """Each update of a step, with the method's terms and with some of their weights at zero."""
    assert method.gan is not None
    without = replace(method, gan=replace(method.gan, **zero))
    return list(zip(updates(method, stage, PART, 0), updates(without, stage, PART, 0), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("features", ["fake", "teacher"])
@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_the_student_raises_the_logits_of_its_own_samples(kind, features, name):
    gan = Gan(generator_weight=0.7, loss_type=kind, features=features)
    method, stage = DMD2(gan=gan), Stage(SCHEDULES[name], {})
    d = logits(stage, gan, sample(stage, method), "gan student")
    term = (torch.log1p(torch.exp(-d)) if kind == "softplus" else -d).mean()
    (pull,) = torch.autograd.grad(term, stage["student"])
    (one, without), _ = both(method, stage, generator_weight=0.0)
    close(one.pull["student"] - without.pull["student"], 0.7 * pull, 1e-9)
    close(one.logs["loss_gan"], term, 1e-9)
    assert pull.abs() > 1e-3


@pytest.mark.parametrize("r1_weight", [0.0, 2.5])
@pytest.mark.parametrize("features", ["fake", "teacher"])
@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_the_head_learns_what_is_data_and_the_approximate_r1_flattens_it(kind, features, r1_weight):
    """The penalty's gradient flows through both of its logits, into the head and, where it judges, the fake score."""
    r1 = {"r1_weight": r1_weight, "r1_sigma": 0.3} if r1_weight else {}
    gan = Gan(discriminator_weight=0.4, loss_type=kind, features=features, **r1)
    method, stage = DMD2(gan=gan), Stage(SCHEDULES["table"], {})
    assert PART.latents is not None
    fake = logits(stage, gan, sample(stage, method).detach(), "gan fake")
    real, shaken = (logits(stage, gan, PART.latents, "gan real", shake) for shake in (0.0, 0.3))
    if kind == "softplus":
        loss = (torch.log1p(torch.exp(fake)) + torch.log1p(torch.exp(-real))).mean()
    else:
        loss = ((1 + fake).clamp(min=0) + (1 - real).clamp(min=0)).mean()
    penalty = ((shaken - real) ** 2).mean()
    loss = loss + r1_weight * penalty
    roles = ["head", "fake"] if features == "fake" else ["head"]
    _, (one, without) = both(method, stage, discriminator_weight=0.0)
    close(one.logs["loss_head"], loss, 1e-9)
    close(one.loss - without.loss, 0.4 * loss, 1e-9)
    for role, pull in zip(roles, torch.autograd.grad(loss, [stage[role] for role in roles]), strict=True):
        close(one.pull[role] - without.pull[role], 0.4 * pull, 1e-9)
    assert penalty > 1e-4
    if features == "teacher":
        close(one.pull["fake"], without.pull["fake"])
