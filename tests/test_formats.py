"""LoRA formats: there and back is the identity, and readers written by others find the same numbers."""

from __future__ import annotations

import json
import re

import loras
import pytest
import torch
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils.other import get_pattern_key

from stepdistill.networks.lora.names import NETWORKS, Layer, by_name, by_part, layers
from stepdistill.networks.lora.names_klein import klein
from stepdistill.networks.lora.tensors import (
    FAMILIES,
    ORIGINAL_IN_COMFYUI,
    LayerLora,
    format_of,
    join_layers,
    lora_tensors,
    original_names,
    parse_lora,
    split_layer,
)

CELLS = [(family, to) for to in ("kohya", "comfyui", "diffusers") for family in FAMILIES[to]]
DEPTH = {"sdxl": 1}  # layers per block of the small UNet


def lora(family: str, made: dict | None = None):
    found = parse_lora(made or loras.state(family), loras.metadata(family), family, DEPTH.get(family, 2))
    assert not found.unknown
    return found.lora


@pytest.mark.parametrize("family", NETWORKS)
def test_every_layer_of_a_network_is_known(family):
    assert loras.layers(family).keys() <= by_part(family, DEPTH.get(family, 2)).keys()


@pytest.mark.parametrize("family", NETWORKS)
def test_names_are_unique(family):
    found = layers(family)
    parts = [part for layer in found for part in layer.parts]
    assert len(parts) == len(set(parts))
    names = [layer.name for layer in found if layer.name]
    assert len(names) == len(set(names)) and len(names) in (0, len(found))


@pytest.mark.parametrize(("family", "to"), CELLS)
def test_there_and_back_is_the_identity(family, to):
    depth, made = DEPTH.get(family, 2), loras.state(family)
    state, metadata = lora_tensors(lora(family), to, family, depth)
    expected = "kohya" if to == "comfyui" and family in ORIGINAL_IN_COMFYUI else to
    assert format_of(state) == expected
    there = parse_lora(state, metadata, family, depth)
    assert not there.unknown and not there.mute
    back, facts = lora_tensors(there.lora, "diffusers", family, depth)
    assert back.keys() == made.keys()
    assert all(torch.equal(back[key], made[key]) for key in made)  # bit for bit
    facts, name = json.loads(facts["lora_adapter_metadata"]), loras.component(family)
    assert (facts[f"{name}.r"], facts[f"{name}.lora_alpha"]) == (loras.RANK, loras.ALPHA)
    assert facts[f"{name}.target_modules"] == sorted(n.partition(".")[2] for n in loras.layers(family))
    assert not facts[f"{name}.rank_pattern"] and not facts[f"{name}.alpha_pattern"]
    again, _ = lora_tensors(there.lora, to, family, depth)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(("family", "to"), CELLS)
def test_half_precision_stays_as_it_is(family, to):
    made = {key: value.half() for key, value in loras.state(family).items()}
    state, metadata = lora_tensors(lora(family, made), to, family, DEPTH.get(family, 2))
    back = parse_lora(state, metadata, family, DEPTH.get(family, 2)).lora
    assert all(torch.equal(part.up, made[f"{name}.lora_B.weight"]) for name, part in back.items())
    assert all(torch.equal(part.down, made[f"{name}.lora_A.weight"]) for name, part in back.items())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z_image", "qwen_image", "krea2"])
def test_trap_t2_the_trained_alpha_is_in_every_layer(family):
    state, _ = lora_tensors(lora(family), "kohya", family, DEPTH.get(family, 2))
    for name in {key.split(".")[0] for key in state}:
        rank = len(state[f"{name}.lora_down.weight"])
        assert state[f"{name}.alpha"].item() / rank == loras.ALPHA / loras.RANK
    # Diffusers' own export writes the rank, whatever was trained
    theirs = convert_state_dict_to_kohya(loras.state("sd"))
    assert {value.item() for key, value in theirs.items() if key.endswith("alpha")} == {loras.RANK}


