"""Human feedback against closed forms: the reward's climb, its hinge, the anchor; and what a step calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import close, fakes
from oracles.context import Drawn, Flow, drawn, stable_diffusion
from oracles.fakes import Brightness, Stage
from tiny import FAMILIES, awake, backbone, batch, context, pipeline
from torch import Tensor

from stepdistill.core.prediction import Estimate
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.methods.base import Batch
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.reward import RewardTerm, reward_loss
from stepdistill.networks.rewards.base import Reward, RewardScale, rewards_by_name
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.networks.roles import TEACHER

SD, FLOW = stable_diffusion(), Flow()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
KAPPA, STD = 1.0, 0.5
FAR = 1e3  # a margin that is never reached


def climb(margin: float, shift: float | None, **more: Any) -> Feedback:
    """Feedback on one step with a reward `kappa x` of slope kappa."""
    term = RewardTerm(reward=Brightness(), margin=margin, mean=0.0, std=1.0, slope=KAPPA)
    sampling = Sampler((999.0,), eta=1.0)
    return Feedback(rewards=(term,), anchor_shift=shift, sampling=sampling, **more)


class Generator:
    """One step `x0 = theta + s z` from noise z, which the role `teacher` is at the start."""

    def __init__(self, theta: float = 0.0, s: float = STD) -> None:
        self.theta, self.log_s = (
            torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (theta, math.log(s))
        )

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        return Estimate(self.theta + self.log_s.exp() * x_t, x_t)


def scene(student: Callable, schedule: Any = SD, teacher: Callable | None = None) -> Drawn:
    """A context whose images are the latents."""
    roles = {"student": student, TEACHER: teacher or Generator()}
    return replace(drawn(schedule, roles), decode=lambda x0: 2 * x0 - 1)


def rows(size: int, shape: tuple[int, ...] = (1, 1, 1)) -> Batch:
    return Batch(tuple(range(size)), {}, shape, prompts=("a",) * size)


def trained(method: Feedback, steps: int, rate: float, size: int = 512, schedule: Any = SD) -> tuple[float, float]:
    """theta and s after steps of gradient descent on the method's own updates."""
    student = Generator()
    made, part = scene(student, schedule), rows(size)
    parameters = [student.theta, student.log_s]
    for step in range(steps):
        (update,) = method.updates(made, part, step)
        for p, pull in zip(parameters, torch.autograd.grad(update.loss, parameters), strict=True):
            p.data -= rate * pull
    return student.theta.item(), student.log_s.exp().item()


# --- closed forms ----------------------------------------------------------------------------------------------------


@SCHEDULES
def test_a_reward_alone_is_climbed_without_end(schedule):
    for steps in (100, 300):
        theta, _ = trained(climb(FAR, None), steps, 0.01, 64, schedule)
        close(theta, KAPPA * 0.01 * steps, 1e-9)


def test_the_hinge_alone_ends_where_all_samples_pass_and_halves_the_spread():
    theta, s = trained(climb(3.0, None), 1500, 0.04)
    assert abs(theta - 3.82) < 0.08 and abs(s) < 0.6 * STD


@SCHEDULES
def test_the_paired_anchor_moves_every_sample_by_its_shift_and_keeps_the_spread(schedule):
    """theta = kappa / (2 lambda) = the shift, whatever the weight of the reward."""
    for shift, weight in ((0.625, 1.0), (0.2, 3.0)):
        method = climb(FAR, shift)
        method = replace(method, rewards=(replace(method.rewards[0], weight=weight),))
        theta, s = trained(method, 400, 0.05 * shift, 512, schedule)
        close(theta, shift, 1e-3)
        close(s, STD, 2e-3)


def test_the_hinge_with_an_anchor_keeps_most_of_the_spread():
    _, alone = trained(climb(1.0, None), 600, 0.08)
    theta, s = trained(climb(1.0, 0.5), 600, 0.08)
    assert 0.2 < theta < 0.5 and s > 0.75 * STD > 1.2 * abs(alone)


def test_a_sample_beyond_the_margin_has_no_gradient():
    """H5: the value and every gradient are exactly 0, and one sample's pass does not weigh on another's."""
    student = Generator(theta=9.0)
    (update,) = climb(3.0, None).updates(scene(student), rows(32), 0)
    update.loss.backward()
    assert update.loss == 0 and student.theta.grad == 0 and student.log_s.grad == 0
    images = torch.tensor([0.0, 9.0, -1.0], dtype=torch.float64).reshape(3, 1, 1, 1).requires_grad_()
    loss, score = RewardTerm(reward=Brightness(), margin=3.0, mean=1.0, std=2.0, slope=1.0, weight=0.6).term(
        scene(student), images, ("a",) * 3
    )
    close(loss, 0.6 * (3.5 + 0 + 4) / 3, 1e-12)
    close(score, (8 / 3 - 1) / 2, 1e-12)
    close(torch.autograd.grad(loss, images)[0].flatten(), [-0.1, 0.0, -0.1], 1e-12)


