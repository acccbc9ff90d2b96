"""LoRAs in the network of a plain pipeline: what Diffusers' own loaders do not do, or not for every pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from diffusers import DiffusionPipeline
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepdistill.networks.backbone import peft_config
from stepdistill.networks.roles import LoraSpec


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


def keys_of(net: nn.Module, name: str) -> set[str]:
    """The names of a LoRA's tensors in a pipeline's network, as a student folder has them; none where it has none."""
    layers = {key: layer for key, layer in net.named_modules() if isinstance(layer, LoraLayer) and name in layer.r}
    return {f"{key}.lora_{part}.weight" for key in layers for part in "AB"}


def same_keys(loaded: Collection[str], given: Collection[str]) -> None:
    """Raise ValueError where a file's LoRA and the one that was made of it in a network have other tensors."""
    odd = sorted(set(loaded) ^ set(given))
    if odd:
        raise ValueError(
            f"{len(given)} LoRA tensors in the file and {len(loaded)} in the network's layers; {len(odd)} names "
            f"differ, the first {odd[0]!r}: it was trained on another network"
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
