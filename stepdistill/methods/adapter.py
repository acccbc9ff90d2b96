"""The training assistant: a LoRA that turns a few-step model back into a denoiser, for the time of a fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from stepdistill.config.kinds import Count
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, teacher_sampler
from stepdistill.methods.base import Batch, StepContext, Tuning, Update
from stepdistill.methods.finetune import score_matching_loss


@dataclass(frozen=True, kw_only=True)
class Assistant(Tuning):
    """A training assistant, also called de-distillation LoRA or training adapter: plain denoising on the few-step
    model's own samples.

    With it the model is the ordinary diffusion model of the images that it draws in few steps. A plain fine-tuning
    that has it on, and its result off (`train.assistant`), learns only how the new images differ from these. What the
    assistant has left undone, the fine-tuning undoes: train it until samples in many steps look like the few-step
    model's. It is for training: `stepdistill generate` and `load_student` refuse it as a student.

    Equation:
        x0 = the few-step model's sample from noise, under its own sampling contract
        loss = E |eps_student(x_t, t, c) - eps|^2, x_t = alpha_t x0 + sigma_t eps; of a flow the velocity's error

    References:
        Z-Image-Turbo training adapter, Ostris 2025, https://huggingface.co/ostris/zimage_turbo_training_adapter, a LoRA
        trained plainly on thousands of the distilled model's images at a learning rate of 1e-5.
        LoRA: low-rank adaptation of large language models, Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Args:
        num_inference_steps: steps in which validation draws the assistant, which is no few-step model.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})
    use: ClassVar[Literal["sampling", "training"]] = "training"

    num_inference_steps: Count = 25

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return teacher_sampler(schedule, steps or self.num_inference_steps)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        yield Update("student", score_matching_loss(context, batch, "student", self.own_samples(context, batch)))
