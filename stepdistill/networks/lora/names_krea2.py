"""The layers of Krea 2 by Diffusers' names and the original ones, for `stepdistill.networks.lora.names`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
ENDS = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
}
KINDS = {
    "transformer_blocks": "blocks",
    "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
    "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
}


def krea2() -> Iterator[tuple[str, tuple[str]]]:
    """Original name and Diffusers' name of each layer."""
    yield from ((original, (name,)) for name, original in ENDS.items())
    for (ours, theirs), i, (name, original) in product(KINDS.items(), range(64), BLOCK.items()):  # it has fewer
        yield f"{theirs}.{i}.{original}", (f"{ours}.{i}.{name}",)
