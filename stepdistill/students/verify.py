"""Write a finished student in other formats, and compare every format with the library's own sampler."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import file_digest
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.read import read_lora
from stepdistill.networks.lora.tensors import Format
from stepdistill.students.contract import STUDENTS, WEIGHTS, Contract, is_multi, read_contract, scheduler_class, teacher
from stepdistill.students.lora.comfyui import WORKFLOW, read_workflow, write_workflow
from stepdistill.students.lora.files import convert_lora, write_lora
from stepdistill.students.proof import prove, prove_workflow
from stepdistill.students.single import in_memory, into_pipeline

logger = logging.getLogger(__name__)

OTHERS: tuple[Format, ...] = ("kohya", "comfyui")
# its reader of Flux expects the full size, and that of klein knows the blocks alone
KOHYA_IN_DIFFUSERS = ("sd", "sdxl")


def export_formats(folder: Path, formats: Sequence[Format]) -> None:
    """Write the LoRA of a student folder in these formats, too; for ComfyUI also a workflow file.

    The files are copied to a folder with those of other students, so each has a name of its own: the base model, the
    number of steps and the start of the weights' sha256.
    """
    if not formats:
        return
    remove_formats(folder)
    contract = read_contract(folder)
    base = PurePath(contract.base_model).name.removesuffix(".safetensors")
    stem = f"{base}_{len(contract.timesteps)}-steps_{file_digest(folder / WEIGHTS)[:8]}"
    for to in formats:
        convert_lora(folder, folder / f"{stem}_{to}.safetensors", to)
    if "comfyui" in formats:
        try:
            write_workflow(folder, contract, f"{stem}_comfyui.safetensors")
        except ConfigError as error:
            logger.warning("%s was not written: %s", WORKFLOW, error)


def format_files(folder: Path) -> dict[Format, Path]:
    """The files of a student folder in other formats."""
    return {to: file for to in OTHERS for file in folder.glob(f"*_{'[0-9a-f]' * 8}_{to}.safetensors")}


def remove_formats(folder: Path) -> None:
    """Remove the files that an earlier run wrote in other formats."""
    for file in (*format_files(folder).values(), folder / WORKFLOW):
        file.unlink(missing_ok=True)


def verify_student(folder: Path) -> float:
    """Compare a student folder in a plain pipeline with the library's own sampler, from the files alone, in float32.

    The library takes a LoRA's scale from the contract. The plain pipeline takes it from the file's metadata.

    Returns:
        The largest difference of final latents, relative to the teacher's largest value.

    Raises:
        StudentError: the folder is not a complete student folder, or the pipeline visits other noise levels.
    """
    if is_multi(folder):
        return _worst(verify_student(place) for place in sorted(folder.glob(f"{STUDENTS}/*")))
    contract = read_contract(folder)
    family = teacher(contract)
    return _difference(folder, contract, family, *in_memory(folder, contract, family))


def _difference(folder: Path, contract: Contract, family: Family, pipe: DiffusionPipeline, backbone: Backbone) -> float:
    """That of the folder in a plain pipeline from the student in memory."""
    plain = family.load()
    into_pipeline(plain, folder, contract, family, "student")
    return prove(contract, family, plain, pipe, backbone, "student", 0).difference


def _worst(differences: Iterable[float]) -> float:
    """The largest; nan if one is, which `max` would pass over."""
    return float(np.max([*differences]))


def verify_formats(folder: Path) -> dict[str, float]:
    """The largest difference of each format in the folder, as `verify_student` measures it.

    Diffusers loads a file of another format if it can for this family; otherwise the file is converted back first. A
    workflow is sampled by the rules of ComfyUI's nodes (key `workflow`).

    Raises:
        StudentError: the folder is not a complete student folder, or one of its files cannot be read.
    """
    if is_multi(folder):
        each = [verify_formats(place) for place in sorted(folder.glob(f"{STUDENTS}/*"))]
        names = dict.fromkeys(name for one in each for name in one)
        return {name: _worst(one[name] for one in each if name in one) for name in names}
    contract = read_contract(folder)
    family = teacher(contract)
    pipe, backbone = in_memory(folder, contract, family)
    differences = {"diffusers": _difference(folder, contract, family, pipe, backbone)}
    for to, file in format_files(folder).items():
        plain = _loaded(folder, file, to, contract, family)
        differences[to] = prove(contract, family, plain, pipe, backbone, "student", 0).difference
    if (folder / WORKFLOW).exists():
        nodes = read_workflow(folder, contract)
        differences["workflow"] = prove_workflow(contract, family, pipe, backbone, nodes)
    return differences


def _loaded(folder: Path, file: Path, to: Format, contract: Contract, family: Family) -> DiffusionPipeline:
    """A plain pipeline with the LoRA of a file and the folder's scheduler."""
    layout = family.lora_layout()
    lora = read_lora(file, layout)
    plain: Any = family.load()
    if to == "kohya" and layout.family in KOHYA_IN_DIFFUSERS:
        try:
            plain.load_lora_weights(folder, weight_name=file.name, adapter_name="student")
        except (OSError, ValueError, RuntimeError) as error:
            got, todo = f"{file}, which Diffusers cannot load", "convert the student again"
            raise StudentError(problem(got, "a LoRA of the base model", str(error), todo)) from error
        plain.scheduler = scheduler_class(contract).from_pretrained(folder, subfolder="scheduler")
        return plain
    with TemporaryDirectory() as place:
        shutil.copytree(folder / "scheduler", Path(place) / "scheduler")
        write_lora(lora, Path(place) / WEIGHTS, "diffusers")
        into_pipeline(plain, Path(place), contract, family, "student")
    return plain
