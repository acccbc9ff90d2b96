"""The sampling contract of a student, `distill_config.json`: how it is sampled, and where it comes from."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stepdistill.config.schema import locate, pick
from stepdistill.core.errors import StudentError, problem
from stepdistill.core.prediction import Kind
from stepdistill.core.solvers import Sampler
from stepdistill.families.base import Family
from stepdistill.networks.roles import AdapterArch

CONTRACT = "distill_config.json"
WEIGHTS = "pytorch_lora_weights.safetensors"
LAST = "last_lora.safetensors"  # of a student trained on top of another: its own LoRA alone
ADAPTERS = "guidance_adapters.safetensors"
STUDENTS = "students"  # the subfolder of a folder of several students
SCHEMA = 1
DECODER = "decoder"  # the kind of a student of an autoregressive model, see `stepdistill.decoding.contract`


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """The LoRA in the folder. `strength` is the adapter weight to load it with; alpha is in its metadata, too."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """A whole network in the folder, which replaces the base's network: its class in Diffusers, and its size.

    `fused` is true for the base's network with a LoRA fused into it.
    """

    class_name: str
    parameters: int
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class GuidanceAdapters:
    """The manifest of the guidance adapters in the folder, which plain Diffusers cannot load.

    Args:
        arch, width: those of `stepdistill.networks.roles.Adapters`.
        sites: dotted names of their attention layers, in the order of the file.
        parameters: number of parameters in all.
        guidance_scale: the default w.
    """

    arch: AdapterArch
    width: int
    sites: tuple[str, ...]
    parameters: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A comparison of the folder in a plain pipeline with the student in memory.

    Args:
        difference: largest difference of the final latents, over the largest absolute value of the teacher's.
        tolerance: the largest difference that is accepted in `dtype`.
        dtype: precision of both networks; all other arithmetic is float32.
        timesteps: those that the plain pipeline passed to the network.
        seed: of the starting noise.
    """

    difference: float
    tolerance: float
    dtype: str
    timesteps: tuple[float, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An earlier training whose LoRA is part of the folder's.

    Args:
        method: class and hyper-parameters; None of a LoRA without a contract.
        source: folder, file or hub id that it was read from.
        sha256: of its LoRA's file.
    """

    method: dict[str, Any] | None
    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Contract:
    """`distill_config.json`: how a student is sampled, and where it comes from.

    Args:
        schema_version: of this format; a folder with another version is refused.
        kind: what the folder holds: a LoRA, a whole network in a subfolder with the component's name, or guidance
            adapters.
        use: `sampling`, or `training` for a training assistant, which is no model to draw with.
        method: class and hyper-parameters.
        start_from: the trainings before, the earliest first, whose LoRAs are part of `lora`; none for most students.
        base_model: hub id, absolute path, or name of a bundled teacher.
        base_hash: `base_hash` of the base for each precision that it may be loaded in.
        base_without: components that the pipeline requires and this base lacks; None is passed for each.
        family: class and arguments, from which `teacher` builds it.
        controlnet: hash of the ControlNet that was in the training loop; None without one.
        prediction_type: of the network.
        timesteps, sigmas: where each step starts, as trained, in the scheduler's time and as `sigma_t` of
            `x_t = alpha_t x0 + sigma_t eps`.
        clean: whether the last step returns x0; else it ends at time 0 of the table, which is still noisy.
        scheduler: class (`_class_name`) and config.
        call: keyword arguments of the pipeline's call.
        guidance_scale: w of `uncond + w (cond - uncond)`; 1 is none.
        guidance_rule: how the teacher's pipeline combines outputs without and with the prompt, see
            `stepdistill.core.guidance`.
        guidance_embedding: the value of the network's guidance input; None if it has no such input.
        guidance_range: the scales that guidance adapters support; None without adapters.
        eta: share of each step that is noised again.
        first_noise: whether every step uses the noise that sampling started from.
        ancestral: whether steps are ancestral.
        negative_prompt: whether negative prompts have an effect.
        lora, network, adapters: one of the three, by `kind`.
        resolution: height and width in pixels, those of a call that names none.
        sizes: heights and widths that it was trained at; none where an earlier version wrote the folder.
        dtype: precision of the base in training.
        licence: of the base; None if it is unknown.
        versions: of the libraries that wrote the folder.
        proof: None if the folder was never compared with the trained student.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    kind: Literal["lora", "full", "adapters"] = "lora"
    use: Literal["sampling", "training"] = "sampling"
    method: dict[str, Any]
    start_from: tuple[Stage, ...] = ()
    base_model: str
    base_hash: dict[str, str]
    base_without: tuple[str, ...]
    family: dict[str, Any]
    controlnet: str | None = None
    prediction_type: Kind
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    clean: bool
    scheduler: dict[str, Any]
    call: dict[str, Any]
    guidance_scale: float
    guidance_rule: str = "linear"
    guidance_embedding: float | None = None
    guidance_range: tuple[float, float] | None = None
    eta: float
    first_noise: bool = False
    ancestral: bool = False
    negative_prompt: bool
    lora: LoraWeights | None
    network: Network | None = None
    adapters: GuidanceAdapters | None = None
    resolution: tuple[int, int]
    sizes: tuple[tuple[int, int], ...] = ()
    dtype: str
    licence: str | None
    versions: dict[str, str]
    proof: Proof | None = None

    def sampler(self) -> Sampler:
        """The sampler that the contract describes."""
        return Sampler(
            self.timesteps,
            self.eta,
            self.clean,
            self.guidance_scale,
            self.first_noise,
            self.adapters.guidance_scale if self.adapters else None,
            self.guidance_range,
            self.ancestral,
        )


@dataclass(frozen=True, kw_only=True)
class MultiContract:
    """`distill_config.json` of a folder of several students, each in `students/<k>/` with its own contract.

    `router.json` assigns a student to each prompt. The fields that the students share are those of `Contract`.

    Args:
        students: how many there are.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    kind: Literal["multi"] = "multi"
    students: int
    base_model: str
    base_hash: dict[str, str]
    base_without: tuple[str, ...]
    family: dict[str, Any]
    dtype: str
    licence: str | None
    versions: dict[str, str]


FORMAT = TypeAdapter(Contract)
MULTI = TypeAdapter(MultiContract)
FAMILY = functools.cache(TypeAdapter)  # of a family's class: a card alone asks for the same one ten times
T = TypeVar("T")


def read_contract(folder: Path | str) -> Contract:
    """The contract of a student folder. Raises StudentError if it is missing, invalid or of another version."""
    if kind_of(folder) == DECODER:
        got, expected = f"{folder}, a student of an autoregressive image model", "a student of a diffusion pipeline"
        why, todo = "it is a whole pipeline with no part for another", f"use `stepdistill generate {folder} PROMPT`"
        raise StudentError(problem(got, expected, why, todo))
    return read_as(folder, FORMAT)


def read_multi(folder: Path | str) -> MultiContract:
    """The contract of a folder of several students. Raises as `read_contract` does."""
    return read_as(folder, MULTI)


def read_contracts(folder: Path) -> tuple[Contract, ...]:
    """The contract of each student in a folder, which holds one or several."""
    if not is_multi(folder):
        return (read_contract(folder),)
    return tuple(read_contract(folder / STUDENTS / str(k)) for k in range(read_multi(folder).students))


def is_multi(folder: Path | str) -> bool:
    """Whether a folder holds several students. Raises StudentError if it has no contract."""
    return kind_of(folder) == "multi"


def kind_of(folder: Path | str) -> str | None:
    """The kind that a folder's contract names. Raises StudentError if it has no contract."""
    return _parse(folder)[0].get("kind")


def _parse(folder: Path | str) -> tuple[dict[str, Any], str]:
    path = Path(folder) / CONTRACT
    todo = "pass the output_dir of a finished run"
    try:
        text = path.read_text()
        return dict(json.loads(text)), text
    except (OSError, ValueError, TypeError) as error:
        why = f"it defines how to sample the student ({error})"
        raise StudentError(problem(f"no readable {path}", "a sampling contract", why, todo)) from error


def read_as(folder: Path | str, form: TypeAdapter[T]) -> T:
    """The contract of a folder in one form. Raises as `read_contract` does."""
    fields, text = _parse(folder)
    path, version = Path(folder) / CONTRACT, fields.get("schema_version")
    if version != SCHEMA:
        why, todo = "the meaning of its fields may have changed", "install the version of stepdistill that wrote it"
        raise StudentError(problem(f"schema version {version} in {path}", str(SCHEMA), why, todo))
    try:
        return form.validate_json(text, strict=True)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        todo = "pass the output_dir of a finished run"
        raise StudentError(problem(f"invalid contents of {path}", "a sampling contract", why, todo)) from error


def write_contract(folder: Path, contract: Contract | MultiContract) -> None:
    """Write the contract into a student folder."""
    form: TypeAdapter[Any] = FORMAT if isinstance(contract, Contract) else MULTI
    (folder / CONTRACT).write_bytes(form.dump_json(contract, indent=1) + b"\n")


def teacher(contract: Contract | MultiContract) -> Family:
    """The family that a contract names, with its arguments. Raises ConfigError if there is no such family."""
    node = dict(contract.family)
    family: type[Family] = pick([Family], node.pop("type", None))
    return FAMILY(family).validate_python(node)


def scheduler_class(contract: Contract) -> Any:  # noqa: ANN401
    """The class of a contract's scheduler, from Diffusers or from `stepdistill.families.schedulers`."""
    package = "stepdistill.families.schedulers" if contract.first_noise else "diffusers"
    return locate(f"{package}.{contract.scheduler['_class_name']}")