def test_before_the_first_step_the_anchor_is_exactly_zero():
    (update,) = climb(1.0, 0.1).updates(scene(Generator()), rows(8), 0)
    assert update.logs["anchor"] == 0 and update.roles == ("student",)


# --- what a step calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exits", "firsts"), [("all", [0, 0, 0, 0, 0]), ("last", [0, 1, 2, 3, 7]), (None, [0, 1, 2, 2, 4])]
)
def test_where_samples_are_scored(exits, firsts):
    method = Feedback(exits=exits)
    assert [method.first_exit(count) for count in (1, 2, 3, 4, 8)] == firsts


@pytest.mark.parametrize("share", [0.0, 0.49, 0.51, 0.99])
def test_one_call_of_the_student_has_a_graph_and_the_anchor_sees_its_input(share):
    """The steps before it are those of sampling, with the contract's noise and guidance."""
    times, sampler = (999.0, 749.0, 499.0, 249.0), Sampler((999.0, 749.0, 499.0, 249.0), eta=0.3, guidance_scale=2.0)
    method = replace(climb(FAR, 0.1), sampling=sampler)
    calls: list[tuple[str, bool, float, Tensor]] = []

    def role(name: str, student: Callable) -> Callable:
        def call(x_t: Tensor, t: Tensor, cond: Any) -> Estimate:
            calls.append((name, torch.is_grad_enabled(), t[0].item(), x_t))
            x0, eps = student(x_t, t, cond)
            return Estimate(x0 + cond["mean"], eps)

        return call

    own = Generator()
    made = scene(role("student", own), SD, role(TEACHER, Generator()))

    class Exit(Drawn):
        def shared(self, purpose: str) -> float:
            assert purpose == "exit"
            return share

    made = Exit(**vars(made))
    part = replace(rows(3), cond={"mean": torch.ones(3, 1, 1, 1, dtype=torch.float64)})
    (update,) = method.updates(made, part, 0)
    taken = 2 if share < 0.5 else 3
    assert [name for name, *_ in calls] == ["student"] * (taken + 1) + [TEACHER]
    assert [graph for _, graph, *_ in calls] == [False] * taken + [True, False]
    assert [t for _, _, t, _ in calls] == [*times[: taken + 1], times[taken]]
    assert all(len(x_t) == 6 for *_, x_t in calls)  # both prompts in one call
    assert torch.equal(calls[-1][3], calls[-2][3])
    update.loss.backward()
    noises = [made.seen[f"again {i}"] for i in range(taken)]

    def denoise(x_t: Tensor, t: Tensor, cond: Any) -> Estimate:
        return Estimate(own.theta + own.log_s.exp() * x_t + 2.0, x_t)  # guided from 0 to 1 by 2

    expected = few_step(denoise, SD, sampler, made.seen["start"], {}, noises.__getitem__, taken=taken)
    close(calls[-1][3][:3], expected, 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_reaches_the_student_alone(name):
    """Through decoder and reward, which are frozen, to all of the LoRA."""
    family, pipe = FAMILIES[name], pipeline(name)
    bone = backbone(name, pipe)
    sampler = Sampler(family.schedule(pipe.scheduler).starts(2), eta=1.0)
    term = RewardTerm(reward=WhiteBorder(), margin=1e3, mean=0.0, std=1.0, slope=1.0)
    method = Feedback(rewards=(term,), sampling=sampler, ema_decay=None)
    bone.add("student", method.roles()["student"])
    awake(bone, "student")
    part = replace(batch(name, pipe), prompts=("a", "b"))
    before = {key: value.clone() for key, value in pipe.vae.state_dict().items()}
    (update,) = method.updates(context(name, pipe, bone), part, 0)
    update.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in bone.parameters_of("student").values())
    assert all(torch.equal(value, before[key]) for key, value in pipe.vae.state_dict().items())
    assert update.logs["anchor"] > 0 and set(update.logs) == {"loss", "anchor", "reward/WhiteBorder"}


# --- the one-step stage of Hyper-SD ----------------------------------------------------------------------------------

MATCHING = DMD2(timesteps=(999.0,), critic_steps=1, guidance_scale=1.0)
TERM = RewardTerm(reward=Brightness(kappa=2.0), margin=0.85, mean=0.2, std=0.7, slope=1.0, weight=0.6)


