"""The ComfyUI workflow: its links resolve, its nodes are ComfyUI's, and its noise levels are the contract's."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from oracles.comfyui import Comfy
from oracles.context import Table

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.solvers import few_step
from stepdistill.data.bundled import bundled
from stepdistill.students.contract import Contract, LoraWeights, scheduler_class, teacher
from stepdistill.students.lora.comfyui import (
    SIGMA_FOR_ALPHA,
    WORKFLOW,
    comfy_levels,
    read_workflow,
    sigmas,
    workflow,
    write_workflow,
)
from stepdistill.students.lora.comfyui_draw import ComfyRun

# inputs and outputs of ComfyUI's own nodes, from their definitions in nodes.py and comfy_extras
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name", "weight_dtype"}, ("MODEL",)),
    "CLIPLoader": ({"clip_name", "type"}, ("CLIP",)),
    "DualCLIPLoader": ({"clip_name1", "clip_name2", "type"}, ("CLIP",)),
    "VAELoader": ({"vae_name"}, ("VAE",)),
    "LoraLoader": ({"model", "clip", "lora_name", "strength_model", "strength_clip"}, ("MODEL", "CLIP")),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, ("MODEL",)),
    "CLIPTextEncode": ({"text", "clip"}, ("CONDITIONING",)),
    "CLIPTextEncodePixArtAlpha": ({"width", "height", "text", "clip"}, ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning", "guidance"}, ("CONDITIONING",)),
    "CFGGuider": ({"model", "positive", "negative", "cfg"}, ("GUIDER",)),
    "RandomNoise": ({"noise_seed"}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name"}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas"}, ("SIGMAS",)),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width", "height", "batch_size"}, ("LATENT",)),
    "EmptyFlux2LatentImage": ({"width", "height", "batch_size"}, ("LATENT",)),
    "EmptyHunyuanLatentVideo": ({"width", "height", "batch_size", "length"}, ("LATENT",)),
    "SamplerCustomAdvanced": ({"noise", "guider", "sampler", "sigmas", "latent_image"}, ("LATENT", "LATENT")),
    "AddNoise": ({"model", "noise", "sigmas", "latent_image"}, ("LATENT",)),
    "LatentMultiply": ({"samples", "multiplier"}, ("LATENT",)),
    "VAEDecode": ({"samples", "vae"}, ("IMAGE",)),
    "SaveImage": ({"images", "filename_prefix"}, ()),
}
TYPES = {
    "model": "MODEL",
    "clip": "CLIP",
    "vae": "VAE",
    "positive": "CONDITIONING",
    "negative": "CONDITIONING",
    "conditioning": "CONDITIONING",
    "noise": "NOISE",
    "guider": "GUIDER",
    "sampler": "SAMPLER",
    "sigmas": "SIGMAS",
    "latent_image": "LATENT",
    "samples": "LATENT",
    "images": "IMAGE",
}
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def contract(**changes) -> Contract:
    family = {"type": "stepdistill.families.sd.StableDiffusion", "pretrained_teacher_model": "owner/base"}
    fields: dict = dict(
        method={"type": "x"},
        base_model="owner/base",
        base_hash={},
        base_without=(),
        family=family,
        prediction_type="epsilon",
        timesteps=(999.0, 759.0, 499.0, 259.0),
        sigmas=(),
        clean=True,
        scheduler={"_class_name": "LCMScheduler", **VP, "prediction_type": "epsilon"},
        call={},
        guidance_scale=1.0,
        eta=1.0,
        negative_prompt=False,
        lora=LoraWeights(rank=4, alpha=16, target_modules=()),
        resolution=(512, 768),
        dtype="float32",
        licence=None,
        versions={},
    )
    return Contract(**fields | changes)


FLOW = {
    "family": {"type": "stepdistill.families.sd3.StableDiffusion3", "pretrained_teacher_model": "owner/base"},
    "prediction_type": "flow",
    "timesteps": (1000.0, 900.0, 750.0, 500.0),
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "eta": 0.0,
}
KLEIN = {"type": "stepdistill.families.flux2_klein.Flux2Klein", "pretrained_teacher_model": "owner/base"}
KREA2 = {"type": "stepdistill.families.krea2.Krea2", "pretrained_teacher_model": "krea/Krea-2-Raw"}
Z_IMAGE = {"type": "stepdistill.families.z_image.ZImage", "pretrained_teacher_model": "owner/base"}
QWEN = {"type": "stepdistill.families.qwen_image.QwenImage", "pretrained_teacher_model": "Qwen/Qwen-Image"}
SINGLE_FILE = str(bundled("tiny-sd-reference.safetensors"))  # whatever is in it
CONTRACTS = {
    "sd": contract(),
    "v": contract(prediction_type="v_prediction", eta=0.0, guidance_scale=3.0),
    "edge": contract(eta=0.0, clean=False),
    "flow": contract(**FLOW),
    "z_image": contract(**FLOW | {"family": Z_IMAGE}),
    "krea2": contract(**FLOW | {"family": KREA2}),
    "embedding": contract(**FLOW, guidance_embedding=3.5),
    "klein": contract(**FLOW | {"family": KLEIN, "guidance_scale": 4.0}),
    "below": contract(timesteps=(399.0,)),
    "flow below": contract(**FLOW | {"timesteps": (900.0, 500.0)}),
    "separate": contract(**FLOW | {"family": QWEN}),
    "loras": contract(family=contract().family | {"teacher_loras": ["owner/style"]}),
    "zeros": contract(
        family={"type": "stepdistill.families.sdxl.StableDiffusionXL", "pretrained_teacher_model": SINGLE_FILE},
        guidance_scale=3.0,
    ),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_link_resolves_and_every_node_is_comfyui_s(name):
    nodes = json.loads(json.dumps(workflow(CONTRACTS[name], "lora_comfyui.safetensors")))
    used = set()
    for node in nodes.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs and node["_meta"]["title"]
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                source, output = value
                assert NODES[nodes[source]["class_type"]][1][output] == TYPES[key]
                used.add(source)
            else:
                assert key not in TYPES or key in ("sigmas", "sampler"), f"{key} is no link"
    assert nodes.keys() - used == {"save"}  # nothing hangs loose
    assert nodes["lora"]["inputs"]["strength_model"] == 1.0


def numbers(contract: Contract) -> list[float]:
    """As ComfyUI's ManualSigmas reads its text."""
    text = workflow(contract, "x")["sigmas"]["inputs"]["sigmas"]
    return [float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def test_the_noise_levels_are_those_of_the_contract():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    expected = [float(np.sqrt((1 - abar[t]) / abar[t])) for t in (999, 759, 499, 259)]
    assert expected[0] == pytest.approx(14.6146, rel=1e-4)  # what ComfyUI calls sigma_max
    assert numbers(CONTRACTS["sd"]) == pytest.approx([*expected, 0.0], rel=2e-6, abs=1e-9)
    last = float(np.sqrt((1 - abar[0]) / abar[0]))
    assert numbers(CONTRACTS["edge"]) == pytest.approx([*expected, last], rel=2e-5)
    assert last == pytest.approx(0.0291675, rel=1e-4)  # sigma_min
    assert numbers(CONTRACTS["flow"]) == [1.0, 0.9, 0.75, 0.5, 0.0]


def test_a_level_so_small_that_python_writes_an_exponent_is_read_whole():
    small = contract(**FLOW | {"timesteps": (1000.0, 0.05)})
    assert str(sigmas(small)[1]) == "5e-05"
    assert numbers(small) == [1.0, 5e-5, 0.0]


def test_zero_terminal_snr_has_comfyui_s_last_level():
    scheduler = CONTRACTS["v"].scheduler | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = replace(CONTRACTS["v"], scheduler=scheduler)
    nodes = workflow(zero, "x")
    assert nodes["prediction"]["inputs"] == {"model": ["lora", 0], "sampling": "v_prediction", "zsnr": True}
    assert numbers(zero)[0] == pytest.approx(4518.76, rel=1e-4) and np.isfinite(numbers(zero)).all()


def test_a_table_of_its_own_that_ends_near_zero_is_told_to_comfyui():
    betas = EulerDiscreteScheduler(**VP, rescale_betas_zero_snr=True).betas.tolist()
    scheduler = {"_class_name": "DDIMScheduler", "trained_betas": betas, "prediction_type": "v_prediction"}
    own = replace(CONTRACTS["v"], scheduler=scheduler, timesteps=(999.0, 749.0))
    assert workflow(own, "x")["prediction"]["inputs"]["zsnr"]
    assert numbers(own)[0] > 4000


def test_what_the_contract_says_is_in_the_nodes():
    nodes = workflow(CONTRACTS["sd"], "some.safetensors")
    assert nodes["sampler"]["inputs"]["sampler_name"] == "lcm"
    assert nodes["lora"]["inputs"]["lora_name"] == "some.safetensors"
    assert nodes["latent"]["inputs"] == {"width": 768, "height": 512, "batch_size": 1}
    assert "prediction" not in nodes and "embedding" not in nodes
    nodes = workflow(CONTRACTS["v"], "x")
    assert nodes["sampler"]["inputs"]["sampler_name"] == "euler" and nodes["guider"]["inputs"]["cfg"] == 3.0
    assert nodes["guider"]["inputs"]["model"] == ["prediction", 0]
    nodes = workflow(CONTRACTS["flow"], "x")
    assert nodes["latent"]["class_type"] == "EmptySD3LatentImage"
    assert workflow(CONTRACTS["embedding"], "x")["embedding"]["inputs"]["guidance"] == 3.5
    nodes = workflow(CONTRACTS["klein"], "x")
    assert nodes["latent"]["class_type"] == "EmptyFlux2LatentImage" and nodes["clip"]["inputs"]["type"] == "flux2"
    assert nodes["lora"]["inputs"]["model"] == ["model", 0] and nodes["model"]["class_type"] == "UNETLoader"
    assert nodes["negative"]["inputs"] == {"text": "", "clip": ["clip", 0]} and nodes["guider"]["inputs"]["cfg"] == 4.0


@pytest.mark.parametrize(
    "odd",
    [
        {"eta": 0.5},
        {"eta": 1.0, "clean": False},
        {"first_noise": True, "eta": 0.0},
        {"eta": 1.0, "clean": True, "ancestral": True},
    ],
)
def test_what_comfyui_has_no_sampler_for_is_refused(odd):
    with pytest.raises(ConfigError, match="the workflow has no sampler for such steps"):
        workflow(contract(**odd), "x")


def test_z_image_s_parts_are_files_of_their_own():
    nodes = workflow(CONTRACTS["z_image"], "x")
    assert nodes["clip"]["inputs"] == {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}
    assert nodes["latent"]["class_type"] == "EmptySD3LatentImage"  # of 16 channels
    assert nodes["decode"]["inputs"]["vae"] == ["vae", 0]


def test_krea_2_s_parts_are_files_of_their_own_and_guidance_has_this_package_s_number():
    nodes = workflow(replace(CONTRACTS["krea2"], guidance_scale=4.5), "x")
    assert nodes["clip"]["inputs"] == {"clip_name": "qwen3vl_4b_bf16.safetensors", "type": "krea2"}
    assert nodes["vae"]["inputs"] == {"vae_name": "qwen_image_vae.safetensors"}
    assert nodes["latent"]["class_type"] == "EmptyHunyuanLatentVideo" and nodes["latent"]["inputs"]["length"] == 1
    assert nodes["guider"]["inputs"]["cfg"] == 4.5  # ComfyUI's is `uncond + cfg (cond - uncond)`


def test_guidance_by_another_rule_than_comfyui_s_is_refused():
    capped = Z_IMAGE | {"cfg_normalization": 1.0}
    workflow(contract(**FLOW | {"family": capped}), "x")  # without guidance there is no rule
    workflow(contract(**FLOW | {"family": Z_IMAGE}, guidance_scale=3.0), "x")
    with pytest.raises(ConfigError, match="guidance 3 by the rule capped, expected the linear rule"):
        workflow(contract(**FLOW | {"family": capped}, guidance_scale=3.0), "x")


def test_a_student_whose_guidance_comfyui_does_not_have_is_refused():
    """Qwen-Image's scales each token, and ComfyUI's is linear."""
    told = contract(**FLOW | {"family": QWEN}, guidance_scale=3.0)
    with pytest.raises(
        ConfigError, match="guidance 3 by the rule token_norm, expected the linear rule, or no guidance"
    ):
        workflow(told, "x")
    nodes = workflow(replace(told, guidance_scale=1.0), "x")
    assert nodes["clip"]["inputs"] == {"clip_name": "qwen_2.5_vl_7b.safetensors", "type": "qwen_image"}
    assert nodes["vae"]["inputs"] == {"vae_name": "qwen_image_vae.safetensors"}
    assert nodes["latent"]["class_type"] == "EmptyHunyuanLatentVideo" and nodes["latent"]["inputs"]["length"] == 1
    assert nodes["decode"]["inputs"]["vae"] == ["vae", 0]


def test_sizes_at_which_comfyui_counts_the_tokens_of_qwen_image_otherwise_are_told(tmp_path, caplog):
    odd = {"resolution": (1024, 1024), "sizes": ((1024, 1024), (1328, 1328), (1024, 1040), (1040, 1024))}
    for family in (QWEN, KREA2):
        write_workflow(tmp_path, contract(**FLOW | {"family": family} | odd), "x")
        assert ("at 1328 x 1328, 1040 x 1024, 1024 x 1040 (" in caplog.text) == (family == QWEN)
        caplog.clear()
    write_workflow(tmp_path, contract(**FLOW | {"family": QWEN}, resolution=(1328, 1024)), "x")
    assert "at 1024 x 1328 (" in caplog.text


# what ComfyUI draws with the nodes

STARTS = {"highest": (999.0, 759.0, 499.0, 259.0), "below": (749.0, 399.0), "one": (399.0,)}


def toy(x: torch.Tensor, t: float, prompt: str | None) -> torch.Tensor:
    """A network that is no linear function of its input, and heeds the prompt."""
    return torch.tanh((1 + t / 1000) * x) - {"red apple": 0.3, "": 0.1, None: -0.4}[prompt]


def by_contract(told: Contract, noise: torch.Tensor, fresh, null: str | None = "") -> torch.Tensor:
    """The library's own sampler."""
    family = teacher(told)
    vp = told.prediction_type != "flow"
    scheduler = scheduler_class(told).from_config(told.scheduler)
    schedule = Table(scheduler.alphas_cumprod.double()) if vp else family.schedule(scheduler)

    def denoise(x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> Estimate:
        one, other = (toy(x_t, t[0].item(), prompt) for prompt in ("red apple", null))
        return estimate(told.prediction_type, other + told.guidance_scale * (one - other), x_t, t, schedule)

    return few_step(denoise, schedule, told.sampler(), noise, {}, lambda i: fresh[i])


def made(**changes) -> Contract:
    told = contract(**changes)
    kind = {"prediction_type": told.prediction_type} if told.prediction_type != "flow" else {}
    return replace(told, scheduler=told.scheduler | kind)


CASES = (
    {
        f"{kind} {start} eta {eta:g} {'clean' if clean else 'edge'}": made(
            prediction_type=kind, timesteps=STARTS[start], eta=eta, clean=clean, guidance_scale=scale
        )
        for kind, scale in (("epsilon", 3.0), ("v_prediction", 1.0), ("sample", 1.0))
        for start in STARTS
        for eta, clean in ((0.0, True), (0.0, False), (1.0, True))
    }
    | {
        f"flow {times[0]:g} eta {eta:g}": made(**FLOW | {"timesteps": times, "eta": eta})
        for times in ((1000.0, 750.0), (900.0, 500.0))
        for eta in (0.0, 1.0)
    }
    | {
        f"frames {times[0]:g} of {family['type']}": made(**FLOW | {"family": family, "timesteps": times, "eta": 1.0})
        for times in ((1000.0, 750.0), (900.0, 500.0))
        for family in (QWEN, KREA2)
    }
)


@pytest.mark.parametrize("name", CASES)
def test_comfyui_draws_what_the_contract_says(name):
    """Wherever the first step starts, and whatever the last one ends at; its arithmetic is an oracle's."""
    told = CASES[name]
    noise, *fresh = torch.randn(5, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = by_contract(told, noise, fresh)
    flow = told.prediction_type == "flow"
    kind = "frames" if name.startswith("frames") else "flow" if flow else "sd"
    comfy = Comfy(kind, toy, noise, lambda i: fresh[i])
    nodes = json.loads(json.dumps(workflow(told, "x")))
    got = comfy.decoded(nodes) * comfy.scale
    if kind == "frames":  # a video of one
        got = got.squeeze(2)
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()

    def raw(x, t, cfg):
        one, other = (toy(x, t, prompt) for prompt in ("red apple", ""))
        return other + cfg * (one - other)

    levels = None if flow else comfy_levels(told)
    ours = ComfyRun(nodes, levels, raw, noise, lambda i: fresh[i]).latents()  # what `verify` samples with
    assert (ours - got).abs().max() < 2e-6 * expected.abs().max()


def test_the_seed_reaches_the_noise_of_the_lcm_sampler_wherever_it_starts():
    """ComfyUI seeds it by the noise node of the sampler, and a node without noise has seed 0."""
    for told in CASES.values():
        nodes = workflow(told, "x")
        assert nodes["sample"]["inputs"]["noise"] == ["noise", 0] and nodes["noise"]["class_type"] == "RandomNoise"


def test_another_table_than_comfyui_s_gets_no_workflow():
    """It would tell the network other timesteps."""
    other = contract(scheduler=contract().scheduler | {"beta_schedule": "linear"})
    with pytest.raises(ConfigError, match="a noise schedule that ComfyUI does not have"):
        workflow(other, "x")


# the base


def base_folder(place, **files) -> str:
    for name, content in files.items():
        file = place / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps(content))
    return str(place)


def of_base(module: str, place: str, **changes) -> Contract:
    return contract(family={"type": f"stepdistill.families.{module}", "pretrained_teacher_model": place}, **changes)


@pytest.mark.parametrize("zeros", [True, False, "by default", "of a single file"])
def test_sdxl_with_guidance_departs_from_zeros_where_diffusers_does(tmp_path, zeros):
    place, index = SINGLE_FILE, {"_class_name": "StableDiffusionXLPipeline"}
    if zeros != "of a single file":
        index |= {} if zeros == "by default" else {"force_zeros_for_empty_prompt": zeros}
        place = base_folder(tmp_path, model_index=index)
    told = of_base("sdxl.StableDiffusionXL", place, guidance_scale=3.0)
    told = replace(told, eta=0.0)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    comfy = Comfy("sdxl", toy, noise, lambda i: noise)
    expected = by_contract(told, noise, [], None if zeros else "")
    got = comfy.decoded(workflow(told, "x")) * comfy.scale
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()
    assert "zero" not in workflow(replace(told, guidance_scale=1.0), "x")


@pytest.mark.parametrize(("side", "kind"), [(64, "pixart_sigma"), (128, "pixart_alpha")])
def test_pixart_alpha_that_comfyui_takes_for_sigma_is_decoded_in_its_own_scale(tmp_path, caplog, side, kind):
    """Latents 1.40 times too large are a broken image."""
    place = base_folder(tmp_path, model_index={}, transformer__config={"sample_size": side})
    table = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
    told = of_base("pixart_alpha.PixArtAlpha", place, scheduler={"_class_name": "LCMScheduler", **table})
    noise, *fresh = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    comfy = Comfy(kind, toy, noise, lambda i: fresh[i])
    expected = by_contract(told, noise, fresh)
    write_workflow(tmp_path, told, "x")
    got = comfy.decoded(json.loads((tmp_path / WORKFLOW).read_text())) * 0.18215
    assert (got - expected).abs().max() < 2e-6 * expected.abs().max()
    assert ("for PixArt-Sigma" in caplog.text) == (side == 64) and pytest.approx(1 / 1.4, abs=2e-3) == SIGMA_FOR_ALPHA


@pytest.mark.parametrize(
    ("base", "file"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev.safetensors"),
        ("stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-3.5-medium.safetensors"),
        ("/models/v1-5.pruned.safetensors", "v1-5.pruned.safetensors"),
        ("owner/base", "base.safetensors"),
    ],
)
def test_the_name_of_the_base_is_whole(base, file):
    flux = {"type": "stepdistill.families.flux.Flux", "pretrained_teacher_model": base}
    for told in (contract(base_model=base), contract(**FLOW | {"family": flux}, base_model=base)):
        assert file in workflow(told, "x")["model"]["inputs"].values()


@pytest.mark.parametrize("told", [{"max_sequence_length": 256}, {"text_encoder_out_layers": [8, 17, 26]}])
def test_prompts_of_klein_that_comfyui_encodes_otherwise_are_refused(told):
    with pytest.raises(ConfigError, match=f"{next(iter(told))}.*ComfyUI encodes its prompts in no other way"):
        workflow(replace(CONTRACTS["klein"], family=KLEIN | told), "x")


def test_both_prompts_of_flux_have_the_guidance_embedding():
    """The unconditional pass of Diffusers has it, too, and ComfyUI's default is 3.5."""
    told = contract(**FLOW, guidance_embedding=2.0, guidance_scale=3.0)
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    comfy = Comfy("flow", toy, noise, lambda i: noise)
    comfy.decoded(workflow(told, "x"))
    assert comfy.embedded == {"red apple": 2.0, "": 2.0}


def test_loras_of_the_base_are_loaded_before_the_student_s():
    family = CONTRACTS["sd"].family | {"teacher_loras": ["owner/style.v2", "/loras/look.safetensors"]}
    nodes = workflow(contract(family=family), "x")
    first, second = nodes["teacher_lora_0"]["inputs"], nodes["teacher_lora_1"]["inputs"]
    assert (first["model"], first["clip"], first["lora_name"]) == (["model", 0], ["model", 1], "style.v2.safetensors")
    assert (second["model"], second["clip"]) == (["teacher_lora_0", 0], ["teacher_lora_0", 1])
    assert second["lora_name"] == "look.safetensors" and first["strength_model"] == first["strength_clip"] == 1
    assert nodes["lora"]["inputs"]["model"] == ["teacher_lora_1", 0]
    assert nodes["positive"]["inputs"]["clip"] == nodes["negative"]["inputs"]["clip"] == ["teacher_lora_1", 1]


# what a user may change: prompts, seed, size, and the names of files
OF_THE_USER = {"model", "clip", "vae", "positive", "negative", "noise", "latent", "decode", "save"}


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_other_value_of_a_workflow_is_the_contract_s(tmp_path, name):
    told = CONTRACTS[name]
    write_workflow(tmp_path, told, "x")
    text = (tmp_path / WORKFLOW).read_text()
    for node, key in ((node, key) for node, part in json.loads(text).items() for key in part["inputs"]):
        nodes = json.loads(text)
        value = nodes[node]["inputs"][key]
        nodes[node]["inputs"][key] = value + (1 if isinstance(value, int | float) else type(value)("x"))
        (tmp_path / WORKFLOW).write_text(json.dumps(nodes))
        if node in OF_THE_USER or key == "lora_name":
            read_workflow(tmp_path, told)
            continue
        for odd in (nodes, {kept: part for kept, part in nodes.items() if kept != node}):
            (tmp_path / WORKFLOW).write_text(json.dumps(odd))
            with pytest.raises(StudentError, match=f"with other {node}, "):
                read_workflow(tmp_path, told)


def test_a_changed_workflow_is_noticed(tmp_path):
    write_workflow(tmp_path, CONTRACTS["sd"], "x")
    read_workflow(tmp_path, CONTRACTS["sd"])
    found = json.loads((tmp_path / WORKFLOW).read_text())
    found["positive"]["inputs"]["text"] = "a cat"
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    read_workflow(tmp_path, CONTRACTS["sd"])  # the prompt is the user's
    found["lora"]["inputs"]["lora_name"] = "mine.safetensors"
    found["model"]["inputs"]["ckpt_name"] = "folder/mine.safetensors"
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    read_workflow(tmp_path, CONTRACTS["sd"])  # and so are the names of files
    found["sigmas"]["inputs"]["sigmas"] = "14.6, 7, 3, 1, 0"
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    with pytest.raises(StudentError, match="with other sigmas"):
        read_workflow(tmp_path, CONTRACTS["sd"])
    write_workflow(tmp_path, CONTRACTS["embedding"], "x")
    found = json.loads((tmp_path / WORKFLOW).read_text())
    found["embedding"]["inputs"]["guidance"] = 7.0
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    with pytest.raises(StudentError, match="with other embedding"):
        read_workflow(tmp_path, CONTRACTS["embedding"])
    (tmp_path / WORKFLOW).write_text("{")
    with pytest.raises(StudentError, match="unreadable"):
        read_workflow(tmp_path, CONTRACTS["sd"])
