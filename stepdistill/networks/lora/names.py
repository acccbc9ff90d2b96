"""The names of layers in LoRA files: those of Diffusers, and those of kohya's sd-scripts and musubi-tuner.

A `Layer` is one layer of the original implementation. It holds one layer of Diffusers' network, or several stacked ones
where the original fuses projections.

The names were checked against kohya-ss/sd-scripts (`networks/lora.py`, `lora_sd3.py`, `lora_flux.py`,
`convert_flux_lora.py`), kohya-ss/musubi-tuner (`networks/lora_flux_2.py`, `lora_zimage.py`, `lora_qwen_image.py`),
ComfyUI (`comfy/lora.py`, `comfy/utils.py`, `comfy/ldm/qwen_image/model.py`) and Diffusers' loaders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from stepdistill.networks.lora import names_qwen_image, names_z_image
from stepdistill.networks.lora.names_klein import ENDS as KLEIN_ENDS
from stepdistill.networks.lora.names_klein import NORM as KLEIN_NORM
from stepdistill.networks.lora.names_klein import klein
from stepdistill.networks.lora.names_krea2 import krea2

NETWORKS = {
    **dict.fromkeys(("sd", "sdxl"), "unet"),
    **dict.fromkeys(("sd3", "flux", "klein", "pixart", "sana", "z_image", "qwen_image", "krea2"), "transformer"),
}
PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "klein",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
    "SanaSprintPipeline": "sana",
    "ZImagePipeline": "z_image",
    "QwenImagePipeline": "qwen_image",
    "Krea2Pipeline": "krea2",
}
# sd-scripts' names of the CLIP text encoders; its T5 is not converted
ENCODERS: dict[str, dict[str, str]] = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux": {"text_encoder": "lora_te1"},
    **dict.fromkeys(("klein", "pixart", "sana", "z_image", "qwen_image", "krea2"), {}),
}
BLOCKS = 64  # more than any of these networks has; names are matched whole, so a bound costs nothing
EMBEDDER = ("linear_1", "linear_2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
FLUX_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1.linear": "img_mod.lin",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
}
FLUX_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}

# layers that sd-scripts or musubi-tuner have no LoRA for: they leave them out of a file without an error
OUTSIDE: dict[str, tuple[str, ...]] = {
    "sd": tuple(name for name in UNET_ENDS if not name.startswith("add_embedding")),
    "sdxl": tuple(UNET_ENDS),
    "flux": ("norm_out.linear", "proj_out"),
    "klein": (*KLEIN_ENDS, KLEIN_NORM),
    "z_image": names_z_image.ENDS,
    "qwen_image": names_qwen_image.ENDS,
}


@dataclass(frozen=True)
class Layer:
    """One layer of the original network.

    Args:
        name: the name in sd-scripts or musubi-tuner; None if neither supports the network.
        parts: its layers in Diffusers' pipeline, with the component first: `transformer.proj_out`.
        rows: for several parts, the number of outputs of each, in units of the layer's inputs.
        swap: the original gives (shift, scale) where Diffusers gives (scale, shift), if the outputs are twice as many
            as the inputs: the modulation of an output, and of the text stream in SD3's last block.
    """

    name: str | None
    parts: tuple[str, ...]
    rows: tuple[int, ...] = (1,)
    swap: bool = False


def with_text_model(name: str) -> str:
    """A layer's name with the `text_model` that CLIP has in files; transformers 5 leaves it out of some encoders."""
    return re.sub(r"^(text_encoder(_2)?)\.encoder\.layers\.", r"\1.text_model.encoder.layers.", name)


def without_text_model(name: str) -> str:
    """The end of a CLIP layer's name, by which PEFT finds the layer whether or not it is below a `text_model`."""
    return name.removeprefix("text_model.")


@cache
def layers(family: str, per_block: int = 2) -> tuple[Layer, ...]:
    """Every layer that a LoRA of a family may be on, text encoders included.

    Args:
        family: a key of `NETWORKS`.
        per_block: `layers_per_block` of an SDXL UNet, by which the original counts its blocks.
    """
    network = NETWORKS[family]
    originals: Iterable[tuple]
    match family:
        case "sd":
            originals = ((name, (name,)) for name in _unet(4, 1, per_block))
        case "sdxl":
            names = _unet(3, 10, per_block)
            originals = ((_sgm(name, per_block), (name,)) for name in names)
        case "sd3":
            originals = _sd3()
        case "flux":
            originals = _flux()
        case "klein":
            originals = klein(BLOCKS)
        case "pixart":
            originals = ((None, (name,)) for name in _pixart())
        case "z_image":
            originals = ((name, (name,)) for name in names_z_image.names())
        case "qwen_image":
            originals = ((name, (name,)) for name in names_qwen_image.qwen_image(BLOCKS))
        case "krea2":
            originals = krea2()
        case _:
            originals = ((None, (name,)) for name in _sana())
    whole = []
    for original, parts, *more in originals:
        name = None if original is None else "lora_unet_" + original.replace(".", "_")
        whole.append(Layer(name, tuple(f"{network}.{part}" for part in parts), *more))
    return (*whole, *_encoders(family))


@cache
def by_part(family: str, per_block: int = 2) -> dict[str, Layer]:
    """The layers by Diffusers' names of their parts."""
    return {part: layer for layer in layers(family, per_block) for part in layer.parts}


