"""Closed forms over the frames of a video: a Gaussian process whose frames depend on one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from oracles.context import Flow, drawn
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core.denoise import HELD, with_held
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.wan_concat import IMAGE
from stepdistill.methods.base import Batch
from stepdistill.methods.vsd import VSD
from stepdistill.networks.roles import TEACHER


def smooth(frames: int, length: float, jitter: float) -> Tensor:
    """The covariance (F, F) of a smooth process: nearby frames are alike."""
    i = torch.arange(frames, dtype=torch.float64)
    return torch.exp(-0.5 * ((i[:, None] - i) / length) ** 2) + jitter * torch.eye(frames, dtype=torch.float64)


def process(mean: Tensor, covariance: Tensor) -> Callable[..., Estimate]:
    """The exact denoiser on a flow of videos (B, 1, F, 1, 1) whose frames are N(mean, covariance)."""
    schedule, ones = Flow(), torch.eye(len(mean), dtype=torch.float64)

    def denoise(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        (alpha, sigma), x = (value[0].item() for value in schedule(t)), x_t[:, 0, :, 0, 0]
        power = alpha**2 * covariance + sigma**2 * ones
        x0 = mean + (x - alpha * mean) @ torch.linalg.solve(power, alpha * covariance)
        x0 = x0[:, None, :, None, None]
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    return denoise


class Affine:
    """A student that makes `A z + b` of pure noise z over the frames."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        self.matrix, self.offset = matrix.requires_grad_(), offset

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        x0 = x_t[:, 0, :, 0, 0] @ self.matrix.T + self.offset
        return Estimate(x0[:, None, :, None, None], torch.zeros_like(x_t))


def gradient(roles: dict[str, object], batch: Batch, share: float) -> tuple[Tensor, Tensor]:
    """VSD's gradient at the student's samples over its weight `alpha s`, and the noise that they come from; (B, F)."""
    schedule, found = Flow(), list[Tensor]()
    student: Callable[..., Estimate] = roles["student"]  # pyright: ignore[reportAssignmentType]

    def watched(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        est = student(x_t, t, cond)
        if torch.is_grad_enabled():
            est.x0.retain_grad()
            found.append(est.x0)
        return est

    context = drawn(schedule, {**roles, "student": watched}, score_t=share)
    next(VSD(guidance_scale=1.0).updates(context, batch, 0)).loss.backward()
    assert found[0].grad is not None
    alpha, s = levels_at(share)
    g = found[0].grad * found[0].numel() / (alpha * s)
    return g[:, 0, :, 0, 0], context.seen["start"][:, 0, :, 0, 0]


def levels_at(share: float) -> tuple[float, float]:
    """alpha and s of the times that `share` draws."""
    t = Flow().random_times(torch.full((1,), share).double(), 20.0, 980.0)
    alpha, s = (value.item() for value in Flow()(t))
    return alpha, s


def agrees(values: Tensor, expected: Tensor) -> None:
    """Means over samples are as expected, and most are far enough from 0 to be seen."""
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() < 5 * error).all()
    assert (expected.abs() > 10 * error).float().mean() > 0.5


def test_the_gradient_over_frames_is_that_of_the_divergence():
    """V1: E[mu_fake - mu_real] = s^2 C^-1 (b - m) and E[(mu_fake - mu_real) z'] = s^2 (C^-1 - C_q^-1) A.

    C = alpha^2 S + s^2 and C_q = alpha^2 A A' + s^2; VSD's weight is alpha s. A is not symmetric, so that a transposed
    one is seen.
    """
    generator = torch.Generator().manual_seed(0)
    frames, size, share = 6, 60_000, 0.6
    covariance, mean = smooth(frames, 3.0, 1e-3), torch.linspace(-1, 1, frames).double()
    a = torch.randn(frames, frames, generator=generator).double() / 2
    offset = torch.randn(frames, generator=generator).double()
    roles = {"fake": process(offset, a @ a.T), TEACHER: process(mean, covariance)}
    batch = Batch(tuple(range(size)), {}, (1, frames, 1, 1))
    g, z = gradient({**roles, "student": Affine(a.clone(), offset)}, batch, share)
    (alpha, s), ones = levels_at(share), torch.eye(frames).double()
    inverse, own = (torch.linalg.inv(alpha**2 * each + s**2 * ones) for each in (covariance, a @ a.T))
    agrees(g, s**2 * inverse @ (offset - mean))
    agrees(g[:, :, None] * z[:, None], s**2 * (inverse - own) @ a)


