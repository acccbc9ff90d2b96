"""LoRAs in the three file formats: convert their tensors to and from one common form.

Three formats hold the same numbers:

- `diffusers`: Diffusers' names, `lora_A` and `lora_B`; rank and alpha are in the file's metadata.
- `kohya`: the original implementation's names as kohya's trainers spell them, `lora_down`, `lora_up` and an `alpha` of
  each layer; where the original fuses projections, so does the file. For Z-Image and Qwen-Image musubi-tuner spells
  Diffusers' names so.
- `comfyui`: for UNets and klein the same as kohya. For other networks ComfyUI reads Diffusers' names, which need no
  fusing, with an `alpha` of each layer. It does not read metadata.

The original implementation's names in its own spelling, under `diffusion_model.`, are read as kohya's.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.networks.lora.layer import LayerLora, join_layers, split_layer
from stepdistill.networks.lora.names import NETWORKS, Layer, by_name, by_part, with_text_model, without_text_model

Format = Literal["diffusers", "kohya", "comfyui"]
FAMILIES: dict[Format, tuple[str, ...]] = {
    "diffusers": tuple(NETWORKS),
    "kohya": ("sd", "sdxl", "sd3", "flux", "klein", "z_image", "qwen_image", "krea2"),
    "comfyui": ("sd", "sdxl", "sd3", "flux", "klein", "pixart", "z_image", "qwen_image", "krea2"),
}
ORIGINAL_IN_COMFYUI = ("sd", "sdxl", "klein")  # it does not map all of Diffusers' names of these
METADATA = "lora_adapter_metadata"
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
A, B = "lora_A.weight", "lora_B.weight"
# settings of PEFT with which a layer adds something else than its two matrices, or to another base
VARIANTS = ("use_dora", "lora_bias", "bias", "use_qalora", "use_bdlora", "kasa_config", "arrow_config")
VARIANTS += ("monteclora_config", "alora_invocation_tokens", "layer_replication", "target_parameters")
VARIANTS += ("trainable_token_indices", "modules_to_save")
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that take a part out of the base


Lora = dict[str, LayerLora]  # by the layer's name in Diffusers' pipeline, such as `unet.conv_in`


@dataclass(frozen=True)
class ParsedLora:
    """The parsed tensors of a file.

    Args:
        unknown: keys that no layer of the family has, or whose layer is incomplete.
        mute: layers without an alpha, for which it is the rank.
    """

    lora: Lora
    unknown: tuple[str, ...]
    mute: tuple[str, ...] = ()


def format_of(state: Collection[str]) -> Format | None:
    """The format of a file's keys; None if it is none of the three."""
    if any(key.startswith("lora_") and key.endswith((DOWN, UP)) for key in state):
        return "kohya"
    if not any(key.endswith((A, B)) for key in state):
        return None
    return "comfyui" if any(key.endswith("." + ALPHA) for key in state) else "diffusers"


def original_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under kohya's names where they have the original names in dots, `diffusion_model.NAME.lora_A.weight`;
    others as they are."""
    known = {name for family in FAMILIES["kohya"] for name in by_name(family)}

    def renamed(key: str) -> str:
        for end, theirs in {A: DOWN, B: UP, DOWN: DOWN, UP: UP, ALPHA: ALPHA}.items():
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(f".{end}").replace(".", "_")
            if key.startswith("diffusion_model.") and key.endswith(f".{end}") and name in known:
                return f"{name}.{theirs}"
        return key

    return {renamed(key): value for key, value in state.items()}


def parse_lora(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], family: str | None, per_block: int = 2
) -> ParsedLora:
    """The LoRA in a file's tensors. Raises ValueError if their shapes do not match.

    Args:
        family: family of the layers; None accepts any layer with a name of Diffusers.
    """
    facts = json.loads(metadata.get(METADATA, "{}"))
    _check_plain(facts)
    if family is not None and format_of(state) == "kohya":
        return _read_kohya(state, by_name(family, per_block))
    facts = facts if format_of(state) == "diffusers" else {}
    return _read_named(state, facts, by_part(family, per_block) if family else None)


def _check_plain(facts: Mapping[str, Any]) -> None:
    """Raise ValueError where PEFT's config in the metadata is that of a variant of LoRA."""
    for key, value in facts.items():
        setting = key.rpartition(".")[2]
        other_base = setting == "init_lora_weights" and str(value).startswith(OTHER_BASE)
        if other_base or (setting in VARIANTS and value and value != "none"):
            raise ValueError(f"{key} is {value!r} in the metadata, and only plain LoRAs are supported")


