"""Every export of every family in ComfyUI itself: its network with the file gives what Diffusers' gives.

`COMFYUI_PATH` names a folder of ComfyUI, whose requirements are installed beside this package's. Without it the tests
are skipped; `tests/test_workflow.py` and `tests/test_formats.py` test the same by ComfyUI's documented rules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loras
import pytest
import tiny
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import Tensor, nn

from clients import comfy
from clients.networks import CONTEXT, FAMILIES, FLOWS, LAYERS, POOLED, network
from stepdistill.core.denoise import Condition, guided
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.solvers import few_step
from stepdistill.families.base import Family
from stepdistill.networks.lora.names import by_part
from stepdistill.networks.lora.read import Layout, LoraFile
from stepdistill.networks.lora.tensors import FAMILIES as KNOWN
from stepdistill.networks.lora.tensors import Format, LayerLora, lora_tensors, parse_lora
from stepdistill.students.contract import Contract, LoraWeights, scheduler_class
from stepdistill.students.lora import comfyui
from stepdistill.students.lora.files import write_lora

RANK, ALPHA = 2, 6.0


def cell(name: str, *rest: str) -> Any:
    """PixArt takes its real width and size here, and half a minute."""
    return pytest.param(name, *rest, marks=[pytest.mark.slow] * name.startswith("pixart"))


def layout(name: str) -> str:
    return "pixart" if name.startswith("pixart") else name


CELLS = [cell(name, to) for name in FAMILIES for to in ("kohya", "comfyui") if layout(name) in KNOWN[to]]
CELLS.remove(pytest.param("z_image", "kohya", marks=[]))  # ComfyUI knows no such names


def component(name: str) -> str:
    return "unet" if name in ("sd", "sdxl") else "transformer"


def lora_on(net: nn.Module, name: str, seed: int = 1) -> dict[str, Tensor]:
    """A LoRA on every layer of a network, in Diffusers' names."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for layer, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            shape, ones = module.weight.shape, [1] * (module.weight.ndim - 2)
            key = f"{component(name)}.{layer}"
            state[f"{key}.lora_A.weight"] = (
                torch.randn(RANK, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
            )
            state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(shape[0], RANK, *ones, generator=generator)
    return state


def fused(net: nn.Module, name: str, state: dict[str, Tensor]) -> nn.Module:
    for key, delta in loras.deltas(state, ALPHA).items():
        weight = net.get_submodule(key.removeprefix(component(name) + ".")).weight
        weight.data += delta.reshape(weight.shape)
    return net


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    channels, side = (16 if name in FLOWS else 4), {"pixart_alpha": 128}.get(name, 64)
    side = side if name.startswith("pixart") else 8
    length = 12
    if name == "klein":  # patches of 32 channels, and every prompt is padded
        channels, length = 128, 512
    width = LAYERS * CONTEXT if name == "krea2" else CONTEXT  # the layers of a token side by side
    sizes = {"x": (1, channels, side, side), "context": (1, length, width), "pooled": (1, POOLED)}
    return {key: torch.randn(*size, generator=generator) for key, size in sizes.items()}


T = 749.0


def family_of(name: str) -> Family:
    return tiny.FAMILIES["pixart_alpha" if name == "pixart_512" else name]


def condition(name: str, context: Tensor, pooled: Tensor) -> Condition:
    return {
        "states": context.unflatten(-1, (LAYERS, CONTEXT)) if name == "krea2" else context,
        "pooled": pooled,
        "mask": torch.ones(context.shape[:2], dtype=torch.bool),
        "scale": torch.full((1, 1), 8.0),
    }


def by_diffusers(net: nn.Module, name: str, x: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """The raw output at the timestep T."""
    return family_of(name).call(net, x, torch.tensor([T]), condition(name, context, pooled))


def by_comfyui(patcher, name: str, **given: Tensor) -> Tensor:
    patcher.patch_model(torch.device("cpu"))
    y = raw(patcher, name, **given)
    patcher.unpatch_model(torch.device("cpu"))
    return y


def raw(patcher, name: str, x: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    net, side, t = patcher.model.diffusion_model, 8 * x.shape[-1], torch.tensor([T])
    match name:
        case "sd":
            return net(x, t, context=context)
        case "sdxl":
            y = patcher.model.encode_adm(pooled_output=pooled, width=side, height=side, device="cpu")
            return net(x, t, context=context, y=y)
        case "sd3":
            return net(x, t, context=context, y=pooled)
        case "flux":
            return net(x, t / 1000, context, pooled, torch.tensor([3.5]))
        case "klein":
            return net(x, t / 1000, context)
        case "z_image":
            return net(x, t / 1000, context, num_tokens=context.shape[1])
        case "qwen_image" | "krea2":
            return net(x[:, :, None], t / 1000, context)[:, :, 0]
    return net(x, t, context, c_size=torch.tensor([[side, side]]).float(), c_ar=torch.ones(1, 1))[:, :4]


def exported(file: Path, state: dict[str, Tensor], name: str, to: Format) -> None:
    family = layout(name)
    parsed = parse_lora(state, loras.metadata(family, RANK, ALPHA), family)
    assert not parsed.unknown
    write_lora(LoraFile(parsed.lora, "diffusers", Layout(family), len(state), 0), file, to)


@torch.no_grad()
@pytest.mark.parametrize(("name", "to"), CELLS)
def test_comfyui_s_network_with_the_file_gives_what_diffusers_gives(tmp_path, name: str, to: Format):
    plain, state = network(name), lora_on(network(name), name)
    exported(tmp_path / "x.safetensors", state, name, to)
    model, given = comfy.model(name, plain), inputs(name)
    bare = by_diffusers(plain, name, **given)
    torch.testing.assert_close(by_comfyui(model.clone(), name, **given), bare, rtol=1e-4, atol=1e-4)
    loaded, lost = comfy.with_lora(model, tmp_path / "x.safetensors")
    assert lost == 0
    expected = by_diffusers(fused(plain, name, state), name, **given)
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(by_comfyui(loaded, name, **given), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("sides", [(8, 8), (10, 8), (6, 14)])
def test_of_an_odd_number_of_tokens_comfyui_counts_qwen_image_s_places_from_another_middle(sides):
    """`moved_sizes` warns of it, and it is all that differs."""
    net, given = network("qwen_image"), inputs("qwen_image")
    given["x"] = torch.randn(1, 16, *sides, generator=torch.Generator().manual_seed(3))
    expected = by_diffusers(net, "qwen_image", **given)
    client = comfy.model("qwen_image", net).model.diffusion_model

    def moved_back(args: dict[str, Any]) -> dict[str, Any]:
        args["img_ids"] -= torch.tensor([0, *(side // 2 % 2 for side in sides)])
        return args

    video, at, context = given["x"][:, :, None], torch.tensor([T / 1000]), given["context"]
    found = client(video, at, context)[:, :, 0]
    options = {"patches": {"post_input": [moved_back]}}
    back = client(video, at, context, transformer_options=options)[:, :, 0]
    assert ((found - expected).abs().max() > 0.05) == any(side % 4 for side in sides)
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "to"), [(name, to) for name in ("sd", "sdxl", "sd3", "flux") for to in ("kohya", "comfyui")]
)
def test_comfyui_finds_layers_of_clip_by_their_names(name, to):
    """A conversion may hold them; a student has none."""
    parts = [part for part in by_part(name) if part.startswith("text_encoder")]
    small = LayerLora(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    file, _ = lora_tensors(dict.fromkeys(parts, small), to, name)
    clips = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    layers = {f"{clips[part.partition('.')[0]]}.transformer.{part.partition('.')[2]}.weight" for part in parts}

    class Encoders:
        def state_dict(self) -> dict[str, None]:
            return dict.fromkeys(layers)

    found = comfy.client_lora.load_lora(file, comfy.client_lora.model_lora_keys_clip(Encoders(), {}))
    assert found.keys() == layers


def test_of_a_diffusers_file_comfyui_leaves_out_the_attention(tmp_path):
    """Without an error, as the guide says: 128 of the 282 layers of Stable Diffusion's UNet."""
    net = network("sd")
    state = lora_on(net, "sd")
    save_file(state, tmp_path / "x.safetensors", loras.metadata("sd", RANK, ALPHA))
    _, lost = comfy.with_lora(comfy.model("sd", net), tmp_path / "x.safetensors")
    assert lost == sum(".to_" in key for key in state) > 0


def test_of_a_kohya_file_of_z_image_comfyui_leaves_out_the_attention(tmp_path):
    """Without an error, as the guide says."""
    net = network("z_image")
    state = {key: value for key, value in lora_on(net, "z_image").items() if ".layers." in key}
    exported(tmp_path / "x.safetensors", state, "z_image", "kohya")
    _, lost = comfy.with_lora(comfy.model("z_image", net), tmp_path / "x.safetensors")
    assert lost == 3 * sum(".attention." in key and "lora_A" in key for key in state) == 12


def test_comfyui_reads_no_file_of_klein_or_krea_2_in_diffusers_names():
    """As the guide says."""
    load = comfy.comfy.sd.load_diffusion_model_state_dict
    assert load(dict(network("krea2").state_dict())) is None
    with pytest.raises(KeyError, match=r"x_embedder\.bias"):
        load(dict(network("klein").state_dict()))


@torch.no_grad()
def test_comfyui_decodes_klein_s_latents_as_the_family_does():
    """The order of the channels in a patch, and the norm; of the real shape, which ComfyUI takes for granted."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2().eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    latents = torch.randn(1, 128, 2, 3)
    expected = family_of("klein").decode(SimpleNamespace(vae=vae), latents)
    found = comfy.comfy.sd.VAE(sd=dict(vae.state_dict()), device=torch.device("cpu"), dtype=torch.float32).decode(
        latents
    )
    torch.testing.assert_close(2 * found.movedim(-1, 1) - 1, expected.clamp(-1, 1), rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


# workflows


def executed(nodes: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """What the node `VAEDecode` is given, by ComfyUI's own nodes one after the other; `given` replaces some classes."""
    done: dict[str, Any] = {}

    def value(link: Any) -> Any:
        if not isinstance(link, list):
            return link
        name, output = link
        if name not in done:
            node = nodes[name]
            kind, inputs = node["class_type"], {key: value(one) for key, one in node["inputs"].items()}
            if kind in given:
                done[name] = given[kind](**inputs)
            else:
                done[name] = comfy.node(kind, inputs)
        return done[name][output]

    return value(next(node for node in nodes.values() if node["class_type"] == "VAEDecode")["inputs"]["samples"])


def told(name: str, **changes: Any) -> Contract:
    kind = "flow" if name in FLOWS else "epsilon"
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name.startswith("pixart"):
        table = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = {"_class_name": "LCMScheduler", **table, "prediction_type": kind}
    family = family_of(name)
    fields = {
        "method": {},
        "base_model": "owner/base",
        "base_hash": {},
        "base_without": (),
        "family": {
            "type": f"{type(family).__module__}.{type(family).__name__}",
            "pretrained_teacher_model": "owner/base",
        },
        "prediction_type": kind,
        "sigmas": (),
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"} if kind == "flow" else scheduler,
        "call": {},
        "guidance_embedding": 2.0 if name == "flux" else None,
        "negative_prompt": False,
        "lora": LoraWeights(rank=RANK, alpha=ALPHA, target_modules=()),
        "dtype": "float32",
        "licence": None,
        "versions": {},
    }
    return Contract(**fields | changes)


SAMPLERS = {
    "highest, Euler": ((999.0, 499.0), 0.0, True),
    "highest, LCM": ((999.0, 759.0, 259.0), 1.0, True),
    "below, Euler": ((749.0, 399.0), 0.0, True),
    "below, LCM": ((749.0, 399.0), 1.0, True),
    "one step": ((399.0,), 1.0, True),
    "time 0": ((999.0, 499.0), 0.0, False),
}
FLOW_SAMPLERS = {
    "highest, Euler": ((1000.0, 750.0), 0.0, True),
    "highest, LCM": ((1000.0, 750.0, 250.0), 1.0, True),
    "below, Euler": ((900.0, 500.0), 0.0, True),
    "below, LCM": ((900.0, 500.0), 1.0, True),
}
DRAWS = [(name, way) for name in FAMILIES for way in (FLOW_SAMPLERS if name in FLOWS else SAMPLERS)]
DRAWS = [cell(name, way) for name, way in DRAWS if not name.startswith("pixart") or way == "below, LCM"]


FRAMES = ("qwen_image", "krea2")  # whose latents in ComfyUI are a video of one frame
SCALES = {  # factor and shift of ComfyUI's latents
    **{"sdxl": (0.13025, 0.0), "pixart_sigma": (0.13025, 0.0)},
    **{"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159), "klein": (1.0, 0.0), "z_image": (0.3611, 0.1159)},
}


def by_scale(name: str, latents: Tensor) -> Tensor:
    """Latents of ComfyUI's as the network sees them."""
    if name in FRAMES:
        assert latents.shape[2] == 1
        config: Any = AutoencoderKLQwenImage().config  # the published one
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        return (latents[:, :, 0] - mean) / std
    factor, shift = SCALES.get(name, (0.18215, 0.0))
    return factor * (latents - shift)


@torch.no_grad()
@pytest.mark.parametrize(("name", "way"), DRAWS)
def test_comfyui_s_own_nodes_sample_what_the_contract_says(tmp_path, monkeypatch, name, way):
    """The exported workflow, with the exported LoRA, from the noise that the seed gives."""
    net, state = network(name), lora_on(network(name), name)
    exported(tmp_path / "mine.safetensors", state, name, "comfyui")
    style = lora_on(net, name, 3) if way == "one step" else {}
    if style:
        exported(tmp_path / "style.safetensors", style, name, "comfyui")
    comfy.loras_in(tmp_path)
    given = inputs(name)
    side = (16 if name == "klein" else 8) * given["x"].shape[-1]
    times, eta, clean = (FLOW_SAMPLERS if name in FLOWS else SAMPLERS)[way]
    scale = 1.0 if name == "qwen_image" else 2.0
    contract = told(name, timesteps=times, eta=eta, clean=clean, guidance_scale=scale, resolution=(side, side))
    contract = replace(contract, family=contract.family | {"teacher_loras": ["owner/style"] if style else []})
    monkeypatch.setattr(comfyui, "read_as_sigma", lambda _: name == "pixart_512")
    monkeypatch.setattr(comfyui, "_zero_negative", lambda *_: name == "sdxl")
    nodes = json.loads(json.dumps(comfyui.workflow(contract, "mine.safetensors")))
    nodes["noise"]["inputs"]["noise_seed"] = 7
    other = {key: -value for key, value in given.items()}
    model = comfy.model(name, net)

    def encode(text: str, **_: Any) -> tuple:
        one = given if text else other
        return ([[one["context"], {"pooled_output": one["pooled"]}]],)

    replaced = {kind: lambda **_: (model, None, None) for kind in ("CheckpointLoaderSimple", "UNETLoader")}
    replaced |= {kind: lambda **_: (None,) for kind in ("CLIPLoader", "DualCLIPLoader", "VAELoader")}
    replaced |= {"CLIPTextEncode": encode, "CLIPTextEncodePixArtAlpha": encode}
    got = executed(nodes, replaced)["samples"]

    taught, family = fused(fused(network(name), name, state), name, style), family_of(name)
    if name == "flux":
        family = replace(family, guidance_embedding=2.0)  # other than ComfyUI's default
    noise = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(7))
    fresh = torch.Generator().manual_seed(8)  # as its samplers on the CPU have it
    scheduler = scheduler_class(contract).from_config(contract.scheduler)
    schedule = family.schedule(scheduler)

    def denoiser(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return estimate(contract.prediction_type, family.call(taught, x_t, t, cond), x_t, t, schedule)

    null = condition(name, *([0 * other[key] if name == "sdxl" else other[key] for key in ("context", "pooled")]))
    denoise = guided(denoiser, null, scale)
    cond = condition(name, given["context"], given["pooled"])
    expected = few_step(
        denoise, schedule, contract.sampler(), noise, cond, lambda i: torch.randn(noise.shape, generator=fresh)
    )
    difference = (by_scale(name, got) - expected).abs().max() / expected.abs().max()
    assert difference < 2e-4  # in float32, through sigma = 14.6
