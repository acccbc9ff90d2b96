"""The rows of a report on one-step decoders: the teacher's own tokens, and the students' in one to three calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.core.cost import Cost, count_calls
from stepdistill.core.errors import StudentError, problem
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of
from stepdistill.decoding.contract import DecoderContract
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.load import load_decoder
from stepdistill.evaluation.inputs import labels
from stepdistill.evaluation.metrics.image_scores import ImageScore
from stepdistill.evaluation.plan import SamplingPlan, called, with_reference
from stepdistill.evaluation.rows import Drawer, Generate, RowSource
from stepdistill.evaluation.spec import EvalRun

Draw = Callable[[Sequence[str], Tensor], tuple[Tensor, Tensor]]  # tokens (B, n) and images in [0, 1], of noise


@dataclass(frozen=True)
class DecoderRows(RowSource):
    """An autoregressive teacher and its one-step decoders.

    Args:
        spec: what is asked for.
        teacher: on the device that it draws on.
        contracts: of the students, by place.
    """

    spec: EvalRun
    teacher: TokenTeacher
    contracts: Mapping[str, DecoderContract]

    @property
    def frames(self) -> int:
        return 1

    @property
    def frame_rate(self) -> float:
        return 1.0  # an image has no other frame

    @property
    def teacher_facts(self) -> dict[str, Any]:
        drawn = self.teacher.settings
        facts = {"id": self.spec.teacher, "steps": self.teacher.places, "guidance": drawn.guidance_scale}
        return facts | {"temperature": drawn.temperature, "top_k": drawn.top_k}

    def plans(self) -> list[SamplingPlan]:
        calls, w = self.teacher.places, self.teacher.settings.guidance_scale
        given: dict[str, Any] = {"role": "teacher", "student": None, "guidance": w}
        plans = [SamplingPlan(name=called("teacher", calls), steps=calls, seed=self.spec.seed, **given)]
        for (place, contract), who in zip(self.contracts.items(), labels(list(self.contracts)), strict=True):
            given = {"role": "student", "student": place, "guidance": 1.0}  # the teacher's is in its weights
            for steps in self.spec.steps or range(len(contract.keeps), 0, -1):
                plans.append(SamplingPlan(name=called(who, steps), steps=steps, seed=self.spec.seed, **given))
        return with_reference(self.spec, plans)

    def settings(self, plan: SamplingPlan) -> tuple[int | None, float | None]:
        return plan.steps, plan.guidance

    def open(self, place: str | None, device: torch.device) -> TokenDrawer:
        return TokenDrawer(self, None if place is None else load_decoder(place, device)[0])

    @cached_property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.teacher.pixels(self.teacher.codes[:1].expand(1, self.teacher.places, -1)).shape[-2:]
        return height, width

    @property
    def whole_law(self) -> TokenTeacher:
        """The teacher without its top-k, which gives a student's tokens outside of it no probability at all."""
        return replace(self.teacher, settings=replace(self.teacher.settings, top_k=None))


@dataclass(frozen=True)
class TokenDrawer(Drawer):
    """A student, or the teacher.

    Args:
        rows: whose it is.
        pipe: the student; None is the teacher.
        drawn: prompt and tokens of the images that were drawn last, by number. Their likelihood is no part of the time
            that it took to draw them.
    """

    rows: DecoderRows
    pipe: OneStepPipeline | None
    drawn: dict[int, tuple[str, Tensor]] = field(default_factory=dict)

    def digest(self) -> str:
        return self.rows.teacher.digest

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.pixels

    @property
    def scores(self) -> Sequence[ImageScore]:
        return [self.log_likelihood]

    def facts(self, plan: SamplingPlan) -> dict[str, object]:
        return {}

    def generate(self, plan: SamplingPlan) -> Generate:
        if self.pipe is None:
            network, draw = self.rows.teacher.model.model.language_model, self._by_teacher
        else:
            keeps = self.pipe.config["keeps"]
            calls = plan.steps or len(keeps)
            if calls > len(keeps):
                why, todo = "it was trained for no more", "remove the number from --steps"
                raise StudentError(problem(f"{calls} calls", f"1 to {len(keeps)}", why, todo))
            network, draw = self.pipe.language_model, partial(_by_student, self.pipe, keeps[:calls])
        return partial(self._generate, network, draw, plan.seed)

    def log_likelihood(self, images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        """Mean log p of the tokens of the images with these numbers, see `TokenTeacher.log_likelihood`."""
        law, size, values = self.rows.whole_law, self.rows.spec.batch, list[float]()
        for start in range(0, len(numbers), size):
            prompts, tokens = zip(*(self.drawn[i] for i in numbers[start : start + size]), strict=True)
            values += law.log_likelihood(prompts, torch.stack(tokens)).tolist()
        return {"log_likelihood": values}

    @torch.no_grad()
    def _generate(
        self, network: nn.Module, draw: Draw, seed: int, prompts: Sequence[str], batch: int, numbers: Sequence[int]
    ) -> tuple[Tensor, Cost]:
        """Images (N, 3, H, W) uint8 of numbered noise, and their cost."""
        teacher, tokens, images = self.rows.teacher, list[Tensor](), list[Tensor]()
        with count_calls(network) as cost:
            for start in range(0, len(prompts), batch):
                part = slice(start, start + batch)
                noise = torch.stack([noise_of(seed, i, teacher.shape) for i in numbers[part]]).to(teacher.codes.device)
                made, pixels = draw(prompts[part], noise)
                tokens.append(made)
                images.append(to_uint8(pixels.cpu()))
                cost.batches += 1
        self.drawn.clear()
        self.drawn.update(zip(numbers, zip(prompts, torch.cat(tokens), strict=True), strict=True))
        return torch.cat(images), cost

    def _by_teacher(self, prompts: Sequence[str], noise: Tensor) -> tuple[Tensor, Tensor]:
        teacher = self.rows.teacher
        tokens = teacher.draw(prompts, noise)
        return tokens, (teacher.pixels(teacher.codes[tokens]) / 2 + 0.5).clamp(0, 1)


def _by_student(
    pipe: OneStepPipeline, keeps: Sequence[int], prompts: Sequence[str], noise: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, values = pipe.heads.decode(pipe.language_model, *pipe.read(prompts), noise, keeps)
    return tokens, pipe.images(tokens, values, "pt")
