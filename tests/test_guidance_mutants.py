"""Each known bug of guidance distillation, planted, is noticed by a test."""

from __future__ import annotations

import test_adapters as roles
import test_guidance_distillation as methods
from oracles.context import Flow, stable_diffusion
from oracles.planted import Bug, bug_tests

from stepdistill.core.solvers import teacher_sampler
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.guided_lora import GuidedLora
from stepdistill.methods.progressive import ProgressiveHalving, two_steps
from stepdistill.networks import guidance_adapters as adapters
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.guidance_adapters import CrossAttentionAdapter, Hooks


def recompute() -> None:
    roles.test_recompute_sees_the_scale_of_its_forward("sd", "mixed")


def lora() -> None:
    methods.test_a_guided_lora_becomes_the_guided_teacher(stable_diffusion(), "noised")


BUGS = {
    "features of 1000 w": Bug(
        adapters.scale_features, "w[:, None] * pace", "1000 * w[:, None] * pace", roles.told_by_features_alone
    ),
    "one scale for the whole batch": Bug(
        Hooks._site,
        "scale.to(x.device).reshape(-1).expand(len(x))",
        "scale.to(x.device).reshape(-1)[:1].expand(len(x))",
        lambda: roles.test_each_sample_has_its_own_scale("sd", "mixed"),
    ),
    "recompute under the scale that is set by then": Bug(
        Backbone.enable_checkpointing,
        "self._use(name, grad, context)",
        "self._use(name, grad, self._hooks.now)",
        recompute,
    ),
    "an output that does not start at zero": Bug(
        adapters.zeroed,
        "nn.init.zeros_(layer.weight)",
        "nn.init.normal_(layer.weight)",
        lambda: roles.test_at_zero_they_are_the_base_bit_for_bit("sd", "cross_attention"),
    ),
    "adapters on for every role": Bug(
        Backbone._switch,
        "self._hooks.now = context",
        "self._hooks.now = context if context.adapters else self._hooks.now",
        lambda: roles.test_other_roles_know_nothing_of_them("sd", "mixed"),
    ),
    "the prompt's stream in the image's place": Bug(
        Hooks._site,
        "return (output[0] + more.to(output[0].dtype), *output[1:])",
        "return (output[0], *output[1:])",
        lambda: roles.test_at_zero_they_are_the_base_bit_for_bit("sd3", "mixed"),
    ),
    "no w - 1": Bug(
        Hooks._site,
        "(w - 1) / UNIT",
        "w / UNIT",
        lambda: roles.test_one_is_no_guidance_whatever_they_have_learnt("mixed"),
    ),
    "mixed without the image": Bug(CrossAttentionAdapter.forward, "silu(read + q)", "silu(read)", roles.held_out),
    "w - 1 for w": Bug(
        AdapterGuidance.updates,
        "SCALE: w}",
        "SCALE: w - 1}",
        lambda: methods.test_the_loss_is_zero_at_guidance_by_the_scale_of_the_state(stable_diffusion(), "epsilon"),
    ),
    "a loss in x0": Bug(
        AdapterGuidance.updates,
        "student.native(student(x_t, t, {**batch.cond, SCALE: w}), t)",
        "student(x_t, t, {**batch.cond, SCALE: w}).x0",
        lambda: methods.test_the_loss_is_zero_at_guidance_by_the_scale_of_the_state(Flow(), "flow"),
    ),
    "a teacher without guidance": Bug(GuidedLora.updates, "self.guidance_scale)", "1.0)", lora),
    "guidance twice": Bug(GuidedLora.updates, "self.guidance_scale)", "self.guidance_scale**2)", lora),
    "guided at sampling, too": Bug(
        GuidedLora.sampler,
        "teacher_sampler(schedule, steps or self.num_inference_steps)",
        "Sampler(schedule.starts(steps or self.num_inference_steps), 0.0, False, self.guidance_scale)",
        lora,
    ),
    "a clean end, which the teacher's steps have not": Bug(
        teacher_sampler,
        "clean=False",
        "clean=True",
        lambda: methods.test_one_pass_ends_where_the_teacher_s_own_steps_end(
            stable_diffusion(), GuidedLora(num_inference_steps=methods.N)
        ),
    ),
    "the stored output of another scale": Bug(
        GuidedLora.updates,
        'distance("l2", y, student.native(target, t))',
        'distance("l2", y, batch.state.output)',
        lambda: methods.test_a_guided_lora_becomes_the_guided_teacher(stable_diffusion(), "trajectories"),
    ),
    "one step of the teacher": Bug(
        two_steps,
        "est = teacher(x_middle, middle, cond)",
        "est = teacher(x_t, t, cond)",
        lambda: methods.test_one_step_of_the_target_is_two_of_the_teacher(stable_diffusion()),
    ),
    "a last step that stays noisy": Bug(
        two_steps,
        "expand(torch.where(last, 0.0, sigma_end), x_t)",
        "expand(sigma_end, x_t)",
        lambda: methods.test_one_step_of_the_target_is_two_of_the_teacher(stable_diffusion()),
    ),
    "no weight": Bug(
        ProgressiveHalving.updates,
        "(alpha_t / sigma_t).square().clamp(min=1)",
        "1.0",
        methods.test_the_weight_is_the_truncated_signal_to_noise_ratio,
    ),
    "a teacher that follows the student": Bug(
        ProgressiveHalving.roles,
        "until=k * self.stage_steps",
        "until=None",
        methods.test_stages_and_their_teachers,
    ),
    "a stage too late": Bug(
        ProgressiveHalving.stage,
        "step // self.stage_steps",
        "(step - 1) // self.stage_steps",
        methods.test_stages_and_their_teachers,
    ),
}


test_without_a_bug_the_oracle_passes, test_a_planted_bug_is_noticed = bug_tests(BUGS, RuntimeError, TypeError, KeyError)
