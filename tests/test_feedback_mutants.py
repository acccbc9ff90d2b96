"""Bugs planted in human feedback, its rewards and its guards: for each a test must fail."""

from __future__ import annotations

import test_feedback as closed_forms
from oracles.planted import Bug, bug_tests
from test_feedback import SD

from stepdistill.methods import rollout
from stepdistill.methods.base import Tuning
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.reward import RewardTerm, reward_loss
from stepdistill.training.watch import rules

UPDATES, TERM = Feedback.updates, RewardTerm.term
CLIMB = lambda: closed_forms.test_a_reward_alone_is_climbed_without_end(SD)  # noqa: E731
SHIFT = lambda: closed_forms.test_the_paired_anchor_moves_every_sample_by_its_shift_and_keeps_the_spread(SD)  # noqa: E731
HINGE = closed_forms.test_a_sample_beyond_the_margin_has_no_gradient
START = closed_forms.test_before_the_first_step_the_anchor_is_exactly_zero
CALLS = lambda: closed_forms.test_one_call_of_the_student_has_a_graph_and_the_anchor_sees_its_input(0.99)  # noqa: E731
TERMS = closed_forms.test_several_terms_are_added_on_one_decoding
STAGE = lambda: closed_forms.test_dmd2_adds_rewards_and_pairs_on_the_same_sample(SD, 800.0)  # noqa: E731
LEAVES = closed_forms.test_a_reward_that_all_samples_reach_leaves_dmd2_as_it_was


def last_half() -> None:
    closed_forms.test_where_samples_are_scored(None, [0, 1, 2, 2, 4])


def falls() -> None:
    closed_forms_of_rules([(0, 3), (1, 2), (2, 1)], False)


def falls_alone() -> None:
    closed_forms_of_rules([(0, 3), (0, 2), (0, 1), (0, 0)], False)


def rises() -> None:
    closed_forms_of_rules([(0, 0), (1, 9), (2, 8), (3, 7), (4, 6)], True)


def closed_forms_of_rules(pairs: list[tuple[float, float]], fires: bool) -> None:
    key, held_out = f"{rules.TRAINED}A", f"{rules.HELD_OUT}B"
    assert rules.deceived([{rules.SCORE: 0.0, key: a, held_out: b} for a, b in pairs]) == fires


BUGS = {
    # the reward
    "downhill": Bug(TERM, "self.margin - score", "self.margin + score", CLIMB),
    "no hinge": Bug(TERM, "(self.margin - score).relu()", "(self.margin - score)", HINGE),
    "hinge on the batch's mean": Bug(
        TERM, "(self.margin - score).relu().mean()", "(self.margin - score).mean().relu()", HINGE
    ),
    "sum for mean": Bug(TERM, ".relu().mean()", ".relu().sum()", CLIMB),
    "weight forgotten": Bug(TERM, "self.weight *", "1.0 *", TERMS),
    "not in standard deviations": Bug(TERM, "- mean) / std", "- mean)", HINGE),
    "mean forgotten": Bug(TERM, "- mean) / std", ") / std", HINGE),
    "latents in the place of images": Bug(reward_loss, "context.decode(x0) / 2 + 0.5", "x0", STAGE),
    "images from -1 to 1": Bug(reward_loss, "context.decode(x0) / 2 + 0.5", "context.decode(x0)", CLIMB),
    "the last term alone": Bug(reward_loss, "loss = loss + value", "loss = value", TERMS),
    "decoded for no term": Bug(reward_loss, "if terms:", "if True:", TERMS),
    # the anchor
    "no anchor": Bug(UPDATES, "loss = loss + pull / (2 * self.anchor_shift)", "pull; loss = loss + 0", SHIFT),
    "half the shift": Bug(UPDATES, "pull / (2 * self.anchor_shift)", "pull / self.anchor_shift", SHIFT),
    "weight of the anchor without that of the reward": Bug(UPDATES, "one.weight * slope", "slope", SHIFT),
    "anchored to the student": Bug(UPDATES, "held = before(", "held = student(", SHIFT),
    "anchored to other samples": Bug(UPDATES, "(x0 - held)", "(x0 - held.roll(1, 0))", START),
    "anchored to the batch's mean": Bug(UPDATES, "(x0 - held)", "(x0 - held.mean(0))", START),
    "a graph through the anchor": Bug(UPDATES, "torch.no_grad()", "torch.enable_grad()", CALLS),
    # the rollout
    "one step too far": Bug(rollout.reached, "taken=taken", "taken=taken + 1", CALLS),
    "a graph through the rollout": Bug(rollout.reached, "torch.no_grad()", "torch.enable_grad()", CALLS),
    "the start's time": Bug(rollout.reached, "sampler.timesteps[taken]", "sampler.timesteps[0]", CALLS),
    "not guided as it is sampled": Bug(
        Tuning.sampled, "self.few_steps(context.student_schedule).guidance_scale", "1.0", CALLS
    ),
    "scored after every step": Bug(Feedback.first_exit, "count - max(1, count // 2)", "0", last_half),
    "scored after the first step alone": Bug(UPDATES, 'context.shared("exit")', '0 * context.shared("exit")', CALLS),
    # the one-step stage
    "pairs without their noise": Bug(DMD2.towards, "batch.pair[0] if self.regression_weight else ", "", STAGE),
    "pairs without a weight": Bug(DMD2.student_loss, "self.regression_weight * logs", "logs", STAGE),
    "pairs to their noise": Bug(DMD2.student_loss, "batch.pair[1]", "batch.pair[0]", STAGE),
    "rewards not added": Bug(DMD2.student_loss, "matching + term", "matching", STAGE),
    "rewards in the place of matching": Bug(DMD2.student_loss, "matching + term", "term", LEAVES),
    # the guards
    "two falls end the run": Bug(rules.deceived, "len(looks) > FALLS", "len(looks) > 2", falls),
    "a fall alone ends the run": Bug(rules.deceived, "any(falls) and any(rises)", "any(falls)", falls_alone),
    "never falls": Bug(rules.deceived, "a[key] > b[key]", "a[key] < b[key]", rises),
}


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS, RuntimeError, IndexError)
