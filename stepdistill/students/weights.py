"""The weights of a student folder, a LoRA, a network or guidance adapters: into it, a plain pipeline, a backbone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.config.schema import locate
from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.guidance_adapters import Attachment, build
from stepdistill.networks.pipeline_loras import adapters_on, attach, keys_of, same_keys, switch_on
from stepdistill.networks.roles import Adapters, LoraSpec
from stepdistill.students.contract import Adapter, Attached, Contract, Network

WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTERS = "guidance_adapters.safetensors"


def save_weights(
    folder: Path, family: Family, backbone: Backbone, role: str, told: float | None = None
) -> Adapter | Network | Attached:
    """Write a role's weights, as Diffusers reads them where it can, and say what they are.

    Args:
        told: the guidance scale that adapters are told where none is set.
    """
    kind = backbone.kind(role)
    if isinstance(kind, Adapters):
        assert told is not None and backbone.sites is not None
        state = {key: value.cpu().contiguous() for key, value in backbone.state(role).items()}
        found = Attached(
            arch=kind.arch,
            width=kind.width,
            sites=tuple(site.name for site in backbone.sites.places),
            parameters=sum(value.numel() for value in state.values()),
            guidance_scale=told,
        )
        save_file(state, folder / ADAPTERS, {"manifest": json.dumps(asdict(found))})
        return found
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


def load_adapters(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's guidance adapters."""
    try:
        return load_file(folder / ADAPTERS)
    except (OSError, SafetensorError) as error:
        expected, todo = "guidance adapters as a run saves them", "give the folder of such a student"
        raise StudentError(problem(f"unreadable {folder / ADAPTERS}", expected, str(error), todo)) from error


def attached(net: nn.Module, folder: Path, manifest: Attached, family: Family) -> Attachment:
    """A folder's guidance adapters in a network, on from now on; StudentError where they do not fit it."""
    sites, parameter = family.sites(net), next(net.parameters())
    names = tuple(site.name for site in sites.places)
    modules = build(Adapters(manifest.arch, manifest.width), sites)
    try:
        if names != manifest.sites:
            raise ValueError(f"they are for {len(manifest.sites)} attention layers, and the network has {len(names)}")
        modules.load_state_dict(load_adapters(folder))
    except (ValueError, RuntimeError) as error:
        got, expected = f"{folder} and a network, which do not go together", "a network of the same shape as the base's"
        todo = "load the base, or one fine-tuned from it"
        raise StudentError(problem(got, expected, _brief(error), todo)) from error
    modules.requires_grad_(False).eval().to(parameter.device, parameter.dtype)
    return Attachment(net, sites, modules, manifest.guidance_scale)


def into_pipeline(
    pipe: DiffusionPipeline, folder: Path, contract: Contract, family: Family, adapter_name: str
) -> Attachment | None:
    """A student's weights and scheduler into a plain pipeline; LoRAs that are active stay so.

    Returns:
        The guidance adapters, where the folder holds such.
    """
    net: Any = family.network(pipe)
    active = adapters_on(net)
    adapters = attached(net, folder, contract.adapters, family) if contract.adapters else None
    try:
        if contract.kind == "full":
            pipe.register_modules(**{family.network_name: load_network(folder, family, net)})
        elif contract.lora is not None and family.loads_lora:
            loader: Any = pipe  # LoRA loading is a mixin of the pipeline's class
            loader.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=adapter_name)
            # a file of another network is only warned of, and leaves the pipeline as it was
            same_keys(keys_of(net, adapter_name), read_lora(folder / WEIGHTS, family)[0].keys())
        elif contract.lora is not None:
            state, scale = read_lora(folder / WEIGHTS, family)
            rank, targets = contract.lora.rank, contract.lora.target_modules
            spec = LoraSpec(rank=rank, alpha=scale * rank, target_modules=targets)
            attach(net, spec, state, adapter_name)
        scheduler = scheduler_class(contract)
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
        switch_on(net, [*active, adapter_name])
    return adapters


def scheduler_class(contract: Contract) -> Any:  # noqa: ANN401
    """The class of a contract's scheduler: one of Diffusers, or of `stepdistill.families.schedulers`."""
    package = "stepdistill.families.schedulers" if contract.first_noise else "diffusers"
    return locate(f"{package}.{contract.scheduler['_class_name']}")


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
        raise StudentError(f"{source}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The head of a message: torch lists every tensor of a network that does not fit."""
    return " ".join(str(error).split("\n")[:2])
