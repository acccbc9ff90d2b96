"""Convert LoRA files from one format to another without loss: reading, writing, and the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import save_tensors, written_whole
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.names import OUTSIDE
from stepdistill.networks.lora.read import SHOWN, Layout, LoraFile, read_lora
from stepdistill.networks.lora.tensors import FAMILIES, Format, lora_tensors, parse_lora
from stepdistill.students.contract import WEIGHTS, read_contract, teacher

logger = logging.getLogger(__name__)

# the programs of kohya's that train a family, where they are not sd-scripts
PROGRAMS: dict[str, str] = dict.fromkeys(("klein", "z_image", "qwen_image", "krea2"), "musubi-tuner")


@dataclass(frozen=True)
class Conversion:
    """The report of a conversion, which matched every key."""

    source: LoraFile
    to: Format
    tensors: int

    @property
    def ignored(self) -> tuple[str, ...]:
        """The layers that kohya's programs leave out of a file in their format. Other programs load them."""
        family = self.source.layout.family
        if self.to != "kohya" or family is None:
            return ()
        return tuple(sorted(name for name in self.source.lora if name.partition(".")[2] in OUTSIDE.get(family, ())))

    def __str__(self) -> str:
        lora, scales = self.source.lora, {part.scale for part in self.source.lora.values()}
        low, high = min(scales), max(scales)
        lines = [
            f"{self.source.format} to {self.to}, {self.source.layout.family}: {self.source.tensors} tensors read, "
            f"{self.tensors} written, {len(lora)} layers matched, 0 unmatched",
            f"alpha / rank: {low:g}" + (f" to {high:g}" if high > low else ""),
        ]
        if self.to == "kohya":
            name = _program(self.source.layout.family)
            lines.append(f"{name} can load {len(lora) - len(self.ignored)} of {len(lora)} layers")
        if self.source.mute:
            lines.append(f"{self.source.mute} layers have no alpha: it is set to their rank, as in every reader")
        return "\n".join(lines)


def convert_lora(source: Path, target: Path, to: Format, family: str | None = None) -> Conversion:
    """Write the LoRA of a student folder or file in another format.

    The result is read again and compared before the file is put in place.

    Args:
        target: a `.safetensors` file.
        family: family of the layers; None reads it from the folder's contract or from the names.

    Raises:
        ConfigError: the conversion is not supported.
        StudentError: the source cannot be read completely. Nothing is written then.
    """
    if target.suffix != ".safetensors":
        why, todo = "a pickle runs any code in it when it is opened", "name a file that ends in .safetensors"
        raise ConfigError(problem(f"the target {target}", "a .safetensors file", why, todo))
    if source.is_dir():
        contract = read_contract(source)
        if contract.lora is None:
            got, why = f"{source}, which holds {contract.kind} weights", "only a LoRA can be converted"
            raise StudentError(problem(got, "a student that is a LoRA", why, "pass the folder of a LoRA student"))
        lora_file = read_lora(source / WEIGHTS, teacher(contract).lora_layout())
    else:
        lora_file = read_lora(source, Layout(family) if family else None)
    return write_lora(lora_file, target, to)


def write_lora(lora_file: LoraFile, target: Path, to: Format) -> Conversion:
    """Write a LoRA. Raises ConfigError if the format does not support it, StudentError if reading it back differs."""
    layout = lora_file.layout
    if layout.family not in FAMILIES[to]:
        why = {"kohya": "sd-scripts do not support it", "comfyui": "ComfyUI's built-in nodes do not support it"}[to]
        todo = "use the format of Diffusers, or fuse the LoRA with --to fused"
        raise ConfigError(problem(f"{to} for {layout.family}", f"one of {', '.join(FAMILIES[to])}", why, todo))
    try:
        state, metadata = lora_tensors(lora_file.lora, to, layout.family, layout.per_block)
    except ValueError as error:
        got, expected = "a LoRA whose layers cannot be joined", "matrices in the shapes of the layers"
        raise StudentError(problem(got, expected, str(error), "check the origin of the file")) from error
    lora, again = lora_file.lora, parse_lora(state, metadata, layout.family, layout.per_block)
    odd = [*again.unknown, *sorted(lora.keys() ^ again.lora.keys())]
    odd += [name for name in lora.keys() & again.lora.keys() if not _same(lora[name], again.lora[name])]
    if odd:
        got, todo = f"a changed LoRA of {odd[:SHOWN]} after conversion", "keep the source, and report this as a bug"
        raise StudentError(problem(got, "the LoRA of the source", "the images would change", todo))
    with written_whole(target) as part:
        save_tensors(state, part, metadata)
    conversion = Conversion(lora_file, to, len(state))
    warn_of_ignored(conversion.ignored, layout.family)
    return conversion


def _program(family: str | None) -> str:
    return PROGRAMS.get(family or "", "sd-scripts")


def warn_of_ignored(layers: Sequence[str], family: str | None) -> None:
    """Warn of layers that kohya's programs leave out of a file in their format without an error."""
    if layers:
        logger.warning(
            "%s will ignore %d layers of the kohya file (%s), so the student generates other images there. Programs "
            "that load every layer are not affected. To avoid this, train without these layers in lora.target_modules",
            _program(family),
            len(layers),
            ", ".join(layers),
        )


def _same(one: LayerLora, other: LayerLora) -> bool:
    """Whether two LoRAs of a layer add the same: exactly, or up to rounding if a matrix was scaled."""
    if torch.equal(one.down, other.down) and torch.equal(one.up, other.up):
        return math.isclose(one.scale, other.scale, rel_tol=1e-6)
    first, second = one.product(), other.product()
    rough = 1e-6 if one.up.dtype == torch.float32 else 1e-2
    return bool((first - second).abs().max() <= rough * first.abs().max())
