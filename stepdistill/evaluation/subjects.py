"""What is drawn: a teacher and its students, each in some numbers of steps and at some guidance scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusers import DiffusionPipeline

from stepdistill.config.registry import every, find
from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.base import Family
from stepdistill.students.contract import Contract, read_contracts, teacher
from stepdistill.students.draw.pipeline import DrawOptions
from stepdistill.students.single import folder_of

Role = Literal["reference", "teacher", "student"]


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
    """

    name: str
    role: Role
    student: str | None
    steps: int | None
    guidance: float | None
    seed: int

    @property
    def options(self) -> DrawOptions:
        """What differs from the student's contract."""
        return DrawOptions(steps=self.steps, guidance_scale=self.guidance)


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
    if where.endswith(".safetensors"):
        if chosen is None:
            todo = f"say --family, one of {sorted(cls.__module__.rpartition('.')[2] for cls in known.values())}"
            raise ConfigError(problem(f"the single file {place}", "its family", "the file does not name one", todo))
        return chosen
    try:
        index: Any = DiffusionPipeline.load_config(where)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(problem(f"teacher {place}", "a pipeline", why, "check the name, and the network")) from error
    found = index["_class_name"]
    if found not in known or chosen is not None and known[found] is not type(chosen):
        expected = chosen.pipeline_class.__name__ if chosen else f"one of {sorted(known)}"
        todo = "name the teacher of the students" if contracts else "name its family by --family, or write one"
        raise ConfigError(problem(f"a {found} in {place}", expected, "a family says how its network is called", todo))
    return chosen or known[found](pretrained_teacher_model=place)
