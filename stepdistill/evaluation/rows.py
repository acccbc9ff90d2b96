"""What draws the rows of a report: a teacher and its students, here the Diffusers pipelines of a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.cost import Cost
from stepdistill.core.files import file_digest
from stepdistill.evaluation.first_frames import FirstFrames
from stepdistill.evaluation.metrics.identity import DTYPES
from stepdistill.evaluation.metrics.image_scores import ImageScore
from stepdistill.evaluation.plan import SamplingPlan, at_its_best, contract_of, sampling_plans, size_of
from stepdistill.evaluation.spec import EvalRun
from stepdistill.families.base import Family
from stepdistill.networks.lora.read import lora_path
from stepdistill.students.base_model import pipeline_hash
from stepdistill.students.draw.animation import frame_rate_of
from stepdistill.students.draw.filters import unfiltered
from stepdistill.students.draw.loras import load_style
from stepdistill.students.draw.pipeline import StudentPipeline

Generate = Callable[..., tuple[Tensor, Cost]]  # of prompts, batch and numbers


class RowSource(ABC):
    """A teacher and its students, as an evaluation sees them."""

    @property
    @abstractmethod
    def frames(self) -> int:
        """Of what is drawn; 1 is an image."""

    @property
    @abstractmethod
    def frame_rate(self) -> float:
        """Frames a second at which clips are shown."""

    @property
    @abstractmethod
    def teacher_facts(self) -> dict[str, Any]:
        """What the report says of the teacher: `id`, `steps` and `guidance`, and what else it is drawn by."""

    @abstractmethod
    def plans(self) -> list[SamplingPlan]:
        """The rows, those of the teacher first, and of these the reference where there is one.

        Raises StepdistillError.
        """

    @abstractmethod
    def settings(self, plan: SamplingPlan) -> tuple[int | None, float | None]:
        """Steps and guidance scale of a row, those of the student where the plan has none."""

    @abstractmethod
    def open(self, place: str | None, device: torch.device) -> Drawer:
        """Load a student, or with None the teacher. Raises StepdistillError."""


class Drawer(ABC):
    """A student or the teacher in memory."""

    @abstractmethod
    def digest(self) -> str:
        """sha256 of all that the teacher draws with; it is asked of the teacher alone."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of what is drawn."""

    @property
    @abstractmethod
    def scores(self) -> Sequence[ImageScore]:
        """What only these images have a score for."""

    @abstractmethod
    def facts(self, plan: SamplingPlan) -> dict[str, object]:
        """What a plan's images depend on besides teacher, student, prompts and the evaluation's own settings."""

    @abstractmethod
    def generate(self, plan: SamplingPlan) -> Generate:
        """What draws a plan's images, until the next plan is asked for.

        Raises ValueError, StepdistillError where the student cannot be drawn so.
        """


@dataclass(frozen=True)
class PipelineRows(RowSource):
    """Pipelines of Diffusers.

    Args:
        spec: what is asked for.
        family: the teacher's.
        begun: images that the videos of the prompts begin with, for a family that continues images.
    """

    spec: EvalRun
    family: Family
    begun: tuple[Path, ...] = ()

    @property
    def frames(self) -> int:
        return frames_of_family(self.family)

    @property
    def frame_rate(self) -> float:
        return frame_rate_of(self.family)

    @property
    def teacher_facts(self) -> dict[str, Any]:
        steps, guidance = at_its_best(self.spec)
        style = {"lora": self.spec.lora[0], "lora_strength": self.spec.lora[1]} if self.spec.lora else {}
        return {"id": self.spec.teacher, "steps": steps, "guidance": guidance, **style}

    def plans(self) -> list[SamplingPlan]:
        return sampling_plans(self.spec)

    def settings(self, plan: SamplingPlan) -> tuple[int | None, float | None]:
        if plan.student is None:
            return plan.steps, plan.guidance
        contract = contract_of(plan.student)
        own = contract.adapters.guidance_scale if contract.adapters else contract.guidance_scale
        steps = len(contract.timesteps) if plan.steps is None else plan.steps
        return steps, own if plan.guidance is None else plan.guidance

    def open(self, place: str | None, device: torch.device) -> PipelineDrawer:
        asked = next(iter(self.spec.sizes), None) or size_of(self.spec.students)
        pipeline = StudentPipeline.of(self.family, place, device, DTYPES[self.spec.dtype])
        style = load_style(self.family, pipeline.pipe, self.spec.lora[0], "beside") if self.spec.lora else None
        return PipelineDrawer(self, pipeline, style, asked or self.family.native_size(pipeline.pipe))

    @cached_property
    def style_digest(self) -> str | None:
        """Of the file of the LoRA beside."""
        return file_digest(lora_path(self.spec.lora[0])) if self.spec.lora else None


@dataclass(frozen=True)
class PipelineDrawer(Drawer):
    """A pipeline, with a student or as the teacher.

    Args:
        rows: whose it is.
        pipeline: with the student loaded.
        style: the name of the LoRA beside, if there is one.
        pixels: height and width.
    """

    rows: PipelineRows
    pipeline: StudentPipeline
    style: str | None
    pixels: tuple[int, int]

    def digest(self) -> str:
        # networks, fused LoRAs, scheduler, and what its calls are given
        pipe, family = self.pipeline.pipe, self.pipeline.family
        with unfiltered(pipe, family):
            networks = pipeline_hash(pipe)
        parts = [networks, self.pipeline.native.to_json_string(), repr(family.arguments())]
        return sha256("\n".join(parts).encode()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels

    @property
    def scores(self) -> Sequence[ImageScore]:
        first = self.first  # images of another size than the clips' are not comparable
        return [first.score] if first and self.rows.frames > 1 and not self.rows.spec.side else []

    def facts(self, plan: SamplingPlan) -> dict[str, object]:
        begun = {"begun": self.first.digest} if self.first else {}
        return {**begun, **({"lora": [self.rows.style_digest, plan.lora_strength]} if self.rows.spec.lora else {})}

    def generate(self, plan: SamplingPlan) -> Generate:
        calls = self.pipeline.calls(replace(plan.options, height=self.pixels[0], width=self.pixels[1]), plan.name)
        if self.style is not None and plan.lora_strength is not None:
            self.pipeline.weigh({self.style: plan.lora_strength})
        return partial(self.pipeline.generate, calls, seed=plan.seed, first=self.first)

    @cached_property
    def first(self) -> FirstFrames | None:
        """The images that videos begin with."""
        return FirstFrames(self.rows.begun, self.pixels) if self.rows.begun else None


def frames_of_family(family: Family) -> int:
    """Frames of what a family's pipeline draws; 1 is an image."""
    return family.arguments().get("num_frames", 1)
