"""A role's network without adapters."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from stepdistill.networks.backbone import Backbone


@torch.no_grad()
def merged_network(backbone: Backbone, role: str) -> nn.Module:
    """A role's network in float32: a copy of a whole one, or the base's with its LoRA added to the weights.

    The base must be built by its class from `net.config`, as those of transformers are.
    """
    if role in backbone.others:
        return deepcopy(backbone.others[role])
    net: Any = backbone.net
    state = {
        key.replace(".base_layer.", "."): value.to(torch.float32, copy=True)
        for key, value in net.state_dict().items()
        if ".lora_" not in key
    }
    for name, layer in net.named_modules():
        if isinstance(layer, LoraLayer):
            state[f"{name}.weight"] += layer.get_delta_weight(role)  # pyright: ignore
    plain = type(net)(net.config)
    plain.load_state_dict(state)
    return plain.eval().requires_grad_(False)
