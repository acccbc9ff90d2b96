"""A student's LoRA fused into its base: a student folder with a whole network, which needs no LoRA loader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils import recurse_remove_peft_layers

from stepdistill.core.errors import StudentError, problem
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.students.contract import (
    Network,
    read_contract,
    scheduler_class,
    teacher,
    write_contract,
)
from stepdistill.students.proof import prove
from stepdistill.students.room import check_student_room, emptied
from stepdistill.students.single import in_memory, into_pipeline
from stepdistill.students.write import keep_proof


def fuse_student(source: Path, target: Path, overwrite: bool = False) -> float:
    """Write the student of a LoRA folder as a folder of kind `full`, in float32, and prove it.

    Args:
        target: a new or empty folder.
        overwrite: whether `target` may hold an earlier student, which is replaced.

    Returns:
        The largest difference of final latents from the LoRA's, relative to the teacher's largest value.

    Raises:
        StudentError: the source is no LoRA, or the difference is too large.
        OutputError: the target is in use, or cannot be written.
    """
    contract = read_contract(source)
    if contract.lora is None:
        got, why = f"{source}, which holds {contract.kind} weights", "there is nothing to fuse"
        raise StudentError(problem(got, "a student that is a LoRA", why, "give such a folder"))
    family = teacher(contract)
    check_student_room(target, [source, family.pretrained_teacher_model, *family.teacher_loras], overwrite)
    pipe, backbone = in_memory(source, contract, family)
    plain = family.load()
    into_pipeline(plain, source, contract, family, "student")
    fuse_loras(plain)
    net: Any = recurse_remove_peft_layers(family.network(plain))
    net.save_pretrained(emptied(target) / family.network_name)
    scheduler = scheduler_class(contract).from_pretrained(source, subfolder="scheduler")
    scheduler.save_pretrained(target / "scheduler")
    size = sum(p.numel() for p in net.state_dict().values())
    network = Network(class_name=type(net).__name__, parameters=size, fused=True)
    contract = replace(contract, kind="full", lora=None, network=network, proof=None)
    write_contract(target, contract)
    into_pipeline(plain, target, contract, family, "student")
    return keep_proof(target, contract, prove(contract, family, plain, pipe, backbone, "student", 0))
