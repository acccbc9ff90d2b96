"""Which test kills which bug: each bug is planted in the library, one edit each, and a test must fail."""

from __future__ import annotations

import pytest
import test_consistency as fixed
import test_consistency_updates as single
import test_losses
import test_prediction
import test_regression
import test_sampling
import test_schedule
from oracles import close
from oracles.context import stable_diffusion
from oracles.planted import Bug, bug_tests, planted
from torch import nn

from stepdistill.core import denoise, guidance, losses, prediction, random
from stepdistill.core import solvers as sampling
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.methods.base import StepContext
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.regression import Regression
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Copy, Ema, LoraSpec


def averages() -> None:
    """`mean <- decay mean + (1 - decay) value`, after a step of the source and of no other role."""
    bone = Backbone(nn.Linear(2, 2), LoraSpec(), ())
    bone.add("student", Copy())
    bone.add("ema", Ema("student", 0.9))
    before = bone.parameters_of("ema")["weight"].clone()
    bone.parameters_of("student")["weight"].data += 1.0
    bone.average(["other"], 0)
    close(bone.parameters_of("ema")["weight"], before, 0)
    bone.average(["student"], 0)
    close(bone.parameters_of("ema")["weight"], before + 0.1, 1e-6)


GUIDED = single.test_the_guided_mean
LCM = fixed.test_lcm_converges_to_fifty_ddim_steps
TCD = fixed.test_tcd_converges_to_its_own_biased_point
KINDS = fixed.test_every_prediction_type_converges_to_the_same
ENDS = fixed.test_ends_stay_in_the_segment_and_meet_each_time_equally
UPDATES = Consistency.updates
MIX = "u + scale * (c - u)"
TEACHER_STEP = "x_u = schedule.add_noise(*teacher(x_t, t, cond), u)"

