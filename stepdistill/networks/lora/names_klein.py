"""The layers of FLUX.2 klein by Diffusers' names and the original ones, for `stepdistill.networks.lora.names`."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
NORM = "norm_out.linear"  # of (scale, shift) where the original's is of (shift, scale)


def klein(blocks: int) -> Iterator[tuple]:
    """Original name, Diffusers' names of its parts, and what else a `Layer` takes, for `blocks` blocks of each kind."""
    yield from ((original, (name,)) for name, original in ENDS.items())
    yield "final_layer.adaLN_modulation.1", (NORM,), (1,), True
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from ((f"{theirs}.{original}", (f"{ours}.{name}",)) for name, original in BLOCK.items())
        yield f"{theirs}.img_attn.qkv", tuple(f"{ours}.attn.to_{x}" for x in "qkv"), (1, 1, 1)
        yield f"{theirs}.txt_attn.qkv", tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)
        ours, theirs = f"single_transformer_blocks.{i}.attn", f"single_blocks.{i}"
        yield f"{theirs}.linear1", (f"{ours}.to_qkv_mlp_proj",)
        yield f"{theirs}.linear2", (f"{ours}.to_out",)