# image to video: the image c is held as frame 0, or is an input beside the frames, all of which are generated


def begun(cond: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The image (B,), and the first frame that is generated."""
    return (cond[HELD][:, 0, 0, 0, 0], 1) if HELD in cond else (cond[IMAGE], 0)


@dataclass(frozen=True)
class Given:
    """The generated frames given the image, N(B c + b, covariance)."""

    slope: Tensor
    offset: Tensor
    covariance: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Estimate:
        c, first = begun(cond)
        (alpha, sigma), x = (value[0].item() for value in Flow()(t)), x_t[:, 0, first:, 0, 0]
        mean = c[:, None] * self.slope + self.offset
        power = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.slope)).double()
        x0 = mean + (x - alpha * mean) @ torch.linalg.solve(power, alpha * self.covariance)
        return held_estimate(x0, (x - alpha * x0) / sigma, cond)


@dataclass(frozen=True)
class Continuing:
    """A student that makes `A z + B c + b` of the generated frames; one that does not see the image has B = 0."""

    matrix: Tensor
    slope: Tensor
    offset: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Estimate:
        c, first = begun(cond)
        x0 = x_t[:, 0, first:, 0, 0] @ self.matrix.T + c[:, None] * self.slope + self.offset
        return held_estimate(x0.requires_grad_(), torch.zeros_like(x0), cond)


def held_estimate(x0: Tensor, eps: Tensor, cond: Mapping[str, Tensor]) -> Estimate:
    """As `Denoiser` returns it."""
    _, first = begun(cond)
    whole = (torch.cat([part[:, :first] * 0, part], 1)[:, None, :, None, None] for part in (x0, eps))
    return Estimate(*(with_held(part, cond) for part in whole))


def conditional(covariance: Tensor, mean: Tensor) -> Given:
    """The law of frames 1 ... given frame 0."""
    slope = covariance[1:, 0] / covariance[0, 0]
    return Given(slope, mean[1:] - slope * mean[0], covariance[1:, 1:] - torch.outer(slope, covariance[1:, 0]))


@pytest.mark.parametrize("held", [True, False])
def test_the_gradient_of_image_to_video_pulls_to_the_law_given_the_image(held):
    """V2: E[g] and E[g c] = s^2 C^-1 ((b - b*) E c^k + (B - B*) E c^(k+1)), k = 0, 1; a held frame has none."""
    frames, size, share = 6, 120_000, 0.5
    covariance, mean = smooth(frames, 3.0, 1e-3), torch.linspace(0.5, 1.5, frames).double()
    real = conditional(covariance, mean)
    a = 0.5 * torch.eye(frames - 1).double()
    slope, offset = torch.full((frames - 1,), 0.3).double(), torch.full((frames - 1,), 0.2).double()
    c = mean[0] + covariance[0, 0].sqrt() * torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
    first, cond = (1, {HELD: c[:, None, None, None, None]}) if held else (0, {IMAGE: c})
    batch = Batch(tuple(range(size)), cond, (1, frames - 1 + first, 1, 1))
    roles = {"student": Continuing(a, slope, offset), "fake": Given(slope, offset, a @ a.T), TEACHER: real}
    g, _ = gradient(roles, batch, share)
    assert g.shape[1] == frames - 1 + first and not g[:, :first].any()
    (alpha, s), ones = levels_at(share), torch.eye(frames - 1).double()
    inverse = torch.linalg.inv(alpha**2 * real.covariance + s**2 * ones)
    squared = covariance[0, 0] + mean[0] ** 2
    agrees(g[:, first:], s**2 * inverse @ (offset - real.offset + (slope - real.slope) * mean[0]))
    moment = (offset - real.offset) * mean[0] + (slope - real.slope) * squared
    agrees(g[:, first:] * c[:, None], s**2 * inverse @ moment)
    # at the law given the image nothing pulls, and a student that does not see the image is pulled towards seeing it
    own = torch.linalg.cholesky(real.covariance)
    there = {"student": Continuing(own, real.slope, real.offset), "fake": real, TEACHER: real}
    assert not gradient(there, batch, share)[0].any()
    blind = Given(torch.zeros_like(slope), mean[1:], covariance[1:, 1:])
    whole = torch.linalg.cholesky(blind.covariance)
    pulled, _ = gradient(
        {"student": Continuing(whole, blind.slope, blind.offset), "fake": blind, TEACHER: real}, batch, share
    )
    agrees(pulled[:, first:] * (c - mean[0])[:, None], -(s**2) * inverse @ real.slope * covariance[0, 0])


@dataclass(frozen=True)
class Noised:
    """The generated frames given the image as it is noised with them: the exact estimate of a joint N(mean, S)."""

    mean: Tensor
    covariance: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Estimate:
        est = process(self.mean, self.covariance)(x_t, t, cond)
        return Estimate(*(with_held(part, cond) for part in est))


@pytest.mark.parametrize(("s", "largest"), [(0.2, 0.02), (0.5, 0.24), (0.8, 0.77)])
def test_a_critic_that_is_told_a_noised_image_pulls_away_from_the_law_given_the_image(s, largest):
    """V2 (ii): at the true law E[g (c - m)] = K cov(x_s, c) - cov(x, c), not 0; K x_s is the joint estimate."""
    frames, size = 6, 60_000
    covariance, mean = smooth(frames, 3.0, 1e-3), torch.linspace(0.5, 1.5, frames).double()
    real = conditional(covariance, mean)
    c = mean[0] + covariance[0, 0].sqrt() * torch.randn(size, generator=torch.Generator().manual_seed(1)).double()
    own = Continuing(torch.linalg.cholesky(real.covariance), real.slope, real.offset)
    batch = Batch(tuple(range(size)), {HELD: c[:, None, None, None, None]}, (1, frames, 1, 1))
    share = (1000 * s - 20) / 960
    alpha = 1 - s
    assert levels_at(share) == pytest.approx((alpha, s))
    g, _ = gradient({"student": own, "fake": Noised(mean, covariance), TEACHER: real}, batch, share)
    power = alpha**2 * covariance + s**2 * torch.eye(frames).double()
    joint = alpha * covariance @ torch.linalg.solve(power, alpha * covariance[:, 0])
    expected = (joint - covariance[:, 0])[1:]
    assert expected.abs().max().item() == pytest.approx(largest, abs=5e-3) and not g[:, 0].any()
    agrees(g[:, 1:] * (c - mean[0])[:, None], expected)


def law(frames: int, covariance: Tensor, denoise: Callable[..., Estimate], steps: int) -> Tensor:
    """The covariance of what deterministic steps make of noise; the process has mean 0, so they are linear."""
    schedule = Flow()
    schedule.shift = 5.0
    noise = torch.eye(frames, dtype=torch.float64)[:, None, :, None, None]
    made = few_step(denoise, schedule, Sampler(schedule.starts(steps)), noise, {})[:, 0, :, 0, 0].T
    return made @ made.T


@pytest.mark.parametrize(("steps", "frame", "change"), [(2, 0.149, 0.075), (4, 0.435, 0.292)])
def test_few_euler_steps_lose_motion_before_they_lose_pictures(steps, frame, change):
    """V3: the share of the variance of frames, and of their differences, that the teacher keeps in few steps."""
    frames, covariance = 16, smooth(16, 4.0, 1e-4)
    made = law(frames, covariance, process(torch.zeros(frames).double(), covariance), steps)
    difference = torch.eye(frames).double().diff(dim=0)
    moved = [(difference @ each @ difference.T).trace() for each in (made, covariance)]
    assert (made.trace() / covariance.trace()).item() == pytest.approx(frame, abs=6e-4)
    assert (moved[0] / moved[1]).item() == pytest.approx(change, abs=6e-4)


def test_many_steps_keep_both():
    frames, covariance = 16, smooth(16, 4.0, 1e-4)
    made = law(frames, covariance, process(torch.zeros(frames).double(), covariance), 400)
    difference = torch.eye(frames).double().diff(dim=0)
    moved = [(difference @ each @ difference.T).trace() for each in (made, covariance)]
    assert (made.trace() / covariance.trace()).item() == pytest.approx(1, abs=0.02)
    assert (moved[0] / moved[1]).item() == pytest.approx(1, abs=0.03)


def euler() -> None:
    test_few_euler_steps_lose_motion_before_they_lose_pictures(4, 0.435, 0.292)


BUGS = {
    "the signs of the scores": Bug(
        VSD.gradient, "(real - fake)", "(fake - real)", test_the_gradient_over_frames_is_that_of_the_divergence
    ),
    "the weight": Bug(
        VSD.gradient, "** 2 * (real", "** 1 * (real", test_the_gradient_over_frames_is_that_of_the_divergence
    ),
    "the grid without its shift": Bug(
        Rectified.grid, "1000 * self.shift * u / (1 + (self.shift - 1) * u)", "1000 * u", euler
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
