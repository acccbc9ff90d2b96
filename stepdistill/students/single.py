"""The student folder: write it, prove it, verify it, load it into a plain pipeline, train on from it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from stepdistill.core.errors import StudentError, problem
from stepdistill.data.routing import ROUTER
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.networks.roles import Adapters, Copy, Ema, Lora, LoraSpec
from stepdistill.students.base_model import base_hash, base_of, name_of
from stepdistill.students.card import is_non_commercial as is_non_commercial
from stepdistill.students.card import warn_of_licence as warn_of_licence
from stepdistill.students.card import write_card
from stepdistill.students.contract import (
    CONTRACT,
    STUDENTS,
    Contract,
    Proof,
    is_multi,
    read_contract,
    save,
    teacher,
)
from stepdistill.students.proof import prove
from stepdistill.students.snippets import snippet as snippet
from stepdistill.students.weights import (
    ADAPTERS,
    WEIGHTS,
    into_pipeline,
    load_adapters,
    load_network,
    load_state,
    read_lora,
)
from stepdistill.students.write import write_unproven

logger = logging.getLogger(__name__)
# what loading needs of a hub folder
PATTERNS = [CONTRACT, WEIGHTS, ADAPTERS, "scheduler/*", "unet/*", "transformer/*", ROUTER, f"{STUDENTS}/*"]


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
        role: the LoRA, copy or average that becomes the student.
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
    if family.quantization is None:
        # the base was rounded in training and the LoRA was not; `net.to` would warn of it
        nn.Module.to(family.network(plain), dtype).float()
    into_pipeline(plain, folder, contract, family, "student")
    return accept(folder, contract, prove(contract, family, plain, pipe, backbone, role, seed))


def accept(folder: Path, contract: Contract, proof: Proof) -> float:
    """Keep a proof in the contract and card; returns its difference. Raises StudentError where that is too large."""
    if not proof.difference <= proof.tolerance:
        raise StudentError(
            problem(
                f"a difference of {proof.difference:.3g} between {folder} in plain Diffusers and the student",
                f"at most {proof.tolerance:g} of the teacher's largest value, in {proof.dtype}",
                "the folder draws other images than training did",
                "do not share it; compare its weights and scheduler with distill_config.json",
            )
        )
    contract = replace(contract, proof=proof)
    save(folder, contract)
    write_card(folder, contract)
    return proof.difference


def verify(folder: Path) -> float:
    """Compare a student folder in a plain pipeline with our own sampler, from the files alone, in float32.

    On one side a LoRA's scale comes from the contract, on the other from the file's metadata.

    Returns:
        The largest difference of final latents, relative to the teacher's largest value.

    Raises:
        StudentError: the folder is no whole student folder, or other noise levels are visited.
    """
    if is_multi(folder):
        return max(verify(place) for place in sorted(folder.glob(f"{STUDENTS}/*")))
    contract = read_contract(folder)
    family = teacher(contract)
    pipe, backbone = in_memory(folder, contract, family)
    plain = family.load()
    into_pipeline(plain, folder, contract, family, "student")
    return prove(contract, family, plain, pipe, backbone, "student", 0).difference


def in_memory(folder: Path, contract: Contract, family: Family) -> tuple[DiffusionPipeline, Backbone]:
    """A student folder as training has it: the base's pipeline, and a backbone in it with the role `student`.

    A LoRA's scale comes from the contract. Raises StudentError where the weights are not the contract's.
    """
    lora, adapters, pipe = contract.lora, contract.adapters, family.load()
    net = family.network(pipe)
    if adapters is not None:
        backbone = Backbone(net, LoraSpec(), (), sites=family.sites(net))
        backbone.add("student", Adapters(adapters.arch, adapters.width))
        load_state(backbone, "student", load_adapters(folder), folder)
    elif lora is None:
        backbone = Backbone(net, LoraSpec(), ())
        backbone.add("student", Copy(partial(load_network, folder, family, net)))
    else:
        spec = LoraSpec(rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules)
        backbone = Backbone(net, spec, lora.target_modules)
        backbone.add("student", Lora())
        load_state(backbone, "student", read_lora(folder / WEIGHTS, family)[0], folder)
    return pipe, backbone


def load_one(pipe: DiffusionPipeline, folder: Path, adapter_name: str) -> Any:  # noqa: ANN401
    """Load the one student of a local folder; what it returns is `stepdistill.load_student`'s."""
    contract = read_contract(folder)
    family = teacher(contract)
    name = family.network_name
    if name not in pipe.components:
        raise StudentError(
            problem(
                f"a {type(pipe).__name__}, which has no {name}",
                f"a {family.pipeline_class.__name__} or a relative of it",
                f"the student in {folder} belongs to the {name} of {contract.base_model}",
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
    adapters = into_pipeline(pipe, folder, contract, family, adapter_name)
    if adapters is None:
        return dict(contract.call)
    assert contract.guidance_range is not None
    return GuidedCall(contract.call, adapters, contract.guidance_range)


def folder_of(place: str | Path) -> Path:
    """A local student folder; a hub id is downloaded first."""
    if Path(place).is_dir():
        return Path(place)
    expected, todo = "a student folder or a hub id", "check the path or id, and the network"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise StudentError(problem(f"{place}, which does not exist", expected, "there is no student", todo))
    try:
        return Path(snapshot_download(str(place), allow_patterns=PATTERNS))
    except OSError as error:
        raise StudentError(problem(f"{place}, which is neither", expected, str(error), todo)) from error


def start_from(backbone: Backbone, source: str, family: Family, role: str = "student") -> None:
    """Load the LoRA of a student folder, hub id or file into `role` and its averages, at the same strength.

    A role that is a network of its own takes the folder's whole network, one of adapters the folder's adapters.

    Raises:
        StudentError: it cannot be read, or its rank, layers or width are not the config's.
    """
    name = ADAPTERS if isinstance(backbone.kind(role), Adapters) else WEIGHTS
    path = Path(source) if source.endswith(".safetensors") else folder_of(source) / name
    if name == ADAPTERS:
        state = load_adapters(path.parent)
    elif role in backbone.others:
        state = dict(load_network(path.parent, family, backbone.others[role]).state_dict())
    else:
        state, scale = read_lora(path, family)
        config = backbone.lora_config(role)
        ratio = scale * config["r"] / config["lora_alpha"]
        state = {key: value * ratio if ".lora_B." in key else value for key, value in state.items()}
    averages = [key for key, other in backbone.declared.items() if isinstance(other, Ema) and other.of == role]
    for name in [role, *averages]:
        load_state(backbone, name, state, path)
