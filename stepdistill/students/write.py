"""Write a student folder: its weights, scheduler, contract and card, and its proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.config.dump import to_node
from stepdistill.config.schema import dotted
from stepdistill.core.errors import StudentError, problem
from stepdistill.core.files import save_tensors
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.tensors import peft_state
from stepdistill.networks.roles import Adapters, Module
from stepdistill.students.base_model import Base, absolute, base_of, name_of
from stepdistill.students.card import write_card
from stepdistill.students.chain import Start, chained
from stepdistill.students.contract import (
    ADAPTERS,
    FAMILY,
    LAST,
    Contract,
    GuidanceAdapters,
    LoraWeights,
    Network,
    Proof,
    write_contract,
)
from stepdistill.students.proof import prove
from stepdistill.students.single import into_pipeline

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
KINDS: dict[type, Literal["lora", "full", "adapters"]] = {
    LoraWeights: "lora",
    Network: "full",
    GuidanceAdapters: "adapters",
}


def write_student(
    folder: Path,
    *,
    family: Family,
    pipe: DiffusionPipeline,
    backbone: Backbone,
    role: str,
    method: Method,
    resolution: tuple[int, int],
    sizes: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    steps: int | None = None,
    licence: str | None = None,
    start: Start | None = None,
) -> float:
    """Write a student folder, load it into a new plain pipeline, and compare that with the student in memory.

    Args:
        pipe: the pipeline that `backbone` trains in; its scheduler is the teacher's.
        role: the LoRA, copy or average that becomes the student.
        resolution: height and width in pixels, of a call that names none.
        sizes: heights and widths that the student was trained at; none stands for `resolution` alone.
        seed: of the comparison's noise.
        steps: of the contract's sampler; None takes the method's.
        licence: of the base; None reads the base's model card.
        start: the student that is fused into `pipe`, and becomes part of the one that is written.

    Returns:
        The largest difference of final latents, relative to the teacher's largest value.

    Raises:
        StudentError: the difference is above 1e-4 (more in half precision), or the pipeline visits other noise levels.
            The folder is kept, and its contract has no proof.
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
        sizes=sizes,
        base=base_of(plain, family, licence),
        steps=steps,
        start=start,
    )
    dtype = next(backbone.net.parameters()).dtype
    if family.quantization is None:
        # the base was rounded in training and the LoRA was not; `net.to` would warn of it
        nn.Module.to(family.network(plain), dtype).float()
    into_pipeline(plain, folder, contract, family, "student")
    return keep_proof(folder, contract, prove(contract, family, plain, pipe, backbone, role, seed))


def keep_proof(folder: Path, contract: Contract, proof: Proof) -> float:
    """Write a proof to contract and card, and return its difference. Raises StudentError if it is too large."""
    if not proof.difference <= proof.tolerance:
        raise StudentError(
            problem(
                f"a difference of {proof.difference:.3g} between {folder} in plain Diffusers and the trained student",
                f"at most {proof.tolerance:g} of the teacher's largest value, in {proof.dtype}",
                "the folder does not generate the images of the trained student",
                "do not share the folder; compare its weights and scheduler with distill_config.json",
            )
        )
    contract = replace(contract, proof=proof)
    write_contract(folder, contract)
    write_card(folder, contract)
    return proof.difference


def write_unproven(
    folder: Path,
    *,
    family: Family,
    pipe: DiffusionPipeline,
    backbone: Backbone,
    role: str,
    method: Method,
    resolution: tuple[int, int],
    sizes: Sequence[tuple[int, int]] = (),
    base: Base,
    steps: int | None = None,
    start: Start | None = None,
) -> Contract:
    """Write a student folder as `write_student` does, but without a proof, which needs time and a second pipeline."""
    if isinstance(backbone.declared[role], Module):
        got, expected = f"role {role!r}, which is not a denoiser", "a LoRA, a copy or an average"
        why, todo = "only a denoiser generates images", "name the student's role in the method's `student_role`"
        raise StudentError(problem(got, expected, why, todo))
    folder.mkdir(parents=True, exist_ok=True)
    sampler = method.sampler(family.schedule_at(pipe, pipe.scheduler, resolution), steps)
    weights = save_weights(folder, family, backbone, role, sampler.adapter_scale, start)
    scheduler, _ = family.scheduler(pipe, sampler)
    scheduler.save_pretrained(folder / "scheduler")
    dtype = next(backbone.net.parameters()).dtype
    before = start.stages if start and isinstance(weights, LoraWeights) else ()
    contract = _contract(family, pipe, base, method, steps, weights, resolution)
    trained = tuple(sizes) or (resolution,)
    contract = replace(contract, dtype=name_of(dtype), start_from=before, sizes=trained)
    write_contract(folder, contract)
    write_card(folder, contract)
    return contract


