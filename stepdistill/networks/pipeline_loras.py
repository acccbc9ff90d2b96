"""LoRAs in the network of a plain pipeline: what Diffusers' own loaders do not do, or not for every pipeline."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepdistill.core.errors import StudentError
from stepdistill.core.files import save_tensors
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.names import with_text_model
from stepdistill.networks.lora.read import unmatched
from stepdistill.networks.lora.tensors import Lora, lora_facts, peft_state
from stepdistill.networks.peft_config import file_config, peft_config
from stepdistill.networks.roles import LoraSpec


def write_component_lora(file: Path, component: str, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a LoRA of one component of a pipeline with its metadata, as Diffusers' loaders read it."""
    tensors = {f"{component}.{key}": value.contiguous() for key, value in state.items()}
    facts = {f"{component}.{key}": value for key, value in config.items()}
    metadata = json.dumps(facts, indent=2, sort_keys=True, default=sorted)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, file, {"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata})


def attach(net: nn.Module, spec: LoraSpec, state: dict[str, Tensor], name: str) -> None:
    """A LoRA into a pipeline's network where Diffusers has no loader for it; on, and the others as they were.

    Raises:
        ValueError: the name is in use, or the tensors are not those of `spec`'s layers.
    """
    if keys_of(net, name):
        raise ValueError(f"adapter name {name!r} is already in use")
    on = adapters_on(net)
    inject_adapter_in_model(peft_config(spec, ()), net, name)
    same_keys(keys_of(net, name), state.keys())
    set_peft_model_state_dict(net, state, adapter_name=name)
    switch_on(net, [*on, name])


def load_lora(pipe: DiffusionPipeline, lora: Lora, name: str, source: str | Path) -> None:
    """A LoRA into the networks of a pipeline, each layer at its own rank and alpha; on from now on, and no other.

    Raises:
        StudentError: some of its layers are not in the pipeline, or have other shapes. It is as it was then.
    """
    loader: Any = pipe
    networks = {part: pipe.components[part] for part in loader._lora_loadable_modules}
    layers = {
        with_text_model(f"{part}.{inner}"): layer
        for part, net in networks.items()
        if net is not None
        for inner, layer in net.named_modules()
    }
    check_fit(layers, lora, source)
    state, facts = peft_state(lora), lora_facts(lora)
    for part in networks.keys() & {layer.partition(".")[0] for layer in lora}:
        given: dict[str, Any] = {"prefix": part, "adapter_name": name, "metadata": facts, "_pipeline": pipe}
        given["low_cpu_mem_usage"] = True  # as the pipeline's own loader has it
        if part.startswith("text_encoder"):
            loader.load_lora_into_text_encoder(state, None, networks[part], **given)
        else:
            networks[part].load_lora_adapter(state, **given)


def assist(backbone: Backbone, lora: Lora, network: str, source: str | Path) -> None:
    """A LoRA into a backbone as its training assistant, each layer at its own rank and alpha.

    Args:
        network: the pipeline's component that the backbone is of.

    Raises:
        StudentError: some of its layers are not in the network, or have other shapes.
    """
    check_fit({f"{network}.{name}": layer for name, layer in backbone.net.named_modules()}, lora, source)
    state = {key.removeprefix(f"{network}."): value for key, value in peft_state(lora).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # to predict memory
        backbone.assist(file_config(lora, network), state)


def check_fit(layers: Mapping[str, nn.Module], lora: Lora, source: str | Path) -> None:
    """Raise StudentError where some layers of a LoRA are not among a pipeline's `layers`, or have other shapes."""
    odd = [layer for layer, tensors in lora.items() if layer not in layers or not _fits(layers[layer], tensors)]
    if odd:
        shapes = {layer: f"{tuple(lora[layer].up.shape)} x {tuple(lora[layer].down.shape)}" for layer in odd}
        expected = "layers of this pipeline, of the same shapes"
        why, todo = "the images would change without them", "check the network that it was trained on"
        keys = [f"{layer}.lora_{end}.weight, of {shapes[layer]}" for layer in odd for end in "AB"]
        raise StudentError(unmatched(source, keys, 2 * len(lora), expected, why, todo))


def _fits(layer: nn.Module, lora: LayerLora) -> bool:
    """Whether a LoRA is as wide as a layer."""
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    match layer:
        case nn.Linear():  # by these, as a quantised weight has another shape
            shape = (layer.out_features, layer.in_features)
        case nn.Conv2d():
            shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        case _:
            return False
    return (len(lora.up), *lora.down.shape[1:]) == shape and lora.up[0, 0].numel() == 1


def keys_of(net: nn.Module, name: str) -> set[str]:
    """The names of a LoRA's tensors in a pipeline's network, as a student folder has them; none where it has none."""
    layers = {key: layer for key, layer in net.named_modules() if isinstance(layer, LoraLayer) and name in layer.r}
    return _tensor_names(layers)


def target_keys(net: nn.Module, targets: Collection[str]) -> set[str]:
    """The names of the tensors that a LoRA on these targets has, which are whole names of layers or their ends."""
    return _tensor_names(target_layers(net, targets))


def target_layers(net: nn.Module, targets: Collection[str]) -> list[str]:
    """The names of the layers that targets, which are whole names or their ends, stand for."""
    ends = tuple(f".{target}" for target in targets)
    return [name for name, _ in net.named_modules() if f".{name}".endswith(ends)]


def _tensor_names(layers: Iterable[str]) -> set[str]:
    return {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}


def same_keys(expected: Collection[str], given: Collection[str]) -> None:
    """Raise ValueError where a file's LoRA has other tensors than a network's layers ask for."""
    odd = sorted(set(expected) ^ set(given))
    if odd:
        missing = len(set(expected) - set(given))
        raise ValueError(
            f"of {len(given)} LoRA tensors in the file {len(given) + missing - len(odd)} match the network's layers "
            f"and {len(odd) - missing} do not, {missing} are missing; the first is {odd[0]!r}"
        )


def adapters_on(net: nn.Module) -> list[str]:
    """The LoRAs that are on in a pipeline's network."""
    layers = [layer for layer in net.modules() if isinstance(layer, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


def switch_on(net: nn.Module, names: Sequence[str]) -> None:
    """Let these LoRAs be on in a pipeline's network, each at the strength that it has, and no others."""
    for layer in net.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(names))


def weigh_active(net: nn.Module, weights: Mapping[str, float]) -> None:
    """Let these LoRAs be on in a pipeline's network, each at its strength, and no others."""
    switch_on(net, list(weights))
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            for name in weights.keys() & layer.r.keys():
                layer.set_scale(name, weights[name])


def fuse_loras(pipe: DiffusionPipeline) -> None:
    """Fuse the LoRAs that are on into the weights of a pipeline's networks, at their strength.

    The images are the same, in less time. PEFT's layers stay, so that `unfuse_lora` of Diffusers undoes it.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for layer in (layer for net in networks for layer in net.modules() if isinstance(layer, BaseTunerLayer)):
        layer.merge()


def strengths(net: nn.Module, names: Collection[str]) -> list[tuple[dict[str, float], str]]:
    """Where a pipeline's network keeps the strengths of these LoRAs, and under which name; none of what is fused."""
    layers = [layer for layer in net.modules() if isinstance(layer, LoraLayer) and not layer.merged]
    return [(layer.scaling, name) for layer in layers for name in names if name in layer.scaling]
