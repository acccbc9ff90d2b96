"""Families: each calls its network as its pipeline does; teachers that are one file in the original layout."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, SD3Transformer2DModel
from safetensors.torch import save_file
from tiny import FAMILIES, SIDE, awake, flux, latent_shape, pipeline, pixart, sana, wan

from stepdistill.core.denoise import concatenated
from stepdistill.core.errors import ConfigError
from stepdistill.data.bundled import build
from stepdistill.families.base import Family
from stepdistill.families.ltx import LTX
from stepdistill.families.sana import Sana
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Copy, Lora, LoraSpec

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


def steps_of(family: Family, pipe: DiffusionPipeline, scale: float, height: int, width: int) -> list[dict]:
    """What the network is given, and what it answers, in the first of two guided steps of the pipeline's own call."""
    seen, net = [], family.network(pipe)
    pipe.set_progress_bar_config(disable=True)
    names = list(inspect.signature(net.forward).parameters)

    def recorded(module, args, kwargs, output):
        seen.append(
            {
                "x": (args or (kwargs["hidden_states"],))[0],
                **dict(zip(names, args, strict=False)),
                **kwargs,
                "y": output[0],
            }
        )

    handle = net.register_forward_hook(recorded, with_kwargs=True)
    call = family.arguments() | family.guidance(scale) | {"height": height, "width": width, "num_inference_steps": 2}
    noise = torch.randn(1, *family.latent_shape(pipe, height, width), generator=torch.Generator().manual_seed(0))
    pipe(prompt="red apple", latents=family.pack(noise), output_type="latent", **call)
    handle.remove()
    return seen[: len(seen) // 2]


def is_called_as_its_pipeline_calls_it(family: Family, pipe: DiffusionPipeline) -> list[dict]:
    """Guided, at another size than the native one: prompt, null, time, sizes and guidance embedding are the same."""
    height, width = (32, 64) if isinstance(family, Sana | LTX) else (16, 32)  # their pipelines take no less
    seen, net = steps_of(family, pipe, 5.0, height, width), family.network(pipe)
    x, y = (
        torch.cat([family.unpack(call[key], height // 4, width // 4) for call in seen[::-1]]) for key in ("x", "y")
    )  # null first
    assert x.shape == (2, *family.latent_shape(pipe, height, width)) and torch.equal(x[0], x[1])
    t = torch.full((2,), family.time(net, float(seen[0]["timestep"].flatten()[0])))
    assert 0 < t[0] <= 1000
    cond, null = family.condition(pipe, ["red apple"]), family.unconditional(pipe)
    both = concatenated(null, cond)
    made = family.call(net, x, t, both)
    assert (made[0] - made[1]).abs().max() > 1e-3
    # two calls of one row and one of two round apart
    assert torch.allclose(made, y[:, : made.shape[1]], rtol=0, atol=1e-5)
    return seen


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "z_image"])  # which has its own, with lists
def test_the_network_is_called_as_its_pipeline_calls_it(name):
    is_called_as_its_pipeline_calls_it(FAMILIES[name], pipeline(name))


VARIANTS = {
    "schnell": ("flux", lambda: flux(build.vae((16, 16, 16)), told=False)),
    "told the size": ("pixart_alpha", lambda: pixart("pixart_alpha", build.vae((16, 16, 16)), side=128)),
    "sigma at 1024": ("pixart_sigma", lambda: pixart("pixart_sigma", build.vae((16, 16, 16)), side=128)),
    "base of SANA-Sprint": ("sana", lambda: sana(sprint=True)),
    "SD3.5": ("sd3", lambda: sd35()),
    "Wan 2.2, which tells each token the time": ("wan", lambda: wan(expand_timesteps=True)),
}


def sd35() -> DiffusionPipeline:
    """Queries and keys are normalised, and the first block has a second attention of the image alone."""
    pipe = pipeline("sd3")
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    pipe.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    return pipe


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_called_as_their_pipeline_calls_them(variant):
    name, make = VARIANTS[variant]
    torch.manual_seed(0)
    pipe = make()
    seen = is_called_as_its_pipeline_calls_it(FAMILIES[name], pipe)
    if variant == "told the size":
        assert seen[0]["added_cond_kwargs"]["resolution"].tolist() == [[16, 32]] * 2
    if variant == "schnell":
        assert seen[0]["guidance"] is None and FAMILIES[name].embedded(pipe) is None
    # every target of the LoRA, and every weight of a smaller network, is reached by the loss
    family, net = FAMILIES[name], FAMILIES[name].network(pipe)
    bone = Backbone(net, LoraSpec(rank=2), family.lora_targets(net), narrow=family.narrow)
    bone.add("student", Lora())
    awake(bone, "student")
    bone.add("slim", Copy(width=0.5))
    cond, x_t = family.condition(pipe, ["rose"]), torch.randn(1, *family.latent_shape(pipe, SIDE, SIDE))
    for role in ("student", "slim"):
        with bone.use(role) as used:
            family.call(used, x_t, torch.tensor([500.0]), cond).square().sum().backward()
        without = [key for key, p in bone.parameters_of(role).items() if p.grad is None or not p.grad.any()]
        assert without == [], (role, without)


def test_the_null_of_sdxl_is_zeros():
    pipe, family = pipeline("sdxl"), FAMILIES["sdxl"]
    null = family.unconditional(pipe)
    assert null["states"].abs().sum() == 0 == null["pooled"].abs().sum()
    assert family.condition(pipe, [""])["states"].abs().sum() > 0  # as a prompt it is one like any other
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert torch.equal(family.unconditional(pipe)["states"], family.condition(pipe, [""])["states"])


def test_the_autoencoder_of_sdxl_stays_in_single_precision(tmp_path):
    """It overflows in half: a file of halves is raised, and training in half lowers the denoiser alone."""
    pipe = pipeline("sdxl").to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    family = replace(FAMILIES["sdxl"], pretrained_teacher_model=str(tmp_path), variant="fp16")
    loaded = family.load()
    assert loaded.vae.dtype == loaded.unet.dtype == torch.float32
    family.network(loaded).to(torch.bfloat16)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    assert family.decode(loaded, family.encode(loaded, pixels).bfloat16()).dtype == torch.float32


def test_the_prompt_of_sana_has_its_instruction_and_the_null_has_not(monkeypatch):
    pipe, asked = pipeline("sana"), []
    pipe.tokenizer.model_max_length = 4096
    inner = pipe._get_gemma_prompt_embeds

    def recorded(**options):
        asked.append((options["prompt"], bool(options["complex_human_instruction"])))
        return inner(**options)

    monkeypatch.setattr(pipe, "_get_gemma_prompt_embeds", recorded)
    family = replace(FAMILIES["sana"], human_instruction=True)
    cond, null = family.condition(pipe, ["rose"]), family.unconditional(pipe)
    assert asked == [(["rose"], True), ([""], False), ([""], True), ([""], False)]
    assert cond["states"].shape == null["states"].shape
    assert torch.equal(null["states"], FAMILIES["sana"].condition(pipe, [""])["states"])  # that one has none
    assert not torch.equal(null["states"], family.condition(pipe, [""])["states"])
    assert "complex_human_instruction" not in family.arguments()


def test_packed_latents_are_those_of_the_pipeline_and_come_back():
    latents = torch.randn(2, 4, 6, 8)
    packed = FAMILIES["flux"].pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(FAMILIES["flux"].unpack(packed, 6, 8), latents)
    for name, family in FAMILIES.items():
        latents = torch.randn(2, *latent_shape(name)[:-2], 6, 8)
        assert torch.equal(family.unpack(family.pack(latents), 6, 8), latents), name


def test_the_shift_of_flux_is_that_of_its_largest_image_unless_said():
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)  # the mu of 4,096 tokens
    family = FAMILIES["flux"]
    grid = family.schedule(scheduler).grid(4).flip(0)
    assert torch.allclose(grid, 1000 * scheduler.sigmas, rtol=1e-5, atol=1e-3)
    assert replace(family, shift=1.88).schedule(scheduler).shift == 1.88
    assert family.schedule(FlowMatchEulerDiscreteScheduler(shift=1.0)).shift == 1.0


def test_trap_t10_diffusers_has_no_lora_loader_for_pixart():
    """If it gets one, the family should use it."""
    assert {name for name, family in FAMILIES.items() if not family.loads_lora} == {"pixart_alpha", "pixart_sigma"}
    family = replace(FAMILIES["pixart_sigma"], pretrained_teacher_model="a/teacher", teacher_loras=("a/style",))
    with pytest.raises(ConfigError, match="teacher_loras for a PixArtSigmaPipeline.* --to fused"):
        family.load()


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_latents_are_decoded_as_the_pipeline_decodes_them(name):
    """Both autoencoders have a `shift_factor`, which Stable Diffusion's pipeline leaves alone and that of SD3 adds."""
    family = {"tiny-sd": StableDiffusion, "tiny-sd3": StableDiffusion3}[name](pretrained_teacher_model=name)
    pipe = family.load()
    assert pipe.vae.config.shift_factor

    def drawn(kind: str) -> torch.Tensor:
        made = pipe("rose", num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind).images
        return made if kind == "latent" else made * 2 - 1

    with torch.no_grad():
        pixels = family.decode(pipe, drawn("latent"))
        torch.testing.assert_close(pixels.clamp(-1, 1), drawn("pt"), atol=1e-5, rtol=0)
        latents = family.encode(pipe, pixels)
        coded = pipe.vae.encode(pixels).latent_dist.mode()
        shift = pipe.vae.config.shift_factor if name == "tiny-sd3" else 0.0
        torch.testing.assert_close(latents, (coded - shift) * pipe.vae.config.scaling_factor)
