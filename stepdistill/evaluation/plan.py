"""Sampling plans: a teacher and its students, at several numbers of steps and guidance scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from stepdistill.config.registry import every, find
from stepdistill.core.errors import ConfigError, EvaluationError, problem
from stepdistill.core.files import is_single_file
from stepdistill.evaluation.inputs import TEACHER, labels
from stepdistill.evaluation.spec import EvalRun
from stepdistill.families.base import Family
from stepdistill.students.contract import Contract, read_contracts, teacher
from stepdistill.students.draw.pipeline import DrawOptions, check_one_lora
from stepdistill.students.load import folder_of
from stepdistill.students.single import check_use

Role = Literal["reference", "teacher", "student"]
STEPS, GUIDANCE = 50, 7.5  # of a pipeline at its best, where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """One way to draw, a row of the report.

    Args:
        name: what the report calls it.
        role: `reference` is the teacher under other noises, which the rows are compared with.
        student: the student's folder or hub id; None is the teacher.
        steps: None is the student's own number.
        guidance: None is the student's own scale.
        seed: of the noises.
        lora_strength: of the LoRA beside; None without one.
    """

    name: str
    role: Role
    student: str | None
    steps: int | None
    guidance: float | None
    seed: int
    lora_strength: float | None = None

    @property
    def options(self) -> DrawOptions:
        """What differs from the student's contract."""
        return DrawOptions(steps=self.steps, guidance_scale=self.guidance)


def sampling_plans(spec: EvalRun) -> list[SamplingPlan]:
    """The plans, the teacher's first.

    Raises:
        StudentError: a student without a contract, a training assistant, or with a LoRA beside it one that is no LoRA.
    """
    for place in spec.students:
        check_use(place, contract_of(place))
    for place in spec.students if spec.lora else ():
        check_one_lora(place)
    trained = {place: len(contract_of(place).timesteps) for place in spec.students}
    best, w = at_its_best(spec)
    few = sorted({*(spec.steps or trained.values())} - {best}, reverse=True)
    common: dict[str, Any] = {"student": None, "guidance": w, "role": "teacher", "seed": spec.seed}
    beside = None if spec.lora is None else spec.lora[1]
    plans = [
        SamplingPlan(name=called("teacher", steps) + _with(spec, beside), steps=steps, lora_strength=beside, **common)
        for steps in (best, *few)
    ]
    who = dict(zip(spec.students, labels(spec.students), strict=True))
    strengths = spec.lora_strengths or (beside,)
    for place, steps, w, strength in product(spec.students, spec.steps or (None,), spec.guidance or (None,), strengths):
        name = called(who[place], steps or trained[place]) + ("" if w is None else f", w = {w:g}")
        name += _with(spec, strength)
        options = {"student": place, "steps": steps, "guidance": w, "lora_strength": strength}
        plans.append(SamplingPlan(name=name, role="student", seed=spec.seed, **options))
    return with_reference(spec, plans)


def at_its_best(spec: EvalRun) -> tuple[int, float]:
    """Steps and guidance scale of a pipeline that all is compared with."""
    w = spec.teacher_guidance
    return spec.teacher_steps or STEPS, GUIDANCE if w is None else w


def with_reference(spec: EvalRun, plans: Sequence[SamplingPlan]) -> list[SamplingPlan]:
    """The plans, before them the first one under other noises where the rows are compared with that.

    Raises EvaluationError for two of one name.
    """
    names = [plan.name for plan in plans]
    if len({slug(name) for name in names}) < len(names):
        why = "their files would overwrite each other's"
        raise EvaluationError(problem(f"rows {names}", "different names", why, "rename a folder"))
    if spec.reference != TEACHER:
        return list(plans)
    return [replace(plans[0], name="reference", role="reference", seed=spec.reference_seed), *plans]


def size_of(students: Sequence[str]) -> tuple[int, int] | None:
    """Height and width that all students draw, so that noises are equal; None where there are none.

    Raises EvaluationError where they differ.
    """
    sizes = {place: contract_of(place).resolution for place in students}
    if len(set(sizes.values())) > 1:
        why = "the initial noise depends on the size, and distances under different noise are not comparable"
        raise EvaluationError(problem(f"students of sizes {sizes}", "one size", why, "evaluate them separately"))
    return next(iter(sizes.values()), None)


def called(who: str, steps: int) -> str:
    """Such as `teacher, 4 steps`."""
    return f"{who}, {steps} step{'s' * (steps > 1)}"


def _with(spec: EvalRun, strength: float | None) -> str:
    """Such as `, ink 0.8`, where there is a LoRA beside."""
    if spec.lora is None:
        return ""
    place = Path(spec.lora[0])
    return f", {place.parent.name if place.name == LORA_WEIGHT_NAME_SAFE else place.stem} {strength:g}"


def slug(name: str) -> str:
    """A name as a file's."""
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in name.replace(", ", "_").replace(" ", "-"))


def contract_of(place: str) -> Contract:
    """The contract of a student, of several the first one's."""
    return read_contracts(folder_of(place))[0]


def family_of(place: str, kind: str | None, contracts: Sequence[Contract]) -> Family:
    """The family of a teacher: of `kind`, else that of its students, else the one with its class of pipeline.

    Args:
        place: a pipeline folder, a hub id, a `.safetensors` file or the name of a bundled teacher.
        kind: a module of stepdistill.families, or a dotted path.

    Raises:
        ConfigError: there is none.
    """
    known = {cls.pipeline_class.__name__: cls for cls in every(Family)}
    chosen: Family | None = None
    if kind is not None:
        chosen = find(Family, kind)(pretrained_teacher_model=place)
    elif contracts:
        chosen = replace(teacher(contracts[0]), pretrained_teacher_model=place)
    where = (chosen or next(iter(known.values()))(pretrained_teacher_model=place)).location()
    if is_single_file(where):
        if chosen is None:
            todo = f"pass --family, one of {sorted(cls.__module__.rpartition('.')[2] for cls in known.values())}"
            raise ConfigError(problem(f"the single file {place}", "its family", "the file does not state it", todo))
        return chosen
    try:
        index: Any = DiffusionPipeline.load_config(where)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(problem(f"teacher {place}", "a pipeline", why, "check the name, and the network")) from error
    name = index["_class_name"]
    fits = chosen is not None and name in (chosen.pipeline_class.__name__, *chosen.needs.relatives)
    if not fits and (name not in known or chosen is not None):
        expected = chosen.pipeline_class.__name__ if chosen else f"one of {sorted(known)}"
        todo = "pass the teacher of the students" if contracts else "pass its family with --family, or write one"
        raise ConfigError(
            problem(f"a {name} in {place}", expected, "the family defines how its network is called", todo)
        )
    return chosen or known[name](pretrained_teacher_model=place)
