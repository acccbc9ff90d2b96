"""Convert LoRA files from one format to another without loss: reading, writing, and the report."""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import save_tensors, written_whole
from stepdistill.families.base import Family
from stepdistill.students.contract import WEIGHTS, read_contract, teacher
from stepdistill.students.lora.names import NETWORKS, OUTSIDE, PIPELINES, Layer, by_name, by_part
from stepdistill.students.lora.tensors import (
    FAMILIES,
    Format,
    LayerLora,
    Lora,
    ParsedLora,
    format_of,
    lora_tensors,
    parse_lora,
    peft_state,
)

logger = logging.getLogger(__name__)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 10


@dataclass(frozen=True)
class Layout:
    """The network of a LoRA: a key of `students.lora.names.NETWORKS`, and `layers_per_block` of its UNet.

    Without a family, any layer with a name of Diffusers is accepted.
    """

    family: str | None
    per_block: int = 2


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file.

    Args:
        mute: number of layers without an alpha, for which it is the rank.
    """

    lora: Lora
    format: Format
    layout: Layout
    tensors: int
    mute: int


@dataclass(frozen=True)
class Conversion:
    """The report of a conversion, which matched every key."""

    source: LoraFile
    to: Format
    tensors: int

    @property
    def ignored(self) -> tuple[str, ...]:
        """The layers that sd-scripts leave out of a file in their format. Other programs load them."""
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
            lines.append(f"sd-scripts load {len(lora) - len(self.ignored)} of {len(lora)} layers")
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
        lora_file = read_lora(source / WEIGHTS, layout_of(teacher(contract)))
    else:
        lora_file = read_lora(source, Layout(family) if family else None)
    return write_lora(lora_file, target, to)


def layout_of(family: Family) -> Layout:
    """The layout of a family. Raises ConfigError if the other formats' names of its layers are not known."""
    name = PIPELINES.get(family.pipeline_class.__name__)
    if name is None:
        got, expected = f"the family of {family.pipeline_class.__name__}", f"one of {', '.join(PIPELINES)}"
        why = "the names of its layers in other formats are not known"
        raise ConfigError(problem(got, expected, why, "use the format of Diffusers"))
    where = family.location()
    if name != "sdxl" or where.endswith(".safetensors"):
        return Layout(name)
    config: Any = UNet2DConditionModel.load_config(where, subfolder="unet", revision=family.revision)
    return Layout(name, config["layers_per_block"])


