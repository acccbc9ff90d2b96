"""Extract a few-step model from its base: a LoRA student from the difference of two networks, without training."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.core.devices import full_precision
from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import write_text
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data.bundled import bundled
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.low_rank import low_rank
from stepdistill.networks.lora.tensors import peft_state
from stepdistill.networks.roles import Copy, Lora, LoraSpec
from stepdistill.students.base_model import absolute_path, network_hash
from stepdistill.students.difference import Difference, choose_targets, difference_of
from stepdistill.students.extracted import Extracted
from stepdistill.students.licence import licence_of, warn_of_terms
from stepdistill.students.proof import check_sampling
from stepdistill.students.rollout import Rollout
from stepdistill.students.room import EXTRACTION, check_student_room, emptied
from stepdistill.students.single import load_network, load_state
from stepdistill.students.write import write_student

logger = logging.getLogger(__name__)

SHOWN = 5  # layers in the summary
NAMED = 10  # layers and tensors in a warning


@dataclass(frozen=True)
class ExtractedLayer:
    """How much of the change D of a layer's weight W a LoRA keeps.

    Args:
        change: |D| / |W|.
        energy: `1 - |D - up down|^2 / |D|^2`; 0 of a layer without a LoRA.
        outputs: the same share of the change of the layer's outputs, at the inputs that its LoRA is fitted on; None
            where it is not.
    """

    change: float
    energy: float = 0.0
    outputs: float | None = None


@dataclass(frozen=True)
class Extraction:
    """What came of an extraction, as `extraction.json` has it.

    Args:
        layers: those with a LoRA whose weights differ, by name.
        left_out: layers without one whose weights differ.
        beside: other tensors that differ, which no LoRA holds, such as biases.
        gap_left: by timestep, the share of the squared distance of x0 from the base's that is left, see
            `Rollout.gap_left`.
        difference: of the folder's proof.
    """

    layers: dict[str, ExtractedLayer]
    left_out: dict[str, ExtractedLayer]
    beside: tuple[str, ...]
    gap_left: dict[float, float]
    difference: float

    def __str__(self) -> str:
        worst = sorted((layer.energy, name) for name, layer in self.layers.items())
        outputs = [layer.outputs for layer in self.layers.values() if layer.outputs is not None]
        lines = [f"energy kept of {len(worst)} layers' weights: {_spread([energy for energy, _ in worst])}; the least:"]
        lines += [f"  {energy:7.2%}  {name}" for energy, name in worst[:SHOWN]]
        if outputs:
            lines.append(f"energy kept of {len(outputs)} layers' outputs: {_spread(outputs)}")
        gaps = ", ".join(f"{gap:.2%} at {t:g}" for t, gap in self.gap_left.items())
        lines.append(f"share of the x0 gap to the base that is left: {gaps}")
        lines.append(f"largest difference of plain Diffusers from the library's sampler: {self.difference:.3g}")
        return "\n".join(lines)


def extract_student(
    tuned: str,
    family: Family,
    folder: Path,
    *,
    method: Extracted,
    rank: int,
    prompts: Sequence[str],
    every: bool = False,
    resolution: tuple[int, int] | None = None,
    device: torch.device | None = None,
    batch: int = 4,
    overwrite: bool = False,
) -> Extraction:
    """Write the difference of a few-step model from its base as a LoRA student, and prove the folder.

    Args:
        tuned: the few-step model: a pipeline as `family` reads it, or a folder with its network.
        family: of the base.
        folder: a new or empty folder.
        method: how the few-step model is sampled, and whether linear layers are fitted to their inputs. Its `tuned` and
            `sha256` are replaced.
        rank: of the LoRA.
        prompts: of the few-step model's rollouts.
        every: whether all linear and convolution layers that differ get a LoRA, and not only the family's targets.
        resolution: height and width in pixels; None is the native size.
        device: None is the CPU.
        batch: prompts of a rollout at once.
        overwrite: whether `folder` may hold an earlier extracted student, which is replaced.

    Raises:
        ConfigError: the base is quantized or continues images, or the steps do not fit its schedule.
        StudentError: the few-step model is none of that base, or the folder does not generate what the LoRA in memory
            does.
        OutputError: the folder is in use, or cannot be written.
    """
    _check_family(family)
    check_student_room(folder, [tuned, family.pretrained_teacher_model, *family.teacher_loras], overwrite)
    device = device or torch.device("cpu")
    pipe = family.load()
    net, size = family.network(pipe), resolution or family.native_size(pipe)
    schedule = family.schedule_at(pipe, pipe.scheduler, size)
    sampler = _checked_sampler(method, schedule)
    check_sampling(family, pipe, sampler)
    other = _tuned_network(tuned, family, pipe, sampler)
    difference = difference_of(net, other, (tuned, family.pretrained_teacher_model))
    targets = choose_targets(difference, net, family.lora_targets(net), every)
    _warn_of_rest(difference, targets)
    licence = licence_of(str(bundled(tuned)))
    warn_of_terms(tuned, licence)
    method = replace(method, tuned=absolute_path(tuned), sha256=network_hash(other, torch.float32))

    pipe.to(device)
    backbone = Backbone(net, LoraSpec(rank=rank, target_modules=tuple(targets)), targets)
    backbone.add("student", Lora())
    backbone.add("tuned", Copy(lambda: other))
    rollout = Rollout(family, pipe, backbone, sampler, size, prompts, batch)
    with full_precision(device):
        moments = rollout.moments(difference.linear(targets)) if method.whitened else {}
        loras = {name: low_rank(difference.change(name).to(device), rank, moments.get(name)) for name in targets}
        load_state(backbone, "student", peft_state(loras), tuned)
        layers = _layers(difference, loras, moments)
        gap_left = rollout.gap_left("student")
    proof = write_student(
        emptied(folder),
        family=family,
        pipe=pipe,
        backbone=backbone,
        role="student",
        method=method,
        resolution=size,
        licence=licence,
    )
    left_out = {name: ExtractedLayer(difference.sizes[name]) for name in difference.outside(targets)}
    extraction = Extraction(layers, left_out, difference.beside, gap_left, proof)
    write_text(folder / EXTRACTION, json.dumps(asdict(extraction), indent=1))
    return extraction


def _spread(shares: Sequence[float]) -> str:
    return f"at least {min(shares):.2%}, median {median(shares):.2%}"


def _check_family(family: Family) -> None:
    if isinstance(family, ImageToVideo):
        got, why = f"a base of {type(family).__name__}", "the states of a rollout depend on images, and there are none"
        todo = "extract from the pipeline of text to video, where it has the same network"
        raise ConfigError(problem(got, "a base that starts from noise alone", why, todo))
    if family.quantization is not None:
        why, todo = "the rounding of its weights would be a part of the difference", "remove family.quantization"
        raise ConfigError(problem("a quantized base", "one in full precision", why, todo))


def _checked_sampler(method: Extracted, schedule: NoiseSchedule) -> Sampler:
    try:
        sampler = method.sampler(schedule)
        schedule.check(sampler.timesteps)
    except ValueError as error:
        raise ConfigError(f"the steps of the few-step model: {error}") from error
    return sampler


def _tuned_network(tuned: str, family: Family, pipe: DiffusionPipeline, sampler: Sampler) -> nn.Module:
    """The network of the few-step model, in float32. Raises StudentError where it has another noise process."""
    folder = Path(tuned)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        return load_network(folder, family, family.network(pipe))
    its = replace(family, pretrained_teacher_model=tuned, revision=None, variant=None, teacher_loras=())
    other = its.load(("text", "vae"))
    kinds, times = (family.kind(pipe), its.kind(other)), torch.tensor(sampler.timesteps)
    ours, theirs = (one.schedule(part.scheduler)(times)[1] for one, part in ((family, pipe), (its, other)))
    if kinds[0] != kinds[1] or not torch.allclose(ours, theirs, rtol=0, atol=1e-3):
        got = f"{tuned}, which predicts {kinds[1]} at the noise levels {[round(x, 4) for x in theirs.tolist()]}"
        expected = f"{kinds[0]} at {[round(x, 4) for x in ours.tolist()]}, as {family.pretrained_teacher_model}"
        why = "the student runs in the base's pipeline, where its outputs would mean something else"
        raise StudentError(problem(got, expected, why, "share the whole network, or choose another base"))
    return its.network(other)


def _warn_of_rest(difference: Difference, targets: Sequence[str]) -> None:
    """Log what differs, and will have no LoRA."""
    outside = {name: difference.sizes[name] for name in difference.outside(targets)}
    if outside:
        logger.warning(
            "%d layers outside the LoRA's targets differ from the base, by up to %.2g of their size, and are left out: "
            "%s. With --all they get a LoRA, too",
            len(outside),
            max(outside.values()),
            _listed(sorted(outside, key=lambda name: -outside[name])),
        )
    if difference.beside:
        logger.warning(
            "%d tensors that are no weights of linear or convolution layers differ from the base, and no LoRA holds "
            "them: %s",
            len(difference.beside),
            _listed(difference.beside),
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _layers(
    difference: Difference, loras: Mapping[str, LayerLora], moments: Mapping[str, Tensor]
) -> dict[str, ExtractedLayer]:
    """What each LoRA keeps of a change, by layer."""
    layers = {}
    for name in (name for name in loras if difference.sizes[name]):
        change = difference.change(name).flatten(1)
        rest = change - loras[name].product().to(change)
        moment = moments[name].to(change) if name in moments else None
        outputs = None if moment is None else 1 - (_power(rest, moment) / _power(change, moment)).item()
        energy = 1 - (rest.square().sum() / change.square().sum()).item()
        layers[name] = ExtractedLayer(difference.sizes[name], energy, outputs)
    return layers


def _power(matrix: Tensor, moment: Tensor) -> Tensor:
    """`E|matrix x|^2`, up to the factor of the moment."""
    return ((matrix @ moment) * matrix).sum()
