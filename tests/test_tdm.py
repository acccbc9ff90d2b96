"""TDM against closed forms: states, fixed points, the fake score's optimum, noise levels, and planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import close
from oracles.context import Drawn, Flow, drawn, stable_diffusion
from oracles.gaussian import GaussianTeacher, levels, marginal_std
from oracles.planted import Bug, bug_tests
from test_distribution import gradient, prompts
from test_distribution_updates import scene
from tiny import FAMILIES, SIDE, pipeline
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core import schedule as schedules
from stepdistill.core.denoise import HELD, with_held
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data import Prompts
from stepdistill.methods import rollout
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.tdm import TDM
from stepdistill.networks.roles import TEACHER, LoraSpec
from stepdistill.students.draw.call import student_calls
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

MEAN, STD = 0.8, 0.5  # of the data
SCHEDULES = {"flow": Flow(3.0), "table": stable_diffusion()}
BOTH = pytest.mark.parametrize("name", SCHEDULES)
STEPS = range(4)
SQUARED = TDM(guidance_scale=1.0, loss_type="l2", fake_target="noise")
PUBLISHED = replace(SQUARED, fake_target="x0")


class Stepwise:
    """A student of four steps, in each of which x0 is an affine function of its input."""

    def __init__(self, schedule: NoiseSchedule, slopes: list[float], offsets: list[float]) -> None:
        self.schedule, self.times = schedule, schedule.starts(4)
        self.slope, self.offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (slopes, offsets))

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        k = self.times.index(round(t[0].item(), 2))
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t))
        x0 = self.offset[k] + self.slope[k] * x_t
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)

    @property
    def states(self) -> list[tuple[float, float]]:
        """Mean and std of the input of each step, then of the samples."""
        rows = [(0.0, 1.0)]
        for k, (t, s) in enumerate(pairwise((*self.times, None))):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(self.schedule, t), levels(self.schedule, s)
            ratio, (mean, std) = sigma_s / sigma_t, rows[-1]
            share = alpha_s - ratio * alpha_t
            gain = ratio + share * self.slope[k].item()
            rows.append((gain * mean + share * self.offset[k].item(), gain * std))
        return rows

    def made(self, k: int) -> tuple[float, float]:
        """Mean and std of the x0 of step k; a falling function of its input has a negative std."""
        mean, std = self.states[k]
        return self.offset[k].item() + self.slope[k].item() * mean, self.slope[k].item() * std


def matched(schedule: NoiseSchedule, of_x0: bool = False) -> Stepwise:
    """The student whose states have the marginals of the data; with `of_x0` every x0 is distributed as the data."""
    student = Stepwise(schedule, [0.0] * 4, [0.0] * 4)
    for k, (t, s) in enumerate(pairwise((*student.times, None))):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
        (mean, std), ratio = student.states[k], sigma_s / sigma_t
        slope = STD / std
        offset = MEAN - slope * mean
        if not of_x0:
            gain, share = marginal_std(schedule, STD, s) / std, alpha_s - ratio * alpha_t
            slope, offset = (gain - ratio) / share, (alpha_s * MEAN - gain * mean) / share
        with torch.no_grad():
            student.slope[k], student.offset[k] = slope, offset
    return student


def of_states(student: Stepwise, k: int) -> Callable:
    """The denoiser of the states that step k leads to, noised further."""
    mean, std = student.states[k + 1]
    alpha_s, sigma_s = levels(student.schedule, [*student.times, None][k + 1])

    def fake(x_r: Tensor, r: Tensor, cond: object) -> Estimate:
        alpha_r, sigma_r = (expand(v, x_r) for v in student.schedule(r))
        gain = alpha_r / alpha_s
        eps = sigma_r * (x_r - gain * mean) / ((gain * std) ** 2 + sigma_r**2 - (gain * sigma_s) ** 2)
        return Estimate((x_r - sigma_r * eps) / alpha_r, eps)

    return fake


def of_x0_given_states(student: Stepwise, k: int) -> Callable:
    """The mean of the x0 of step k given the noised state: what the fake score learns of many dimensions."""
    (mean, std), (x0, spread) = student.states[k + 1], student.made(k)
    alpha_s, sigma_s = levels(student.schedule, [*student.times, None][k + 1])

    def fake(x_r: Tensor, r: Tensor, cond: object) -> Estimate:
        alpha_r, sigma_r = (expand(v, x_r) for v in student.schedule(r))
        gain = alpha_r / alpha_s
        slope = spread * gain * std / ((gain * std) ** 2 + sigma_r**2 - (gain * sigma_s) ** 2)
        mu = x0 + slope * (x_r - gain * mean)
        return Estimate(mu, (x_r - alpha_r * mu) / sigma_r)

    return fake


def play(student: Stepwise, k: int, critic: Callable = of_states, **fixed: float) -> Drawn:
    """A context in whose step the student's step k is trained."""
    roles = {"student": student, "fake": critic(student, k), TEACHER: GaussianTeacher(student.schedule, STD)}
    return drawn(student.schedule, roles, step=(k + 0.5) / 4, **fixed)


