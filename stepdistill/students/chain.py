"""A student trained on top of another: what it starts from, and one LoRA for both.

A run with `start_from` fuses a few-step student into its base, and trains a second LoRA there. The folder holds their
sum as one LoRA for the original base, of the sum of both ranks. `last_lora.safetensors` beside it is the second LoRA
alone, which can be given a strength of its own beside the first student.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stepdistill.core.errors import StudentError, problem
from stepdistill.core.files import file_digest
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.read import lora_path
from stepdistill.networks.lora.tensors import Lora
from stepdistill.networks.pipeline_loras import check_fit
from stepdistill.students.base_model import base_hash
from stepdistill.students.contract import CONTRACT, LAST, Contract, Stage, is_multi, read_contract
from stepdistill.students.load import folder_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The student that a run is trained on top of, as it was when it was fused: its folder may change in the meantime.

    Args:
        lora: in float32.
        stages: the trainings that it comes from, the earliest first.
    """

    lora: Lora
    stages: tuple[Stage, ...]


def start_contract(source: str) -> Contract | None:
    """The sampling contract of `start_from`; None of a LoRA that has none. Raises StudentError for other students."""
    if Path(source).is_file() or not ((folder := folder_of(source)) / CONTRACT).exists():
        return None
    contract = None if is_multi(folder) else read_contract(folder)
    if contract is None or contract.lora is None:
        kind = "several students" if contract is None else f"a student of kind {contract.kind!r}"
        why = "it is fused into the base, and exported as one LoRA with what is trained"
        todo = "name the folder of one LoRA student; of a whole network make a pipeline, and take it as the teacher"
        raise StudentError(problem(f"start_from {source}, which holds {kind}", "a student that is a LoRA", why, todo))
    return contract


def start_sampler(source: str) -> Sampler | None:
    """How the student of `start_from` is sampled; None where no contract says so."""
    contract = start_contract(source)
    return None if contract is None else contract.sampler()


def stages(source: str) -> tuple[Stage, ...]:
    """The trainings whose LoRAs a student on top of `source` includes, the earliest first."""
    contract, digest = start_contract(source), file_digest(lora_path(source))
    if contract is None:
        return (Stage(method=None, source=source, sha256=digest),)
    return (*contract.start_from, Stage(method=contract.method, source=source, sha256=digest))


def start_lora(source: str, family: Family) -> Lora:
    """The LoRA of `start_from`, in float32. Raises StudentError where it changes more than the denoiser."""
    lora = family.read_lora(source)
    outside = [name for name in lora if not name.startswith(f"{family.network_name}.")]
    if outside:
        got = f"start_from {source} with {len(outside)} layers outside the {family.network_name}, such as {outside[0]}"
        todo = "fuse that LoRA into a pipeline, and take the pipeline as the teacher"
        raise StudentError(problem(got, f"a LoRA of the {family.network_name}", "a student trains no other part", todo))
    return {name: LayerLora(layer.down.float(), layer.up.float(), layer.alpha) for name, layer in lora.items()}


def read_assistant(source: str, family: Family, start_from: str | None) -> Lora:
    """The LoRA of a training assistant (student folder, hub id or LoRA file), without what it was trained on top of.

    A warning is logged where it was trained for another few-step model than that of `start_from`.

    Raises:
        StudentError: it is a student to draw with, or no LoRA of this family.
    """
    contract = start_contract(source)
    if contract is None:
        return family.read_lora(source)
    if contract.use != "training":
        got, expected = f"train.assistant {source}, which is a student", "a training assistant, or a LoRA file"
        why, todo = "the student would be trained beside itself", "name it in start_from, and train an assistant for it"
        raise StudentError(problem(got, expected, why, todo))
    before = stages(start_from) if start_from else ()
    if [stage.sha256 for stage in before] != [stage.sha256 for stage in contract.start_from]:
        logger.warning(
            "the assistant in %s was trained for another few-step model than that of start_from: what it leaves "
            "undone of the distillation, the fine-tuning will undo",
            source,
        )
    alone = folder_of(source) / LAST
    return family.read_lora(alone if alone.is_file() else source)


@torch.no_grad()
def fuse_start(pipe: DiffusionPipeline, family: Family, source: str) -> Start:
    """Add the LoRA of `start_from` to the weights of a float32 pipeline's denoiser.

    Raises:
        StudentError: it has layers that the network lacks, or of other shapes.
    """
    contract, lora, net = start_contract(source), start_lora(source, family), family.network(pipe)
    if contract is not None and contract.base_hash["float32"] != base_hash(pipe, family):
        logger.warning(
            "the student in %s was distilled from %s, and the weights of %s are others: what is trained on top of it "
            "is exported for the latter",
            source,
            contract.base_model,
            family.pretrained_teacher_model,
        )
    check_fit({f"{family.network_name}.{name}": layer for name, layer in net.named_modules()}, lora, source)
    for name, layer in lora.items():
        weight = net.get_submodule(name.partition(".")[2]).weight
        assert isinstance(weight, torch.Tensor)
        weight += layer.product().reshape(weight.shape).to(weight)
    return Start(lora, stages(source))


def chained(first: Lora, second: Lora) -> Lora:
    """One LoRA that adds what both add: `[A1; A2]`, `[s1 B1, s2 B2]`, alpha = rank.

    Every layer has one rank, that of the widest of `first` and of `second` together; what a layer has less is zeros.
    """
    ranks = [max(len(layer.down) for layer in lora.values()) for lora in (first, second)]
    return {name: _stacked([first.get(name), second.get(name)], ranks) for name in sorted(first.keys() | second.keys())}


def _stacked(parts: list[LayerLora | None], ranks: list[int]) -> LayerLora:
    like = next(part for part in parts if part is not None)
    down = like.down.new_zeros(sum(ranks), *like.down.shape[1:])
    up = like.up.new_zeros(len(like.up), sum(ranks), *like.up.shape[2:])
    for part, begin in zip(parts, (0, ranks[0]), strict=True):
        if part is not None:
            rank = len(part.down)
            down[begin : begin + rank] = part.down
            up[:, begin : begin + rank] = part.up * part.scale
    return LayerLora(down, up, float(sum(ranks)))
