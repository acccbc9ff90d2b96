"""The layers of Qwen-Image, whose original names are Diffusers', for `stepdistill.networks.lora.names`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

ENDS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.{name}" for name in ("linear_1", "linear_2")),
)
BLOCK = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{name}" for stream, name in product(("img", "txt"), ("mod.1", "mlp.net.0.proj", "mlp.net.2"))),
)


def qwen_image(blocks: int) -> Iterator[str]:
    """The names of all layers, for `blocks` blocks."""
    yield from ENDS
    yield from (f"transformer_blocks.{i}.{name}" for i, name in product(range(blocks), BLOCK))