def batch(size: int, side: int = 8) -> Batch:
    return prompts(size, MEAN, (1, side, side))


# the forward process


def renoised() -> None:
    """From clean data to s and on to r is from clean data to r: `alpha_r x0 + N(0, sigma_r^2)`."""
    x0, z = torch.full((4, 2, 1, 1), 1.7, dtype=torch.float64), torch.ones(4, 2, 1, 1, dtype=torch.float64)
    for schedule in SCHEDULES.values():
        s = torch.tensor([20.0, 250.0, 500.0, 749.0], dtype=torch.float64)
        r = torch.tensor([20.0, 260.0, 749.0, 990.0], dtype=torch.float64)
        (alpha_r, sigma_r), (_, sigma_s) = schedule(r), schedule(s)
        alone = schedule.renoise(schedule.add_noise(x0, 0 * z, s), s, r, 0 * z)
        close(alone, expand(alpha_r, x0) * x0, 1e-12)
        old = schedule.renoise(schedule.add_noise(0 * x0, z, s), s, r, 0 * z)
        new = schedule.renoise(0 * x0, s, r, z)
        close(old.square() + new.square(), expand(sigma_r.square(), x0).expand_as(x0), 1e-12)
        assert not new[0].any() and (new[1:] > 0).all() and (old > 0).all() and (sigma_s > 0).all()
        close(schedule.renoise(x0, None, r, z), schedule.add_noise(x0, z, r), 1e-12)


def test_noise_is_added_to_a_state():
    renoised()


# fixed points


def test_states_have_the_marginals_of_the_data_and_slopes_depend_on_where_a_step_leads():
    student = matched(SCHEDULES["flow"])
    assert [round(std, 3) for _, std in student.states] == [1.0, 0.901, 0.760, 0.559, 0.5]
    assert [round(k, 3) for k in student.slope.tolist()] == [0.014, 0.061, 0.206, 0.894]
    other = matched(SCHEDULES["flow"], of_x0=True)  # that of DMD2 with deterministic steps
    assert [round(std, 3) for _, std in other.states] == [1.0, 0.95, 0.875, 0.75, 0.5]


