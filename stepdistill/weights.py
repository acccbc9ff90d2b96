"""The weights of a student folder, a LoRA or a whole network: into the folder, a plain pipeline, a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepdistill.backbone import Backbone
from stepdistill.contract import Adapter, Contract, Network
from stepdistill.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.schema import locate

WEIGHTS = "pytorch_lora_weights.safetensors"


def save_weights(folder: Path, family: Family, backbone: Backbone, role: str) -> Adapter | Network:
    """Write a role's weights as Diffusers reads them, and say what they are."""
    if role in backbone.others:
        net: Any = backbone.others[role]
        net.save_pretrained(folder / family.network_name)
        return Network(class_name=type(net).__name__, parameters=sum(p.numel() for p in net.state_dict().values()))
    config = backbone.lora_config(role)
    config["target_modules"] = sorted(config["target_modules"])
    family.save_lora(folder, backbone.state(role), config)
    return Adapter(rank=config["r"], alpha=float(config["lora_alpha"]), target_modules=tuple(config["target_modules"]))


def load_network(folder: Path, family: Family, like: nn.Module) -> nn.Module:
    """The whole network in a student folder, on the device and in the precision of `like`."""
    kind: Any = type(like)
    try:
        net = kind.from_pretrained(folder, subfolder=family.network_name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        expected, todo = "a network as Diffusers saves it", "give the folder of a student of its own network"
        raise StudentError(problem(f"unreadable {folder / family.network_name}", expected, str(error), todo)) from error
    parameter = next(like.parameters())
    return nn.Module.to(net, parameter.device, parameter.dtype)  # the net's own warns of what it would keep in float32


def into_pipeline(pipe: DiffusionPipeline, folder: Path, contract: Contract, family: Family, adapter_name: str) -> None:
    """A student's weights and scheduler into a plain pipeline; adapters that are active stay so."""
    net: Any = family.network(pipe)
    loader: Any = pipe  # LoRA loading is a mixin of the pipeline's class
    active = list(net.active_adapters()) if family.network_name in loader.get_list_adapters() else []
    try:
        if contract.kind == "full":
            pipe.register_modules(**{family.network_name: load_network(folder, family, net)})
        else:
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
    if active and contract.kind == "lora":  # loading has switched them off
        net.set_adapter([*active, adapter_name])


def read_lora(path: Path, family: Family) -> tuple[dict[str, Tensor], float]:
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


def load_state(backbone: Backbone, role: str, state: dict[str, Tensor], source: Path) -> None:
    """Tensors into a role; StudentError names where they come from."""
    try:
        backbone.load_state(role, state)
    except (ValueError, RuntimeError) as error:
        raise StudentError(f"{source}: {error}") from error
