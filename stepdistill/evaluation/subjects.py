"""Who is drawn: a teacher and its students, each in some numbers of steps and at some scales of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.config import load as config
from stepdistill.config.registry import every, find
from stepdistill.core.cost import Cost
from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.students import single as student
from stepdistill.students.contract import STUDENTS, Contract, is_multi, read_contract, teacher
from stepdistill.students.draw.call import Row, generate, student_row, teacher_row
from stepdistill.students.load import load_student
from stepdistill.students.several import Students, generate_each

Role = Literal["reference", "teacher", "student"]


@dataclass(frozen=True, kw_only=True)
class Way:
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


def contract_of(place: str) -> Contract:
    """The contract of a student, of several the first one's."""
    folder = student.folder_of(place)
    return read_contract(folder / STUDENTS / "0" if is_multi(folder) else folder)


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


@dataclass(frozen=True)
class Subject:
    """A pipeline that draws as the teacher, or as one student.

    Args:
        size: height and width in pixels.
        call: the student's own call, or several students; None of the teacher.
        schedulers: the teacher's, which knows the noise process, and the student's own.
    """

    family: Family
    pipe: DiffusionPipeline
    size: tuple[int, int]
    contract: Contract | None
    call: Mapping[str, Any] | Students | None
    schedulers: tuple[Any, Any]

    @staticmethod
    def load(
        family: Family, place: str | None, size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype
    ) -> Subject:
        """The teacher, or the student at `place` in a fresh pipeline of it. Raises StudentError, ConfigError.

        Args:
            size: height and width in pixels; None is what the teacher was trained at.
        """
        pipe = family.load()
        own, side = pipe.scheduler, family.native_side(pipe)
        pipe.to(device)
        if dtype != torch.float32:  # which it is; Diffusers warns of any cast
            pipe.to(dtype)
        call = load_student(pipe, place) if place else None
        contract = contract_of(place) if place else None
        return Subject(family, pipe, size or (side, side), contract, call, (own, pipe.scheduler))

    def row(self, way: Way) -> Row:
        """The way as a scheduler and a call. Raises ConfigError or ValueError where the student cannot be drawn so."""
        if self.contract is None:
            assert way.steps is not None and way.guidance is not None
            return teacher_row(self.family, self.pipe, way.steps, way.guidance, way.name)
        if way.steps is not None:
            method = config.read(Method, self.contract.method, f"the method of {way.student}")
            self.pipe.scheduler = self.schedulers[0]
            row = replace(student_row(self.family, method, self.pipe, way.steps), name=way.name)
            self.pipe.scheduler = self.schedulers[1]
        else:
            row = Row(way.name, self.schedulers[1], self.contract.call, self.family)
        call = {key: value for key, value in row.call.items() if key not in ("height", "width")}
        if way.guidance is not None and isinstance(self.call, GuidedCall):
            self.call.guidance_scale = way.guidance
        elif way.guidance is not None:
            call |= self.family.guidance(way.guidance)
        return replace(row, call=call)

    def draw(
        self, way: Way, row: Row, prompts: Sequence[str], numbers: Sequence[int], batch: int
    ) -> tuple[Tensor, Cost]:
        """Images (B, 3, H, W) uint8 and their cost, see `stepdistill.students.draw.call.generate`."""
        if isinstance(self.call, Students):
            alike = None if way.steps is way.guidance is None else row  # else each under its own contract
            return generate_each(self.call, prompts, way.seed, alike, batch, numbers, self.size)
        return generate(self.pipe, row, prompts, way.seed, batch, numbers=numbers, size=self.size)
