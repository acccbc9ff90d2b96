"""Adapter guidance distillation (AGD): classifier-free guidance at any scale in one forward pass instead of two.

As in `guided_lora`, the student learns the guided teacher, `uncond + w (cond - uncond)`, in the network's own output.
Guidance is affine in the output, so the target is the same in epsilon, v, x0 and flow, up to the weight of a time in
the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from stepdistill.config.kinds import Count
from stepdistill.core.denoise import SCALE
from stepdistill.core.losses import distance
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, teacher_sampler
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.networks.roles import AdapterArch, Adapters, Role


@dataclass(frozen=True, kw_only=True)
class AdapterGuidance(Method):
    """Adapter guidance distillation (AGD): adapters on the frozen base give guidance at any scale in one pass.

    Minimises `|y(x_t, t, c, w) - y_w(x_t, t, c)|^2` over states of guided trajectories, where y_w is the guided output;
    the trajectories are generated before training, which then needs one pass and no teacher. The student takes as many
    steps as the teacher; negative prompts have no effect.

    Equation:
        y_w(x_t, t, c) = y(x_t, t) + w (y(x_t, t, c) - y(x_t, t)), the teacher's output under guidance
        loss = E |y_student(x_t, t, c, w) - y_w(x_t, t, c)|^2, x_t on guided trajectories

    References:
        Efficient distillation of classifier-free guidance using adapters, Jensen & Sadat 2025,
        https://arxiv.org/abs/2503.07274. Differences: the adapter's output is multiplied by w - 1, the frequencies of w
        are fixed and low, g(w) has two layers instead of four, tokens get no position embedding, since the prompt's
        have one, and `mixed` is new.

    Args:
        arch: `cross_attention` attends from the image tokens to tokens of w, timestep and prompt. `mixed` also takes
            the image tokens as an input and adds a nonlinearity, which fits better at the same size. `offset` adds one
            vector to all image tokens.
        width: inner dimension of the adapters. 320 adds 2.7 % parameters to Stable Diffusion 1.5. SDXL has 4 times as
            many attention layers, so 128 is enough.
        guidance_range: guidance scales of the trajectories, stored in the contract. Sampling at other scales logs a
            warning.
        sampling_guidance_scale: default guidance scale of sampling, within guidance_range.
        num_inference_steps: default number of sampling steps, stored in the contract.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})

    arch: AdapterArch = "cross_attention"
    width: int = 320
    guidance_range: tuple[float, float] = (1.0, 12.0)
    sampling_guidance_scale: float = 7.5
    num_inference_steps: Count = 50

    def __post_init__(self) -> None:
        low, high = self.guidance_range
        if not low <= self.sampling_guidance_scale <= high:
            raise ValueError(
                f"sampling_guidance_scale is {self.sampling_guidance_scale}: expected a scale that the adapters learn, "
                f"in guidance_range {[low, high]}"
            )
        if self.width < 1:
            raise ValueError(f"width is {self.width}: expected at least 1")

    def roles(self) -> dict[str, Role]:
        return {"student": Adapters(self.arch, self.width)}

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return replace(
            teacher_sampler(schedule, steps or self.num_inference_steps),
            adapter_scale=self.sampling_guidance_scale,
            adapter_range=self.guidance_range,
        )

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        x_t, t, w, target = batch.guided_state
        student = context.denoiser("student")
        y = student.native(student(x_t, t, {**batch.cond, SCALE: w}), t)
        yield Update("student", distance("l2", y, target))
