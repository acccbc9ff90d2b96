"""Writing the files of a student folder: weights, scheduler, contract and card. `students.single` proves them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from pydantic import TypeAdapter

from stepdistill.config.dump import to_node
from stepdistill.config.schema import dotted
from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Module
from stepdistill.students.base_model import Base, absolute, name_of
from stepdistill.students.card import write_card
from stepdistill.students.contract import Adapter, Attached, Contract, Network, save
from stepdistill.students.weights import save_weights

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
KINDS: dict[type, Literal["lora", "full", "adapters"]] = {Adapter: "lora", Network: "full", Attached: "adapters"}


def write_unproven(
    folder: Path,
    *,
    family: Family,
    pipe: DiffusionPipeline,
    backbone: Backbone,
    role: str,
    method: Method,
    resolution: tuple[int, int],
    base: Base,
    steps: int | None = None,
) -> Contract:
    """Write a student folder as `write` does, without the pipeline and the time that its proof takes."""
    if isinstance(backbone.declared[role], Module):
        why, todo = "it draws nothing", "name the student's role in the method's `student_role`"
        raise StudentError(problem(f"role {role!r}, which is no denoiser", "a LoRA, a copy or an average", why, todo))
    folder.mkdir(parents=True, exist_ok=True)
    sampler = method.sampler(family.schedule(pipe.scheduler), steps)
    weights = save_weights(folder, family, backbone, role, sampler.adapter_scale)
    scheduler, _ = family.scheduler(pipe, sampler)
    scheduler.save_pretrained(folder / "scheduler")
    dtype = next(backbone.net.parameters()).dtype
    contract = replace(_contract(family, pipe, base, method, steps, weights, resolution), dtype=name_of(dtype))
    save(folder, contract)
    write_card(folder, contract)
    return contract


def _contract(
    family: Family,
    pipe: DiffusionPipeline,
    base: Base,
    method: Method,
    steps: int | None,
    weights: Adapter | Network | Attached,
    resolution: tuple[int, int],
) -> Contract:
    schedule = family.schedule(pipe.scheduler)
    sampler = method.sampler(schedule, steps)
    scheduler, call = family.scheduler(pipe, sampler)
    scale, (height, width) = sampler.guidance_scale, resolution
    stored = absolute(family)
    arguments = TypeAdapter(type(stored)).dump_python(stored, mode="json")
    return Contract(
        kind=KINDS[type(weights)],
        method=to_node(method, Method),
        base_model=stored.pretrained_teacher_model,
        base_hash=base.hashes,
        base_without=base.without,
        family={"type": dotted(type(family))} | arguments,
        prediction_type=family.kind(pipe),
        timesteps=sampler.timesteps,
        sigmas=tuple(schedule(torch.tensor(sampler.timesteps))[1].tolist()),
        clean=sampler.clean,
        scheduler=json.loads(scheduler.to_json_string()),  # pyright: ignore[reportAttributeAccessIssue]
        call=call | family.guidance(scale) | family.arguments() | {"height": height, "width": width},
        guidance_scale=scale,
        guidance_embedding=family.embedded(pipe),
        guidance_range=sampler.adapter_range,
        eta=sampler.eta,
        first_noise=sampler.first_noise,
        negative_prompt=scale > 1,
        lora=weights if isinstance(weights, Adapter) else None,
        network=weights if isinstance(weights, Network) else None,
        adapters=weights if isinstance(weights, Attached) else None,
        resolution=resolution,
        dtype="float32",
        licence=base.licence,
        versions={name: version(name) for name in ("stepdistill", *LIBRARIES)},
    )
