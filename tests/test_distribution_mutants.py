"""Bugs planted in DMD2, VSD and DisBack, among them those of the released code: for each a test must fail."""

from __future__ import annotations

import test_distribution as closed_forms
import test_distribution_updates as plumbing
from oracles.context import stable_diffusion
from oracles.planted import Bug, bug_tests
from test_distribution import FLOW, ONE, SD
from test_distribution_updates import DMD

from stepdistill.core import losses
from stepdistill.core.schedule import DiscreteVP, Rectified
from stepdistill.methods import dmd2, finetune, gan, rollout
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.vsd import VSD
from stepdistill.networks import taps as adversarial
from stepdistill.networks.backbone import Backbone


def starts() -> None:
    closed_forms.test_equal_scores_give_no_gradient_and_guidance_only_its_own(SD)


def divergence() -> None:
    closed_forms.test_the_gradient_is_that_of_the_divergence(SD)


def guidance() -> None:
    closed_forms.test_guidance_on_one_side_moves_the_fixed_point(SD)


def floor_dmd() -> None:
    closed_forms.test_the_fake_score_has_its_floor_at_the_students_distribution(ONE, SD)


def floor_flow() -> None:
    closed_forms.test_the_fake_score_has_its_floor_at_the_students_distribution(ONE, FLOW)


def floor_vsd() -> None:
    closed_forms.test_the_fake_score_has_its_floor_at_the_students_distribution(VSD(proportion_empty_prompts=0.0), SD)


def judged() -> None:
    closed_forms.test_at_the_optimal_discriminator_the_adversarial_term_is_a_weighted_score_term(SD)


def simulated() -> None:
    closed_forms.test_simulated_inputs_have_the_distribution_that_sampling_makes(SD, 1.0)


def trained() -> None:
    plumbing.test_each_update_reaches_all_of_its_roles_and_the_student_only_in_its_turn(plumbing.GAN, "sd")


def prompts_alone() -> None:
    plumbing.test_prompts_alone_never_touch_data(DMD)


MODES = lambda: closed_forms.test_modes_are_found_at_high_noise_only("one", (20.0, 120.0), 0.0, 0.0)  # noqa: E731
TOWARDS, STUDENT, HEAD = DMD2.towards, DMD2.student_loss, gan.Gan.head_loss
RATIO = closed_forms.test_a_weight_of_the_divergence_multiplies_the_score_term
COUNT = lambda: plumbing.test_the_fake_score_takes_k_steps_for_one_of_the_student_after_its_warm_up(3)  # noqa: E731
BACK = plumbing.test_disback_follows_its_waypoints_back_to_the_teacher

