"""Fine-tuning a one-step model on new images, with and without a training assistant, in closed form.

At Stable Diffusion's last timestep the one-step student of N(m, c^2) is `x0 = a + k x` with `k = c / S`, S the std of
its input, and the denoiser of the same images has `k = alpha c^2 / S^2`: nearly a constant, the blur. Both methods are
run as they ship; the network is the pair (a, k), and draws have exact moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from oracles.context import Scripted, column, stable_diffusion
from oracles.planted import Bug, bug_tests
from tiny import FAMILIES, FLOWS, awake, backbone, batch, context, pipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, guided
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import expand
from stepdistill.core.solvers import Sampler, few_step, follow
from stepdistill.methods.adapter import Assistant
from stepdistill.methods.base import Batch, Method, Tuning
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.finetune import FineTune, score_matching_loss
from stepdistill.networks.roles import TEACHER, Lora

SD = stable_diffusion()
ALPHA, SIGMA = (level.item() for level in SD(torch.tensor(999.0)))
ONE_STEP = Sampler((999.0,))
STD = 0.6  # of the images that the student was distilled for, and of the new ones, whose mean is 1
START = torch.tensor([0.0, STD / math.hypot(ALPHA * STD, SIGMA)], dtype=torch.float64)
SIGNS = {"images": (1, 1, -1, -1), "sample start": (1, 1, -1, -1), "student eps": (1, -1, 1, -1)}


@dataclass(frozen=True)
class Line:
    """A network `x0 = a + k x`, of parts that add up."""

    parts: tuple[Tensor, ...]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        a, k = torch.stack(self.parts).sum(0)
        alpha, sigma = (expand(level, x_t) for level in SD(t))
        x0 = a + k * x_t
        return Estimate(x0, (x_t - alpha * x0) / sigma)


class Moments(Scripted):
    """Two points a draw, of mean 0 and variance 1, independent by purpose: exact for a loss that is quadratic."""

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        return column(*SIGNS[purpose])


def trained(method: Method, frozen: tuple[Tensor, ...], start: Tensor, mean: float, std: float, steps: int) -> Tensor:
    """(a, k) after gradient descent of rate .05 on `|x0 - images|^2 / 2`, beside frozen parts."""
    own = start.clone().requires_grad_()
    scene = Moments(
        schedule=SD,
        null={},
        denoiser={"student": Line((own, *frozen)), TEACHER: Line((START,))}.__getitem__,  # pyright: ignore[reportArgumentType]
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=0,
        device=torch.device("cpu"),
        draws={"student t": torch.full((4,), 0.9999, dtype=torch.float64)},
        eps=torch.zeros(1),
    )
    part = Batch((0, 1, 2, 3), {}, (1, 1, 1), mean + std * column(*SIGNS["images"]))
    for step in range(steps):
        (only,) = method.updates(scene, part, step)
        (gradient,) = torch.autograd.grad(only.loss, own)
        own.data -= 0.05 / (2 * (ALPHA / SIGMA) ** 2) * gradient  # the loss is that of the noise
    return own.detach()


def denoiser(mean: float, std: float) -> Tensor:
    k = ALPHA * std**2 / ((ALPHA * std) ** 2 + SIGMA**2)
    return torch.tensor([mean * (1 - k * ALPHA), k], dtype=torch.float64)


def fine_tuned(share: float, steps: int, std: float = STD) -> tuple[float, float]:
    """Mean and std of one-step samples without the assistant, after training with a share of it."""
    assistant = share * (denoiser(0, STD) - START)
    a, k = START + trained(FineTune(sampling=ONE_STEP), (START, assistant), torch.zeros(2).double(), 1.0, std, steps)
    return a.item(), abs(k.item())


def test_alone_the_blur_comes_before_the_style():
    for steps, mean, std in ((0, 0.0, 0.601), (10, 0.388, 0.391), (20, 0.625, 0.257), (50, 0.912, 0.083)):
        assert fine_tuned(0.0, steps) == pytest.approx((mean, std), abs=5e-4)
    assert fine_tuned(0.0, 100) == pytest.approx((0.991, 0.030), abs=5e-4)


@pytest.mark.parametrize(("share", "std"), [(1.0, 0.603), (0.8, 0.489), (0.5, 0.317), (0.0, 0.030)])
def test_what_the_assistant_leaves_undone_training_undoes(share, std):
    mean = 0.991 if share < 0.8 else 0.992
    assert fine_tuned(share, 100) == pytest.approx((mean, std), abs=5e-4)


@pytest.mark.parametrize(("std", "drawn"), [(0.3, 0.582), (1.2, 0.674)])
def test_the_spread_of_new_images_hardly_arrives(std, drawn):
    assert fine_tuned(1.0, 2000, std)[1] == pytest.approx(drawn, abs=5e-4)


def test_the_assistant_is_the_way_to_the_denoiser_of_the_model_s_own_samples():
    """Its samples are the few-step model's and not its own, which it changes as it learns."""
    method = Assistant(sampling=ONE_STEP)
    found = trained(method, (START,), torch.zeros(2).double(), math.nan, math.nan, 400)
    torch.testing.assert_close(found, denoiser(0, START[1].item()) - START, rtol=0, atol=1e-8)