@cache
def by_name(family: str, per_block: int = 2) -> dict[str, Layer]:
    """The layers by sd-scripts' names; for SDXL also by Diffusers' names in that spelling, which other trainers use;
    for Z-Image also by the original ones, which ComfyUI takes."""
    known = {layer.name: layer for layer in layers(family, per_block) if layer.name}
    if family == "z_image":
        return known | {name: Layer(name, parts, (1,) * len(parts)) for name, parts in names_z_image.originals()}
    if family != "sdxl":
        return known
    others = {part: layer for part, layer in by_part(family, per_block).items() if part.startswith("unet.")}
    return {"lora_" + part.replace(".", "_"): layer for part, layer in others.items()} | known


def _encoders(family: str) -> Iterator[Layer]:
    kinds = [*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
    for (component, prefix), i, kind in product(ENCODERS.get(family, {}).items(), range(32), kinds):
        name = f"text_model.encoder.layers.{i}.{kind}"
        yield Layer(f"{prefix}_{name.replace('.', '_')}", (f"{component}.{name}",))


def _unet(blocks: int, depth: int, per_block: int) -> Iterator[str]:
    """The layers of a UNet with `blocks` blocks on each side, and transformers of at most `depth` layers."""
    inner = [f"attn{k}.{name}" for k in (1, 2) for name in ATTENTION] + ["ff.net.0.proj", "ff.net.2"]
    attention = ["proj_in", "proj_out", *(f"transformer_blocks.{t}.{name}" for t in range(depth) for name in inner)]
    yield from UNET_ENDS
    yield from (f"mid_block.attentions.0.{name}" for name in attention)
    yield from (f"mid_block.resnets.{i}.{name}" for i, name in product(range(2), RESNET))
    for b in range(blocks):
        for way, count, end in (("down", per_block, 0), ("up", per_block + 1, blocks - 1)):
            ours = f"{way}_blocks.{b}"
            yield from (f"{ours}.resnets.{i}.{name}" for i, name in product(range(count), RESNET))
            # SDXL's outermost level has no attention, which distinguishes its files from those of other UNets
            if depth == 1 or b != end:
                yield from (f"{ours}.attentions.{i}.{name}" for i, name in product(range(count), attention))
            yield f"{ours}.{way}samplers.0.conv"


def _sgm(name: str, per_block: int) -> str:
    """SDXL's original name of a layer: blocks are counted through all levels, with the input as block 0."""
    if name in UNET_ENDS:
        return UNET_ENDS[name]
    block, *rest = name.split(".", 1 if name.startswith("mid") else 2)
    kind, i, inner = rest[-1].split(".", 2)
    inner = RESNET[inner] if kind == "resnets" else inner
    place = {"resnets": 0, "attentions": 1}.get(kind)
    if block == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{inner}"
    level = int(rest[0])
    if kind == "downsamplers":
        return f"input_blocks.{(per_block + 1) * (level + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(per_block + 1) * level + per_block}.2.conv"
    if block == "down_blocks":
        return f"input_blocks.{1 + (per_block + 1) * level + int(i)}.{place}.{inner}"
    return f"output_blocks.{(per_block + 1) * level + int(i)}.{place}.{inner}"


def _sd3() -> Iterator[tuple]:
    yield from ((original, (name,)) for name, original in SD3_ENDS.items())
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), (1,), True
    for i in range(BLOCKS):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        yield from ((f"{theirs}.{original}", (f"{ours}.{name}",)) for name, original in SD3_BLOCK.items())
        yield f"{theirs}.context_block.adaLN_modulation.1", (f"{ours}.norm1_context.linear",), (1,), True
        for attention in ("attn", "attn2"):
            parts = tuple(f"{ours}.{attention}.to_{x}" for x in "qkv")
            yield f"{theirs}.x_block.{attention}.qkv", parts, (1, 1, 1)
        yield f"{theirs}.context_block.attn.qkv", tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)


def _flux() -> Iterator[tuple]:
    yield from ((original, (name,)) for name, original in FLUX_ENDS.items())
    yield "final_layer.adaLN_modulation.1", ("norm_out.linear",), (1,), True
    for i in range(BLOCKS):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from ((f"{theirs}.{original}", (f"{ours}.{name}",)) for name, original in FLUX_BLOCK.items())
        yield f"{theirs}.img_attn.qkv", tuple(f"{ours}.attn.to_{x}" for x in "qkv"), (1, 1, 1)
        yield f"{theirs}.txt_attn.qkv", tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"), (1, 1, 1)
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield f"{theirs}.modulation.lin", (f"{ours}.norm.linear",)
        yield f"{theirs}.linear2", (f"{ours}.proj_out",)
        parts = (*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp")
        yield f"{theirs}.linear1", parts, (1, 1, 1, 4)


def _pixart() -> Iterator[str]:
    yield from ("pos_embed.proj", "proj_out", "adaln_single.linear")
    embedders = ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder")
    yield from (f"adaln_single.emb.{kind}.{name}" for kind, name in product(embedders, EMBEDDER))
    yield from (f"caption_projection.{name}" for name in EMBEDDER)
    yield from _cross(("net.0.proj", "net.2"))


def _sana() -> Iterator[str]:
    yield from ("patch_embed.proj", "proj_out", "time_embed.linear")
    embedders = ("emb.timestep_embedder", "timestep_embedder", "guidance_embedder")
    yield from (f"time_embed.{kind}.{name}" for kind, name in product(embedders, EMBEDDER))
    yield from (f"caption_projection.{name}" for name in EMBEDDER)
    yield from _cross(("conv_inverted", "conv_depth", "conv_point"))


def _cross(inner: tuple[str, ...]) -> Iterator[str]:
    """The blocks of a transformer with self-attention, cross-attention and a feed-forward part of these layers."""
    names = [f"attn{k}.{name}" for k in (1, 2) for name in ATTENTION] + [f"ff.{name}" for name in inner]
    return (f"transformer_blocks.{i}.{name}" for i, name in product(range(BLOCKS), names))