def _contract(
    family: Family,
    pipe: DiffusionPipeline,
    base: Base,
    method: Method,
    steps: int | None,
    weights: LoraWeights | Network | GuidanceAdapters,
    resolution: tuple[int, int],
) -> Contract:
    schedule = family.schedule_at(pipe, pipe.scheduler, resolution)
    sampler = method.sampler(schedule, steps)
    scheduler, call = family.scheduler(pipe, sampler)
    scale, (height, width) = sampler.guidance_scale, resolution
    stored = absolute(family)
    arguments = FAMILY(type(stored)).dump_python(stored, mode="json")
    return Contract(
        kind=KINDS[type(weights)],
        use=method.use,
        method=to_node(method, Method),
        base_model=stored.pretrained_teacher_model,
        base_hash=base.hashes,
        base_without=base.without,
        controlnet=base.controlnet,
        family={"type": dotted(type(family))} | arguments,
        prediction_type=family.kind(pipe),
        timesteps=sampler.timesteps,
        sigmas=tuple(schedule(torch.tensor(sampler.timesteps))[1].tolist()),
        clean=sampler.clean,
        scheduler=json.loads(scheduler.to_json_string()),  # pyright: ignore[reportAttributeAccessIssue]
        call=call | family.guidance(scale) | family.arguments() | {"height": height, "width": width},
        guidance_scale=scale,
        guidance_rule=family.rule.name,
        guidance_embedding=family.embedded(pipe),
        guidance_range=sampler.adapter_range,
        eta=sampler.eta,
        first_noise=sampler.first_noise,
        ancestral=sampler.ancestral,
        negative_prompt=scale > 1 and family.takes_negative_prompt,
        lora=weights if isinstance(weights, LoraWeights) else None,
        network=weights if isinstance(weights, Network) else None,
        adapters=weights if isinstance(weights, GuidanceAdapters) else None,
        resolution=resolution,
        dtype="float32",
        licence=base.licence,
        versions={name: version(name) for name in ("stepdistill", *LIBRARIES)},
    )


def save_weights(
    folder: Path,
    family: Family,
    backbone: Backbone,
    role: str,
    guidance_scale: float | None = None,
    start: Start | None = None,
) -> LoraWeights | Network | GuidanceAdapters:
    """Write the weights of a role, in the format of Diffusers if it has one, and return their description.

    Args:
        guidance_scale: the default scale of guidance adapters.
        start: the student in the base, whose LoRA becomes part of the file; what was trained lies in another one.
    """
    (folder / LAST).unlink(missing_ok=True)  # of an earlier run in this folder
    kind = backbone.kind(role)
    if isinstance(kind, Adapters):
        assert guidance_scale is not None and backbone.sites is not None
        state = {key: value.cpu().contiguous() for key, value in backbone.state(role).items()}
        adapters = GuidanceAdapters(
            arch=kind.arch,
            width=kind.width,
            sites=tuple(site.name for site in backbone.sites.places),
            parameters=sum(value.numel() for value in state.values()),
            guidance_scale=guidance_scale,
        )
        save_tensors(state, folder / ADAPTERS, {"manifest": json.dumps(asdict(adapters))})
        return adapters
    if role in backbone.others:
        net: Any = backbone.others[role]
        net.save_pretrained(folder / family.network_name)
        return Network(class_name=type(net).__name__, parameters=sum(p.numel() for p in net.state_dict().values()))
    config, state = backbone.lora_config(role), backbone.state(role)
    if start:
        family.save_lora(folder, state, config, LAST)
        both, prefix = chained(start.lora, family.read_lora(folder / LAST)), f"{family.network_name}."
        rank = len(next(iter(both.values())).down)
        names = [name.removeprefix(prefix) for name in both]
        config |= {"r": rank, "lora_alpha": rank, "target_modules": names}
        state = {key.removeprefix(prefix): value for key, value in peft_state(both).items()}
    family.save_lora(folder, state, config)
    targets = tuple(sorted(config["target_modules"]))
    return LoraWeights(rank=config["r"], alpha=float(config["lora_alpha"]), target_modules=targets)
