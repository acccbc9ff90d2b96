"""ComfyUI in this process, on the CPU, with small networks in the place of its checkpoints."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PLACE = os.environ.get("COMFYUI_PATH", "")
if not (Path(PLACE) / "comfy" / "lora.py").is_file():
    pytest.skip("COMFYUI_PATH names no folder of ComfyUI", allow_module_level=True)
sys.path.insert(0, PLACE)
from comfy.cli_args import args  # noqa: E402

args.cpu = True  # before anything else of it is imported
import comfy.lora as client_lora  # noqa: E402, F401  (the tests' too)
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_extras.nodes_post_processing  # noqa: E402, F401  (before `nodes_latent`: they import one another)
import folder_paths  # noqa: E402
import nodes  # noqa: E402
from comfy import text_encoders  # noqa: E402, F401  (the tests' too)
from comfy_extras import (  # noqa: E402
    nodes_custom_sampler,
    nodes_flux,
    nodes_hunyuan,
    nodes_latent,
    nodes_model_advanced,
    nodes_pixart,
    nodes_sd3,
)

from clients.networks import CONTEXT, LAYERS, POOLED  # noqa: E402

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2],
    "channel_mult": [1, 2],
    "context_dim": CONTEXT,
    "use_temporal_attention": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
    "num_classes": None,
    "adm_in_channels": None,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("SD15", UNET | {
        "model_channels": 32, "use_linear_in_transformer": False, "transformer_depth": [1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    }),
    "sdxl": ("SDXL", UNET | {
        "model_channels": 64, "use_linear_in_transformer": True, "transformer_depth": [0, 0, 2, 2],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2], "transformer_depth_middle": 2,
        "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256,
    }),
    "flux": ("Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": CONTEXT,
        "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    }),
    "klein": ("Flux2", {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": CONTEXT,
        "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": False,
        "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
    }),
    "z_image": ("ZImage", {
        "image_model": "lumina2", "in_channels": 16, "patch_size": 2, "dim": 1056, "cap_feat_dim": CONTEXT,
        "n_layers": 1, "n_refiner_layers": 1, "n_heads": 22, "n_kv_heads": 22, "axes_dims": [16, 16, 16],
        "axes_lens": [256, 64, 64], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "qk_norm": True,
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    }),
    "qwen_image": ("QwenImage", {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": CONTEXT, "axes_dims_rope": (4, 6, 6),
    }),
    "krea2": ("Krea2", {
        "image_model": "krea2", "features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 4, "kvheads": 2,
        "tdim": 32, "txtdim": CONTEXT, "txtlayers": LAYERS, "txtheads": 2, "txtkvheads": 2,
    }),
}  # fmt: skip
# of klein and Krea 2 ComfyUI reads the original files alone; its tables for LoRAs lack these names
KLEIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
KREA2 = {
    "transformer_blocks.": "blocks.",
    "text_fusion.": "txtfusion.",
    "final_layer.scale_shift_table": "last.modulation.lin",
    "final_layer.": "last.",
    "scale_shift_table": "mod.lin",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "norm1.weight": "prenorm.scale",
    "norm2.weight": "postnorm.scale",
    "norm_q.weight": "qknorm.qnorm.scale",
    "norm_k.weight": "qknorm.knorm.scale",
    "norm.weight": "norm.scale",
}
KINDS = {"sd3": "SD3", "pixart_alpha": "PixArtAlpha", "pixart_sigma": "PixArtSigma"}


def model(family: str, net: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's network with the weights of Diffusers' `net`, brought over by its own tables of names."""
    state = {key: value.clone() for key, value in net.state_dict().items()}
    if family in ("sd", "sdxl"):
        kind, config = CONFIGS[family]
        names = comfy.utils.unet_to_diffusers(config)
        state = {names[key]: value for key, value in state.items()}
    elif family == "qwen_image":  # Diffusers' names
        kind, config = CONFIGS[family]
    elif family == "klein":
        kind, config = CONFIGS[family]
        ends = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in KLEIN.items()}
        state = renamed(state, comfy.utils.flux_to_diffusers(config) | ends)
    elif family == "krea2":
        kind, config = CONFIGS[family]
        state = krea2_state(state, comfy.utils.krea2_to_diffusers(config))
    else:
        converted = comfy.model_detection.convert_diffusers_mmdit(state)
        assert converted is not None and not state.keys() - {"pos_embed.pos_embed"}
        state = converted
        if family in CONFIGS:
            kind, config = CONFIGS[family]
        else:
            config = comfy.model_detection.detect_unet_config(state, "")
            kind = KINDS[config.get("image_model", "sd3")]
        if family.startswith("pixart"):
            config |= {"caption_channels": CONTEXT}
    settings = getattr(comfy.supported_models, kind)(config)
    settings.set_inference_dtype(torch.float32, None)
    made = settings.get_model(state, "", device="cpu")
    missing, unknown = made.diffusion_model.load_state_dict(state, strict=False)
    assert set(missing) <= {"y_embedder.y_embedding"} and not unknown
    return comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu"))


def krea2_state(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of Krea 2 by the original names; `table` has the weights of its linear layers."""

    def name(key: str) -> str:
        weight = key.replace(".bias", ".weight")
        if weight in table:
            return table[weight].removesuffix("weight") + key.rpartition(".")[2]
        for ours, theirs in KREA2.items():
            key = key.replace(ours, theirs)
        return key

    named = {name(key): value for key, value in state.items()}
    return {key: value.flatten() if key.endswith(".mod.lin") else value for key, value in named.items()}


def renamed(state: dict[str, Tensor], table: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by the names of a table of ComfyUI's: `name`, `(name, (dim, start, length))` as a part of a tensor,
    or `(name, None, function)`."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        match table[key]:
            case str(name):
                parts[name] = {0: value}
            case (name, (0, start, _)):
                parts.setdefault(name, {})[start] = value
            case (name, None, function):
                parts[name] = {0: function(value)}
    return {name: torch.cat([found[start] for start in sorted(found)]) for name, found in parts.items()}


def with_lora(model: comfy.model_patcher.ModelPatcher, file: Path) -> tuple[comfy.model_patcher.ModelPatcher, int]:
    """The model with a LoRA file as its own node loads it; and how many keys of the file it leaves out."""
    lost: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lost.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        loaded, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), 1.0, 0.0)
    finally:
        logging.getLogger().removeHandler(handler)
    return loaded, sum("not loaded" in message.lower() for message in lost)


def loras_in(place: Path) -> None:
    """Let ComfyUI look for LoRAs in this folder, too."""
    folder_paths.add_model_folder_path("loras", str(place), is_default=True)
    folder_paths.filename_list_cache.clear()


def node(kind: str, inputs: dict[str, Any]) -> tuple:
    """The outputs of a node of ComfyUI's."""
    rooms = (nodes, nodes_custom_sampler, nodes_flux, nodes_hunyuan, nodes_latent)
    rooms += (nodes_model_advanced, nodes_pixart, nodes_sd3)
    found = next(vars(room)[kind] for room in rooms if kind in vars(room))
    if "FUNCTION" in vars(found) or found in nodes.NODE_CLASS_MAPPINGS.values():
        return getattr(found(), found.FUNCTION)(**inputs)
    return found.execute(**inputs).args
