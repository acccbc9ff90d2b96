"""Load a folder of one or several students into a plain pipeline of its base, or as the start of training."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from stepdistill.core.errors import StudentError, problem
from stepdistill.data.routing import ROUTER
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.low_rank import cut, padded
from stepdistill.networks.lora.tensors import Lora
from stepdistill.networks.roles import Adapters
from stepdistill.students.contract import ADAPTERS, CONTRACT, LAST, STUDENTS, WEIGHTS, is_multi, read_contract
from stepdistill.students.several import load_several
from stepdistill.students.single import load_adapters, load_network, load_one, load_state, role_state

logger = logging.getLogger(__name__)

# the files of a hub folder that loading needs; no code is among them
PATTERNS = [CONTRACT, WEIGHTS, LAST, ADAPTERS, "scheduler/*", "unet/*", "transformer/*", ROUTER, f"{STUDENTS}/*"]
PATTERNS += ["model_index.json", "language_model/*", "heads/*", "vqmodel/*", "processor/*"]  # of a decoder


def load_student(pipe: DiffusionPipeline, folder_or_hub_id: str | Path, adapter_name: str = "student") -> Any:  # noqa: ANN401
    """Load a student's LoRA, or guidance adapters, and its scheduler into a plain pipeline of its base.

    Adapters that are active in the pipeline, such as a style, stay active at the same strength. A student that is a
    whole network replaces the pipeline's network, and the adapters on it. The pipeline may be the family's with a
    ControlNet.

    Returns:
        Keyword arguments of the pipeline's call: `pipe(prompt, **load_student(pipe, folder))`. For guidance adapters
        they are a `networks.guidance_adapters.GuidedCall`, whose `guidance_scale` can be set. For a folder of several
        students the result is a `stepdistill.students.several.Students`: `load_student(pipe, folder)(prompts)`.

    Raises:
        StudentError: there is no student, or it does not fit the pipeline; or it is a training assistant, which is
            loaded under the adapter name `assistant` only.
        ConfigError: the pipeline has a ControlNet, and it does not fit the student's network.
    """
    folder = folder_of(folder_or_hub_id)
    return load_several(pipe, folder, adapter_name) if is_multi(folder) else load_one(pipe, folder, adapter_name)


def folder_of(place: str | Path) -> Path:
    """A local student folder; a hub id is downloaded first."""
    if Path(place).is_dir():
        return Path(place)
    expected, todo = "a student folder or a hub id", "check the path or the id, and the network connection"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise StudentError(problem(f"{place}, which does not exist", expected, "there is no student to load", todo))
    try:
        return Path(snapshot_download(str(place), allow_patterns=PATTERNS, ignore_patterns="*.py"))
    except OSError as error:
        raise StudentError(problem(f"{place}, which is neither of them", expected, str(error), todo)) from error


def start_from(
    backbone: Backbone, source: str, family: Family, role: str = "student", base: Mapping[str, str] | None = None
) -> None:
    """Load the LoRA of a student folder, hub id or file into `role` and its copies, at the same strength.

    A LoRA of another rank than the role's is cut to the closest one, or padded. A role that is a whole network takes
    the folder's network. A role of guidance adapters takes the folder's adapters.

    Args:
        base: `base_hash` of the role's base by precision; None is not compared with that of a student folder.

    Raises:
        StudentError: it cannot be read, was trained on another base, or its layers or width differ from the config's.
    """
    if base is not None:
        _check_base(source, base)
    if isinstance(backbone.kind(role), Adapters):
        state = load_adapters(folder_of(source))
    elif role in backbone.others:
        state = dict(load_network(folder_of(source), family, backbone.others[role]).state_dict())
    else:
        config = backbone.lora_config(role)
        lora = _at_rank_of(backbone, role, family.read_lora(source), f"{family.network_name}.", source)
        state = role_state(lora, family, config["lora_alpha"] / config["r"])
    for name in [role, *backbone.copies_of(role)]:
        load_state(backbone, name, state, source)


def _check_base(source: str, base: Mapping[str, str]) -> None:
    """Raise StudentError where a local student folder is of a base with other weights than this one in any precision.

    A hub id or a file alone has no contract that would tell.
    """
    if not (Path(source) / CONTRACT).is_file() or is_multi(source):
        return
    contract = read_contract(source)
    if not any(contract.base_hash.get(dtype) == value for dtype, value in base.items()):
        got = f"the student in {source}, which was trained on {contract.base_model}"
        why = "what it adds to those weights is something else on others"
        todo = f"name the student of this base; to start from it all the same, name its file {Path(source) / WEIGHTS}"
        raise StudentError(problem(got, "a student of the weights that the run trains on", why, todo))


def _at_rank_of(backbone: Backbone, role: str, lora: Lora, prefix: str, source: str) -> Lora:
    """A LoRA at a role's rank; layers that the role lacks, or has in another width, stay as they are."""
    held, made, lost, whole = backbone.state(role), dict(lora), 0.0, 0.0
    for name, layer in lora.items():
        down = held.get(f"{name.removeprefix(prefix)}.lora_A.weight")
        if down is None or down.shape[1:] != layer.down.shape[1:]:
            continue
        made[name] = cut(layer, len(down)) if len(layer.down) >= len(down) else padded(layer, down)
        if len(layer.down) > len(down):
            product = layer.product()
            whole += product.square().sum().item()
            lost += (made[name].product() - product).square().sum().item()
    if whole:
        logger.warning(
            "the LoRA of %s has a higher rank than lora.rank of %r, which starts from it: it is cut, and keeps %.1f %% "
            "of its energy",
            source,
            role,
            100 * (1 - lost / whole),
        )
    return made
