"""A folder of K students of one teacher: join them, load them into one plain pipeline, route prompts to them.

Multi-student distillation, Song et al. 2024, https://arxiv.org/abs/2410.23274: one student generates the images of a
prompt, so K students take no more time than one. As LoRAs on one base they take little more memory. The paper's smaller
students are whole networks, and each takes its own memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.errors import StudentError, problem
from stepdistill.data.routing import Router, Routing, read_routing
from stepdistill.families.base import Family
from stepdistill.networks.pipeline_loras import adapters_on, switch_on
from stepdistill.students.card import write_card, write_multi_card
from stepdistill.students.contract import (
    CONTRACT,
    STUDENTS,
    Contract,
    MultiContract,
    is_multi,
    read_contract,
    read_multi,
    teacher,
    write_contract,
)
from stepdistill.students.room import check_student_room, emptied
from stepdistill.students.single import load_one

EACH = ("generator", "latents", "negative_prompt")  # arguments of a call that may have one entry for each prompt
LEFT_OUT = ("checkpoint-*", "runs")  # parts of a training run that its student does not need


@dataclass(frozen=True)
class Students:
    """K students in one plain pipeline, and the router between them; `students(prompts)` generates images.

    Args:
        pipe: the pipeline.
        family: of the base.
        router: from a prompt to the number of its student.
        adapters: for each student the adapters to activate: its own, after those that were active before; none
            if the students are whole networks.
        nets: the denoiser of each student; the same one for all if they are adapters.
        calls, schedulers: each student's keyword arguments of the call, and its scheduler.
    """

    pipe: Any
    family: Family
    router: Router
    adapters: tuple[tuple[str, ...], ...]
    nets: tuple[Any, ...]
    calls: tuple[dict[str, Any], ...]
    schedulers: tuple[Any, ...]

    def route(self, prompts: Sequence[str]) -> dict[int, list[int]]:
        """The indices of each student's prompts, in order, without the students that have none."""
        places: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(self.router.route(prompt), []).append(place)
        return places

    @contextmanager
    def use(self, k: int) -> Iterator[None]:
        """Let the pipeline use student k inside the context, and restore it afterwards."""
        net, scheduler = self.pipe.components[self.family.network_name], self.pipe.scheduler
        active = adapters_on(net) if self.adapters[k] else []
        try:
            self.choose(k)
            yield
        finally:
            self.pipe.register_modules(**{self.family.network_name: net, "scheduler": scheduler})
            if active:
                switch_on(net, active)

    def choose(self, k: int) -> None:
        """Let the pipeline use student k from now on."""
        self.pipe.register_modules(**{self.family.network_name: self.nets[k], "scheduler": self.schedulers[k]})
        if self.adapters[k]:
            switch_on(self.nets[k], self.adapters[k])

    def __call__(self, prompts: Sequence[str] | str, **call: Any) -> Any:  # noqa: ANN401
        """Images in the order of the prompts: a list, or one tensor or array by the pipeline's `output_type`.

        The pipeline is called once for each student that has prompts, because adapters cannot change within a batch.

        Args:
            prompts: N of them.
            call: further arguments of the pipeline's call, which override the contract's. A list of N generators or
                negative prompts, or (N, C, h, w) latents, is divided among the students like the prompts. With a
                single generator an image depends on the other prompts; with one for each prompt it does not.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = {name: call.pop(name) for name in EACH if isinstance(call.get(name), list | tuple | Tensor)}
        odd = [f"{len(values)} {name}" for name, values in each.items() if len(values) != len(prompts)]
        if odd or not prompts:
            got = ", ".join(odd) or "no prompts"
            expected = f"one for each of {len(prompts)} prompts" if odd else "at least one prompt"
            why, todo = "each image has one prompt", "pass a list of prompts, and one value for each of them"
            raise ValueError(problem(got, expected, why, todo))
        rows: dict[int, Any] = {}
        for k, places in self.route(prompts).items():
            shares = {name: _at(values, places) for name, values in each.items()}
            with self.use(k):
                images = self.pipe(prompt=[prompts[i] for i in places], **{**self.calls[k], **call, **shares})[0]
            if len(images) != len(places):
                got, why = f"{len(images)} images of {len(places)} prompts", "images are returned in the prompts' order"
                todo = "repeat a prompt instead of setting num_images_per_prompt"
                raise ValueError(problem(got, "one image for each prompt", why, todo))
            rows |= dict(zip(places, images, strict=True))
        ordered = [rows[i] for i in range(len(prompts))]
        if isinstance(ordered[0], Tensor):
            return torch.stack(ordered)
        return np.stack(ordered) if isinstance(ordered[0], np.ndarray) else ordered


def _at(values: Any, places: list[int]) -> Any:  # noqa: ANN401
    return values[places] if isinstance(values, Tensor) else [values[i] for i in places]


def load_several(pipe: DiffusionPipeline, folder: Path, adapter_name: str = "student") -> Students:
    """Load all students of a folder into a plain pipeline of their base, as adapters `student-0`, `student-1`, ...

    Whole networks are placed on the current device of the pipeline, so move the pipeline first. The pipeline itself
    uses student 0 until another one is chosen.

    Raises:
        StudentError: the folder is incomplete, or does not fit the pipeline.
    """
    contract, routing = read_multi(folder), read_routing(folder)
    if routing.router.students != contract.students:
        got = f"a router of {routing.router.students} and a contract of {contract.students} students in {folder}"
        why, todo = "some prompts would have no student", "join the students again"
        raise StudentError(problem(got, "the same number in both", why, todo))
    family, places = teacher(contract), [folder / STUDENTS / str(k) for k in range(contract.students)]
    part, names = family.network_name, [f"{adapter_name}-{k}" for k in range(contract.students)]
    base, nets, calls, schedulers = pipe.components.get(part), [], [], []
    for k, place in enumerate(places):
        if k:  # a whole network has replaced it
            pipe.register_modules(**{part: base})
        calls.append(load_one(pipe, place, names[k]))
        nets.append(family.network(pipe))
        schedulers.append(pipe.scheduler)
    adapters = [()] * len(names)
    if read_contract(places[0]).kind == "lora":
        styles = [name for name in adapters_on(nets[0]) if name not in names]  # loading keeps active adapters active
        adapters = [(*styles, name) for name in names]
    students = Students(pipe, family, routing.router, tuple(adapters), tuple(nets), tuple(calls), tuple(schedulers))
    students.choose(0)
    return students


def join_students(out: Path, folders: Sequence[Path], move: bool = False, overwrite: bool = False) -> Path:
    """Join the folders of K students into one folder, `out`. Each student keeps its own proof.

    Args:
        out: a new or empty folder.
        folders: of the runs over the K parts of one `Partition`, in any order.
        move: move the folders whole instead of copying what the students need.
        overwrite: whether `out` may hold an earlier student, or several, which are replaced.

    Raises:
        StudentError: a student is missing, given twice or unproven, or is of another teacher or partition.
        OutputError: `out` is in use, or cannot be written.
    """
    check_student_room(out, folders, overwrite)
    order = _ordered(folders)
    emptied(out)
    for k, folder in enumerate(order):
        to = out / STUDENTS / str(k)
        if move:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, to)
        else:
            shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*LEFT_OUT))
        write_card(to, read_contract(to))  # the code in the card names the folder
    first = read_contract(out / STUDENTS / "0")
    shared = {name: vars(first)[name] for name in vars(first).keys() & MultiContract.__dataclass_fields__.keys()}
    contract = MultiContract(**{**shared, "kind": "multi", "students": len(order)})
    routing = Routing(None, read_routing(out / STUDENTS / "0").router)
    write_contract(out, contract)
    routing.save(out)
    write_multi_card(out, contract)
    return out


def _ordered(folders: Sequence[Path]) -> list[Path]:
    """The folders in the order of their students' numbers, after all checks."""
    if not folders:
        why, todo = "there is nothing to join", "name the folders"
        raise StudentError(problem("no folder", "the folders of all students", why, todo))
    numbered: dict[int, Path] = {}
    first: tuple[dict[str, object], Path] | None = None
    for folder in folders:
        if is_multi(folder):
            why, todo = "its students have been joined already", f"name the folders in its {STUDENTS}/"
            raise StudentError(problem(f"{folder}, a folder of several students", "one student", why, todo))
        contract = read_contract(folder)
        if contract.adapters is not None:
            got, why = f"{folder}, which holds guidance adapters", "a network can have only one set of them at a time"
            raise StudentError(problem(got, "a LoRA or a whole network", why, "train LoRAs instead"))
        routing = read_routing(folder)
        if contract.proof is None:
            expected = "a folder that was compared with the trained student"
            why, todo = f"{folder / CONTRACT} records no comparison that passed", "train the student again"
            raise StudentError(problem(f"no proof of {folder}", expected, why, todo))
        facts = _facts(contract, routing)
        odd = [name for name in facts if first and facts[name] != first[0][name]]
        if first and odd:
            got = f"{folder} and {first[1]}, which differ in {', '.join(odd)}"
            why = "together the students replace one teacher, each on its part of one partition"
            todo = "train all students with the same settings"
            raise StudentError(problem(got, "students of one teacher and one partition", why, todo))
        first = first or (facts, folder)
        if routing.student is None or routing.student in numbered:
            got = f"student {routing.student} both in {numbered.get(routing.student or 0)} and in {folder}"
            why, todo = "each part of the prompts has one student", "name the folder of another student"
            raise StudentError(problem(got, "each student once", why, todo))
        numbered[routing.student] = folder
    count = read_routing(folders[0]).router.students
    missing = [k for k in range(count) if k not in numbered]
    if missing:
        got = f"{len(folders)} of {count} students, without {missing}"
        why, todo = "their prompts would have no student", "train the missing students, and name their folders"
        raise StudentError(problem(got, "all students", why, todo))
    return [numbered[k] for k in range(count)]


def _facts(contract: Contract, routing: Routing) -> dict[str, object]:
    """What all students of a folder must have in common, by a name for error messages."""
    return {
        "kind": contract.kind,
        "the family of the base": contract.family["type"],
        "the family's arguments": teacher(contract).arguments(),
        "the weights of the base": contract.base_hash,
        "the number of students": routing.router.students,
        "the router": routing.router,
    }
