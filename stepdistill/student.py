"""The student folder: write it, prove it, verify it, load it into a plain pipeline, train on from it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepdistill.backbone import Backbone
from stepdistill.card import is_non_commercial as is_non_commercial
from stepdistill.card import snippet as snippet
from stepdistill.card import warn_of_licence as warn_of_licence
from stepdistill.card import write_card
from stepdistill.contract import (
    CONTRACT,
    Contract,
    base_hash,
    read_contract,
    save,
    teacher,
)
from stepdistill.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.folder import base_of, name_of, write_unproven
from stepdistill.methods.base import Method
from stepdistill.proof import prove
from stepdistill.roles import Ema, Lora, LoraSpec
from stepdistill.schema import locate

logger = logging.getLogger(__name__)
WEIGHTS = "pytorch_lora_weights.safetensors"


def write(
    folder: Path,
    *,
    family: Family,
    pipe: DiffusionPipeline,
    backbone: Backbone,
    role: str,
    method: Method,
    resolution: tuple[int, int],
    seed: int = 0,
    steps: int | None = None,
    licence: str | None = None,
) -> float:
    """Write a student folder, load it into a fresh plain pipeline, and compare with the student in memory.

    Args:
        pipe: the pipeline that `backbone` trains in; its scheduler is the teacher's.
        role: the LoRA or average that becomes the student.
        resolution: height and width in pixels.
        seed: of the comparison's noise.
        steps: of the contract's sampler; None takes the method's.
        licence: of the base; None reads the base's model card.

    Returns:
        The largest difference of final latents, relative to the teacher's largest value.

    Raises:
        StudentError: the difference is above 1e-4 (more in half precision), or other noise levels are
            visited. The folder stays, with a contract that says that it was not proven.
    """
    plain = family.load()
    contract = write_unproven(
        folder,
        family=family,
        pipe=pipe,
        backbone=backbone,
        role=role,
        method=method,
        resolution=resolution,
        base=base_of(plain, family, licence),
        steps=steps,
    )
    dtype = next(backbone.net.parameters()).dtype
    # the base was rounded in training and the LoRA was not; `net.to` would warn of it
    nn.Module.to(family.network(plain), dtype).float()
    _load(plain, folder, contract, family, "student")
    proof = prove(contract, family, plain, pipe, backbone, role, seed)
    if not proof.difference <= proof.tolerance:
        raise StudentError(
            problem(
                f"a difference of {proof.difference:.3g} between {folder} in plain Diffusers and the student",
                f"at most {proof.tolerance:g} of the teacher's largest value, in {proof.dtype}",
                "the folder draws other pictures than training did",
                "do not share it; compare its LoRA metadata and scheduler with distill_config.json",
            )
        )
    contract = replace(contract, proof=proof)
    save(folder, contract)
    write_card(folder, contract)
    return proof.difference


def verify(folder: Path) -> float:
    """Compare a student folder in a plain pipeline with our own sampler, from the files alone, in float32.

    On one side the LoRA's scale comes from the contract, on the other from the file's metadata.

    Returns:
        The largest difference of final latents, relative to the teacher's largest value.

    Raises:
        StudentError: the folder is no whole student folder, or other noise levels are visited.
    """
    contract = read_contract(folder)
    family, lora = teacher(contract), contract.lora
    pipe, plain = family.load(), family.load()
    spec = LoraSpec(rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules)
    backbone = Backbone(family.network(pipe), spec, lora.target_modules)
    backbone.add("student", Lora())
    _load_state(backbone, "student", _read_lora(folder / WEIGHTS, family)[0], folder)
    _load(plain, folder, contract, family, "student")
    return prove(contract, family, plain, pipe, backbone, "student", 0).difference


def load_student(
    pipe: DiffusionPipeline, folder_or_hub_id: str | Path, adapter_name: str = "student"
) -> dict[str, Any]:
    """Load a student's LoRA and scheduler into a plain pipeline of its base.

    Adapters that are active there, such as a style, stay so, at the strength that they have.

    Returns:
        Keyword arguments of the pipeline's call: `pipe(prompt, **load_student(pipe, folder))`.

    Raises:
        StudentError: there is no student, or it does not fit the pipeline.
    """
    folder = _folder(folder_or_hub_id)
    contract = read_contract(folder)
    family = teacher(contract)
    name = family.network_name
    if name not in pipe.components:
        raise StudentError(
            problem(
                f"a {type(pipe).__name__}, which has no {name}",
                f"a {family.pipeline_class.__name__} or a relative of it",
                f"the student in {folder} is a LoRA on the {name} of {contract.base_model}",
                "load that base",
            )
        )
    if contract.proof is None:
        logger.warning("%s was never compared with the trained student: try `stepdistill verify`", folder)
    dtype = next(family.network(pipe).parameters()).dtype
    if contract.base_hash.get(name_of(dtype)) != base_hash(pipe, family, dtype):
        logger.warning(
            "the student was distilled from %s, and this pipeline's %s has other weights: with another "
            "checkpoint of the same base it may work a little less well, with another base not at all",
            contract.base_model,
            name,
        )
    _load(pipe, folder, contract, family, adapter_name)
    return dict(contract.call)


def _load(pipe: DiffusionPipeline, folder: Path, contract: Contract, family: Family, adapter_name: str) -> None:
    net: Any = family.network(pipe)
    loader: Any = pipe  # LoRA loading is a mixin of the pipeline's class
    active = list(net.active_adapters()) if family.network_name in loader.get_list_adapters() else []
    try:
        loader.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=adapter_name)
        scheduler = locate(f"diffusers.{contract.scheduler['_class_name']}")
        pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StudentError(
            problem(
                f"{folder} and a {type(pipe).__name__}, which do not go together",
                f"a whole student folder and a pipeline of {contract.base_model}",
                str(error),
                "check both; where the adapter's name is in use, pass another adapter_name",
            )
        ) from error
    if active:  # loading has switched them off
        net.set_adapter([*active, adapter_name])


def _folder(place: str | Path) -> Path:
    """A local student folder; a hub id is downloaded first."""
    if Path(place).is_dir():
        return Path(place)
    expected, todo = "a student folder or a hub id", "check the path or id, and the network"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise StudentError(problem(f"{place}, which does not exist", expected, "there is no student", todo))
    try:
        return Path(snapshot_download(str(place), allow_patterns=[CONTRACT, WEIGHTS, "scheduler/*"]))
    except OSError as error:
        raise StudentError(problem(f"{place}, which is neither", expected, str(error), todo)) from error


def _read_lora(path: Path, family: Family) -> tuple[dict[str, Tensor], float]:
    """The tensors of a LoRA file under the backbone's names, and alpha / rank of its metadata."""
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            facts = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        expected, todo = "a LoRA as Diffusers saves it", "give a student folder or such a file"
        raise StudentError(problem(f"unreadable {path}", expected, str(error), todo)) from error
    name = family.network_name
    scale = facts.get(f"{name}.lora_alpha", 1) / facts.get(f"{name}.r", 1)  # Diffusers takes 1 without
    return {key.removeprefix(f"{name}."): value for key, value in state.items()}, scale


def _load_state(backbone: Backbone, role: str, state: dict[str, Tensor], source: Path) -> None:
    try:
        backbone.load_state(role, state)
    except (ValueError, RuntimeError) as error:
        raise StudentError(f"{source}: {error}") from error


def start_from(backbone: Backbone, source: str, family: Family, role: str = "student") -> None:
    """Load the LoRA of a student folder, hub id or file into `role` and its averages, at the same strength.

    Raises:
        StudentError: it cannot be read, or its rank or layers are not the config's.
    """
    path = Path(source) if source.endswith(".safetensors") else _folder(source) / WEIGHTS
    state, scale = _read_lora(path, family)
    config = backbone.lora_config(role)
    ratio = scale * config["r"] / config["lora_alpha"]
    state = {key: value * ratio if ".lora_B." in key else value for key, value in state.items()}
    averages = [key for key, other in backbone.declared.items() if isinstance(other, Ema) and other.of == role]
    for name in [role, *averages]:
        _load_state(backbone, name, state, path)