def test_own_samples_follow_the_contract_with_its_guidance():
    pipe = pipeline("sd")
    bone, part = backbone("sd", pipe), batch("sd", pipe)
    bone.add("student", Lora())
    awake(bone, "student")
    scene, sampler = context("sd", pipe, bone), Sampler((999.0, 499.0), eta=1.0, guidance_scale=3.0)
    made = Assistant(sampling=sampler).own_samples(scene, part)
    expected = few_step(
        guided(scene.denoiser(TEACHER), scene.null, 3.0),
        scene.schedule,
        sampler,
        scene.noise(part, "sample start"),
        part.cond,
        lambda k: scene.noise(part, f"sample again {k}"),
    )
    assert torch.equal(made, expected) and not made.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_network_s_own_error(name):
    """As in Diffusers' scripts: of the noise, or on a flow of the velocity."""
    pipe = pipeline(name)
    bone, part = backbone(name, pipe), batch(name, pipe)
    bone.add("student", Lora())
    scene = context(name, pipe, bone)
    (only,) = FineTune(sampling=ONE_STEP).updates(scene, part, 0)
    t = scene.schedule.random_times(scene.draw(part, "student t"), *scene.schedule.span)
    eps = scene.noise(part, "student eps")
    with bone.use("student") as net:
        raw = FAMILIES[name].call(net, scene.schedule.add_noise(part.x0, eps, t), t, part.cond)
    goal = eps - part.x0 if name in FLOWS else eps
    assert only.loss.item() == pytest.approx((raw[:, : goal.shape[1]] - goal).square().mean().item(), rel=1e-5)


def test_an_assistant_is_drawn_in_many_steps_and_the_model_in_its_few():
    method = Assistant(sampling=ONE_STEP, num_inference_steps=10)
    times = method.sampler(SD).timesteps
    assert len(times) == 10 and method.few_steps(SD) == ONE_STEP and FineTune(sampling=ONE_STEP).sampler(SD) == ONE_STEP
    line, x = Line((denoiser(0, STD),)), column(0.3, -1.0)
    drawn = few_step(line, SD, method.sampler(SD), x, {})
    assert torch.equal(drawn, follow(line, SD, [*times, 0.0], x, {}))
    assert (method.use, FineTune.use, DMD2.use) == ("training", "sampling", "sampling")
    assert (method.takes_assistant, FineTune.takes_assistant, DMD2.takes_assistant) == (False, True, False)


BUGS = {
    "samples of the student": Bug(
        Tuning.own_samples,
        "self.sampled(context, TEACHER)",
        'self.sampled(context, "student")',
        test_the_assistant_is_the_way_to_the_denoiser_of_the_model_s_own_samples,
    ),
    "samples without the contract's guidance": Bug(
        Tuning.sampled,
        "self.few_steps(context.student_schedule).guidance_scale",
        "1.0",
        test_own_samples_follow_the_contract_with_its_guidance,
    ),
    "fresh noises not those of the step": Bug(
        Tuning.own_samples,
        'f"sample again {k}"',
        '"sample start"',
        test_own_samples_follow_the_contract_with_its_guidance,
    ),
    "an assistant of the data": Bug(
        Assistant.updates,
        "self.own_samples(context, batch)",
        "batch.x0",
        test_the_assistant_is_the_way_to_the_denoiser_of_the_model_s_own_samples,
    ),
    "fine-tuning on the model's own samples": Bug(
        FineTune.updates,
        "batch.x0",
        "self.own_samples(context, batch)",
        test_alone_the_blur_comes_before_the_style,
    ),
    "another time than the input's": Bug(
        score_matching_loss,
        ", eps, t), t,",
        ", eps, t), t / 2,",
        lambda: test_the_loss_is_the_network_s_own_error("sd"),
    ),
    "an assistant that is sampled in few steps": Bug(
        Assistant.sampler,
        "teacher_sampler(schedule, steps or self.num_inference_steps)",
        "self.few_steps(schedule, steps)",
        test_an_assistant_is_drawn_in_many_steps_and_the_model_in_its_few,
    ),
}


test_without_a_bug_the_oracle_passes, test_a_bug_is_noticed = bug_tests(BUGS, ValueError)
