"""Load the student of a folder into a plain pipeline of its base, or into a backbone as in training."""

from __future__ import annotations

import logging
from functools import partial
from math import isclose
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.guidance_adapters import Attachment, GuidedCall, build
from stepdistill.networks.lora.tensors import Lora as LoraTensors
from stepdistill.networks.lora.tensors import peft_state
from stepdistill.networks.pipeline_loras import adapters_on, attach, same_keys, switch_on, target_keys
from stepdistill.networks.roles import ASSISTANT, Adapters, Copy, Lora, LoraSpec
from stepdistill.students.base_model import base_hash, controlnet_hash, name_of
from stepdistill.students.contract import (
    ADAPTERS,
    CONTRACT,
    WEIGHTS,
    Contract,
    GuidanceAdapters,
    LoraWeights,
    read_contract,
    scheduler_class,
    teacher,
)

logger = logging.getLogger(__name__)


def in_memory(folder: Path, contract: Contract, family: Family) -> tuple[DiffusionPipeline, Backbone]:
    """Load a student folder as in training: the base's pipeline, and a backbone in it with the role `student`.

    A LoRA's scale comes from the contract. Raises StudentError if the weights do not match the contract.
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
        load_state(backbone, "student", network_state(folder / WEIGHTS, family), folder)
    return pipe, backbone


def load_one(pipe: DiffusionPipeline, folder: Path, adapter_name: str) -> Any:  # noqa: ANN401
    """Load the student of a local folder; returns the same as `stepdistill.load_student`."""
    contract = read_contract(folder)
    check_use(folder, contract, adapter_name)
    family = teacher(contract)
    name = family.network_name
    if name not in pipe.components:
        raise StudentError(
            problem(
                f"a {type(pipe).__name__}, which has no {name}",
                f"a {family.pipeline_class.__name__} or another pipeline with this component",
                f"the student in {folder} was trained for the {name} of {contract.base_model}",
                "load the student into a pipeline of that base model",
            )
        )
    if contract.proof is None:
        logger.warning("%s was never compared with the trained student: run `stepdistill verify` to check it", folder)
    dtype = next(family.network(pipe).parameters()).dtype
    if contract.base_hash.get(name_of(dtype)) != base_hash(pipe, family, dtype):
        logger.warning(
            "the student was distilled from %s, but this pipeline's %s has other weights: the images may be slightly "
            "worse with a fine-tuned checkpoint of the same base model, and are unusable with another base model",
            contract.base_model,
            name,
        )
    beside = pipe.components.get("controlnet")
    if contract.controlnet is not None and contract.controlnet != controlnet_hash(beside):
        logger.warning(
            "the student was trained with the ControlNet %s in its loop, and this pipeline has %s: the images may "
            "follow the control less, or be worse",
            contract.family["controlnet"],
            "none" if beside is None else "another one",
        )
    if contract.lora is not None:
        _check_strength(folder, contract.lora, family)
    adapters = into_pipeline(pipe, folder, contract, family, adapter_name)
    if family.controls is not None and isinstance(pipe, family.controls.pipeline):
        family.controls.check(pipe, family.network(pipe), pipe.components["controlnet"])  # of a whole network, too
    if adapters is None:
        return dict(contract.call)
    assert contract.guidance_range is not None
    return GuidedCall(contract.call, adapters, contract.guidance_range)


def check_use(folder: Path | str, contract: Contract, adapter_name: str = "student") -> None:
    """Raise StudentError for a training assistant, unless it is asked for by its adapter name."""
    if contract.use == "training" and adapter_name != ASSISTANT:
        why = "it turns a few-step model back into one of many steps, so that its few steps are blurred"
        todo = f"set it as train.assistant; to load it all the same, pass adapter_name={ASSISTANT!r}"
        raise StudentError(problem(f"{folder}, which is a training assistant", "a student to draw with", why, todo))


def _check_strength(folder: Path, lora: LoraWeights, family: Family) -> None:
    """Raise StudentError if the file has another alpha / rank than the contract: tools that rewrite it may lose it."""
    scale = lora.alpha / lora.rank
    odd = [layer.scale for layer in family.read_lora(folder / WEIGHTS).values() if not isclose(layer.scale, scale)]
    if odd:
        got, expected = f"alpha / rank {odd[0]:g} for {len(odd)} layers in {folder / WEIGHTS}", f"{scale:g}"
        todo = "use the file as it was written, with its metadata"
        raise StudentError(problem(got, expected, f"the contract in {CONTRACT} says so", todo))


def into_pipeline(
    pipe: DiffusionPipeline, folder: Path, contract: Contract, family: Family, adapter_name: str
) -> Attachment | None:
    """Load a student's weights and scheduler into a plain pipeline; active LoRAs stay active.

    Returns:
        The guidance adapters, if the folder holds any.
    """
    net: Any = family.network(pipe)
    active = adapters_on(net)
    adapters = attached(net, folder, contract.adapters, family) if contract.adapters else None
    try:
        if contract.kind == "full":
            pipe.register_modules(**{family.network_name: load_network(folder, family, net)})
        elif contract.lora is not None:
            # what Diffusers only warns of, or takes: a file of another network, or one that lacks layers
            same_keys(target_keys(net, contract.lora.target_modules), network_state(folder / WEIGHTS, family).keys())
            if family.loads_lora:
                loader: Any = pipe  # LoRA loading is a mixin of the pipeline's class
                loader.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=adapter_name)
            else:
                rank, alpha = contract.lora.rank, contract.lora.alpha
                spec = LoraSpec(rank=rank, alpha=alpha, target_modules=contract.lora.target_modules)
                attach(net, spec, network_state(folder / WEIGHTS, family, alpha / rank), adapter_name)
        scheduler = scheduler_class(contract)
        pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StudentError(
            problem(
                f"a {type(pipe).__name__} that cannot load {folder}",
                f"a complete student folder and a pipeline of {contract.base_model}",
                str(error),
                "check the folder and the pipeline; if the adapter name is in use, pass another adapter_name",
            )
        ) from error
    if active and contract.kind == "lora":  # loading has switched them off
        switch_on(net, [*active, adapter_name])
    return adapters


def load_network(folder: Path, family: Family, like: nn.Module) -> nn.Module:
    """The whole network in a student folder, or in one of its own, on the device and in the precision of `like`."""
    kind: Any = type(like)
    place = folder if (folder / "config.json").is_file() else folder / family.network_name
    try:
        net, info = kind.from_pretrained(place, output_loading_info=True)
        odd = [*info["missing_keys"], *info["unexpected_keys"]]  # of which Diffusers only warns
        if odd:
            matched = len(net.state_dict()) - len(info["missing_keys"])
            raise ValueError(
                f"{matched} tensors match the network, {len(info['unexpected_keys'])} do not, and "
                f"{len(info['missing_keys'])} are missing; the first is {odd[0]!r}"
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        expected, todo = "a network saved by Diffusers", "pass the folder of a student that is a whole network"
        raise StudentError(problem(f"unreadable {place}", expected, str(error), todo)) from error
    parameter = next(like.parameters())
    return nn.Module.to(net, parameter.device, parameter.dtype)  # the network's own `to` warns of layers in float32


def load_adapters(folder: Path) -> dict[str, Tensor]:
    """The tensors of the guidance adapters in a folder."""
    try:
        return load_file(folder / ADAPTERS)
    except (OSError, SafetensorError) as error:
        expected, todo = "guidance adapters saved by a run", "pass the folder of a student with guidance adapters"
        raise StudentError(problem(f"unreadable {folder / ADAPTERS}", expected, str(error), todo)) from error


def attached(net: nn.Module, folder: Path, manifest: GuidanceAdapters, family: Family) -> Attachment:
    """Attach the guidance adapters of a folder to a network, enabled. Raises StudentError if they do not fit it."""
    sites, parameter = family.sites(net), next(net.parameters())
    names = tuple(site.name for site in sites.places)
    modules = build(Adapters(manifest.arch, manifest.width), sites)
    try:
        if names != manifest.sites:
            raise ValueError(f"they are for {len(manifest.sites)} attention layers, and the network has {len(names)}")
        modules.load_state_dict(load_adapters(folder))
    except (ValueError, RuntimeError) as error:
        got = f"a {type(net).__name__} that cannot load {folder}"
        expected, todo = "a network of the same shape as the base's", "load the base model, or one fine-tuned from it"
        raise StudentError(problem(got, expected, _brief(error), todo)) from error
    modules.requires_grad_(False).eval().to(parameter.device, parameter.dtype)
    return Attachment(net, sites, modules, manifest.guidance_scale)


def network_state(source: Path | str, family: Family, scale: float | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA (file, folder or hub id) as PEFT has them in a family's network, see `peft_state`.

    Those of other networks stay among them under their names, so that no network takes the file.
    """
    return role_state(family.read_lora(source), family, scale)


def role_state(lora: LoraTensors, family: Family, scale: float | None = None) -> dict[str, Tensor]:
    """The same of a LoRA that is read."""
    tensors = peft_state(lora, scale)
    return {key.removeprefix(f"{family.network_name}."): value for key, value in tensors.items()}


def load_state(backbone: Backbone, role: str, state: dict[str, Tensor], source: Path | str) -> None:
    """Load tensors into a role. Raises a StudentError that names their source."""
    try:
        backbone.load_state(role, state)
    except (ValueError, RuntimeError) as error:
        raise StudentError(f"{source}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The first two lines of a message: torch lists every tensor that does not fit."""
    return " ".join(str(error).split("\n")[:2])