def lora_tensors(lora: Lora, to: Format, family: str, per_block: int = 2) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file. Raises ValueError if the format does not support the family."""
    if family not in FAMILIES[to]:
        raise ValueError(f"{to} has no names for the layers of {family}")
    if to == "diffusers":
        return _sorted(peft_state(lora)), {"format": "pt", METADATA: json.dumps(lora_facts(lora), sort_keys=True)}
    if to == "comfyui" and family not in ORIGINAL_IN_COMFYUI:
        return _with_alpha(lora, A, B), {"format": "pt"}
    known, gathered = by_part(family, per_block), defaultdict(dict)
    for name, part in lora.items():
        gathered[known[name]][name] = part
    joined = {one.name: join_layers([parts.get(name) for name in one.parts], one) for one, parts in gathered.items()}
    return _with_alpha(joined, DOWN, UP), {"format": "pt"}


def peft_state(lora: Lora, scale: float | None = None) -> dict[str, Tensor]:
    """The tensors under PEFT's names in a network.

    Args:
        scale: the network's alpha / rank for every layer; `up` is scaled in layers where it differs. None leaves the
            tensors unchanged.
    """
    state = {}
    for name, layer in lora.items():
        ratio = 1.0 if scale is None else layer.scale / scale
        state |= {f"{name}.{A}": layer.down, f"{name}.{B}": layer.up if ratio == 1 else layer.up * ratio}
    return state


def _layer(tensors: Mapping[str, Tensor], down: str, up: str, alpha: float | None, name: str) -> LayerLora:
    first, second = tensors[down], tensors[up]
    if first.ndim < 2 or second.ndim != first.ndim or second.shape[1] != len(first):
        raise ValueError(f"{name}: shapes {tuple(first.shape)} and {tuple(second.shape)} have no rank in common")
    alpha = float(len(first)) if alpha is None else alpha
    if not len(first) or not math.isfinite(alpha):
        raise ValueError(f"{name}: rank {len(first)} and alpha {alpha:g}, expected 1 or more and a finite number")
    if not first.is_floating_point() or not second.is_floating_point():
        raise ValueError(f"{name}: {first.dtype} and {second.dtype}, expected floating-point numbers")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinite weights, expected finite ones")
    return LayerLora(first, second, alpha)


def _grouped(state: Mapping[str, Tensor], ends: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by layer and by key ending, and the keys with other endings."""
    groups, odd = defaultdict(dict), []
    for key, value in state.items():
        end = next((end for end in ends if key.endswith("." + end)), None)
        if end is None:
            odd.append(key)
        else:
            groups[key.removesuffix("." + end)][end] = value
    return groups, odd


def _read_kohya(state: Mapping[str, Tensor], known: Mapping[str, Layer]) -> ParsedLora:
    (groups, odd), lora, mute = _grouped(state, (DOWN, UP, ALPHA)), {}, []
    for name, tensors in groups.items():
        if name not in known or not {DOWN, UP} <= tensors.keys():
            odd += [f"{name}.{end}" for end in tensors]
            continue
        alpha = tensors[ALPHA].item() if ALPHA in tensors else None
        mute += [name] if alpha is None else []
        whole = _layer(tensors, DOWN, UP, alpha, name)
        for part, one in zip(known[name].parts, split_layer(whole, known[name]), strict=True):
            lora |= {part: one} if one is not None else {}
    return ParsedLora(lora, tuple(sorted(odd)), tuple(mute))


def _read_named(state: Mapping[str, Tensor], facts: Mapping[str, Any], known: Mapping[str, Layer] | None) -> ParsedLora:
    (groups, odd), lora, mute = _grouped(state, (A, B, ALPHA)), {}, []
    for written, tensors in groups.items():
        name = with_text_model(written)
        if known is not None and name not in known or name in lora or not {A, B} <= tensors.keys():
            odd += [f"{written}.{end}" for end in tensors]
            continue
        alpha = tensors[ALPHA].item() if ALPHA in tensors else _alpha(facts, written, len(tensors[A]))
        mute += [name] if alpha is None else []
        lora[name] = _layer(tensors, A, B, alpha, name)
    return ParsedLora(lora, tuple(sorted(odd)), tuple(mute))


def _alpha(facts: Mapping[str, Any], name: str, rank: int) -> float | None:
    """A layer's alpha from PEFT's config in the metadata; None without a config of its component."""
    component, _, inner = name.partition(".")
    if not any(key.startswith(f"{component}.") for key in facts):
        return None
    alpha = facts.get(f"{component}.lora_alpha")
    if alpha is None:
        raise ValueError(f"{component}.lora_alpha is not in the metadata, which have other settings of PEFT")
    for pattern, other in (facts.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", inner):  # as in PEFT
            alpha = other
            break
    return float(alpha) * (math.sqrt(rank) if facts.get(f"{component}.use_rslora") else 1)


def lora_facts(lora: Lora) -> dict[str, Any]:
    """PEFT's config of each component, in the form that Diffusers stores."""
    facts: dict[str, Any] = {}
    for component in sorted({name.partition(".")[0] for name in lora}):
        # `^`: else `proj_out` would be the last layer of every block, too. A text encoder's names are ends.
        start = "" if component.startswith("text_encoder") else "^"
        parts = {n.partition(".")[2]: p for n, p in lora.items() if n.startswith(component + ".")}
        parts = {without_text_model(n): p for n, p in parts.items()}
        rank = Counter(len(p.down) for p in parts.values()).most_common(1)[0][0]
        alpha = Counter(p.alpha for p in parts.values()).most_common(1)[0][0]
        facts |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            f"{component}.target_modules": sorted(parts),
            f"{component}.rank_pattern": {f"{start}{n}": len(p.down) for n, p in parts.items() if len(p.down) != rank},
            f"{component}.alpha_pattern": {f"{start}{n}": p.alpha for n, p in parts.items() if p.alpha != alpha},
        }
    return facts


def _with_alpha(lora: Mapping[str, LayerLora], down: str, up: str) -> dict[str, Tensor]:
    state = {}
    for name, part in lora.items():
        state |= {f"{name}.{down}": part.down, f"{name}.{up}": part.up, f"{name}.{ALPHA}": torch.tensor(part.alpha)}
    return _sorted(state)


def _sorted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # copies: safetensors refuses tensors that share memory
    return {key: state[key].detach().clone().contiguous() for key in sorted(state)}
