"""Base of the UNet families: epsilon or v prediction with a variance-preserving noise schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from stepdistill.families.control import ControlNets
from stepdistill.families.vp import VariancePreserving
from stepdistill.networks.layers import named, rebuilt
from stepdistill.networks.roles import Site, Sites, Tap

# the layers of LCM-LoRA, as diffusers' train_lcm_distill_lora_sdxl.py lists them
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

# a network with one of these takes an input that the plain pipelines do not give it
PLAIN = {"class_embed_type": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None}


def unet_controls(pipeline: type[DiffusionPipeline]) -> ControlNets:
    """The ControlNets of a family with a UNet, in their stock pipeline."""
    return ControlNets(
        pipeline=pipeline,
        model=ControlNetModel,
        image="image",
        same=("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type"),
        own={"conditioning_channels": 3},
        hint="conditioning_embedding_out_channels",
    )


@dataclass(frozen=True, kw_only=True)
class UNet(VariancePreserving):
    """A pipeline with a `UNet2DConditionModel`."""

    network_name: ClassVar[str] = "unet"

    def arguments(self) -> dict[str, Any]:
        return {}

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear, nn.Conv2d))

    def tap(self, net: nn.Module) -> Tap:
        """The bottleneck, as in DMD2."""
        config: Any = net.config
        widths = config["block_out_channels"]
        patch = 2 ** (len(widths) - 1)
        return Tap("up_blocks.0", widths[-1], patch, config["sample_size"] // patch)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The maps after each block on the way down, after the middle, and after each on the way up."""
        config: Any = net.config
        widths = config["block_out_channels"]
        last = len(widths) - 1
        down = [(i, min(i + 1, last)) for i in range(last + 1)]  # level by width, and by side
        up = [(last - i, max(last - i - 1, 0)) for i in range(last + 1)]
        names = [f"down_blocks.{i}" for i in range(1, last + 1)] + ["mid_block"]
        names += [f"up_blocks.{i}" for i in range(last + 1)] + ["conv_norm_out"]
        levels = zip(names, [*down, (last, last), *up], strict=True)
        return tuple(Tap(name, widths[w], 2**k, config["sample_size"] // 2**k) for name, (w, k) in levels)

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        layers: list[tuple[str, Any]] = [(n, m) for n, m in net.named_modules() if isinstance(m, Attention)]
        places = [Site(n, m.query_dim, m.cross_attention_dim) for n, m in layers if n.endswith(".attn2")]
        config: Any = net.config
        width = config["time_embedding_dim"] or 4 * config["block_out_channels"][0]
        return Sites("time_embedding", width, tuple(places))

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        channels = config["block_out_channels"]
        heads = config["num_attention_heads"] or config["attention_head_dim"]  # the second name means heads, too
        heads = heads if isinstance(heads, list | tuple) else [heads] * len(channels)
        units = [math.lcm(config["norm_num_groups"], n) for n in heads]
        slim = [max(1, round(width * c / unit)) * unit for c, unit in zip(channels, units, strict=True)]
        return rebuilt(net, block_out_channels=slim)