def pull_of(method: DMD2, stage: Stage, step: int = 0) -> Tensor:
    """The gradient of the student's weight."""
    return fakes.updates(method, stage, fakes.batch(*range(8)), step)[0].pull["student"]


@SCHEDULES
@pytest.mark.parametrize("start", [999.0, 800.0])
def test_dmd2_adds_rewards_and_pairs_on_the_same_sample(schedule, start):
    """For the unified LoRA from 999, for a dedicated student from 800, each fed pure noise that is labelled so."""
    stage, part = Stage(schedule, {}), fakes.batch(*range(8))
    method = replace(MATCHING, timesteps=(start,), regression_weight=0.5)
    context, (noise, target) = stage.context(0), part.pair
    x0 = context.denoiser("student")(noise, torch.full((8,), start), part.cond).x0
    scores = (2 * (context.decode(x0) / 2 + 0.5).flatten(1).mean(1) - 0.2) / 0.7
    assert 0 < (scores < 0.85).sum() < 8  # some are beyond the margin
    terms = 0.6 * (0.85 - scores).relu().mean(), (x0 - target).square().mean()
    reward, pairs = (torch.autograd.grad(term, stage["student"], retain_graph=True)[0] for term in terms)
    plain = pull_of(method, stage)
    close(pull_of(replace(method, regression_weight=2.0), stage) - plain, 1.5 * pairs, 1e-12)
    close(pull_of(replace(method, rewards=(TERM,)), stage) - plain, reward, 1e-12)


def test_a_reward_that_all_samples_reach_leaves_dmd2_as_it_was():
    """To the bit, and so does a term that is not there."""
    stage, reached = Stage(SD, {}), replace(TERM, margin=-1e3)
    for step in range(2):
        assert torch.equal(pull_of(MATCHING, stage, step), pull_of(replace(MATCHING, rewards=(reached,)), stage, step))


# --- the scale of rewards --------------------------------------------------------------------------------------------


def test_a_scale_is_measured_once_for_each_term_that_has_none():
    asked: list[Reward] = []

    def measure(reward: Reward, slope: bool = False) -> RewardScale:
        assert slope
        asked.append(reward)
        return RewardScale(2.0, 3.0, 4.0)

    known = RewardTerm(reward=Brightness(kappa=9.0), mean=0.0, std=1.0, slope=1.0)
    for method in (
        Feedback(rewards=(known, RewardTerm(reward=Brightness()))),
        DMD2(rewards=(known, RewardTerm(reward=Brightness()))),
    ):
        first, second = method.calibrate(measure).rewards
        assert first == known and second.scale == (2.0, 3.0, 4.0)
        assert asked.pop() == Brightness() and not asked
        assert method.trained_rewards == (Brightness(kappa=9.0), Brightness())
    with pytest.raises(ValueError, match="no mean, std and slope"):
        RewardTerm(reward=Brightness()).scale  # noqa: B018


def test_rewards_are_told_apart_by_name():
    assert list(rewards_by_name([WhiteBorder(), Brightness(), WhiteBorder(width=0.2)])) == [
        "WhiteBorder",
        "Brightness",
        "WhiteBorder_2",
    ]


def test_several_terms_are_added_on_one_decoding():
    decoded: list[Tensor] = []
    student = Generator()
    made = replace(scene(student), decode=lambda x0: decoded.append(x0) or 2 * x0 - 1)
    terms = tuple(
        RewardTerm(reward=Brightness(kappa=k), margin=FAR, mean=0.0, std=1.0, slope=k, weight=w)
        for k, w in ((1.0, 2.0), (3.0, 0.5))
    )
    loss, logs = reward_loss(terms, made, rows(4), student(made.noise(rows(4), "start"), torch.zeros(4), {}).x0)
    (pull,) = torch.autograd.grad(loss, [student.theta])
    close(pull, -(1.0 * 2.0 + 3.0 * 0.5), 1e-12)
    assert len(decoded) == 1 and set(logs) == {"reward/Brightness", "reward/Brightness_2"}
    nothing, no_logs = reward_loss((), made, rows(4), decoded[0])
    assert nothing == 0 and not no_logs and len(decoded) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Feedback(rewards=()), "rewards is empty"),
        (lambda: Feedback(rewards=(RewardTerm(reward=Brightness()),), held_out=Brightness()), "never trained on"),
        (lambda: RewardTerm(reward=Brightness(), mean=1.0), "only mean given"),
        (lambda: Feedback(sampling=Sampler((249.0, 999.0))), "descending"),
        (lambda: DMD2(num_inference_steps=2, regression_weight=0.5).check(SD), "regression_weight is 0.5"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