def network_state(file: Path, family: Family, scale: float | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA file of any format under PEFT's names in a family's network, see `peft_state`.

    A tensor that is not part of a layer's complete LoRA keeps its name, so that no network loads the file.
    """
    state, metadata = tensors_of(file)
    if format_of(state) == "kohya":
        tensors = peft_state(_lora_file(file, state, metadata, layout_of(family)).lora, scale)
    else:
        parsed = _parsed(file, state, metadata, Layout(None))
        tensors = peft_state(parsed.lora, scale) | {key: state[key] for key in parsed.unknown}
    return {key.removeprefix(f"{family.network_name}."): value for key, value in tensors.items()}


def read_lora(file: Path, layout: Layout | None = None) -> LoraFile:
    """The LoRA in a file of any format. Raises StudentError if a part of it is not recognized."""
    return _lora_file(file, *tensors_of(file), layout)


def _lora_file(file: Path, state: dict[str, Tensor], metadata: dict[str, str], layout: Layout | None) -> LoraFile:
    format = format_of(state)
    if format is None:
        got = f"{file} with {len(state)} tensors such as {', '.join(sorted(state)[:3]) or 'none'}"
        expected = "lora_A and lora_B, or lora_down and lora_up, for each layer"
        todo = "pass a LoRA file; LoHa, LoKr and whole networks are not supported"
        raise StudentError(problem(got, expected, "the file holds no LoRA", todo))
    layout = layout or guess(state, file)
    parsed = _parsed(file, state, metadata, layout)
    if parsed.unknown:
        raise StudentError(_unmatched(file, state, parsed, layout, format))
    if parsed.mute and format == "kohya" and len(parsed.mute) < sum(key.endswith(".alpha") for key in state):
        got = f"{file} with {len(parsed.mute)} layers without an alpha, the first {parsed.mute[0]}"
        todo = "get the complete file, or remove every alpha if each equals the rank"
        raise StudentError(problem(got, "an alpha for every layer, or for none", "their strength is unknown", todo))
    return LoraFile(parsed.lora, format, layout, len(state), len(parsed.mute))


def _parsed(file: Path, state: dict[str, Tensor], metadata: dict[str, str], layout: Layout) -> ParsedLora:
    try:
        return parse_lora(state, metadata, layout.family, layout.per_block)
    except ValueError as error:
        expected, todo = "two matrices of the same rank for each layer", "check the origin of the file"
        raise StudentError(problem(f"mismatched shapes in {file}", expected, str(error), todo)) from error


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
    warn_of_ignored(conversion.ignored)
    return conversion


def warn_of_ignored(layers: Sequence[str]) -> None:
    """Warn of layers that sd-scripts leave out of a file in their format without an error."""
    if layers:
        logger.warning(
            "sd-scripts ignore %d layers of the kohya file (%s), so the student generates other images there. Programs "
            "that load every layer, such as ComfyUI, are not affected. To avoid this, train without these layers in "
            "lora.target_modules",
            len(layers),
            ", ".join(layers),
        )


def tensors_of(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file. Raises StudentError for a pickle, and for an incomplete or invalid file."""
    expected = "a complete .safetensors file"
    if file.suffix in PICKLES:
        why, todo = "a pickle runs any code in it when it is opened", "get the same file as safetensors"
        raise StudentError(problem(f"the pickle {file}", expected, why, todo))
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        todo = "check the path, or download the file again"
        raise StudentError(problem(f"unreadable {file}", expected, str(error), todo)) from error


def guess(state: Mapping[str, Tensor], file: Path) -> Layout:
    """The family whose layers have these names, or most of them. Raises ConfigError if several families have all."""
    fits = _fits(state)
    if len(fits) == 1 or _foreign(state, fits[0]):
        return Layout(fits[0])
    got, why = f"{file}, whose layer names fit {' and '.join(fits)}", "the family is ambiguous"
    todo = f"pass --family {fits[0]}, or another one of these"
    raise ConfigError(problem(got, "the layer names of one family", why, todo))


def _fits(state: Mapping[str, Tensor]) -> list[str]:
    """The families that know most of the layers."""
    foreign = {name: len(_foreign(state, name)) for name in NETWORKS}
    fits = [name for name, count in foreign.items() if count == min(foreign.values())]
    ends = ("attn2.to_k.lora_A.weight", "attn2_to_k.lora_down.weight")
    widths = {value.shape[1] for key, value in state.items() if key.endswith(ends)}
    if fits == ["sd", "sdxl"] and widths:  # the width of the prompt's embeddings distinguishes them
        return ["sdxl"] if widths == {2048} else ["sd"]
    return fits


def _names(layout: Layout, format: Format) -> Mapping[str, Layer]:
    return (by_name if format == "kohya" else by_part)(layout.family, layout.per_block) if layout.family else {}


def _foreign(state: Mapping[str, Tensor], family: str) -> set[str]:
    """Names of layers that a family does not have, at its usual depth."""
    known = by_part(family).keys() | by_name(family).keys()
    return {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", key) for key in state} - known


def _unmatched(file: Path, state: Mapping[str, Tensor], parsed: ParsedLora, layout: Layout, format: Format) -> str:
    """The error of unmatched keys: the first ten, each with the nearest layer name."""
    known = list(_names(layout, format))
    lines = []
    for key in parsed.unknown[:SHOWN]:
        near = difflib.get_close_matches(key.partition(".lora_")[0], known, 1, 0.8)
        lines.append(f"  {key}" + (f"  (the nearest layer: {near[0]})" if near else ""))
    count = f"{len(parsed.unknown)} of {len(state)} keys unmatched"
    expected, why = (
        f"keys of a {layout.family} LoRA in the {format} format",
        "the images would change without them",
    )
    todo = "check the family; each layer needs both matrices, and DoRA, LoHa, LoKr and T5 are not supported"
    more = [f"  and {len(parsed.unknown) - SHOWN} more"] if len(parsed.unknown) > SHOWN else []
    fits = _fits(state)
    also = [] if layout.family in fits else [f"they look like {' or '.join(fits)}"]
    return "\n".join([problem(f"{file} with {count}", expected, "; ".join([why, *also]), todo), *lines, *more])


def _same(one: LayerLora, other: LayerLora) -> bool:
    """Whether two LoRAs of a layer add the same: exactly, or up to rounding if a matrix was scaled."""
    if torch.equal(one.down, other.down) and torch.equal(one.up, other.up):
        return math.isclose(one.scale, other.scale, rel_tol=1e-6)
    first, second = one.product(), other.product()
    rough = 1e-6 if one.up.dtype == torch.float32 else 1e-2
    return bool((first - second).abs().max() <= rough * first.abs().max())
