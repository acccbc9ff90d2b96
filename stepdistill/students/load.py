"""Load a folder of one or several students into a plain pipeline of its base, or as the start of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from stepdistill.core.errors import StudentError, problem
from stepdistill.data.routing import ROUTER
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Adapters
from stepdistill.students.contract import ADAPTERS, CONTRACT, LAST, STUDENTS, WEIGHTS, is_multi
from stepdistill.students.several import load_several
from stepdistill.students.single import load_adapters, load_network, load_one, load_state, network_state

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


def start_from(backbone: Backbone, source: str, family: Family, role: str = "student") -> None:
    """Load the LoRA of a student folder, hub id or file into `role` and its copies, at the same strength.

    A role that is a whole network takes the folder's network. A role of guidance adapters takes the folder's adapters.

    Raises:
        StudentError: it cannot be read, or its rank, layers or width differ from the config's.
    """
    if isinstance(backbone.kind(role), Adapters):
        state = load_adapters(folder_of(source))
    elif role in backbone.others:
        state = dict(load_network(folder_of(source), family, backbone.others[role]).state_dict())
    else:
        config = backbone.lora_config(role)
        state = network_state(source, family, config["lora_alpha"] / config["r"])
    for name in [role, *backbone.copies_of(role)]:
        load_state(backbone, name, state, source)
