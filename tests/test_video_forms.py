"""Closed forms over the frames of a video: a Gaussian process whose frames depend on one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles.context import Flow, drawn
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler, few_step
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


def test_the_gradient_over_frames_is_that_of_the_divergence():
    """V1: E[mu_fake - mu_real] = s^2 C^-1 (b - m) and E[(mu_fake - mu_real) z'] = s^2 (C^-1 - C_q^-1) A.

    C = alpha^2 S + s^2 and C_q = alpha^2 A A' + s^2; VSD's weight is alpha s. A is not symmetric, so that a transposed
    one is seen.
    """
    generator = torch.Generator().manual_seed(0)
    frames, size, share = 6, 60_000, 0.6
    covariance, mean = smooth(frames, 3.0, 1e-3), torch.linspace(-1, 1, frames).double()
    matrix = torch.randn(frames, frames, generator=generator).double() / 2
    offset = torch.randn(frames, generator=generator).double()
    schedule, student = Flow(), Affine(matrix, offset)
    fake = process(offset, matrix.detach() @ matrix.detach().T)
    roles = {"student": student, "fake": fake, TEACHER: process(mean, covariance)}
    context = drawn(schedule, roles, score_t=share)
    batch = Batch(tuple(range(size)), {}, (1, frames, 1, 1))
    t = schedule.random_times(torch.full((1,), share).double(), 20.0, 980.0)
    alpha, s = (value.item() for value in schedule(t))
    found: list[Tensor] = []

    def watched(x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        est = student(x_t, t, cond)
        if torch.is_grad_enabled():
            est.x0.retain_grad()
            found.append(est.x0)
        return est

    roles["student"] = watched
    next(VSD(guidance_scale=1.0).updates(context, batch, 0)).loss.backward()
    assert found[0].grad is not None
    g = (found[0].grad * found[0].numel())[:, 0, :, 0, 0] / (alpha * s)
    z = context.seen["start"][:, 0, :, 0, 0]
    ones, a = torch.eye(frames).double(), matrix.detach()
    inverse = torch.linalg.inv(alpha**2 * covariance + s**2 * ones)
    own = torch.linalg.inv(alpha**2 * a @ a.T + s**2 * ones)
    pairs = [(g, s**2 * inverse @ (offset - mean)), (g[:, :, None] * z[:, None], s**2 * (inverse - own) @ a)]
    for values, expected in pairs:
        error = values.std(0) / size**0.5
        assert ((values.mean(0) - expected).abs() < 5 * error).all()
        assert (expected.abs() > 10 * error).float().mean() > 0.5  # else nothing would be seen


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
