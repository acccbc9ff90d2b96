"""What a student folder records of its base model: hashes of the weights, missing components, absolute paths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.families.base import Family
from stepdistill.families.controlled import Controlled, controlnet_of
from stepdistill.families.location import BUNDLED_NAMES
from stepdistill.networks.quantize import dense
from stepdistill.students.licence import licence_of
from stepdistill.students.proof import TOLERANCE

SAMPLED = 1024  # values of each tensor that go into the base's hash


@dataclass(frozen=True)
class Base:
    """What a contract records of the base model, read before a run rounds or changes the weights.

    Args:
        hashes: `base_hash` by precision.
        without: components that the pipeline requires and the base model lacks.
        licence: None if it is not known.
        controlnet: `controlnet_hash` of the one in the training loop.
    """

    hashes: dict[str, str]
    without: tuple[str, ...]
    licence: str | None
    controlnet: str | None = None


def base_of(pipe: DiffusionPipeline, family: Family, licence: str | None = None) -> Base:
    """What to record of a float32 pipeline; `licence` None reads the model card of the base model."""
    hashes = {name_of(dtype): base_hash(pipe, family, dtype) for dtype in TOLERANCE}
    licence = licence or licence_of(family.location())
    return Base(hashes, missing(pipe), licence, controlnet_hash(controlnet_of(family, pipe)))


def missing(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Components that the pipeline's class requires and this one lacks, such as SD3's largest text encoder."""
    optional = pipe._optional_components
    return tuple(name for name, part in pipe.components.items() if part is None and name not in optional)


def absolute(family: Family) -> Family:
    """The family with its local paths made absolute, so that they hold in any working directory."""
    if isinstance(family, Controlled) and family.controlnet:
        family = replace(family, controlnet=absolute_path(family.controlnet))
    return replace(
        family,
        pretrained_teacher_model=absolute_path(family.pretrained_teacher_model),
        single_file_config=absolute_path(family.single_file_config) if family.single_file_config else None,
        teacher_loras=tuple(absolute_path(lora) for lora in family.teacher_loras),
    )


def absolute_path(text: str) -> str:
    """A path made absolute; a hub id or bundled name as it is."""
    return str(Path(text).resolve()) if Path(text).exists() and text not in BUNDLED_NAMES else text


def base_hash(pipe: DiffusionPipeline, family: Family, dtype: torch.dtype = torch.float32) -> str:
    """sha256 of the base model's denoiser in `dtype`: names, shapes and about 1,024 values of each tensor.

    Adapters are left out. A sample of the values is fast and enough to tell checkpoints apart. The hash depends on the
    precision, so weights in another precision are compared with the hash for that precision.
    """
    return network_hash(family.network(pipe), dtype)


def controlnet_hash(controlnet: nn.Module | None) -> str | None:
    """sha256 of a ControlNet in bfloat16, computed as in `base_hash`; the same for copies in all precisions."""
    return None if controlnet is None else network_hash(controlnet, torch.bfloat16)


def pipeline_hash(pipe: DiffusionPipeline) -> str:
    """sha256 of every network of the pipeline, computed as in `base_hash`: embeddings and latents depend on them."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    hashes = "".join(f"{name} {network_hash(part, torch.float32)}" for name, part in parts.items())
    return sha256(hashes.encode()).hexdigest()


def network_hash(net: nn.Module, dtype: torch.dtype) -> str:
    """sha256 of a network, see `base_hash`."""
    state = net.state_dict()
    base = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    digest = sha256()
    for key in sorted(base):
        flat = dense(base[key].detach()).flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", dtype).contiguous()
        digest.update(f"{key} {tuple(base[key].shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")
