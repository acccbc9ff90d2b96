"""The one reader of LoRA files, of any format, and what is said about a file that it does not take."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import is_single_file
from stepdistill.networks.lora.names import NETWORKS, PIPELINES, Layer, by_name, by_part
from stepdistill.networks.lora.tensors import DOWN, UP, Format, Lora, ParsedLora, format_of, original_names, parse_lora

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 10
# what plain Diffusers reads beside its own format, where all layers have one alpha: it mixes the names of others up
READ_BY_DIFFUSERS: dict[Format, tuple[str, ...]] = {
    "kohya": ("sd", "sdxl", "flux", "klein", "z_image"),
    "comfyui": ("flux",),
}
EACH_ALPHA: dict[Format, tuple[str, ...]] = {"kohya": ("qwen_image",)}  # and what it reads with an alpha of each layer
LOST_BY_DIFFUSERS = {"klein": ("modulation", "norm_out")}  # its reader of kohya's names has none for these layers


@dataclass(frozen=True)
class Layout:
    """The network of a LoRA: a key of `networks.lora.names.NETWORKS`, and `layers_per_block` of its UNet.

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


def layout_of(pipeline: type[DiffusionPipeline], where: str, revision: str | None = None) -> Layout:
    """The names of the layers of a pipeline's class, at a folder, hub id or single file.

    Raises:
        ConfigError: the names of its layers in LoRA files are not known.
    """
    name = PIPELINES.get(pipeline.__name__)
    if name is None:
        got, expected = f"the family of {pipeline.__name__}", f"one of {', '.join(PIPELINES)}"
        raise ConfigError(
            problem(
                got, expected, "the names of its layers in other formats are not known", "use the format of Diffusers"
            )
        )
    if name != "sdxl" or is_single_file(where):
        return Layout(name)
    config: Any = UNet2DConditionModel.load_config(where, subfolder="unet", revision=revision)
    return Layout(name, config["layers_per_block"])


def lora_path(source: str | Path) -> Path:
    """The file of a LoRA that is given as a file, a folder or a hub id.

    In a folder it is the one that Diffusers writes, or else the only one.

    Raises:
        StudentError: there is none, there are several, or the hub cannot be reached.
    """
    place, name = Path(source), str(source)
    expected, todo = "a .safetensors file, a folder with one, or a hub id", "check the path or id, and the network"
    try:
        if place.is_dir():
            return place / _chosen(name, [path.name for path in place.iterdir()])
        if place.suffix == ".safetensors" or place.suffix in PICKLES:
            return place
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise FileNotFoundError("there is no such file or folder")
        try:
            return Path(hf_hub_download(name, LORA_WEIGHT_NAME_SAFE))
        except EntryNotFoundError:
            return Path(hf_hub_download(name, _chosen(name, HfApi().list_repo_files(name))))
    except OSError as error:
        raise StudentError(problem(f"LoRA {name}", expected, str(error), todo)) from error


def _chosen(place: str, names: Sequence[str]) -> str:
    names = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if LORA_WEIGHT_NAME_SAFE in names or len(names) == 1:
        return LORA_WEIGHT_NAME_SAFE if LORA_WEIGHT_NAME_SAFE in names else names[0]
    got = f"{place} with {len(names)} .safetensors files{': ' if names else ''}{', '.join(names[:3])}"
    raise StudentError(problem(got, f"{LORA_WEIGHT_NAME_SAFE}, or one file", "the LoRA is not known", "name its file"))


def read_lora(file: Path, layout: Layout | None = None) -> LoraFile:
    """The LoRA in a file of any format. Raises StudentError where some of it is not understood."""
    state, metadata = tensors_of(file)
    return _lora_file(file, original_names(state), metadata, layout)


def read_pipeline_lora(file: Path, pipeline: type[DiffusionPipeline], network: str, layout: Layout) -> Lora:
    """The LoRA in a file, for a pipeline whose denoiser is the component `network`.

    Takes the three formats, and what else Diffusers converts for the class `pipeline`. Whether the networks have the
    layers is found when the LoRA is loaded.

    Raises:
        StudentError: the file is not whole, or some of its keys are no layer's of such a pipeline.
    """
    state, metadata = tensors_of(file)
    originals = original_names(state)
    if layout.family and format_of(originals) == "kohya":
        return _lora_file(file, originals, metadata, layout).lora
    lora, odd = _named(file, state, metadata, network)
    if odd and not any("dora_scale" in key for key in state):  # of which Diffusers only warns
        lora, still = _named(file, _converted(state, pipeline), {}, network)
        odd = odd if still else []
    if odd or not lora:
        expected = f"keys of a LoRA for a {pipeline.__name__}, such as {network}.NAME.lora_A.weight"
        why = "the images would change without them"
        todo = "check what it was trained on; each layer needs both matrices, and DoRA, LoHa and LoKr are not supported"
        raise StudentError(unmatched(file, odd, len(state), expected, why, todo))
    return lora


