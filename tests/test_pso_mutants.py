"""Bugs planted in PSO, among them those of the released code: for each a test must fail."""

from __future__ import annotations

import test_pso_offline as offline_oracles
import test_pso_online as online_oracles
import test_sampling
from oracles.planted import Bug, bug_tests

from stepdistill.core import losses, solvers
from stepdistill.methods import pso_offline, pso_online
from stepdistill.methods.base import Tuning
from stepdistill.methods.pso_offline import PSOOffline
from stepdistill.methods.pso_online import PSOOnline


def optimum() -> None:
    online_oracles.test_the_optimum_is_that_of_the_reward_beside_the_divergence("clean", 3)


def replay() -> None:
    online_oracles.test_stored_transitions_replay("clean")


def densities() -> None:
    online_oracles.test_ratios_are_those_of_densities("tcd")


def fresh() -> None:
    online_oracles.test_a_fresh_lora_has_the_loss_log_2_and_a_gradient("clean")


def offline() -> None:
    offline_oracles.test_offline_starts_at_log_2_with_the_gradient_of_the_errors("clean")


def offline_flow() -> None:
    offline_oracles.test_offline_starts_at_log_2_with_the_gradient_of_the_errors("flow")


def moves() -> None:
    offline_oracles.test_the_samples_move_to_the_images_and_keep_their_spread(1.0)


HARD = online_oracles.test_the_published_hard_labels_have_no_optimum
TIES = online_oracles.test_a_tie_has_no_gradient_and_a_swap_is_the_logit
TIMES = online_oracles.test_the_student_is_trained_at_the_contract_s_times_without_the_last
CLAMP = online_oracles.test_the_clamp_ends_at_a_tenth_of_the_transition_s_std
TCD = lambda: test_sampling.test_tcd_is_tcd_scheduler(0.3, (2,))  # noqa: E731
ANCESTRAL = lambda: test_sampling.test_ancestral_steps_are_those_of_the_scheduler(4)  # noqa: E731
RISES = offline_oracles.test_offline_moves_away_from_its_own_samples_step_by_step


def auto() -> None:
    offline_oracles.test_auto_counts_independent_dimensions(6)


DRAWS = offline_oracles.test_offline_draws_only_the_contract_s_times

BUGS = {
    # online
    "separate starts": Bug(
        pso_online.sample_paths,
        "torch.cat([start, start])",
        'torch.cat([start, context.noise(batch, "other")])',
        optimum,
    ),
    "one fresh noise for both paths": Bug(pso_online.sample_paths, 'f"again {k} {path}"', 'f"again {k}"', replay),
    "one fresh noise for the batch": Bug(
        pso_online.sample_paths, "return torch.cat([context.noise", "return sum([context.noise", optimum
    ),
    "summed over dimensions": Bug(pso_online.log_ratio, ".mean(1)", ".sum(1)", optimum),
    "the reference with its LoRA on": Bug(
        PSOOnline.updates, 'for role in ("student", TEACHER)', 'for role in ("student", "student")', optimum
    ),
    "winner and loser swapped": Bug(PSOOnline.judged, "return first - second", "return second - first", optimum),
    "winner and loser swapped with hard labels": Bug(
        PSOOnline.loss, "ahead.sign() * logit", "-ahead.sign() * logit", HARD
    ),
    "winner and loser swapped in the loss": Bug(
        losses.preference_loss,
        "softplus(-logit) + (1 - label) * softplus(logit)",
        "softplus(logit) + (1 - label) * softplus(-logit)",
        TIES,
    ),
    "each transition alone": Bug(PSOOnline.updates, "if j != k", "if j == -1", optimum),
    "the last step in the loss": Bug(PSOOnline.updates, "in sampler.timesteps[:-1]]", "in sampler.timesteps]", TIMES),
    "all transitions at the first time": Bug(
        PSOOnline.updates, "per_sample(t, states[0])", "per_sample(999.0, states[0])", TIMES
    ),
    "the variance for its root": Bug(pso_online.log_ratio, "reference.std**2", "reference.std", densities),
    "half of the exponent lost": Bug(pso_online.log_ratio, "(2 * reference.std**2)", "reference.std**2", densities),
    "the noise of the next step forgotten": Bug(solvers.transition, "expand(ratio, x0) * est.eps", "0 * est.eps", TCD),
    "the noise at the end of the step": Bug(
        solvers.transition,
        "(sigma_s / alpha_s) ** 2 * alpha_t / sigma_t",
        "(sigma_s / alpha_s) / 2",
        ANCESTRAL,
    ),
    "no clamp": Bug(PSOOnline.clipped, "ratio if c is None else", "ratio if True else", CLAMP),
    "the log-ratio clamped as a ratio": Bug(
        PSOOnline.clipped, "ratio.clamp(math.log(1 - c), math.log(1 + c))", "ratio.clamp(-2 * c, 2 * c)", CLAMP
    ),
    "beta divided by the number of dimensions": Bug(
        PSOOnline.updates, "logit = self.beta * (", "logit = self.beta / states[0][0].numel() * (", optimum
    ),
    "a temperature without the reward's scale": Bug(
        PSOOnline.loss,
        "(self.temperature * self.std)",
        "self.temperature",
        online_oracles.test_the_scale_of_the_reward_is_measured_once,
    ),
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
        Tuning.own_samples, "self.sampled(context, TEACHER)", 'self.sampled(context, "student")', moves
    ),
    "errors of x0": Bug(PSOOffline.scale, "return self.beta * schedule", "return self.beta + 0 * schedule", offline),
    "errors of noise on a flow": Bug(
        PSOOffline.scale,
        "schedule.denoising_target(torch.ones_like(sigma_t), -alpha_t / sigma_t)",
        "(alpha_t / sigma_t)",
        offline_flow,
    ),
    "auto without the dimensions": Bug(PSOOffline.scale, "return independent_dimensions(win - lose)", "return 1", auto),
    "auto of all numbers": Bug(
        PSOOffline.scale, "return independent_dimensions(win - lose)", "return win[0].numel()", auto
    ),
    "auto without the samples": Bug(PSOOffline.scale, "(win - lose).var(0)", "win.var(0)", auto),
    "a pair compared with itself": Bug(
        pso_offline.independent_dimensions, "(squares.sum() - squares.trace())", "squares.sum()", auto
    ),
}


test_without_a_bug_the_oracle_passes, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError, ValueError)
