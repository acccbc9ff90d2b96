"""Base class of the pipeline families: what each family defines, and how all of them load."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as WEIGHTS
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from stepdistill.config.kinds import Place
from stepdistill.config.schema import Factory, locate
from stepdistill.core.denoise import Condition
from stepdistill.core.files import is_single_file
from stepdistill.core.guidance import LINEAR, Combine, Rule, on_estimates
from stepdistill.core.prediction import Kind
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.families.control import ControlNets
from stepdistill.families.location import teacher_location
from stepdistill.families.parts import Needs, check_folder, check_single_file, reading
from stepdistill.families.read import load_pipeline
from stepdistill.families.sizes import check_size
from stepdistill.networks.lora.names import PIPELINES
from stepdistill.networks.lora.read import Layout, layout_of, lora_path, read_pipeline_lora
from stepdistill.networks.lora.tensors import Lora
from stepdistill.networks.pipeline_loras import write_component_lora
from stepdistill.networks.roles import Sites, Tap

Part = Literal["text", "vae", "denoiser"]
Stock = tuple[SchedulerMixin, dict[str, Any]]  # a scheduler of Diffusers, and what the call needs beside it


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A pipeline family around one teacher. Subclasses are final.

    Args:
        pretrained_teacher_model: a pipeline folder, a hub id, a single `.safetensors` file, or the name of a
            bundled teacher (`tiny-sd`, `tiny-sd3`).
        revision: branch, tag or commit of a hub id.
        variant: file variant, such as `fp16`.
        single_file_config: pipeline folder or hub id with the configs of a single file.
        teacher_loras: LoRA folders or files that are fused into the teacher when it is loaded.
        quantization: quantization config of the frozen denoiser, by dotted path: one of Diffusers, such as
            `diffusers.BitsAndBytesConfig` with `load_in_4bit: true`, or one of torchao, such as
            `torchao.quantization.Int8WeightOnlyConfig`. Trained weights stay float32.
    """

    network_name: ClassVar[str]
    multiple: ClassVar[int] = 8  # the pipeline asks for sides in pixels that are multiples of it
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    needs: ClassVar[Needs]
    image_parts: ClassVar[frozenset[str]] = frozenset({"vae"})  # networks that see images: what they give is cached
    seeds_steps: ClassVar[bool] = True  # whether the pipeline hands its generator on to the scheduler
    filters: ClassVar[tuple[str, ...]] = ()  # parts of the pipeline that change a finished image
    takes_negative_prompt: ClassVar[bool] = True  # whether the pipeline's call has the argument
    ragged: ClassVar[bool] = False  # `condition`: `states` (B, L, ...) and `mask` (B, L), true tokens first, of any L
    controls: ClassVar[ControlNets | None] = None  # None: Diffusers has no pipeline with a ControlNet

    pretrained_teacher_model: Place
    revision: str | None = None
    variant: str | None = None
    single_file_config: Place | None = None
    teacher_loras: tuple[Place, ...] = ()
    quantization: Factory | None = None

    def location(self) -> str:
        """Where the teacher lies: a path or a hub id. Raises ConfigError for what can be neither."""
        return teacher_location(self.pretrained_teacher_model)

    def check_files(self) -> None:
        """Raise ConfigError where the teacher's files are not a pipeline of this family; no weights are read."""
        where = self.location()
        with self.reached():
            if is_single_file(where):
                check_single_file(where, self.pipeline_class, self.needs)
            else:
                place = where, self.revision, self.variant
                self.check_network(check_folder(*place, self.pipeline_class, self.network_name, self.needs))
                self.check_scheduler(self.load_scheduler())

    def check_network(self, config: Mapping[str, Any]) -> None:
        """Raise ConfigError where the family's settings do not go with the config of the teacher's denoiser."""
        return

    def reached(self) -> AbstractContextManager[None]:
        """Raise ConfigError for what cannot be read of the teacher inside."""
        return reading(self.pretrained_teacher_model)

    def part_of(self, component: str) -> Part | None:
        """What a component of the pipeline belongs to; None for tokenizers, schedulers and whatever is no network."""
        parts: dict[str, Part] = {**dict.fromkeys(self.image_parts, "vae"), self.network_name: "denoiser"}
        return "text" if component.startswith("text_encoder") else parts.get(component)

    def load(self, without: Collection[Part] = ()) -> DiffusionPipeline:
        """The teacher's whole pipeline in float32, with its LoRAs fused in.

        Args:
            without: parts to replace by networks without weights, on the meta device; read all the same from a single
                file or with LoRAs.
        """
        return load_pipeline(self, without)

    def warn_of_lora(self, source: str, lora: Lora) -> None:
        """Log what a LoRA of the teacher leaves as it is, where that may surprise."""
        return

    def read_lora(self, source: str | Path) -> Lora:
        """The LoRA of a file, folder or hub id. Raises StudentError where a part of it is not of this family."""
        layout = self.lora_layout() if self.pipeline_class.__name__ in PIPELINES else Layout(None)
        return read_pipeline_lora(lora_path(source), self.pipeline_class, self.network_name, layout)

    def lora_layout(self) -> Layout:
        """The names of its layers in LoRA files. Raises ConfigError where they are not known."""
        return layout_of(self.pipeline_class, self.location(), self.revision)

    def load_scheduler(self) -> Any:  # noqa: ANN401
        """The teacher's scheduler alone, from its few bytes; None for a single file, which keeps it inside."""
        where = self.location()
        if is_single_file(where):
            return None
        with self.reached():
            index: Any = self.pipeline_class.load_config(where, revision=self.revision)
            kind = locate(f"diffusers.{index['scheduler'][1]}")
            return kind.from_pretrained(where, subfolder="scheduler", revision=self.revision)

    def network(self, pipe: DiffusionPipeline) -> nn.Module:
        """The denoiser among the pipeline's components."""
        return pipe.components[self.network_name]

    def scale_factor(self, pipe: DiffusionPipeline) -> int:
        """Pixels along one side of a latent."""
        return pipe.vae_scale_factor

    def native_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        """Height and width in pixels that the network was trained at."""
        side = pipe.components[self.network_name].config["sample_size"] * self.scale_factor(pipe)
        return side, side

    def latent_shape(self, pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, ...]:
        """(C, H, W), or (C, F, H, W), of the latents for `height` x `width` pixels. ConfigError for other sizes."""
        scale, config = self.scale_factor(pipe), pipe.components[self.network_name].config
        unit = scale * config.get("patch_size", 1)
        check_size(height, width, math.lcm(self.multiple, unit), unit * config.get("pos_embed_max_size", 10**9))
        return (config["in_channels"], height // scale, width // scale)

    def tokens(self, pipe: DiffusionPipeline, height: int, width: int) -> int:
        """How many tokens of its network images of `height` x `width` pixels are; a shift may depend on it."""
        side = 2 * self.scale_factor(pipe)
        return (height // side) * (width // side)

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) in the form of the pipeline's argument `latents`."""
        return latents

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """Latents (B, C, height, width) from the pipeline's form."""
        return packed

    def latents_of(self, pipe: DiffusionPipeline, drawn: Tensor, height: int, width: int) -> Tensor:
        """Latents (B, C, height, width) from what the pipeline returns for `output_type="latent"`."""
        return self.unpack(drawn, height, width)

    def fresh(self, latents: Tensor) -> Tensor:
        """Noise like `latents`, of the global generator, in the order in which the pipeline's scheduler draws it."""
        return self.unpack(torch.randn_like(self.pack(latents)), *latents.shape[-2:])

    def time(self, net: nn.Module, given: float) -> float:
        """The scheduler's timestep for the number `given` that the pipeline passes to its network."""
        return given

    def steps(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What the pipeline gives its scheduler to set the timesteps, where its own call is given `call`."""
        return {name: value for name, value in call.items() if name != "eta"}

    def guidance(self, scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for guidance of `scale` by its rule; 1 is none, whatever the pipeline calls
        it."""
        return {"guidance_scale": scale}

    @property
    def rule(self) -> Rule:
        """What the pipeline makes of its network's outputs without and with the prompt."""
        return LINEAR

    def combine(self, kind: Kind, schedule: NoiseSchedule) -> Combine:
        """The same on estimates."""
        return on_estimates(self.rule, kind, schedule)

    def embedded(self, pipe: DiffusionPipeline) -> float | None:
        """The guidance scale that the network takes as an input; None where it has no such input."""
        return None

    @property
    def loads_lora(self) -> bool:
        """Whether Diffusers can load a LoRA into the pipeline."""
        return issubclass(self.pipeline_class, LoraBaseMixin)

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the pipeline's call needs besides prompt, sampler, guidance and size, for teacher and student alike."""

    @abstractmethod
    def schedule(self, scheduler: Any, tokens: int | None = None) -> NoiseSchedule:  # noqa: ANN401
        """The noise process, with the exact levels of the pipeline's scheduler.

        Args:
            tokens: those of an image, where the scheduler's grid depends on them; None is the native size.
        """

    def schedule_at(self, pipe: DiffusionPipeline, scheduler: Any, size: tuple[int, int]) -> NoiseSchedule:  # noqa: ANN401
        """The noise process for images of a height and width in pixels."""
        return self.schedule(scheduler, self.tokens(pipe, *size))

    @abstractmethod
    def check_scheduler(self, scheduler: Any) -> None:  # noqa: ANN401
        """Raise ConfigError for a scheduler whose noise process is not the family's."""

    @abstractmethod
    def kind(self, pipe: DiffusionPipeline) -> Kind:
        """What the network predicts."""

    @abstractmethod
    def lora_targets(self, net: nn.Module) -> list[str]:
        """Full names of the layers that get a LoRA; none whose output is never used."""

    @abstractmethod
    def tap(self, net: nn.Module) -> Tap:
        """Where a discriminator's head reads the network's features, halfway."""

    @abstractmethod
    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """Where heads may read them: after each block, in order of depth."""

    @abstractmethod
    def sites(self, net: nn.Module) -> Sites:
        """Where guidance adapters go: attention layers whose output reaches the image, and that see the prompt."""

    @abstractmethod
    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        """The maximum number of tokens of each tokenizer, by component name."""

    @abstractmethod
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """Embeddings of prompts, one row each."""

    def unconditional(self, pipe: DiffusionPipeline) -> Condition:
        """The unconditional embedding, one row, that the pipeline uses without a negative prompt."""
        return self.condition(pipe, [""])

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's raw output for x_t (B, C, H, W) and t (B,) in scheduler timesteps."""

    @torch.no_grad()
    def encode(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the network's scale from pixels (B, 3, H, W) in [-1, 1]."""
        coded = pipe.vae.encode(pixels.to(pipe.vae.dtype), return_dict=False)[0]
        latents = coded.mode() if isinstance(coded, DiagonalGaussianDistribution) else coded
        return (latents.float() - self._shift(pipe)) * pipe.vae.config.scaling_factor

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], not clamped, from latents in the network's scale; differentiable."""
        latents = latents / pipe.vae.config.scaling_factor + self._shift(pipe)
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()

    def _shift(self, pipe: DiffusionPipeline) -> float:
        return pipe.vae.config.shift_factor if self.needs.shifts_latents else 0.0

    @abstractmethod
    def solver(self, pipe: DiffusionPipeline, steps: int, tokens: int | None = None) -> Stock:
        """The teacher's plain solver on even steps, and what the call needs. ConfigError for more than a table has.

        Args:
            tokens: see `schedule`.
        """

    @abstractmethod
    def scheduler(self, pipe: DiffusionPipeline, sampler: Sampler) -> Stock:
        """A stock Diffusers scheduler that samples as `sampler` says, and the keyword arguments that the pipeline's
        call needs so that it visits exactly `sampler.timesteps`. Raises ConfigError where there is none."""

    @abstractmethod
    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        """A fresh network like `net` of about `width` (in (0, 1)) of its channels; the loss reaches every parameter."""

    def save_lora(self, folder: Path, state: dict[str, Tensor], config: dict[str, Any], file: str = WEIGHTS) -> None:
        """Write a LoRA with its metadata, as Diffusers' loaders read it."""
        write_component_lora(folder / file, self.network_name, state, config)