def test_names_that_sd_scripts_and_comfyui_know():
    """Single names as the sources of both programs have them."""
    for family, part, name in [
        ("sd", "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
         "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"),
        ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("sdxl", "unet.down_blocks.2.resnets.0.conv_shortcut", "lora_unet_input_blocks_7_0_skip_connection"),
        ("sdxl", "unet.mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
        ("sdxl", "unet.up_blocks.1.attentions.2.proj_in", "lora_unet_output_blocks_5_1_proj_in"),
        ("sdxl", "unet.up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("sdxl", "unet.up_blocks.2.resnets.2.conv2", "lora_unet_output_blocks_8_0_out_layers_3"),
        ("sdxl", "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
         "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
        ("sd3", "transformer.transformer_blocks.7.attn.add_k_proj", "lora_unet_joint_blocks_7_context_block_attn_qkv"),
        ("sd3", "transformer.transformer_blocks.7.ff.net.0.proj", "lora_unet_joint_blocks_7_x_block_mlp_fc1"),
        ("flux", "transformer.transformer_blocks.18.attn.to_q", "lora_unet_double_blocks_18_img_attn_qkv"),
        ("flux", "transformer.single_transformer_blocks.37.proj_mlp", "lora_unet_single_blocks_37_linear1"),
        ("flux", "transformer.single_transformer_blocks.0.norm.linear", "lora_unet_single_blocks_0_modulation_lin"),
        ("klein", "transformer.transformer_blocks.4.ff_context.linear_in", "lora_unet_double_blocks_4_txt_mlp_0"),
        ("klein", "transformer.single_transformer_blocks.9.attn.to_qkv_mlp_proj", "lora_unet_single_blocks_9_linear1"),
        ("klein", "transformer.single_stream_modulation.linear", "lora_unet_single_stream_modulation_lin"),
        ("krea2", "transformer.transformer_blocks.27.attn.to_gate", "lora_unet_blocks_27_attn_gate"),
        ("krea2", "transformer.transformer_blocks.0.ff.down", "lora_unet_blocks_0_mlp_down"),
        ("krea2", "transformer.text_fusion.refiner_blocks.1.attn.to_out.0",
         "lora_unet_txtfusion_refiner_blocks_1_attn_wo"),
        ("krea2", "transformer.time_mod_proj", "lora_unet_tproj_1"),
        ("z_image", "transformer.layers.29.attention.to_q", "lora_unet_layers_29_attention_to_q"),
        ("z_image", "transformer.noise_refiner.1.attention.to_out.0", "lora_unet_noise_refiner_1_attention_to_out_0"),
        ("z_image", "transformer.context_refiner.0.feed_forward.w3", "lora_unet_context_refiner_0_feed_forward_w3"),
        ("qwen_image", "transformer.transformer_blocks.59.attn.to_add_out",
         "lora_unet_transformer_blocks_59_attn_to_add_out"),
        ("qwen_image", "transformer.transformer_blocks.0.img_mlp.net.0.proj",
         "lora_unet_transformer_blocks_0_img_mlp_net_0_proj"),
        ("qwen_image", "transformer.transformer_blocks.0.txt_mod.1", "lora_unet_transformer_blocks_0_txt_mod_1"),
    ]:  # fmt: skip
        assert by_part(family)[part].name == name
        assert part in by_name(family)[name].parts


# readers by others


class Zeros(dict):
    """A checkpoint whose missing weights are zero."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(3, 1) if "qkv" in key else torch.zeros(2))


def sd3_original(depth: int) -> dict[str, str]:
    """The layers of the original SD3, by sd-scripts' names."""
    blocks = ["x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc1", "x_block.mlp.fc2"]
    blocks += ["x_block.adaLN_modulation.1", "x_block.attn2.qkv", "x_block.attn2.proj", "context_block.attn.qkv"]
    blocks += ["context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2"]
    blocks += ["context_block.adaLN_modulation.1"]
    ends = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"]
    ends += ["context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    names = ends + [f"joint_blocks.{i}.{name}" for i in range(depth) for name in blocks]
    return {"lora_unet_" + name.replace(".", "_"): name for name in names}


def applied(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """What a kohya file adds to weights under the original's names: alpha / rank * up @ down."""
    added = {}
    for key, down in state.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up = state[f"{name}.lora_up.weight"].flatten(1)
            added[f"{names[name]}.weight"] = state[f"{name}.alpha"] / len(down) * (up @ down.flatten(1))
    return added


def test_diffusers_reads_the_original_weights_of_sd3_with_the_lora_in_them():
    """Its checkpoint converter splits q, k and v, and swaps shift and scale, by itself."""
    made = loras.state("sd3")
    state, _ = lora_tensors(lora("sd3"), "kohya", "sd3")
    original = Zeros(applied(state, sd3_original(2)))
    for i in range(2):  # all biases are zero
        original[f"joint_blocks.{i}.x_block.attn.qkv.bias"] = torch.zeros(48)
    found = convert_sd3_transformer_checkpoint_to_diffusers(original)
    expected = loras.deltas(made)
    for name, delta in expected.items():
        torch.testing.assert_close(found[name.removeprefix("transformer.") + ".weight"], delta, rtol=1e-5, atol=1e-5)
    assert len(expected) == len(state) / 3 + 2 * 2 * 2 + 2  # q, k, v: in two streams of two blocks, once more in one


def wide(rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA on one block of each kind of Flux at its real width, which Diffusers' reader expects."""
    h = 3072
    ours, single = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.1"
    shapes = {f"{ours}.attn.{name}": (h, h) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")}
    shapes |= {f"{ours}.attn.add_{x}_proj": (h, h) for x in "qkv"}
    shapes |= {f"{ours}.{ff}.net.0.proj": (4 * h, h) for ff in ("ff", "ff_context")}
    shapes |= {f"{ours}.{ff}.net.2": (h, 4 * h) for ff in ("ff", "ff_context")}
    shapes |= {f"{ours}.{norm}.linear": (6 * h, h) for norm in ("norm1", "norm1_context")}
    shapes |= {f"{single}.attn.to_{x}": (h, h) for x in "qkv"}
    shapes |= {f"{single}.proj_mlp": (4 * h, h), f"{single}.proj_out": (h, 5 * h), f"{single}.norm.linear": (3 * h, h)}
    made = {}
    for i, (name, (outputs, inputs)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(i)
        made[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return made


def test_diffusers_reads_the_kohya_file_of_flux():
    made = wide()
    part = parse_lora(made, loras.metadata("flux", rank=2, alpha=8.0), "flux").lora
    state, _ = lora_tensors(part, "kohya", "flux")
    assert len(state["lora_unet_single_blocks_1_linear1.lora_down.weight"]) == 4 * 2
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(state))
    assert theirs.keys() == made.keys()
    for name in part:
        a, b = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
        ours, x = part[name], torch.ones(made[f"{name}.lora_A.weight"].shape[1])
        assert ours.scale == 4.0
        torch.testing.assert_close(b @ (a @ x), 4 * ours.up @ (ours.down @ x), rtol=1e-4, atol=1e-2)
        assert len(a) == 2  # it saw the blocks, too


def test_diffusers_reads_the_kohya_file_of_klein():
    """All but the modulation, which its converter has no names for."""
    part = lora("klein")
    theirs = _convert_kohya_flux2_lora_to_diffusers(lora_tensors(part, "kohya", "klein")[0])
    read = {name for name in part if "modulation" not in name and "norm_out" not in name}
    assert {key.partition(".lora_")[0] for key in theirs} == read and len(part) - len(read) == 4
    for name in read:
        a, b = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
        assert len(a) == loras.RANK  # of joined layers each has its own
        torch.testing.assert_close(b @ a, part[name].product())


def test_original_names_in_dots_are_read_as_diffusers_reads_them():
    """As ai-toolkit writes LoRAs of klein; `Flux2LoraLoaderMixin` is the oracle."""
    made, _ = lora_tensors(lora("klein"), "kohya", "klein")
    dotted = {f"lora_unet_{name.replace('.', '_')}": name for name, *_ in klein(2)}
    state = {}
    for key, value in made.items():
        name, _, end = key.partition(".")
        end = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(end)
        state |= {f"diffusion_model.{dotted[name]}.{end}": value} if end else {}
    read = parse_lora(original_names(state), {}, "klein")
    assert not read.unknown and len(read.mute) == len(state) // 2
    theirs = Flux2LoraLoaderMixin.lora_state_dict(dict(state))
    assert {key.partition(".lora_")[0] for key in theirs} == read.lora.keys()
    for name, part in read.lora.items():
        a, b = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
        if name == "transformer.norm_out.linear":  # whose halves its converter of LoRAs leaves as they are
            b = torch.cat([b[len(b) // 2 :], b[: len(b) // 2]])
        torch.testing.assert_close(b @ a, part.product())
    flux = {"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(1), "a.lora_A.weight": 1}
    assert original_names(flux).keys() == {
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "a.lora_A.weight",
    }


def test_the_network_of_klein_has_the_layers_that_its_original_names_are_of():
    """Diffusers' converter of the whole original model: the same outputs of each layer, in the same order."""
    net = loras.network("klein")
    state = {name: layer.weight for name, layer in net.named_modules() if isinstance(layer, torch.nn.Linear)}
    part = {f"transformer.{name}": LayerLora(torch.eye(w.shape[1]), w, w.shape[1]) for name, w in state.items()}
    made, _ = lora_tensors(part, "kohya", "klein")
    dotted = {f"lora_unet_{name.replace('.', '_')}.lora_up.weight": f"{name}.weight" for name, *_ in klein(2)}
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(
        {dotted[key]: made[key] for key in made if key in dotted}
    )
    assert {key.removesuffix(".weight") for key in theirs} == state.keys()
    assert all(torch.equal(theirs[f"{name}.weight"], value) for name, value in state.items())


def test_diffusers_swaps_the_last_modulation_of_flux_as_we_do():
    name, generator = "transformer.norm_out.linear", torch.Generator().manual_seed(0)
    made = {f"{name}.lora_A.weight": torch.randn(1, 3072, generator=generator)}
    made[f"{name}.lora_B.weight"] = torch.randn(2 * 3072, 1, generator=generator)
    state, _ = lora_tensors(parse_lora(made, {}, "flux").lora, "kohya", "flux")
    theirs = _convert_kohya_flux_lora_to_diffusers(state)  # it heeds no alpha here, and this one is the rank
    assert torch.equal(theirs["norm_out.linear.lora_B.weight"], made[f"{name}.lora_B.weight"])
    assert torch.equal(theirs["norm_out.linear.lora_A.weight"], made[f"{name}.lora_A.weight"])


def test_diffusers_reads_the_kohya_file_of_z_image():
    """And the one with the original network's names and fused projections, which ComfyUI takes; and so do we."""
    made, part = loras.state("z_image"), lora("z_image")
    part = {name: one for name, one in part.items() if ".attention." in name or ".feed_forward." in name}
    state, _ = lora_tensors(part, "kohya", "z_image")
    fused = {key: value for key, value in state.items() if "attention" not in key}
    for layer in _originals():
        whole = [part.get(name) for name in layer.parts]
        if any(whole):
            one = join_layers(whole, layer)
            assert len(one.down) == loras.RANK * len(layer.parts)  # stacked, and `up` is a block diagonal
            fused |= {f"{layer.name}.lora_down.weight": one.down, f"{layer.name}.lora_up.weight": one.up}
            fused[f"{layer.name}.alpha"] = torch.tensor(one.alpha)
    assert len(fused) < len(state)
    expected = {name: delta for name, delta in loras.deltas(made).items() if name in part}
    for file in (state, fused):
        ours = parse_lora(file, {}, "z_image")
        assert not ours.unknown and ours.lora.keys() == part.keys()
        theirs = _convert_non_diffusers_z_image_lora_to_diffusers(dict(file))
        assert {key.partition(".lora_")[0] for key in theirs} == expected.keys()
        for name, delta in expected.items():
            torch.testing.assert_close(ours.lora[name].product(), delta, rtol=1e-5, atol=1e-5)
            a, b = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
            torch.testing.assert_close(b @ a, delta, rtol=1e-4, atol=1e-4)


def _originals() -> list[Layer]:
    """The layers of Z-Image under the names of the original network."""
    names = by_part("z_image").values()
    return [layer for layer in by_name("z_image").values() if layer not in names]


def test_diffusers_reads_the_kohya_file_of_qwen_image_with_the_alpha_of_each_layer():
    found = lora("qwen_image")
    for i, (name, part) in enumerate(found.items()):
        found[name] = LayerLora(part.down, part.up, 1.0 + i)
    state, _ = lora_tensors(found, "kohya", "qwen_image")
    theirs = _convert_non_diffusers_qwen_lora_to_diffusers(dict(state))
    assert {key.partition(".lora_")[0] for key in theirs} == found.keys()
    for name, part in found.items():
        a, b = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, part.product(), rtol=1e-5, atol=1e-5)


# what ComfyUI's maps of Diffusers' names hold, by hand from comfy/utils.py
COMFY = {
    "sd3": [
        r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|to_out\.0)",
        r"transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
        r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        r"time_text_embed\.(timestep|text)_embedder\.linear_[12]",
        r"context_embedder|pos_embed\.proj|norm_out\.linear|proj_out",
    ],
    "flux": [
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
        r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
        r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]",
        r"x_embedder|context_embedder|norm_out\.linear|proj_out",
    ],
    "pixart": [
        r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
        r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
        r"adaln_single\.emb\.(timestep|resolution|aspect_ratio)_embedder\.linear_[12]",
        r"adaln_single\.linear|caption_projection\.linear_[12]|pos_embed\.proj|proj_out",
    ],
    "krea2": [
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
        r"text_fusion\.(layerwise|refiner)_blocks\.[01]\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
        r"img_in|time_embed\.linear_[12]|time_mod_proj|txt_in\.linear_[12]|text_fusion\.projector|final_layer\.linear",
    ],
    "z_image": [
        r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)",
        r"(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.w[123]",
        r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.0",
        r"all_final_layer\.2-1\.(linear|adaLN_modulation\.1)",
        r"all_x_embedder\.2-1|cap_embedder\.1|t_embedder\.mlp\.[02]",
    ],
    "qwen_image": [  # these are its own, too
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.(img|txt)_(mlp\.net\.(0\.proj|2)|mod\.1)",
        r"time_text_embed\.timestep_embedder\.linear_[12]|img_in|txt_in|norm_out\.linear|proj_out",
    ],
}


@pytest.mark.parametrize("family", COMFY)
def test_comfyui_s_own_names_and_arithmetic(family):
    """A reader as ComfyUI's: `transformer.` and a name of its map, lora_A, lora_B, alpha; no metadata."""
    state, metadata = lora_tensors(lora(family), "comfyui", family)
    assert metadata == {"format": "pt"}
    expected = loras.deltas(loras.state(family))
    seen = set()
    for key in state:
        name, _, end = key.rpartition(".alpha") if key.endswith(".alpha") else key.partition(".lora_")
        inner = name.removeprefix("transformer.")
        assert name != inner and any(re.fullmatch(pattern, inner) for pattern in COMFY[family]), key
        if end == "B.weight":
            down, alpha = state[f"{name}.lora_A.weight"], state[f"{name}.alpha"].item()
            change = alpha / down.shape[0] * torch.mm(state[key].flatten(1), down.flatten(1))
            torch.testing.assert_close(change, expected[name])
            seen.add(name)
    assert seen == expected.keys()


# fused projections

QKV = Layer("lora_unet_x", ("t.q", "t.k", "t.v"), (1, 1, 1))


def parts(*ranks: int | None, width: int = 5, alpha: float = 2.0, seed: int = 0) -> list[LayerLora | None]:
    generator = torch.Generator().manual_seed(seed)

    def one(rank: int) -> LayerLora:
        down, up = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
        return LayerLora(down, up, alpha * rank)

    return [one(rank) if rank else None for rank in ranks]


@pytest.mark.parametrize(
    "ranks", [(2, 2, 2), (1, 1, 1), (None, 3, 3), (3, None, 3), (None, None, 4), (4, 2, 1), (1, 5, 2), (3, 3, None)]
)
def test_blocks_are_found_again(ranks):
    given = parts(*ranks)
    fused = join_layers(given, QKV)
    assert fused.up.shape == (15, sum(filter(None, ranks))) and fused.scale == 2.0
    known = [one for one in given if one]
    exact = torch.cat([one.product() if one else torch.zeros(5, 5) for one in given])
    torch.testing.assert_close(fused.product(), exact)
    found = split_layer(fused, QKV)
    assert [one is None for one in found] == [one is None for one in given]
    for one, other in zip(known, [one for one in found if one], strict=True):
        assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)
        assert one.alpha == pytest.approx(other.alpha, rel=1e-12)


def test_a_layer_that_was_trained_fused_is_split_without_loss_and_fused_again_as_it_was():
    generator = torch.Generator().manual_seed(0)
    whole = LayerLora(torch.randn(4, 5, generator=generator), torch.randn(15, 4, generator=generator), 2.0)
    found = split_layer(whole, QKV)
    assert torch.equal(torch.cat([one.product() for one in found if one]), whole.product())
    again = join_layers(found, QKV)
    assert torch.equal(again.up, whole.up) and torch.equal(again.down, whole.down) and again.alpha == whole.alpha


def test_zero_columns_at_the_end_stay_with_the_last_of_unequal_parts():
    given = parts(4, 2, 2)
    given[2].up[:, 1] = 0
    found = split_layer(join_layers(given, QKV), QKV)
    assert [len(one.down) for one in found] == [4, 2, 2]
    assert all(torch.equal(one.down, other.down) for one, other in zip(given, found, strict=True))


def test_columns_that_are_zero_stay_where_they_are():
    given = parts(2, 2, 2)
    given[1].up[:, 0] = 0
    given[2].up[:, 1] = 0
    found = split_layer(join_layers(given, QKV), QKV)
    assert all(torch.equal(one.up, other.up) for one, other in zip(given, found, strict=True))


def test_a_lora_that_was_never_trained_is_zero_in_all_parts():
    given = parts(2, 2, 2)
    for one in given:
        one.up.zero_()
    assert [len(one.down) for one in split_layer(join_layers(given, QKV), QKV)] == [2, 2, 2]


def test_other_scales_go_into_the_matrices():
    given = parts(2, 3, 1)
    given[1] = LayerLora(given[1].down, given[1].up, 9.0)
    fused = join_layers(given, QKV)
    torch.testing.assert_close(fused.product(), torch.cat([one.product() for one in given]))


def test_widths_that_do_not_fit_are_refused():
    odd = parts(2, 2, 2)
    odd[2] = parts(2, width=4)[0]
    with pytest.raises(ValueError, match="rows"):
        join_layers(odd, QKV)
    with pytest.raises(ValueError, match="up has 14 rows, expected 15"):
        split_layer(LayerLora(torch.zeros(1, 5), torch.zeros(14, 1), 1.0), QKV)


# metadata


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_ranks_and_alphas_of_single_layers_survive(family):
    """They are patterns in the metadata, and hold for no layer of a block that has the same name."""
    found = lora(family)
    names = [name for name in found if name.endswith((".proj_out", "conv_in"))][:1]
    if family == "flux":
        names = ["transformer.proj_out"]
    down, up = found[names[0]].down, found[names[0]].up
    found[names[0]] = LayerLora(torch.cat([down, down]), torch.cat([up, up], 1), 5.0)
    state, metadata = lora_tensors(found, "diffusers", family)
    again = parse_lora(state, metadata, family).lora
    assert {name: part.alpha for name, part in again.items()} == {name: part.alpha for name, part in found.items()}
    facts = json.loads(metadata["lora_adapter_metadata"])
    name = names[0].partition(".")[2]
    assert facts[f"{loras.component(family)}.rank_pattern"] == {f"^{name}": 6}
    assert facts[f"{loras.component(family)}.alpha_pattern"] == {f"^{name}": 5.0}


def test_rank_stabilised_loras_have_the_scale_that_peft_gives_them():
    facts = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": True}
    found = parse_lora(loras.state("sd"), {"lora_adapter_metadata": json.dumps(facts)}, "sd").lora
    assert {round(part.scale, 6) for part in found.values()} == {round(6 / 3**0.5, 6)}


def test_of_several_alphas_the_first_whose_pattern_fits_holds_as_in_peft():
    patterns = {"mid_block.*": 3.0, "attn1.to_q": 9.0, "to_q": 12.0, "to_[qk]": 15.0}
    facts = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": patterns}
    found = parse_lora(loras.state("sd"), {"lora_adapter_metadata": json.dumps(facts)}, "sd").lora
    for name, part in found.items():
        assert part.alpha == patterns.get(get_pattern_key(patterns, name.removeprefix("unet.")), 6.0)
    assert {part.alpha for part in found.values()} == {6.0, *patterns.values()}


@pytest.mark.parametrize(("family", "to"), [("sd", "kohya"), ("sdxl", "kohya"), ("sd3", "kohya"), ("flux", "comfyui")])
def test_text_encoders_are_carried_through(family, to):
    made = loras.state(family)
    name = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    made |= {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    facts = json.loads(loras.metadata(family)["lora_adapter_metadata"]) | {"text_encoder.lora_alpha": 1}
    depth = DEPTH.get(family, 2)
    found = parse_lora(made, {"lora_adapter_metadata": json.dumps(facts)}, family, depth)
    assert not found.unknown and found.lora[name].alpha == 1.0
    state, metadata = lora_tensors(found.lora, to, family, depth)
    prefix = {"sd": "lora_te_", "sdxl": "lora_te1_", "sd3": "lora_te1_"}.get(family)
    expected = prefix + name.removeprefix("text_encoder.").replace(".", "_") if prefix else name
    assert f"{expected}.alpha" in state
    again = parse_lora(state, metadata, family, depth)
    assert not again.unknown and again.lora[name].alpha == 1.0 and torch.equal(again.lora[name].up, torch.ones(4, 2))
