"""Drawing: each way's pictures, unit by unit, into stores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from stepdistill import student
from stepdistill.errors import EvaluationError, StepdistillError, problem
from stepdistill.evaluate import Row
from stepdistill.evaluation.exports import GenEval, T2ICompBench
from stepdistill.evaluation.fill import Score, Unit, cropped, fill
from stepdistill.evaluation.prompts import prompt_of, sha256_of
from stepdistill.evaluation.scores import against_teacher, perceptual
from stepdistill.evaluation.spec import Draws
from stepdistill.evaluation.store import Store
from stepdistill.evaluation.subjects import Subject, Way, contract_of
from stepdistill.families.base import Family
from stepdistill.metrics.features import FeatureExtractor

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENCY = "latency.json"
WARMUP = 3  # pictures drawn before any is timed


@dataclass(frozen=True)
class Painter:
    """Draws ways into stores.

    Args:
        spec: what is asked for.
        family: the teacher's.
        records: of the prompts, in turn for pictures.
        extractor: of the features.
        scores: of each picture, beside its likeness to the teacher's.
        state: this process among the others.
    """

    spec: Draws
    family: Family
    records: Sequence[dict[str, object]]
    n: int
    extractor: FeatureExtractor
    scores: Sequence[Score]
    state: PartialState

    @property
    def prompts(self) -> list[str]:
        """Of every picture, by number."""
        return [prompt_of(self.records[i % len(self.records)]) for i in range(self.n)]

    def store(self, place: int, way: Way) -> Store:
        """Where a way's pictures are kept; the teacher's whole where others are compared with them."""
        whole = way.role == "teacher" and {"pixels", "lpips"} & set(self.spec.metrics)
        kept = self.n if whole else min(self.n, self.spec.columns)
        folder = self.spec.output_dir / "work" / f"{place:02d}-{slug(way.name)}"
        return Store(folder, self.n, self.spec.feature_batch, self.extractor.identity.dim, kept)

    def draw(self, ways: Sequence[Way]) -> tuple[dict[Way, Store], list[str]]:
        """Draw what is missing of every way; one pipeline at a time is in memory.

        Returns:
            Their stores, whole, and what was left out because the student cannot be drawn so, in words.
        """
        stores = {way: self.store(place, way) for place, way in enumerate(ways)}
        teacher = next(store for way, store in stores.items() if way.role == "teacher")
        hashed, left_out = "", []
        for place in dict.fromkeys(way.student for way in ways):
            subject = Subject.load(self.family, place, self.device, DTYPES[self.spec.dtype])
            hashed = hashed or student.base_hash(subject.pipe, self.family)
            scores = [*self.scores, *(self._against(teacher) if place else ())]
            for way in [way for way in ways if way.student == place]:
                try:
                    row = subject.row(way)
                except (ValueError, StepdistillError) as error:
                    left_out.append(f"{way.name}: {error}")
                    logger.warning("left out: %s", left_out[-1])
                    del stores[way]
                    continue
                if self.state.is_main_process:
                    stores[way].open(self._facts(way, subject, hashed))
                self.state.wait_for_everyone()
                self._fill(subject, way, row, stores[way], scores)
                self.state.wait_for_everyone()  # the teacher's pictures are whole before others are compared
        return stores, left_out

    @property
    def device(self) -> torch.device:
        """Where this process draws."""
        assert self.state.device is not None
        return self.state.device

    def _against(self, teacher: Store) -> list[Score]:
        found = [against_teacher(teacher)] if "pixels" in self.spec.metrics else []
        return [*found, perceptual(teacher, self.device)] if "lpips" in self.spec.metrics else found

    def _fill(self, subject: Subject, way: Way, row: Row, store: Store, scores: Sequence[Score]) -> None:
        mine = store.missing(self.state.process_index, self.state.num_processes)
        title = way.name if self.state.is_main_process and mine else ""
        units, total = self._units(subject, way, row, store, mine), sum(len(store.rows(k)) for k in mine)
        fill(store, units, self.extractor, scores, title, total)
        if self.spec.latency and self.state.is_main_process and not store.noted(LATENCY):
            store.note(LATENCY, self._latency(subject, way, row))

    def _units(self, subject: Subject, way: Way, row: Row, store: Store, mine: Sequence[int]) -> Iterator[Unit]:
        prompts = self.prompts
        for k in mine:
            numbers = store.rows(k)
            start = perf_counter()
            try:
                made, cost = subject.draw(way, row, [prompts[i] for i in numbers], numbers, self.spec.batch)
            except ValueError as error:
                if "non-finite" not in str(error):
                    raise
                got, todo = f"pictures {numbers[0]} to {numbers[-1]} of {way.name}: {error}", "draw with --dtype fp32"
                raise EvaluationError(problem(got, "numbers", "what is kept stays whole", todo)) from error
            seconds = perf_counter() - start
            self._keep(way, numbers, made)
            batches = -(-len(numbers) // self.spec.batch)
            told = {
                "calls": cost.calls,
                "batches": batches,
                "rows": cost.rows,
                "seconds": seconds,
                "peak_mem_mib": peak(),
            }
            yield Unit(k, numbers, cropped(made, self.spec.side), told | {"size": list(made.shape[2:])})

    def _keep(self, way: Way, numbers: Sequence[int], made: Tensor) -> None:
        """Pictures as files, where they are asked for."""
        if way.role == "reference":
            return
        name, each = slug(way.name), list(zip(numbers, made, strict=True))
        if self.spec.save_pictures:
            folder = self.spec.output_dir / "pictures" / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in each:
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:06d}.png")
        if self.spec.export:
            kinds = {
                "geneval": GenEval,
                "t2i-compbench": partial(T2ICompBench, per_prompt=-(-self.n // len(self.records))),
            }
            out = kinds[self.spec.export](self.spec.output_dir / self.spec.export / name)
            for i, picture in each:
                out.add(i % len(self.records), i // len(self.records), self.records[i % len(self.records)], picture)

    def _latency(self, subject: Subject, way: Way, row: Row) -> dict[str, Any]:
        """Milliseconds of one picture alone, from prompt to pixels."""
        times = []
        for _ in range(WARMUP + self.spec.latency):
            times.append(1000 * subject.draw(way, row, [self.prompts[0]], [0], 1)[1].seconds)
        found = torch.tensor(times[WARMUP:], dtype=torch.float64)
        ends = {name: found.quantile(q).item() for name, q in (("p50", 0.5), ("p90", 0.9))}
        return {**ends, "batch": 1, "warmup": WARMUP, "repetitions": self.spec.latency}

    def _facts(self, way: Way, subject: Subject, hashed: str) -> dict[str, object]:
        """All that the pictures, their features and scores depend on."""
        return {
            "teacher": hashed,
            "student": fingerprint(way.student) if way.student else None,
            "role": way.role,
            "steps": way.steps,
            "guidance": way.guidance,
            "seed": way.seed,
            "n": self.n,
            "prompts": sha256_of(self.prompts),
            "size": subject.size,
            "batch": self.spec.batch,
            "dtype": self.spec.dtype,
            "eval_res": self.spec.side,
            "features": self.extractor.identity.id,
            "feature_batch": self.spec.feature_batch,
            "clip": self.spec.clip,
            "metrics": sorted({"pixels", "lpips"} & set(self.spec.metrics)),
        }


def plan(spec: Draws) -> list[Way]:
    """The ways, the teacher's first. Raises StudentError for a student without a contract."""
    if len(set(spec.students)) < len(spec.students):
        why = "its rows would be there twice"
        raise EvaluationError(problem(f"students {list(spec.students)}", "each once", why, "leave one out"))
    own = {place: len(contract_of(place).timesteps) for place in spec.students}
    few = sorted({*(spec.steps or own.values())} - {spec.teacher_steps}, reverse=True)
    common: dict[str, Any] = {"student": None, "guidance": spec.teacher_guidance, "role": "teacher", "seed": spec.seed}
    ways = [Way(name=called("teacher", steps), steps=steps, **common) for steps in (spec.teacher_steps, *few)]
    if spec.reference == "teacher":
        ways.insert(0, replace(ways[0], name="reference", role="reference", seed=spec.reference_seed))
    for place, who in zip(spec.students, labels(spec.students), strict=True):
        for steps in spec.steps or (None,):
            for w in spec.guidance or (None,):
                name = called(who, steps or own[place]) + ("" if w is None else f", w = {w:g}")
                ways.append(Way(name=name, role="student", student=place, steps=steps, guidance=w, seed=spec.seed))
    return ways


def called(who: str, steps: int) -> str:
    """Such as `teacher, 4 steps`."""
    return f"{who}, {steps} step{'s' * (steps > 1)}"


def labels(places: Sequence[str]) -> list[str]:
    """The last name of each path, or as much of its end as tells it from the others."""
    parts = [Path(place).parts for place in places]
    deep = next(k for k in range(1, max(map(len, parts), default=1) + 1) if len({p[-k:] for p in parts}) == len(parts))
    return ["/".join(p[-deep:]) for p in parts]


def peak() -> float | None:
    """MiB that were in use on the CUDA device at most since the last call; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return found


def fingerprint(place: str) -> str:
    """sha256 of a student's contract and weights."""
    folder, found = student.folder_of(place), sha256()
    for file in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        parts = file.relative_to(folder).parts
        if not parts[0].startswith(("checkpoint-", "best", "runs", "samples")) and file.name != "eval.json":
            found.update("/".join(parts).encode() + b"\0" + sha256(file.read_bytes()).digest())
    return found.hexdigest()


def slug(name: str) -> str:
    """A name as a file's."""
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in name.replace(", ", "_").replace(" ", "-"))