def sampled(name: str) -> None:
    """The states of the method's own rollouts, at the fixed point."""
    schedule, size = SCHEDULES[name], 4000
    student, inputs = matched(schedule), dict[float, Tensor]()

    def watched(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        if torch.is_grad_enabled():
            inputs[t[0].item()] = x_t
        return student(x_t, t, cond)

    for k in STEPS:
        context = play(student, k)
        roles = {"student": watched, "fake": context.denoiser("fake"), TEACHER: context.denoiser(TEACHER)}
        next(SQUARED.updates(replace(context, denoiser=roles.__getitem__), batch(size), 0))
    ends = few_step(student, schedule, SQUARED.sampler(schedule), torch.randn(size, 1, 8, 8).double(), {})
    count = ends.numel()
    expected = [(levels(schedule, t)[0] * MEAN, marginal_std(schedule, STD, t)) for t in (*student.times[1:], None)]
    assert tuple(inputs) == student.times
    for x, (mean, std) in zip((*list(inputs.values())[1:], ends), expected, strict=True):
        assert abs(x.mean() - mean) < 5 * std / count**0.5 and abs(x.std() / std - 1) < 5 / (2 * count) ** 0.5


@BOTH
def test_the_rollout_has_these_states(name):
    sampled(name)


def still(name: str) -> None:
    """With exact scores nothing moves it, whatever the loss, and up to whichever noise level scores are compared."""
    student = matched(SCHEDULES[name])
    for method in (SQUARED, replace(SQUARED, loss_type="huber"), replace(SQUARED, separate=False)):
        for k in STEPS:
            assert gradient(method, play(student, k), batch(16)).abs().max() < 1e-8  # pyright: ignore


@BOTH
def test_exact_scores_leave_the_student_where_its_states_are_the_teachers(name):
    still(name)


def returns(name: str) -> None:
    """Off the fixed point, descent leads back: of a slope and of a mean, in every step, with every loss."""
    for k in STEPS:
        for move in (-0.2, 0.2):
            for method in (SQUARED, replace(SQUARED, loss_type="huber"), replace(SQUARED, separate=False)):
                student = matched(SCHEDULES[name])
                student.offset.data[k] += move
                assert gradient(method, play(student, k), batch(64)).mean() * move > 1e-3  # pyright: ignore
                student = matched(SCHEDULES[name])
                mean = student.made(k)[0]
                student.slope.data[k] += move * abs(student.slope[k].item())
                student.offset.data[k] += mean - student.made(k)[0]
                next(method.updates(play(student, k), batch(64), 0)).loss.backward()
                assert student.slope.grad[k] * move > 0


@BOTH
def test_off_the_fixed_point_descent_leads_back(name):
    returns(name)


def test_where_dmd2_ends_is_no_fixed_point():
    """With exact scores of the states, but in the last step, which leads to clean data from another input."""
    student = matched(SCHEDULES["flow"], of_x0=True)
    pulls = [gradient(SQUARED, play(student, k), batch(64)).abs().mean() for k in STEPS]  # pyright: ignore
    assert min(pulls[:3]) > 0.05 and pulls[3] < 1e-9


class Affine:
    """A fake score `x0 = a + b x`, whose loss at one noise level is quadratic."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.a, self.b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))

    def __call__(self, x_r: Tensor, r: Tensor, cond: object) -> Estimate:
        alpha_r, sigma_r = (expand(v, x_r) for v in self.schedule(r))
        x0 = self.a + self.b * x_r
        return Estimate(x0, (x_r - alpha_r * x0) / sigma_r)

    def fit(self, method: TDM, context: Drawn, part: Batch) -> None:
        """The least loss, by one Newton step on that of the method."""
        roles = {"fake": self, **{role: context.denoiser(role) for role in ("student", TEACHER)}}
        (update,) = replace(method, warmup_steps=9).updates(replace(context, denoiser=roles.__getitem__), part, 0)
        assert update.roles == ("fake",)
        first = torch.autograd.grad(update.loss, (self.a, self.b), create_graph=True)
        rows = [torch.stack(torch.autograd.grad(g, (self.a, self.b), retain_graph=True)) for g in first]
        move = torch.linalg.solve(torch.stack(rows), torch.stack(first))
        self.a.data -= move[0].item()
        self.b.data -= move[1].item()


def trained(method: TDM | None) -> Stepwise:
    """The student after training with exact scores in every step, or with a fake score that has learned by `method`."""
    # what is learned from noise varies more than from x0
    student, part = matched(SCHEDULES["flow"], of_x0=True), batch(96, 12) if method is SQUARED else batch(32, 12)
    optimizer = torch.optim.Adam([student.slope, student.offset], 0.08)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.965)
    for step in range(130):
        optimizer.zero_grad()
        for k in STEPS:
            context = play(student, k, score_t=0.5, fake_t=0.5)
            context.source.manual_seed(4 * step + k)
            if method is not None:
                fake = Affine(student.schedule)
                fake.fit(method, context, part)
                roles = {"student": student, "fake": fake, TEACHER: context.denoiser(TEACHER)}
                context = replace(context, denoiser=roles.__getitem__)
            next(SQUARED.updates(context, part, 0)).loss.backward()
        optimizer.step()
        decay.step()
    return student


def ends(method: TDM | None) -> None:
    """The published fake score is not quite that of the states, except in the last step."""
    published = method is PUBLISHED
    stds = (0.903, 0.766, 0.586, 0.5) if published else (0.901, 0.760, 0.559, 0.5)
    slopes = (0.028, 0.091, 0.294, 0.854) if published else (0.014, 0.061, 0.206, 0.894)
    student = trained(method)
    assert [std for _, std in student.states[1:]] == pytest.approx(stds, abs=3e-3)
    assert student.slope.tolist() == pytest.approx(slopes, abs=0.01)
    assert student.states[-1][0] == pytest.approx(MEAN, abs=5e-3)


@pytest.mark.parametrize("method", [None, SQUARED, PUBLISHED], ids=["exact", "learned", "as published"])
def test_training_ends_at_the_fixed_point(method):
    ends(method)


# the number of steps


def test_other_numbers_of_steps_would_miss_the_distribution():
    """What a network of (x, t) interpolates between its four times."""
    schedule = SCHEDULES["flow"]
    own = matched(schedule)
    known = [list(reversed(v)) for v in (own.times, own.slope.tolist())]

    def between(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        alpha_t, sigma_t = (expand(v, x_t) for v in schedule(t))
        x0 = MEAN + np.interp(t[0].item(), *known) * (x_t - alpha_t * MEAN)
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)

    found = []
    for steps in (1, 2, 3, 4, 6, 8):
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        zero, one = few_step(between, schedule, Sampler(schedule.starts(steps)), ends, {}).flatten().tolist()
        found.append(round(one - zero, 3))
    assert found == [0.014, 0.155, 0.389, 0.5, 0.493, 0.517]


def answer(method: TDM, schedule: NoiseSchedule, steps: int) -> str:
    """Why the method is not sampled in these steps; "" where it is."""
    try:
        method.sampler(schedule, steps)
    except ValueError as error:
        return str(error)
    return ""


def refused() -> None:
    for schedule in SCHEDULES.values():
        for method, own in ((TDM(), 4), (TDM(timesteps=(899.0, 449.0)), 2)):
            assert len(method.sampler(schedule).timesteps) == own
            assert method.sampler(schedule, own) == method.sampler(schedule)
            for steps in {1, 2, 4, 8} - {own}:
                assert f"got {steps} sampling steps, expected {own}: where a step" in answer(method, schedule, steps)


def test_another_number_of_steps_is_refused():
    refused()


def test_steps_are_deterministic_and_end_at_clean_data():
    for schedule in SCHEDULES.values():
        assert TDM().sampler(schedule) == Sampler(schedule.starts(4), eta=0.0, clean=True)
    assert TDM(timesteps=(899.0, 449.0)).sampler(SCHEDULES["table"]).timesteps == (899.0, 449.0)


def test_commands_draw_and_sample_in_its_own_number_of_steps(tmp_path, capsys):
    """The report of a run has the rows that there are; `generate --steps` says why there is no other."""
    pipe = pipeline("sd")
    assert list(student_calls(FAMILIES["sd"], TDM(), pipe, (8, 4, 2, 1))) == [4]
    pipe.save_pretrained(tmp_path / "teacher")
    train = TrainSpec(
        output_dir=str(tmp_path / "out"),
        max_train_steps=1,
        train_batch_size=1,
        resolution=SIDE,
        report_to="none",
    )
    family = replace(FAMILIES["sd"], pretrained_teacher_model=str(tmp_path / "teacher"))
    method = TDM(num_inference_steps=2)
    out = distill(Run(family=family, method=method, data=Prompts(prompts=("a",)), lora=LoraSpec(rank=2), train=train))
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(out), "rose", "--steps", "4", "-o", str(tmp_path / "images")])
    assert ended.value.code
    assert "got 4 sampling steps, expected 2: where a step" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_a_step_without_a_noise_level_is_refused():
    for method, words in (
        (TDM(num_inference_steps=4, gap=240.0), r"the step from 249 .* between 20, its end or t_min, and 9"),
        (TDM(timesteps=(999.0, 15.0)), r"the step from 15 .* between 20, its end or t_min, and 5"),
    ):
        with pytest.raises(ValueError, match=words):
            method.check(SCHEDULES["table"])
    with pytest.raises(ValueError, match="table's entries"):
        TDM(gap=9.5).check(SCHEDULES["table"])
    for schedule in SCHEDULES.values():
        TDM().check(schedule)
        TDM(num_inference_steps=1).check(schedule)


# noise levels


def levels_of(name: str) -> None:
    """Of each step from its end to `gap` below its start, or below the first start; on every level of a table."""
    schedule = SCHEDULES[name]
    times = [*schedule.starts(4), 0.0]
    for separate in (True, False):
        method = replace(SQUARED, separate=separate)
        for k in STEPS:
            low, high = max(20.0, times[k + 1]), times[k if separate else 0] - 10
            seen: dict[str, list[Tensor]] = {"fake": [], TEACHER: []}
            context = play(matched(schedule), k)

            def asked(role: str, context: Drawn = context, seen: dict = seen) -> Callable:
                def call(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
                    seen.get(role, []).append(t)
                    return context.denoiser(role)(x_t, t, cond)  # pyright: ignore

                return call

            part = batch(6000, 1)
            assert len([*method.updates(replace(context, denoiser=asked), part, 0)]) == 2
            assert len(seen["fake"]) == 2 and torch.equal(seen["fake"][0], seen[TEACHER][0])
            assert not torch.equal(*seen["fake"])
            for r in (*seen["fake"], *seen[TEACHER]):
                shares = torch.arange(6000, dtype=torch.float64).add(0.5) / 6000
                expected = schedule.random_times(shares, low, high)
                assert r.min() >= low and r.max() <= high
                close(r.sort().values, expected, 0.03 * (high - low))


@BOTH
def test_scores_are_compared_between_a_step_s_end_and_its_start(name):
    levels_of(name)


def test_the_step_is_one_for_all_samples_and_processes():
    """And each of the four equally often."""
    _, part, context = scene(TDM())
    counts = dict.fromkeys(STEPS, 0)
    for step in range(400):
        one, other = (
            StepContext(**{**vars(context), "step": step}).shared("step"),
            replace(context, step=step, device=torch.device("cpu")).shared("step"),
        )
        assert one == other
        counts[int(one * 4)] += 1
    assert min(counts.values()) > 70
    seen = []

    def denoiser(role: str) -> Callable:
        def call(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
            if role == "student" and torch.is_grad_enabled():
                seen.append(t)
            return context.denoiser(role)(x_t, t, cond)  # pyright: ignore

        return call

    for step in range(4):
        for rows in ((0,), (1,), (0, 1)):
            only = replace(part, index=rows, cond={key: v[list(rows)] for key, v in part.cond.items()})
            next(TDM().updates(replace(context, denoiser=denoiser, step=step), only, step))
        assert len({t.item() for found in seen[-3:] for t in found}) == 1
    assert len({t[0].item() for t in seen}) > 1


# the fake score


def optimum(student: Stepwise, k: int, share: float, size: int, side: int, method: TDM = PUBLISHED) -> Tensor:
    """The least loss's (a, b)."""
    fake = Affine(student.schedule)
    fake.fit(method, play(student, k, fake_t=share), batch(size, side))
    return torch.stack([fake.a, fake.b])


def expected_optimum(fake: Callable, schedule: NoiseSchedule, r: float) -> tuple[float, float]:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    zero, one = fake(ends, torch.full((2,), r, dtype=torch.float64), {}).x0.flatten().tolist()
    return zero, one - zero


def optima(name: str) -> None:
    """Of one dimension the weight is that of importance sampling: the fake score is the denoiser of x0 noised from
    clean data. Of many, whose mean it takes, it is nearly constant: the mean of x0 given the noised state."""
    schedule = SCHEDULES[name]
    student = matched(schedule, of_x0=True)
    for k in STEPS:
        low, high = SQUARED.levels(SQUARED.sampler(schedule), k)
        r = schedule.random_times(torch.tensor([0.9], dtype=torch.float64), low, high).item()
        mean, std = student.made(k)
        alpha_r, sigma_r = levels(schedule, r)
        slope = alpha_r * std**2 / ((alpha_r * std) ** 2 + sigma_r**2)
        plain = (mean - slope * alpha_r * mean, slope)
        mixed = expected_optimum(of_x0_given_states(student, k), schedule, r)
        if k < 3:
            assert abs(plain[1] - mixed[1]) > 0.02  # else nothing would be seen
        close(optimum(student, k, 0.9, 1_000_000, 1), torch.tensor(plain), 0.01)
        close(optimum(student, k, 0.9, 250, 64), torch.tensor(mixed), 0.01)


@BOTH
def test_what_the_fake_score_learns_depends_on_the_number_of_dimensions(name):
    optima(name)


def learned(name: str) -> None:
    """Trained on the noise, it is the denoiser of the noised states."""
    schedule = SCHEDULES[name]
    for of_x0 in (False, True):
        student = matched(schedule, of_x0)
        for k in STEPS:
            low, high = SQUARED.levels(SQUARED.sampler(schedule), k)
            for share in (0.3, 0.9):
                r = schedule.random_times(torch.tensor([share], dtype=torch.float64), low, high).item()
                expected = torch.tensor(expected_optimum(of_states(student, k), schedule, r))
                alpha_r, sigma_r = levels(schedule, r)
                snr = alpha_r / sigma_r  # so that they are compared as noises are
                close(snr * optimum(student, k, share, 250, 64, SQUARED), snr * expected, 4e-3)
    exact = optimum(student, 0, 0.9, 250, 64, SQUARED)
    assert (exact - optimum(student, 0, 0.9, 250, 64)).abs().max() > 0.05  # else the oracle could not tell them apart


@BOTH
def test_a_fake_score_of_the_noise_is_that_of_the_states(name):
    learned(name)


def weighted(name: str) -> None:
    """Recomputed from the draws, sample by sample; frames that are held count nowhere."""
    schedule = SCHEDULES[name]
    starts = (schedule.starts(1)[0],)
    method = replace(PUBLISHED, timesteps=starts, num_inference_steps=1, warmup_steps=9)
    shape, size = (2, 3, 2, 2), 5
    held = torch.full((size, 2, 1, 2, 2), 0.3, dtype=torch.float64)
    cond = {"mean": torch.zeros(size, 1, 1, 1, 1, dtype=torch.float64), HELD: held}

    def network(slope: float) -> Callable:
        def call(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Estimate:
            est = Estimate(0.2 + slope * x_t, 0.5 - slope * x_t)
            return Estimate(*(with_held(part, cond) for part in est))

        return call

    found = set()
    for share in (0.02, 0.3, 0.9):
        context = drawn(schedule, {"student": network(0.4), "fake": network(0.1)}, fake_t=share)
        part = Batch(tuple(range(size)), cond, shape)
        (update,) = method.updates(context, part, 0)
        r = schedule.random_times(torch.tensor([share], dtype=torch.float64), 20.0, starts[0] - 10).item()
        alpha, sigma = levels(schedule, r)
        x0 = 0.2 + 0.4 * context.seen["start"][:, :, 1:]
        z = context.seen["fake eps"][:, :, 1:]
        x_r = alpha * x0 + sigma * z  # the one step leads to clean data, so that eps_r is z
        error = (0.2 + 0.1 * x_r - x0).square().flatten(1).mean(1)
        snr = (alpha / sigma) ** 2
        found.add(snr > 5)
        (other,) = replace(method, fake_target="noise").updates(replace(context), part, 0)
        z = context.seen["fake eps"][:, :, 1:]
        x_r = alpha * (0.2 + 0.4 * context.seen["start"][:, :, 1:]) + sigma * z
        close(other.loss, (0.5 - 0.1 * x_r - z).square().mean(), 1e-9)
        close(update.loss, min(snr, 5.0) * error.mean(), 1e-9)
    assert found == {True, False}

    student = matched(schedule)  # a step whose state is noisy
    for share in (0.1, 0.9):
        context = play(student, 0, fake_t=share)
        fake = network(0.1)
        roles = {"student": student, "fake": fake}
        (update,) = replace(PUBLISHED, warmup_steps=9).updates(
            replace(context, denoiser=roles.__getitem__), batch(7, 2), 0
        )
        t, s = (torch.full((7,), time, dtype=torch.float64) for time in student.times[:2])
        r = schedule.random_times(torch.full((7,), share, dtype=torch.float64), s[0].item(), t[0].item() - 10)
        est, z = student(context.seen["start"], t, {}), context.seen["fake eps"]
        x_r = schedule.renoise(schedule.add_noise(*est, s), s, r, z)
        alpha, sigma = (expand(v, x_r) for v in schedule(r))
        mixed = (x_r - alpha * est.x0) / sigma
        error = (0.2 + 0.1 * x_r - est.x0).square().flatten(1).mean(1)
        odds = ((z.square().flatten(1).mean(1) - mixed.square().flatten(1).mean(1)) / 2).exp()
        assert odds.std() > 0.01
        close(update.loss, ((alpha / sigma).square().flatten() * odds * error).mean(), 1e-9)


@BOTH
def test_the_fake_score_s_loss_is_weighted_by_signal_and_by_importance(name):
    weighted(name)


# guidance, and the loss of the student


def guided(name: str) -> None:
    """With equal scores, guidance alone is left, over the mean distance to the guided target."""
    schedule = SCHEDULES[name]
    teacher, student = GaussianTeacher(schedule, STD), matched(schedule)
    for k in STEPS:
        for kind in ("l2", "huber"):
            method = TDM(guidance_scale=3.0, loss_type=kind, **({"huber_c": 0.05} if kind == "huber" else {}))
            context = play(student, k, lambda *_: teacher, score_t=0.4)
            found = gradient(method, context, batch(16))  # pyright: ignore
            t, s = [*pairwise((*student.times, None))][k]
            low, high = method.levels(method.sampler(schedule), k)
            r = schedule.random_times(torch.full((16,), 0.4, dtype=torch.float64), low, high)
            x_t = few_step(student, schedule, method.sampler(schedule), context.seen["start"], {}, taken=k)
            est = student(x_t, torch.full((16,), t, dtype=torch.float64), {})
            end = None if s is None else torch.full((16,), s, dtype=torch.float64)
            x_r = schedule.renoise(schedule.add_noise(*est, end), end, r, context.seen["score eps"])
            cond, uncond = (
                teacher(x_r, r, {"mean": torch.full((16, 1, 1, 1), m, dtype=torch.float64)}).x0 for m in (MEAN, 0.0)
            )
            away = -2 * (cond - uncond)
            if kind == "huber":
                away = away / (away.square() + 0.05**2).sqrt()
            n = (est.x0 - (uncond + 3 * (cond - uncond))).abs().mean((1, 2, 3), keepdim=True)
            close(found, away / n, 1e-9)


@BOTH
def test_guidance_is_the_teacher_s_alone(name):
    guided(name)


# one step on networks


def plumbing(name: str) -> None:
    method = TDM(num_inference_steps=2, guidance_scale=3.0, critic_steps=2, warmup_steps=1)
    bone, part, context = scene(method, name)
    seen = []
    for step in range(4):
        for update in method.updates(replace(context, step=step), replace(part, latents=None, noise=None), step):
            update.loss.backward()
            for role in update.roles:
                assert all(p.grad is not None and p.grad.any() for p in bone.parameters_of(role).values()), role
            others = set(bone.declared) - set(update.roles)
            assert all(p.grad is None for role in others for p in bone.parameters_of(role).values())
            bone.zero_grad(set_to_none=True)
            seen.append((step, *update.roles))
    assert seen == [(0, "fake"), (1, "student"), (1, "fake"), (2, "fake"), (3, "student"), (3, "fake")]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_each_update_reaches_its_role_alone_and_the_student_only_in_its_turn(name):
    plumbing(name)


STUDENT, FAKE, RENOISED = TDM.student_loss, TDM.fake_loss, TDM.renoised
BUGS = {
    "x0 in the place of the state": Bug(
        RENOISED,
        "x_s, _ = transition(schedule, sampler, taken, est)",
        "x_s, last = est.x0, True",
        lambda: ends(PUBLISHED),
    ),
    "scores below the state's own noise": Bug(
        TDM.levels, "max(end, self.t_min)", "self.t_min", lambda: levels_of("flow")
    ),
    "scores up to the start": Bug(TDM.levels, "- self.gap", "", lambda: levels_of("table")),
    "steps share noise levels": Bug(
        TDM.levels, "start if self.separate", "start if not self.separate", lambda: levels_of("table")
    ),
    "uphill": Bug(STUDENT, ".x0 - real", ".x0 * -1 + real", lambda: returns("flow")),
    "the fake score's side is guided": Bug(
        STUDENT,
        'context.denoiser("fake")(x_r, r, batch.cond)',
        'context.guided("fake", self.guidance_scale)(x_r, r, batch.cond)',
        lambda: guided("flow"),
    ),
    "guidance lost": Bug(
        STUDENT, "context.guided(TEACHER, self.guidance_scale)", "context.guided(TEACHER, 1.0)", lambda: guided("flow")
    ),
    "a Huber loss without its bound": Bug(STUDENT, ".sqrt()", "", lambda: guided("table")),
    "noise from clean data for a noisy state": Bug(
        RENOISED, "s = None if last else", "s = None if True else", lambda: guided("flow")
    ),
    "the fake score learns x0 with plain noise": Bug(
        FAKE,
        "fake = context",
        "x_r = context.schedule.add_noise(est.x0, z, r)\n    fake = context",
        lambda: weighted("flow"),
    ),
    "no importance": Bug(FAKE, " * ((new - old) / 2).exp()", "", lambda: weighted("table")),
    "importance upside down": Bug(FAKE, "new - old", "old - new", lambda: optima("flow")),
    "importance with the state's noise": Bug(
        FAKE, "for part in (z, mixed, error)", "for part in (z, est.eps, error)", lambda: weighted("flow")
    ),
    "the added noise taken for all of it": Bug(FAKE, "share * fake.eps - z", "fake.eps - z", lambda: learned("flow")),
    "the whole noise in place of the added": Bug(
        FAKE,
        "schedule.renoise(torch.zeros_like(z), s, r,",
        "schedule.renoise(torch.zeros_like(z), None, r,",
        lambda: learned("table"),
    ),
    "held frames count in the noise, too": Bug(
        FAKE, "free_part(share * fake.eps - z, batch.cond)", "(share * fake.eps - z)", lambda: weighted("flow")
    ),
    "no bound of the signal": Bug(FAKE, ".clamp(max=MOST_SNR)", "", lambda: weighted("flow")),
    "held frames count": Bug(FAKE, "free_part(part.square(), batch.cond)", "part.square()", lambda: weighted("flow")),
    "fake score trained through the student": Bug(
        TDM.updates, "est = Estimate(*(part.detach() for part in est))", "pass", lambda: plumbing("sd")
    ),
    "student in every step": Bug(TDM.updates, "turn % self.critic_steps == 0", "True", lambda: plumbing("sd")),
    "no warm-up": Bug(TDM.updates, "step - self.warmup_steps", "step", lambda: plumbing("sd")),
    "a step too few": Bug(rollout.reached, "taken=taken", "taken=0", lambda: sampled("flow")),
    "any number of steps": Bug(TDM.sampler, "steps not in (None, self.steps)", "False", refused),
    "renoised": Bug(TDM.sampler, "eta=0.0", "eta=1.0", test_steps_are_deterministic_and_end_at_clean_data),
    "noise added in full": Bug(
        NoiseSchedule.renoise, "std = added_std(alpha_r, sigma_r, sigma_s / alpha_s)", "std = sigma_r", renoised
    ),
    "the state's signal kept": Bug(NoiseSchedule.renoise, "expand(alpha_r / alpha_s, x_s) * x_s", "x_s", renoised),
    "levels added, not squares": Bug(
        schedules.added_std, "(sigma_t**2 - (alpha_t * ratio) ** 2)", "((sigma_t - alpha_t * ratio) ** 2)", renoised
    ),
}
test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS, RuntimeError)
