"""The names of Z-Image's layers in LoRA files, which are Diffusers' in each format; and those that others write."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

BLOCKS = tuple(product(("layers", "noise_refiner", "context_refiner"), range(64)))  # more than the network has
INNER = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
ENDS = (
    *("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "all_x_embedder.2-1"),
    *("all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
)


def names() -> Iterator[str]:
    """Diffusers' names."""
    yield from ENDS
    for kind, i in BLOCKS:
        yield from (f"{kind}.{i}.{name}" for name in INNER)
        if kind != "context_refiner":  # which is not told the time
            yield f"{kind}.{i}.adaLN_modulation.0"


def originals() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers whose names in the original network differ, which fuses queries, keys and values: as sd-scripts would
    spell them, with the parts in Diffusers' pipeline."""
    for kind, i in BLOCKS:
        ours, theirs = f"transformer.{kind}.{i}.attention", f"lora_unet_{kind}_{i}_attention"
        yield f"{theirs}_qkv", tuple(f"{ours}.to_{x}" for x in "qkv")
        yield f"{theirs}_out", (f"{ours}.to_out.0",)
