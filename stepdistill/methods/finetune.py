"""Plain denoising on new images, which are then sampled in the few steps of the model that is tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stepdistill.core.denoise import free_part
from stepdistill.core.losses import denoising
from stepdistill.core.prediction import Estimate
from stepdistill.methods.base import Batch, StepContext, Tuning, Update


@dataclass(frozen=True, kw_only=True)
class FineTune(Tuning):
    """Plain fine-tuning of a few-step model on new images, as Diffusers' `train_text_to_image_lora.py` does it.

    On its own it undoes the distillation: the denoising loss pulls the few-step model back to a denoiser, whose few
    steps are blurred, before it has learnt the images. So it is meant for short runs with `train.assistant`, which
    holds what the loss would undo: then what is learnt is the difference between the new images and the model's own.
    It moves subjects, colours and styles, and hardly how much samples vary. A student that is a LoRA needs neither:
    train the new LoRA on the base, and load both.

    Equation:
        loss = E |eps_student(x_t, t, c) - eps|^2, x_t = alpha_t x0 + sigma_t eps, x0 a new image; of a flow
               E |v_student(x_t, t, c) - (eps - x0)|^2

    References:
        High-resolution image synthesis with latent diffusion models, Rombach et al. 2022,
        https://arxiv.org/abs/2112.10752.
        LoRA: low-rank adaptation of large language models, Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})
    takes_assistant: ClassVar[bool] = True

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        yield Update("student", score_matching_loss(context, batch, "student", batch.x0))


def score_matching_loss(
    context: StepContext, batch: Batch, role: str, x0: Tensor, shift: float | None = None, again: int = 0
) -> Tensor:
    """Denoising score matching of a role on samples `x0` (B, C, H, W), at any time of the schedule.

    Args:
        shift: how times are spread, see `NoiseSchedule.random_times`.
        again: how many losses the step has had on these samples; each has times and noise of its own.
    """
    name = f"{role} {again}" if again else role
    t = context.schedule.random_times(context.draw(batch, f"{name} t"), *context.schedule.span, shift)
    eps = context.noise(batch, f"{name} eps")
    est = context.denoiser(role)(context.schedule.add_noise(x0, eps, t), t, batch.cond)
    free = Estimate(*(free_part(part, batch.cond) for part in est))
    return denoising(free, free_part(x0, batch.cond), free_part(eps, batch.cond), context.schedule)
