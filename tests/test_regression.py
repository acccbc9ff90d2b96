"""Regression to the teacher's own samples ends at the pairing of noise and sample, whatever its steps."""

from __future__ import annotations

import pytest
import torch
from oracles import close
from oracles.context import Scripted, Tabular, column, stable_diffusion, teacher_table
from oracles.gaussian import GaussianTeacher, solver_gain
from torch import Tensor, nn

from stepdistill.core.denoise import Denoise
from stepdistill.core.solvers import few_step, follow
from stepdistill.methods.base import Batch, Update
from stepdistill.methods.regression import Regression

SD, MEAN, STD = stable_diffusion(), 0.7, 0.6
NOISE = column(-1.7, -0.3, 0.4, 2.1)
COND = {"mean": torch.full_like(NOISE, MEAN)}
PAIRED = follow(GaussianTeacher(SD, STD), SD, SD.grid(50).flip(0).tolist(), NOISE, COND)


def update(method: Regression, student: Denoise, share: float, latents: Tensor | None = PAIRED) -> Update:
    context = Scripted(
        schedule=SD,
        null={},
        denoiser={"student": student}.__getitem__,
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=0,
        device=torch.device("cpu"),
        draws={},
        eps=NOISE,
        common=share,
    )
    (only,) = method.updates(context, Batch((0, 1, 2, 3), COND, (1, 1, 1), latents, NOISE), 0)
    return only


def converged(steps: int) -> Tabular:
    """Each step's least squares, from the noisiest on, at the inputs of the student's own rollout."""
    method, student = Regression(num_inference_steps=steps), Tabular(SD, steps)
    for k in range(steps):
        student.fit(steps - k, update(method, student, (k + 0.5) / steps).loss)
    return student


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_converges_to_the_pairing(steps):
    method, student = Regression(num_inference_steps=steps), converged(steps)
    close(student.slope[steps], solver_gain(SD, STD, 50))
    for k in range(steps):
        assert update(method, student, (k + 0.5) / steps).loss < 1e-25
    close(few_step(student, SD, method.sampler(SD), NOISE, COND), PAIRED)


def test_the_step_is_shared_and_only_the_last_call_has_a_graph():
    method, teacher = Regression(num_inference_steps=4), teacher_table(SD, 4, MEAN, STD)
    for share, calls in ((0.0, [999]), (0.49, [999, 749]), (0.999, [999, 749, 499, 249])):
        seen = []

        def student(x_t, t, cond, seen=seen):
            seen.append((t.unique().item(), torch.is_grad_enabled()))
            return teacher(x_t, t, cond)

        done = update(method, student, share)
        assert seen == [(t, t == calls[-1]) for t in calls] and done.roles == ("student",)


def test_steps_may_start_elsewhere():
    """One step of SDXL begins at 399, on pure noise all the same."""
    seen = []

    def student(x_t, t, cond):
        seen.append((x_t, t.tolist()))
        return estimate

    estimate = teacher_table(SD, 4, MEAN, STD)(NOISE, torch.full((4,), 749.0), COND)
    method = Regression(timesteps=(399.0,))
    assert update(method, student, 0.9).loss == (estimate.x0 - PAIRED).square().mean()
    assert len(seen) == 1 and torch.equal(seen[0][0], NOISE) and seen[0][1] == [399.0] * 4
    assert method.sampler(SD, 2).timesteps == (399.0, 199.0)
    with pytest.raises(ValueError, match="expected whole numbers"):
        Regression(timesteps=(1000.0,)).check(SD)
    with pytest.raises(ValueError, match="descending"):
        Regression(timesteps=(199.0, 399.0))


def test_a_batch_without_pairs_is_refused():
    with pytest.raises(ValueError, match="needs pairs"):
        update(Regression(), teacher_table(SD, 4, MEAN, STD), 0.5, latents=None)
