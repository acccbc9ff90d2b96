"""Adapter guidance distillation (AGD): guidance of any scale in one pass instead of two.

As in `guided_lora`, the student learns the guided teacher, `uncond + w (cond - uncond)`, in the network's own output.
Guidance is affine in the output, so the target is the same in epsilon, v, x0 and flow, up to the weight of a time in
the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from stepdistill.core.denoise import SCALE
from stepdistill.core.losses import distance
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, teacher_sampler
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.networks.roles import AdapterArch, Adapters, Role


@dataclass(frozen=True, kw_only=True)
class AdapterGuidance(Method):
    """Adapter guidance distillation (AGD): adapters on the frozen base give guidance of any scale in one pass.

    Minimises `|y(x_t, t, c, w) - y_w(x_t, t, c)|^2` over states of guided trajectories, where y_w is the guided output;
    the trajectories are made before, so training takes one pass and no teacher. The student takes as many steps as the
    teacher; negative prompts have no effect.

    Equation:
        y_w(x_t, t, c) = y(x_t, t) + w (y(x_t, t, c) - y(x_t, t)), the teacher's output under guidance
        loss = E |y_student(x_t, t, c, w) - y_w(x_t, t, c)|^2, x_t on guided trajectories

    References:
        Efficient distillation of classifier-free guidance using adapters, Jensen & Sadat 2025,
        https://arxiv.org/abs/2503.07274. Other than there: what an adapter adds is multiplied by w - 1, frequencies of
        w are fixed and slow, g(w) has two layers and not four, tokens have no positions of their own, since the
        prompt's have theirs already, and `mixed` is new.

    Args:
        arch: `cross_attention` from the image's tokens to those of w, time and prompt; `mixed`, the same with the
            image's tokens put to it and a nonlinearity, which fits better at the same size; or `offset`, one vector
            for all of the image.
        width: inner dimension of the adapters. 320 is 2.7 % more parameters for Stable Diffusion 1.5; SDXL has 4
            times as many attention layers, so 128 is.
        guidance_range: the scales of the trajectories; written into the contract, which warns of others.
        sampling_guidance_scale: w of images where none is set, within the range.
        num_inference_steps: steps that the contract names.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})

    arch: AdapterArch = "cross_attention"
    width: int = 320
    guidance_range: tuple[float, float] = (1.0, 12.0)
    sampling_guidance_scale: float = 7.5
    num_inference_steps: int = 50

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
