"""The kohya files in sd-scripts themselves: which layers they load, and what these add to the weights.

`SD_SCRIPTS_PATH` names a folder of kohya-ss/sd-scripts, whose requirements are installed beside this package's. Without
it the tests are skipped; `tests/test_formats.py` and `tests/test_convert.py` test the same by their documented rules.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from clients.networks import CONTEXT, POOLED, network
from stepdistill.networks.lora.read import Layout, LoraFile
from stepdistill.networks.lora.tensors import lora_tensors, parse_lora
from stepdistill.students.lora.files import Conversion

PLACE = os.environ.get("SD_SCRIPTS_PATH", "")
if not (Path(PLACE) / "networks" / "lora_flux.py").is_file():
    pytest.skip("SD_SCRIPTS_PATH names no folder of sd-scripts", allow_module_level=True)
sys.path.insert(0, PLACE)
from library import (  # noqa: E402
    flux_models,
    flux_utils,
    model_util,
    original_unet,
    sd3_models,
    sdxl_model_util,
    sdxl_original_unet,
)
from networks import lora, lora_flux, lora_sd3  # noqa: E402

RANK, ALPHA = 1, 2.0
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def networks_of(family: str) -> tuple[nn.Module, nn.Module]:
    """A network in Diffusers and in sd-scripts. UNets are of full size, without storage: sd-scripts fix their size."""
    match family:
        case "sd":
            with torch.device("meta"):
                config: dict[str, Any] = model_util.create_unet_diffusers_config(False, False)
                return UNet2DConditionModel(cross_attention_dim=768), original_unet.UNet2DConditionModel(**config)
        case "sdxl":
            with torch.device("meta"):
                return UNet2DConditionModel(**SDXL), sdxl_original_unet.SdxlUNet2DConditionModel()
        case "sd3":
            inputs = {"adm_in_channels": POOLED, "context_embedder_in_features": CONTEXT}
            shape = {"input_size": 8, "patch_size": 2, "in_channels": 16, "depth": 2, "pos_embed_max_size": 8}
            width = {"context_embedder_out_features": 128, "x_block_self_attn_layers": [0], "qk_norm": "rms"}
            return network("sd3"), sd3_models.MMDiT(**inputs, **shape, **width)
    params = flux_models.FluxParams(
        in_channels=64,
        vec_in_dim=POOLED,
        context_in_dim=CONTEXT,
        hidden_size=32,
        mlp_ratio=4.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
    )
    return network("flux"), flux_models.Flux(params)


def lora_on(net: nn.Module, component: str) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(1), {}
    for layer, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape, ones = module.weight.shape, [1] * (module.weight.ndim - 2)
            state[f"{component}.{layer}.lora_A.weight"] = torch.randn(RANK, *shape[1:], generator=generator)
            state[f"{component}.{layer}.lora_B.weight"] = torch.randn(shape[0], RANK, *ones, generator=generator)
    return state


def by_their_names(family: str, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A UNet's matrices (A, B) by sd-scripts' names: SD's are Diffusers' own, SDXL's come from their converter."""
    layers = sorted({key.partition(".lora_")[0] for key in state})
    numbers = {f"{layer.partition('.')[2]}.weight": torch.tensor(i) for i, layer in enumerate(layers)}
    if family == "sdxl":
        numbers = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(numbers)
    return {
        key.removesuffix(".weight").replace(".", "_"): (
            state[f"{layers[i]}.lora_A.weight"],
            state[f"{layers[i]}.lora_B.weight"],
        )
        for key, i in numbers.items()
    }


def deltas_by_their_names(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """What a LoRA adds to Flux, by the names of sd-scripts' layers, which fuse projections as their converter does."""
    added = {f"{key.partition('.')[2]}.weight": delta for key, delta in loras.deltas(state, ALPHA).items()}
    rest = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    theirs = flux_utils.convert_diffusers_sd_to_bfl(rest | added, 2, 2)
    return {key.removesuffix(".weight").replace(".", "_"): value for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("family", "layers", "ignored"), [("sd", 282, 4), ("sdxl", 794, 6), ("sd3", 37, 0), ("flux", 50, 2)]
)
def test_sd_scripts_load_what_convert_says(family, layers, ignored):
    net, theirs = networks_of(family)
    state = lora_on(net, "unet" if family in ("sd", "sdxl") else "transformer")
    parsed = parse_lora(state, loras.metadata(family, RANK, ALPHA), family)
    file, _ = lora_tensors(parsed.lora, "kohya", family)
    said = Conversion(LoraFile(parsed.lora, "diffusers", Layout(family), len(state), 0), "kohya", len(file))
    assert (len(parsed.lora), len(said.ignored)) == (layers, ignored)
    room = {"sd3": lora_sd3, "flux": lora_flux}.get(family, lora)
    encoders = [] if family in ("sd3", "flux") else nn.Module()
    loaded, _ = room.create_network_from_weights(1.0, None, None, encoders, theirs, weights_sd=dict(file))
    names = {key.partition(".")[0] for key in file}
    known = {layer.lora_name.removeprefix("lora_unet_"): layer for layer in loaded.unet_loras}
    assert len(names) - len(known) == ignored and all(f"lora_unet_{name}" in names for name in known)
    assert all(layer.scale == ALPHA / RANK for layer in loaded.unet_loras)
    parts = {name: [file[f"lora_unet_{name}.lora_{end}.weight"] for end in ("down", "up")] for name in known}
    if family in ("sd", "sdxl"):
        expected = by_their_names(family, state)
        assert all(torch.equal(a, b) for name in known for a, b in zip(parts[name], expected[name], strict=True))
    if family == "flux":
        added = deltas_by_their_names(state, net)
        for name, (down, up) in parts.items():
            torch.testing.assert_close(known[name].scale * up @ down, added[name])