BUGS = {
    # guidance
    "1 + w for w": Bug(guidance.combine_linearly, MIX, MIX.replace("scale *", "(1 + scale) *"), GUIDED),
    "cond and uncond swapped": Bug(guidance.combine_linearly, MIX, "c + scale * (u - c)", GUIDED),
    "prompts in the wrong half": Bug(
        denoise.without_and_with_prompt,
        "concatenated(without_prompt(null, cond), cond)",
        "concatenated(cond, without_prompt(null, cond))",
        GUIDED,
    ),
    "guidance left out": Bug(UPDATES, "context.guidance(self.guidance_scale, batch)", "1.0", GUIDED),
    "one scale for the batch": Bug(
        StepContext.guidance,
        'self.draw(batch, "guidance_scale")',
        'self.draw(batch, "guidance_scale")[:1]',
        single.test_a_hidden_scale_is_averaged,
    ),
    "the range's upper end left out": Bug(
        StepContext.guidance, "(high - low) *", "low *", single.test_a_hidden_scale_is_averaged
    ),
    # the teacher's step
    "predecessor one too low": Bug(UPDATES, "grid[i + 1], grid[i]", "grid[i + 1], grid[(i - 1).clamp(min=0)]", LCM),
    "grid one too low": Bug(UPDATES, "grid[i + 1], grid[i]", "grid[i], grid[(i - 1).clamp(min=0)]", LCM),
    "solver skipped": Bug(UPDATES, TEACHER_STEP, "x_u = x_t", LCM),
    "solver replaced by data": Bug(
        UPDATES, TEACHER_STEP, 'x_u = schedule.add_noise(batch.x0, context.noise(batch, "eps"), u)', LCM
    ),
    "teacher told the end time": Bug(UPDATES, "teacher(x_t, t, cond)", "teacher(x_t, u, cond)", LCM),
    "solver on the student": Bug(UPDATES, "context.guided(TEACHER,", 'context.guided("student",', LCM),
    "levels of a step at its start": Bug(UPDATES, TEACHER_STEP, TEACHER_STEP[:-2] + "t)", LCM),
    # the target
    "target at the wrong time": Bug(UPDATES, "(x_u, u, cond), x_u, u, s,", "(x_u, t, cond), x_u, u, s,", LCM),
    "target from the state before": Bug(UPDATES, "(x_u, u, cond), x_u, u, s,", "(x_t, t, cond), x_t, t, s,", LCM),
    "target not detached": Bug(
        UPDATES,
        "with torch.no_grad():",
        "with torch.enable_grad():",
        lambda: single.test_the_target_carries_no_graph("any"),
    ),
    "target never the average": Bug(
        UPDATES,
        "context.denoiser(self.target)",
        'context.denoiser("student")',
        single.test_the_target_is_the_average_if_asked,
    ),
    "prompts lost on the way to the target": Bug(
        UPDATES,
        "context.denoiser(self.target)(x_u, u, cond)",
        "context.denoiser(self.target)(x_u, u, {k: v.flip(0) for k, v in cond.items()})",
        lambda: single.test_point_masses_are_fixed("any", 1, "table"),
    ),
    "target where the jump has no length": Bug(
        UPDATES, "expand(s == u, x_u), x_u, target", "expand(s <= u, x_u), x_u, target", TCD
    ),
    "average the wrong way round": Bug(Backbone.average, "1 - role.decay", "role.decay", averages),
    "average of every step": Bug(Backbone.average, "for of in stepped", "for of in self.declared", averages),
    # the student's jump
    "boundary head dropped": Bug(
        Consistency.jump,
        "0.25 / scaled * x_t + 10 * expand(t, x_t) / scaled.sqrt() * est.x0",
        "est.x0",
        fixed.test_at_time_zero_the_student_is_the_identity,
    ),
    "boundary head of other scale": Bug(
        Consistency.jump,
        "(10 * expand(t, x_t)) ** 2",
        "expand(t, x_t) ** 2",
        fixed.test_the_boundary_head_is_lcms,
    ),
    "jump to its own time": Bug(Consistency.jump, "est.eps, s)", "est.eps, t)", TCD),
    # segments and phases
    "an edge belongs to the segment above": Bug(
        Consistency.ends, "i // length * length", "(i + 1) // length * length", ENDS
    ),
    "ends below the segment": Bug(Consistency.ends, "edge = i // length * length", "edge = i // length * 0", ENDS),
    "the shortest jump never drawn": Bug(Consistency.ends, "(i - edge + 1)", "(i - edge)", ENDS),
    "end drawn with the start": Bug(UPDATES, 'context.draw(batch, "s")', 'context.draw(batch, "t")', TCD),
    "stage never changes": Bug(
        UPDATES,
        "self.segments_at(step)",
        "self.segments[0]",
        fixed.test_the_stage_decides_the_ends_of_an_update,
    ),
    "phases as long as their number": Bug(
        Consistency.ends,
        "self.num_ddim_timesteps // segments",
        "segments",
        lambda: fixed.test_pcm_is_the_solver_sample_for_sample(4, "table"),
    ),
    # prediction types
    "v with the wrong sign": Bug(prediction.row, "return -sigma_t, alpha_t", "return sigma_t, alpha_t", KINDS),
    "v taken for epsilon": Bug(prediction.row, "return -sigma_t, alpha_t", "return zero, one", KINDS),
    "flow with the wrong sign": Bug(prediction.row, "return -one, one", "return one, -one", KINDS),
    "x0 of the wrong row": Bug(prediction.estimate_at_levels, "q * x_t - sigma_t * y", "q * x_t - alpha_t * y", KINDS),
    "eps of the wrong sign": Bug(
        prediction.estimate_at_levels,
        "alpha_t * y - p * x_t",
        "alpha_t * y + p * x_t",
        test_prediction.test_the_step_of_every_kind_is_ddims,
    ),
    "levels in half precision": Bug(
        prediction.estimate_at_levels,
        "expand(v, x_t) for v in (alpha_t, sigma_t)",
        "expand(v, x_t).bfloat16() for v in (alpha_t, sigma_t)",
        test_prediction.test_half_inputs_are_converted_in_float32,
    ),
    # the noise process
    "powers for amplitudes": Bug(
        NoiseSchedule.add_noise,
        "alpha_t, sigma_t = self(t)",
        "alpha_t, sigma_t = (v**2 for v in self(t))",
        LCM,
    ),
    "leading for trailing": Bug(
        DiscreteVP.grid,
        "torch.arange(1, n + 1) * float(self.steps // n) - 1",
        "torch.arange(n) * float(self.steps // n) + 1",
        lambda: test_schedule.test_students_visit_the_times_of_their_scheduler(4),
    ),
    "no interpolation": Bug(
        DiscreteVP.__call__,
        "share = exact - low",
        "share = 0 * exact",
        test_schedule.test_between_entries_log_snr_is_linear,
    ),
    "shift left out of the grid": Bug(
        Rectified.grid,
        "1000 * self.shift * u / (1 + (self.shift - 1) * u)",
        "1000 * u",
        lambda: test_sampling.test_a_flow_is_the_euler_scheduler(3.0),
    ),
    "inverse of the levels upside down": Bug(
        DiscreteVP.time,
        "self.steps - high - share",
        "self.steps - high + share",
        lambda: test_schedule.test_time_inverts_the_levels(stable_diffusion()),
    ),
    "noise added as if from clean data": Bug(
        sampling.transition,
        "added_std(alpha_s, sigma_s, ratio)",
        "(sigma_s - sigma_l) / (1 - sigma_l)",
        test_sampling.test_renoising_a_flow_from_a_half_to_three_quarters,
    ),
    # samplers
    "LCM student under DDIM": Bug(
        Consistency.sampler,
        '"clean": 1.0',
        '"clean": 0.0',
        lambda: test_sampling.test_lcm_is_lcm_scheduler("epsilon", (2,)),
    ),
    "LCM ends on time 0": Bug(
        Consistency.sampler,
        'self.end == "clean" or schedule.straight',
        "False",
        lambda: test_sampling.test_lcm_is_lcm_scheduler("epsilon", (1,)),
    ),
    "TCD ends on clean data": Bug(
        Consistency.sampler,
        'self.end == "clean" or schedule.straight',
        "True",
        lambda: test_sampling.test_tcd_is_tcd_scheduler(0.3, (1,)),
    ),
    "LCM's times rounded up": Bug(
        Consistency.sampler,
        "np.floor(",
        "np.ceil(",
        lambda: test_schedule.test_students_visit_the_times_of_their_scheduler(4),
    ),
    "eta upside down": Bug(
        sampling.transition,
        "(1 - sampler.eta) * torch.tensor(after)",
        "sampler.eta * torch.tensor(after)",
        lambda: test_sampling.test_tcd_is_tcd_scheduler(0.3, (2,)),
    ),
    "a flow's times made whole": Bug(
        sampling.transition,
        "s = per_sample(after, x0)",
        "s = per_sample(after // 1, x0)",
        lambda: test_sampling.test_a_flow_is_the_euler_scheduler(3.0),
    ),
    "noise after the last step": Bug(
        sampling.transition,
        "if sampler.eta == 0 or after == 0:",
        "if sampler.eta == 0:",
        lambda: test_sampling.test_lcm_is_lcm_scheduler("epsilon", (1,)),
    ),
    "the last step of the solver left out": Bug(
        sampling.follow,
        "each_step(times, x_t)",
        "each_step(times[:-1], x_t)",
        test_sampling.test_follow_is_the_solver_at_full_steps,
    ),
    # losses, draws, regression
    "Huber not zero at zero": Bug(
        losses.pseudo_huber,
        "(squared + c**2).sqrt() - c",
        "(squared + c**2).sqrt()",
        lambda: test_losses.test_equal_is_zero_with_a_zero_gradient("huber"),
    ),
    "draws by place in the batch": Bug(
        StepContext.draw,
        "self._generator(i, purpose)) for i in batch.index",
        "self._generator(i, purpose)) for i, _ in enumerate(batch.index)",
        single.test_a_batch_is_its_samples,
    ),
    "the same draws at every step": Bug(
        random.step_generator, "_generator(seed, step,", "_generator(seed, 0,", single.test_a_batch_is_its_samples
    ),
    "regression off the student's rollout": Bug(
        Regression.updates,
        "follow(student, context.schedule, times[: exit_at + 1], noise, batch.cond)",
        "noise",
        lambda: test_regression.test_it_converges_to_the_pairing(2),
    ),
}


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS)


def test_a_planted_bug_leaves_no_trace():
    with planted(losses.distance, "squared.mean()", "squared.sqrt().mean()"), pytest.raises(AssertionError):
        test_losses.test_squared()
    test_losses.test_squared()
    averages()
