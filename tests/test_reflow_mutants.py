"""Bugs planted in reflow, PeRFlow and SlimFlow, among them those of the released code: for each a test must fail."""

from __future__ import annotations

import test_reflow as closed_forms
from oracles.planted import Bug, bug_tests
from test_reflow import SD

from stepdistill.core import losses
from stepdistill.core import solvers as straight
from stepdistill.evaluation.metrics import straightness
from stepdistill.methods import reflow
from stepdistill.methods.perflow import PeRFlow
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.slimflow import FlowGuided


def line() -> None:
    closed_forms.test_a_solver_that_is_told_the_line_ends_at_its_end(SD, 5)


def fixed() -> None:
    closed_forms.test_the_lines_are_the_fixed_point(SD, "uniform", "l2")


def windows() -> None:
    closed_forms.test_windows_become_the_teacher_s_own_chain(SD, 3.0)


def starts() -> None:
    closed_forms.test_the_noisiest_window_begins_at_pure_noise_and_the_others_at_noised_data(SD)


def floor() -> None:
    closed_forms.test_an_annealed_coupling_has_its_own_floor(0.6)


def sampled() -> None:
    closed_forms.test_steps_of_any_number_end_where_the_teacher_does(SD, 4)


ANNEALED = closed_forms.test_annealing_runs_from_one_to_none_and_keeps_the_noise_s_size
HUBER = closed_forms.test_the_huber_is_of_the_whole_sample
SHARES = closed_forms.test_more_shares_lie_at_both_ends
LED = closed_forms.test_the_flow_takes_over_where_the_student_stands
BENT = closed_forms.test_straightness_of_a_gaussian_is_known
REFLOW, PERFLOW, GUIDED = Reflow.updates, PeRFlow.updates, FlowGuided.updates

BUGS = {
    "velocity with the wrong sign": Bug(REFLOW, "line.velocity", "-line.velocity", fixed),
    "pure noise assumed at the end of a table": Bug(
        REFLOW, "chord(context.schedule, z, top, x0, bottom)", "Estimate(x0, z)", fixed
    ),
    "whole timesteps": Bug(reflow.on_the_line, "now), now,", "now), now.round(),", fixed),
    "line's solution singular": Bug(straight.chord, "alpha_t * sigma_s - alpha_s * sigma_t", "sigma_s - sigma_t", line),
    "line with x0 for eps": Bug(straight.chord, "alpha_t * x_s - alpha_s * x_t", "alpha_s * x_s - alpha_t * x_t", line),
    "one solver step only": Bug(straight.solve, "range(n + 1)", "range(2)", line),
    "the teacher's time stands still": Bug(
        straight.follow, "denoise(x_t, t, cond)", "denoise(x_t, per_sample(times[0], x_t), cond)", windows
    ),
    "the wrong density": Bug(straight.u_shaped, "(2 * u - 1)", "u", SHARES),
    "the density of another a": Bug(straight.u_shaped, "math.sinh(a / 2)", "math.sinh(a)", SHARES),
    "steps end clean": Bug(straight.even_sampler, "clean=False", "clean=True", sampled),
    "annealing of the loss": Bug(
        REFLOW, 'z = (1 - beta**2) ** 0.5 * z + beta * context.noise(batch, "annealing")', "beta = 0", floor
    ),
    "annealed noise too large": Bug(REFLOW, "(1 - beta**2) ** 0.5 * z", "z", ANNEALED),
    "annealed along a line": Bug(REFLOW, "(1 - beta**2) ** 0.5 * z", "(1 - beta) * z", ANNEALED),
    "annealing turned round": Bug(Reflow.beta, "1 - step / self", "step / self", ANNEALED),
    "only the noise mirrored": Bug(
        REFLOW,
        "for value in (z, x0)",
        "if value is z else value for value in (z, x0)",
        closed_forms.test_a_pair_is_mirrored_as_a_whole,
    ),
    "huber element by element": Bug(losses.sample_distances, "squared.sum(1)", "squared.mean(1) * 1.0", HUBER),
    "huber's constant without d": Bug(losses.sample_distances, "0.00054 * d", "0.00054", HUBER),
    "windows without guidance": Bug(PERFLOW, "TEACHER, self.guidance_scale", "TEACHER, 1.0", windows),
    "a leaky start": Bug(PERFLOW, "expand(k == 0, z)", "expand(k < 0, z)", starts),
    "every window from noise": Bug(PERFLOW, "expand(k == 0, z)", "expand(k >= 0, z)", starts),
    "a window too far": Bug(PERFLOW, "edges[k + 1]", "edges[-1].expand_as(k)", windows),
    "a flow led without a graph barrier": Bug(GUIDED, "torch.no_grad()", "torch.enable_grad()", LED),
    "noise of the pair in the place of fresh": Bug(GUIDED, 'context.noise(batch, "fresh")', "batch.noise", LED),
    "the turn at the wrong end": Bug(GUIDED, "high + way * (low - high)", "low + way * (high - low)", LED),
    "the flow's term dropped": Bug(GUIDED, "self.flow_weight * logs", "0 * logs", LED),
    "straightness from mid-air": Bug(straightness.paths, "path[-1] - path[0]", "path[-1] - path[1]", BENT),
    "states as they are": Bug(
        straightness.paths,
        "states.append(x_t / level)",
        "states.append(x_t)",
        lambda: closed_forms.test_reflow_s_fixed_point_is_straight(SD),
    ),
}


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS, KeyError, RuntimeError)
