"""Networks without weights, on the meta device: placeholders for parts of a pipeline that are not loaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import nn

from stepdistill.config.schema import locate


def shell(where: str, name: str, kind: str, revision: str | None) -> nn.Module:
    """Part `name` of the pipeline at `where`, on the meta device: no file of weights is opened.

    A pipeline reads the configs of its parts, such as the autoencoder's for the size of a latent, so None would not do.

    Args:
        kind: dotted path of the part's class, in Diffusers or Transformers.
    """
    network: Any = locate(kind)
    place: dict[str, Any] = {"subfolder": name, "revision": revision}
    if issubclass(network, ModelMixin):
        config, build = network.load_config(where, **place), network.from_config  # pyright: ignore
    else:
        config, build = network.config_class.from_pretrained(where, **place), network
    with torch.device("meta"):
        net = build(config)
    return with_tables(net)


def with_tables(net: nn.Module) -> nn.Module:
    """A network on the meta device with the rotary tables of Qwen-Image on the cpu.

    They are no buffers, so nothing would give them a device again.
    """
    for inner, module in list(net.named_modules()):
        if isinstance(module, QwenEmbedRope):
            with torch.device("cpu"):
                net.set_submodule(inner, QwenEmbedRope(module.theta, module.axes_dim, module.scale_rope))
    return net


def is_shell(part: object) -> bool:
    """Whether a pipeline's part is a network without weights."""
    return isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters())
