"""Bugs planted in PSO, among them those of the released code: for each a test must fail."""

from __future__ import annotations

import pytest
import test_pso_offline as offline_oracles
from oracles.planted import Bug, oracles_of, planted

from stepdistill.methods.base import Tuning
from stepdistill.methods.pso_offline import PSOOffline


def offline() -> None:
    offline_oracles.test_offline_starts_at_log_2_with_the_gradient_of_the_errors("clean")


def offline_flow() -> None:
    offline_oracles.test_offline_starts_at_log_2_with_the_gradient_of_the_errors("flow")


def moves() -> None:
    offline_oracles.test_the_samples_move_to_the_images_and_keep_their_spread(1.0)


RISES = offline_oracles.test_offline_moves_away_from_its_own_samples_step_by_step
AUTO = offline_oracles.test_auto_takes_the_distance_of_each_pair
DRAWS = offline_oracles.test_offline_draws_only_the_contract_s_times

BUGS = {
    # offline
    "kappa of the script, silently": Bug(PSOOffline.updates, "self.kappa * lose", "0.1 * lose", moves),
    "winner and loser swapped offline": Bug(PSOOffline.updates, "win, lose = gain", "lose, win = gain", moves),
    "the offline reference with its LoRA on": Bug(
        PSOOffline.updates, 'for role in ("student", TEACHER)', 'for role in ("student", "student")', RISES
    ),
    "another time than the contract's": Bug(
        PSOOffline.updates,
        "torch.tensor(sampler.timesteps, device",
        "torch.tensor([750.0, 500.0, 250.0, 0.0], device",
        DRAWS,
    ),
    "the first input from data": Bug(
        PSOOffline.updates, "torch.where(first, eps,", "torch.where(~first & first, eps,", moves
    ),
    "noises apart": Bug(
        PSOOffline.updates, "torch.cat([eps, eps])", 'torch.cat([eps, context.noise(batch, "other")])', offline
    ),
    "samples from the student": Bug(
        Tuning.own_samples, "context.denoiser(TEACHER)", 'context.denoiser("student")', moves
    ),
    "errors of x0": Bug(PSOOffline.scale, "return self.beta * schedule", "return self.beta + 0 * schedule", offline),
    "errors of noise on a flow": Bug(
        PSOOffline.scale,
        "schedule.denoising_target(torch.ones_like(sigma_t), -alpha_t / sigma_t)",
        "(alpha_t / sigma_t)",
        offline_flow,
    ),
    "auto is the distance": Bug(PSOOffline.scale, "1 / sample_distances", "sample_distances", AUTO),
}


@pytest.mark.parametrize("name", oracles_of(BUGS))
def test_without_a_bug_the_oracle_passes(name):
    BUGS[name].test()


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_noticed(name):
    bug = BUGS[name]
    with planted(bug.function, bug.old, bug.new), pytest.raises((AssertionError, RuntimeError, ValueError)):
        bug.test()
