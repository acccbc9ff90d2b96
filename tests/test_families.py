"""Teachers that are one file in the layout of the original Stable Diffusion release."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny import FAMILIES, pipeline

from stepdistill.families.sd import StableDiffusion

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_key(key: str, layers: int) -> str:
    """The original name of a weight of a `UNet2DConditionModel` with cross-attention at every level."""
    for name, old in ENDS.items():
        if key.startswith(name + "."):
            return old + key.removeprefix(name)
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+?)\.(\d+)\.(.*)", key)
    assert found, key
    side, level, part, number = found[1], int(found[2] or 0), found[3], int(found[4])
    rest = found[5]
    if part == "resnets":
        name, _, last = rest.rpartition(".")
        rest = f"{RESNET[name]}.{last}"
    first = level * (layers + 1)
    if part == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{first + layers}.2.{rest}"
    slot = ["resnets", "attentions"].index(part)
    if side is None:
        return f"middle_block.{2 * number if slot == 0 else 1}.{rest}"
    block = f"input_blocks.{first + number + 1}" if side == "down" else f"output_blocks.{first + number}"
    return f"{block}.{slot}.{rest}"


def vae_key(key: str, levels: int) -> str:
    """The original name of a weight of an `AutoencoderKL` without attention, whose decoder counts from the top."""
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{levels - 1 - int(found[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", key)
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def one_file(pipe: DiffusionPipeline, file: Path) -> None:
    """Write a pipeline in the original layout."""
    layers, levels = pipe.unet.config["layers_per_block"], len(pipe.vae.config["block_out_channels"])
    tower = {"text_model." + key.removeprefix("text_model."): v for key, v in pipe.text_encoder.state_dict().items()}
    state = {
        **{f"model.diffusion_model.{unet_key(key, layers)}": v for key, v in pipe.unet.state_dict().items()},
        **{f"first_stage_model.{vae_key(key, levels)}": v for key, v in pipe.vae.state_dict().items()},
        **{f"cond_stage_model.transformer.{key}": v for key, v in tower.items()},
        "alphas_cumprod": pipe.scheduler.alphas_cumprod,
    }
    save_file({key: value.contiguous() for key, value in state.items()}, file)


def test_a_single_file_is_the_same_teacher(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    pipe.save_pretrained(tmp_path / "folder")
    one_file(pipe, tmp_path / "model.safetensors")
    family = StableDiffusion(
        pretrained_teacher_model=str(tmp_path / "model.safetensors"), single_file_config=str(tmp_path / "folder")
    )
    loaded = family.load()
    for name in ("unet", "vae", "text_encoder"):
        expected, got = pipe.components[name].state_dict(), loaded.components[name].state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    assert torch.equal(loaded.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert torch.equal(
        family.condition(loaded, ["red apple"])["states"], family.condition(pipe, ["red apple"])["states"]
    )


def test_sdxl_is_called_as_its_pipeline_calls_it(monkeypatch) -> None:
    """Guided, at another size than the native one: zeros for the unconditional half, sizes in pixels."""
    pipe, family, seen = pipeline("sdxl"), FAMILIES["sdxl"], {}
    pipe.set_progress_bar_config(disable=True)
    forward = pipe.unet.forward

    def recorded(*args, **kwargs):
        (seen["y"],) = forward(*args, **kwargs)
        seen["x"], seen["t"] = args
        return (seen["y"],)

    monkeypatch.setattr(pipe.unet, "forward", recorded)
    pipe("red apple", height=32, width=48, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    cond, null = family.condition(pipe, ["red apple"]), family.unconditional(pipe)
    both = {key: torch.cat([null[key], value]) for key, value in cond.items()}
    assert seen["x"].shape[2:] == (8, 12) and null["states"].abs().sum() == 0 == null["pooled"].abs().sum()
    expected = seen["y"]
    assert torch.equal(family.call(pipe.unet, seen["x"], seen["t"].expand(2), both), expected)
    assert family.condition(pipe, [""])["states"].abs().sum() > 0  # as a prompt it is one like any other
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(family.unconditional(pipe)["states"], family.condition(pipe, [""])["states"])