def check_plain(file: Path, lora: Lora, family: str | None) -> None:
    """Raise StudentError if Diffusers' own loader reads another LoRA from a file for a family, or none."""
    with safe_open(file, "pt") as opened:
        format = format_of(opened.keys())
    if not family or format not in READ_BY_DIFFUSERS:
        return
    alphas = len({layer.alpha for layer in lora.values()})
    lost = [name for name in lora for part in LOST_BY_DIFFUSERS.get(family, ()) if part in name]
    plain = family in READ_BY_DIFFUSERS[format] and alphas == 1 and not lost
    if plain or family in EACH_ALPHA.get(format, ()):
        return
    got = f"{file} in the {format} format" + (f" with {alphas} different alphas" if alphas > 1 else "")
    why = "a student's card loads the LoRAs of its teacher with plain Diffusers, which gets this one wrong"
    todo = f"stepdistill convert {file} OUT.safetensors --to diffusers"
    raise StudentError(problem(got, f"a file that Diffusers reads for {family}", why, todo))


def _named(file: Path, state: dict[str, Tensor], metadata: dict[str, str], network: str) -> tuple[Lora, list[str]]:
    """The LoRA of tensors under Diffusers' names, and the keys that are not part of it."""
    parsed = _parsed(file, state, metadata, Layout(None))
    odd = {*parsed.unknown, *(key for key in state if not key.startswith((f"{network}.", "text_encoder")))}
    return parsed.lora, sorted(odd)


def _converted(state: Mapping[str, Tensor], pipeline: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Tensors of yet another format as Diffusers' loader of a pipeline names them; as they were where it knows none."""
    try:
        made = pipeline.lora_state_dict(dict(state), return_alphas=True)
        made, alphas = made if isinstance(made, tuple) else (made, None)
        text = {key: value for key, value in made.items() if key.startswith("text_encoder")}
        made = convert_unet_state_dict_to_peft({key: made[key] for key in made.keys() - text.keys()})
        text = convert_state_dict_to_peft(convert_state_dict_to_diffusers(text)) if text else {}
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, StopIteration, ValueError):
        return dict(state)
    return made | text | {key: torch.as_tensor(alpha) for key, alpha in (alphas or {}).items()}


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
    except (AttributeError, RuntimeError, TypeError, ValueError, re.error) as error:
        expected = "two matrices of the same rank for each layer, one alpha, and the metadata of PEFT"
        todo = "check the origin of the file"
        raise StudentError(problem(f"mismatched shapes or metadata in {file}", expected, str(error), todo)) from error


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
    if fits == ["flux", "klein"]:  # the outputs of their blocks' layers do, in units of the inputs
        ratios = {
            _ratio(state, key.removesuffix(UP)) for key in state if key.endswith(("mlp_0." + UP, "linear1." + UP))
        }
        return ["flux"] if ratios & {4, 7} else ["klein"] if ratios & {6, 9} else fits
    return fits


def _ratio(state: Mapping[str, Tensor], layer: str) -> float:
    return state[layer + UP].shape[0] / state[layer + DOWN].shape[1] if layer + DOWN in state else 0.0


def _names(layout: Layout, format: Format) -> Mapping[str, Layer]:
    return (by_name if format == "kohya" else by_part)(layout.family, layout.per_block) if layout.family else {}


def _foreign(state: Mapping[str, Tensor], family: str) -> set[str]:
    """Names of layers that a family does not have, at its usual depth."""
    known = by_part(family).keys() | by_name(family).keys()
    return {re.sub(r"\.(lora_(A|B|down|up)\.weight|alpha)$", "", key) for key in state} - known


def _unmatched(file: Path, state: Mapping[str, Tensor], parsed: ParsedLora, layout: Layout, format: Format) -> str:
    fits = _fits(state)
    also = "" if layout.family in fits else f"; they look like {' or '.join(fits)}"
    expected = f"keys of a {layout.family} LoRA in the {format} format"
    why = f"the images would change without them{also}"
    todo = "check the family; each layer needs both matrices, and DoRA, LoHa, LoKr and T5 are not supported"
    return unmatched(file, parsed.unknown, len(state), expected, why, todo, _names(layout, format))


def unmatched(
    source: Path | str,
    keys: Sequence[str],
    total: int,
    expected: str,
    why: str,
    todo: str,
    known: Collection[str] = (),
) -> str:
    """What is said of a file some of whose keys match nothing: the first ten, each with the nearest name in `known`."""
    lines = []
    for key in keys[:SHOWN]:
        near = difflib.get_close_matches(key.partition(".lora_")[0], known, 1, 0.8)
        lines.append(f"  {key}" + (f"  (the nearest layer: {near[0]})" if near else ""))
    more = [f"  and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
    got = f"{source} with {len(keys)} of {total} keys unmatched, {total - len(keys)} matched"
    return "\n".join([problem(got, expected, why, todo), *lines, *more])
