"""Sampling: the images of each plan, unit by unit, into stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from stepdistill.core.errors import EvaluationError, StepdistillError, problem
from stepdistill.core.files import file_digest
from stepdistill.evaluation.exports import GenEval, T2ICompBench, VBench
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.metrics.image_scores import (
    ImageScore,
    PromptLikeness,
    motion_score,
    perceptual_likeness,
    pixel_likeness,
)
from stepdistill.evaluation.plan import SamplingPlan, slug
from stepdistill.evaluation.read import Unit, cropped, fill_store
from stepdistill.evaluation.records import prompt_of, prompts_digest
from stepdistill.evaluation.rows import Generate, RowSource
from stepdistill.evaluation.spec import EvalRun
from stepdistill.evaluation.store import Store
from stepdistill.students.draw.animation import images_of_clip
from stepdistill.students.load import PATTERNS, folder_of

LATENCY = "latency.json"
WARMUP = 3  # images drawn before any is timed


@dataclass(frozen=True)
class RowDrawer:
    """Draws plans into stores.

    Args:
        spec: what is asked for.
        source: the teacher and its students.
        records: of the prompts, in turn for images.
        n: images of a row.
        extractor: of the features.
        clip: of the CLIP score, where there is one.
        state: this process among the others.
        device: where it draws.
    """

    spec: EvalRun
    source: RowSource
    records: Sequence[dict[str, object]]
    n: int
    extractor: Extractor
    clip: PromptLikeness | None
    state: PartialState
    device: torch.device

    @property
    def prompts(self) -> list[str]:
        """Of every image, by number."""
        return [prompt_of(self.records[i % len(self.records)]) for i in range(self.n)]

    def store(self, plan: SamplingPlan) -> Store:
        """Where a plan's images are kept; the teacher's whole where others are compared with them."""
        whole = plan.role == "teacher" and {"pixels", "lpips"} & set(self.spec.metrics)
        kept = self.n if whole else min(self.n, self.spec.columns)
        folder = self.spec.output_dir / "work" / slug(plan.name)
        identity = self.extractor.identity
        return Store(folder, self.n, self.spec.feature_batch, identity.dim, kept, 1 + identity.clips)

    @property
    def frames(self) -> int:
        """Of what is drawn; 1 is an image."""
        return self.source.frames

    def draw(self, plans: Sequence[SamplingPlan]) -> tuple[dict[SamplingPlan, Store], list[str]]:
        """Draw what is missing of every plan; one pipeline at a time is in memory.

        Returns:
            Their stores, whole, and what was left out because the student cannot be drawn so, in words.
        """
        stores, left_out, hashed = {plan: self.store(plan) for plan in plans}, [], ""
        teacher = next(store for plan, store in stores.items() if plan.role == "teacher")
        for place in dict.fromkeys(plan.student for plan in plans):
            drawer = self.source.open(place, self.device)
            size, hashed = drawer.size, hashed or drawer.digest()  # the teacher comes first
            scores = [*([self.clip] if self.clip else []), *(self._against(teacher) if place else ())]
            scores += [*([motion_score] if self.frames > 1 else []), *drawer.scores]
            for plan in [plan for plan in plans if plan.student == place]:
                try:
                    generate = drawer.generate(plan)
                except (ValueError, StepdistillError) as error:
                    left_out.append(f"{plan.name}: {error}")
                    del stores[plan]
                    continue
                store = stores[plan]
                if self.state.is_main_process:
                    side = self.spec.side
                    shape = (*[self.frames] * (self.frames > 1), 3, *((side, side) if side else size))
                    store.open(self._facts(plan, size, store.kept, hashed) | drawer.facts(plan), shape)
                self.state.wait_for_everyone()
                units = partial(self._units, plan, store, generate)
                fill_store(store, units, self.extractor, scores, plan.name, self.state)
                if self.spec.latency and self.state.is_main_process and not store.noted(LATENCY):
                    store.note(LATENCY, self._latency(generate))
        return stores, left_out

    def _against(self, teacher: Store) -> list[ImageScore]:
        scores = [pixel_likeness(teacher.images)] if "pixels" in self.spec.metrics else []
        return [*scores, perceptual_likeness(teacher.images, self.device)] if "lpips" in self.spec.metrics else scores

    def _units(self, plan: SamplingPlan, store: Store, generate: Generate, mine: Sequence[int]) -> Iterator[Unit]:
        prompts = self.prompts
        for k in mine:
            numbers = store.rows(k)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = perf_counter()
            try:
                images, cost = generate([prompts[i] for i in numbers], batch=self.spec.batch, numbers=numbers)
            except ValueError as error:
                if "non-finite" not in str(error):
                    raise
                got, todo = f"images {numbers[0]} to {numbers[-1]} of {plan.name}: {error}", "sample with --dtype fp32"
                raise EvaluationError(problem(got, "finite images", "the stored images stay complete", todo)) from error
            if self.frames == 1:
                images = images.flatten(0, -4)  # a video pipeline gives its image as a clip of one frame
            facts = {"calls": cost.calls, "batches": cost.batches, "rows": cost.rows}
            facts |= {"seconds": perf_counter() - start, "peak_mem_mib": peak(), "size": list(images.shape[-2:])}
            self._keep(plan, numbers, images)
            yield Unit(k, numbers, cropped(images, self.spec.side), facts)

    def _keep(self, plan: SamplingPlan, numbers: Sequence[int], images: Tensor) -> None:
        """Images as files, where they are asked for."""
        if plan.role == "reference":
            return
        name, each = slug(plan.name), list(zip(numbers, images, strict=True))
        if self.spec.save_images:
            folder = self.spec.output_dir / "images" / name
            for i, image in each:  # a clip becomes a folder of its frames: animations join equal ones
                files = [folder / f"{i:06d}" / f"{f:04d}" for f in range(self.frames)]
                files = files if self.frames > 1 else [folder / f"{i:06d}"]
                for file, frame in zip(files, images_of_clip(image.reshape(-1, *image.shape[-3:])), strict=True):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    frame.save(file.with_suffix(".png"))
        if self.spec.export:
            kinds = {
                "geneval": GenEval,
                "t2i-compbench": partial(T2ICompBench, per_prompt=-(-self.n // len(self.records))),
                "vbench": partial(VBench, frame_rate=self.source.frame_rate),
            }
            out = kinds[self.spec.export](self.spec.output_dir / self.spec.export / name)
            for i, image in each:
                out.add(i % len(self.records), i // len(self.records), self.records[i % len(self.records)], image)

    def _latency(self, generate: Generate) -> dict[str, Any]:
        """Milliseconds of one image alone, from prompt to pixels."""
        times = []
        for _ in range(WARMUP + self.spec.latency):
            times.append(1000 * generate([self.prompts[0]], batch=1, numbers=[0])[1].seconds)
        kept = torch.tensor(times[WARMUP:], dtype=torch.float64)
        ends = {name: kept.quantile(q).item() for name, q in (("p50", 0.5), ("p90", 0.9))}
        return {**ends, "batch": 1, "warmup": WARMUP, "repetitions": self.spec.latency}

    def _beside(self) -> list[object]:
        """What scores of likeness to the teacher's images depend on; nothing where there are none."""
        likeness = sorted({"pixels", "lpips"} & set(self.spec.metrics))
        facts = self.source.teacher_facts
        return [*likeness, facts["steps"], facts["guidance"]] if likeness else []

    def _facts(self, plan: SamplingPlan, size: tuple[int, int], kept: int, hashed: str) -> dict[str, object]:
        """What images of any source, their features and scores depend on, and which files there are."""
        return {
            "teacher": hashed,
            "student": fingerprint(plan.student) if plan.student else None,
            "role": plan.role,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "seed": plan.seed,
            "n": self.n,
            "prompts": prompts_digest(self.prompts),
            "size": size,
            "dtype": self.spec.dtype,
            "device": self.device.type,
            "eval_res": self.spec.side,
            "features": self.extractor.identity.id,
            "batch": self.spec.batch,
            "feature_batch": self.spec.feature_batch,
            "clip": self.clip.facts if self.clip else None,
            "beside": self._beside() if plan.student else None,
            "kept": kept,
            "save_images": self.spec.save_images,
            "export": self.spec.export,
        }


def peak() -> float | None:
    """MiB that were in use on the CUDA device at most since they were last counted; None where there is none."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def fingerprint(place: str) -> str:
    """sha256 of a student's contract, router and weights."""
    folder, digest = folder_of(place), sha256()
    for pattern in PATTERNS:
        for file in sorted(folder.glob(pattern.replace("/*", "/**/*"))):
            name = file.relative_to(folder)
            if file.is_file() and file.suffix in (".json", ".safetensors", ".jinja") and name.name != "eval.json":
                digest.update(str(name).encode() + b"\0" + bytes.fromhex(file_digest(file)))
    return digest.hexdigest()