BUGS = {
    # the score term
    "away from the teacher": Bug(dmd2.normalised, "(fake - real) / n", "(real - fake) / n", guidance),
    "normalised by the unguided target": Bug(
        STUDENT, "normalised(sample, fake, real, batch", "normalised(sample, fake, fake, batch", guidance
    ),
    "one norm for the batch": Bug(
        dmd2.normalised, ".mean(1).clamp(min=floor).reshape(-1, *[1] * (x0.ndim - 1))", ".mean()", starts
    ),
    "norm squared": Bug(
        dmd2.normalised,
        "(x0 - real).abs()",
        "(x0 - real).square()",
        closed_forms.test_the_normaliser_is_the_mean_distance_to_the_guided_target,
    ),
    "both sides guided": Bug(
        STUDENT,
        'context.denoiser("fake")(x_s, s, batch.cond).x0',
        'context.guided("fake", self.guidance_scale)(x_s, s, batch.cond).x0',
        starts,
    ),
    "guidance lost": Bug(
        DMD2.real_score,
        "context.guided(target, self.guidance_scale)",
        "context.guided(target, 1.0)",
        starts,
    ),
    "scores at different noise": Bug(
        STUDENT,
        'context.denoiser("fake")(x_s, s, batch.cond)',
        'context.denoiser("fake")(context.schedule.add_noise(sample, context.noise(batch, "more"), s), s, batch.cond)',
        starts,
    ),
    "surrogate without its half": Bug(
        losses.surrogate, "0.5 * ", "", closed_forms.test_the_surrogate_has_the_gradient_and_half_its_square
    ),
    "surrogate uphill": Bug(
        losses.surrogate,
        "x0 - gradient",
        "x0 + gradient",
        closed_forms.test_the_surrogate_has_the_gradient_and_half_its_square,
    ),
    "surrogate's target with a graph": Bug(
        losses.surrogate, ".detach()", "", closed_forms.test_the_surrogate_has_the_gradient_and_half_its_square
    ),
    "compared at any time": Bug(VSD.gradient, "*self.t_range", "*context.schedule.span", MODES),
    # VSD
    "VSD weighted by the clean share": Bug(
        VSD.gradient, "context.schedule(s)[1]", "context.schedule(s)[0]", divergence
    ),
    "VSD guides the teacher alone": Bug(
        VSD.gradient,
        "context.guided(role, w)",
        "context.guided(role, w if role == target else 1.0)",
        starts,
    ),
    "PG-SB draws for each side": Bug(
        VSD.gradient,
        "context.guided(role, w)",
        "context.guided(role, w if role == target else w + 1)",
        starts,
    ),
    "VSD uphill": Bug(VSD.gradient, "(real - fake)", "(fake - real)", divergence),
    "VSD's fake score without its weight": Bug(
        VSD.fake_loss,
        "free_part(alpha_t * est.eps, cond), free_part(alpha_t * eps, cond)",
        "free_part(est.eps, cond), free_part(eps, cond)",
        floor_vsd,
    ),
    "the prompt never dropped": Bug(
        VSD.fake_loss,
        "if empty else batch.cond",
        "if False else batch.cond",
        lambda: plumbing.test_an_empty_prompt_is_learned_in_its_share_of_steps(0.0),
    ),
    # the fake score
    "fake score on the noise as target of x0": Bug(
        losses.denoising, "schedule.denoising_target(*est)", "est.x0", floor_dmd
    ),
    "fake score told another time": Bug(finetune.score_matching_loss, ", eps, t), t,", ", eps, t), t / 2,", floor_dmd),
    "a flow's fake score on noise alone": Bug(Rectified.denoising_target, "eps - x0", "eps", floor_flow),
    "fake score trained through the student": Bug(TOWARDS, "x0 = est.x0.detach()", "x0 = est.x0", trained),
    "fake score never trained": Bug(TOWARDS, "loss = score_matching_loss(", "loss = 0 * score_matching_loss(", trained),
    "student at every step": Bug(TOWARDS, "turn % self.critic_steps == 0", "True", COUNT),
    "no warm-up": Bug(TOWARDS, "step - self.warmup_steps", "step", COUNT),
    # simulation
    "data in the place of simulation": Bug(
        TOWARDS,
        "simulate(context, batch, sampler, start,",
        "simulate(context, batch, sampler, start + 0 * batch.latents,",
        prompts_alone,
    ),
    "one step too far": Bug(rollout.reached, "taken=taken", "taken=taken + 1", simulated),
    "always the first step": Bug(rollout.reached, "taken=taken", "taken=0", simulated),
    "the last start again": Bug(rollout.reached, "sampler.timesteps[taken]", "sampler.timesteps[0]", simulated),
    "old noise again": Bug(
        rollout.reached, 'context.noise(batch, f"again {i}")', 'context.noise(batch, "start") * 0', simulated
    ),
    "simulation with a graph": Bug(
        rollout.reached,
        "torch.no_grad()",
        "torch.enable_grad()",
        plumbing.test_only_the_last_call_of_the_student_has_a_graph,
    ),
    # times
    "table's last time never drawn": Bug(
        DiscreteVP.random_times, "(high - low + 1)", "(high - low - 100)", lambda: spreads()
    ),
    "a flow's shift forgotten": Bug(Rectified.random_times, "shift or self.shift", "shift or 1.0", lambda: spreads()),
    # the adversarial term
    "adversarial term uphill": Bug(losses.generator_loss, "softplus(-fake)", "softplus(fake)", judged),
    "head learns the reverse": Bug(
        losses.discriminator_loss,
        "softplus(fake).mean() + softplus(-real).mean()",
        "softplus(-fake).mean() + softplus(real).mean()",
        lambda: heads(),
    ),
    "hinge on one side": Bug(losses.discriminator_loss, "(1 - real)", "(1 + real)", lambda: heads()),
    "adversarial term without its weight": Bug(gan.two_phase, "weight * (x0 * pull)", "(x0 * pull)", RATIO),
    "R1 at other noise": Bug(
        HEAD,
        'data, "gan real", shake',
        'data, "gan shaken", shake',
        plumbing.test_each_term_draws_for_itself,
    ),
    "ratio upside down": Bug(
        losses.divergence_weight,
        "logits.detach()",
        "-logits.detach()",
        lambda: closed_forms.test_the_weights_are_those_of_the_divergences("jeffreys", lambda r: (r - 1) * r.log()),
    ),
    "tokens in columns": Bug(
        adversarial._map,
        "reshape(len(features), -1, *sides)",
        "reshape(len(features), -1, *sides[::-1]).transpose(2, 3)",
        lambda: plumbing.test_features_are_those_of_a_whole_pass_which_ends_early("sd3"),
    ),
    "hook left behind": Bug(
        adversarial.inputs_of,
        "handle.remove()",
        "pass",
        lambda: plumbing.test_features_are_those_of_a_whole_pass_which_ends_early("sd"),
    ),
    # DisBack, whose release never changes its target
    "target stays the teacher": Bug(DisBack.target, 'f"waypoint_{left}" if left > 0 else TEACHER', "TEACHER", BACK),
    "path the wrong way": Bug(DisBack.target, 'f"waypoint_{left}"', 'f"waypoint_{self.waypoints - left}"', BACK),
    "target not handed on": Bug(DMD2.real_score, "guided(target,", "guided('teacher',", BACK),
    "waypoints all the same": Bug(Backbone.average, "step < role.until", "True", BACK),
    "student moves while the way is recorded": Bug(DisBack.updates, "self.waypoints * self.recording_steps", "0", BACK),
}


def spreads() -> None:
    """Every whole time of a table equally often; a flow's as its grid."""
    import torch

    table, shares = stable_diffusion(), torch.arange(1000).double() / 1000 + 0.0005
    assert table.random_times(shares, *table.span).tolist() == list(range(1000))
    assert table.random_times(shares, 20.0, 980.0).unique().tolist() == list(range(20, 981))
    flow = Rectified(3.0)
    torch.testing.assert_close(flow.random_times(torch.arange(5) / 5, *flow.span), flow.grid(5)[:-1])
    cut = flow.random_times(torch.tensor([0.0, 1.0]), 20.0, 980.0)
    torch.testing.assert_close(cut, torch.tensor([20.0, 980.0]))


def heads() -> None:
    """The head's loss falls when real logits rise and fake ones fall."""
    import torch

    for kind in ("softplus", "hinge"):
        good, bad = (losses.discriminator_loss(kind, torch.tensor([[-s]]), torch.tensor([[s]])) for s in (0.5, -0.5))
        assert good < bad
        assert losses.generator_loss(kind, torch.tensor([[1.0]])) < losses.generator_loss(kind, torch.tensor([[0.0]]))


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(
    BUGS, RuntimeError, TypeError, adversarial._Reached
)
