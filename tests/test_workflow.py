"""The ComfyUI workflow: its links resolve, its nodes are ComfyUI's, and its noise levels are the contract's."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.prediction import Estimate
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.students.contract import Contract, LoraWeights
from stepdistill.students.lora.comfyui import WORKFLOW, sigmas, verify_workflow, workflow, write_workflow

# inputs and outputs of ComfyUI's own nodes, from their definitions in nodes.py and comfy_extras
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name", "weight_dtype"}, ("MODEL",)),
    "CLIPLoader": ({"clip_name", "type"}, ("CLIP",)),
    "DualCLIPLoader": ({"clip_name1", "clip_name2", "type"}, ("CLIP",)),
    "VAELoader": ({"vae_name"}, ("VAE",)),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, ("MODEL",)),
    "CLIPTextEncode": ({"text", "clip"}, ("CONDITIONING",)),
    "CLIPTextEncodePixArtAlpha": ({"width", "height", "text", "clip"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning", "guidance"}, ("CONDITIONING",)),
    "CFGGuider": ({"model", "positive", "negative", "cfg"}, ("GUIDER",)),
    "RandomNoise": ({"noise_seed"}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name"}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas"}, ("SIGMAS",)),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width", "height", "batch_size"}, ("LATENT",)),
    "SamplerCustomAdvanced": ({"noise", "guider", "sampler", "sigmas", "latent_image"}, ("LATENT", "LATENT")),
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
    plain = Contract(
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
    return replace(plain, **changes)


FLOW = {
    "family": {"type": "stepdistill.families.sd3.StableDiffusion3", "pretrained_teacher_model": "owner/base"},
    "prediction_type": "flow",
    "timesteps": (1000.0, 900.0, 750.0, 500.0),
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "eta": 0.0,
}
CONTRACTS = {
    "sd": contract(),
    "v": contract(prediction_type="v_prediction", eta=0.0, guidance_scale=3.0),
    "edge": contract(eta=0.0, clean=False),
    "flow": contract(**FLOW),
    "embedding": contract(**FLOW, guidance_embedding=3.5),
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


@pytest.mark.parametrize("odd", [{"eta": 0.5}, {"eta": 1.0, "clean": False}, {"first_noise": True, "eta": 0.0}])
def test_what_comfyui_has_no_sampler_for_is_refused(odd):
    with pytest.raises(ConfigError, match="ComfyUI has no sampler for such steps"):
        workflow(contract(**odd), "x")


def toy(x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """An estimate of x0 that is no linear function of its input."""
    return torch.tanh(alpha * x_t) - 0.3 * sigma


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_comfyui_s_samplers_along_these_levels_are_the_contract_s(kind, eta):
    """Its `euler` and `lcm`, written out in its own measure, against our sampler in ours."""
    told = contract(eta=eta) if kind == "vp" else contract(**FLOW | {"eta": eta})
    family = tiny.FAMILIES["sd" if kind == "vp" else "sd3"]
    scheduler = tiny.pipeline("sd" if kind == "vp" else "sd3").scheduler
    if kind == "vp":
        scheduler = type(scheduler).from_config(dict(scheduler.config) | VP)
    schedule = family.schedule(scheduler)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fresh = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(1, 4)]

    def denoise(x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> Estimate:
        alpha, sigma = schedule(t[0])
        x0 = toy(x_t, alpha, sigma)
        return Estimate(x0, (x_t - alpha * x0) / sigma)

    ours = few_step(denoise, schedule, Sampler(told.timesteps, eta), noise, {}, lambda i: fresh[i])
    levels = torch.tensor(numbers(told))
    # x = x0 + sigma noise for one, (1 - sigma) x0 + sigma noise for the other; the first is at its largest level
    x = noise * (1 + levels[0] ** 2).sqrt() if kind == "vp" else noise
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        alpha = 1 / (1 + now**2).sqrt() if kind == "vp" else 1 - now
        x0 = toy(x * alpha if kind == "vp" else x, alpha, now * alpha if kind == "vp" else now)
        if eta == 0:
            x = x + (x - x0) / now * (then - now)
        elif then > 0:
            x = x0 + then * fresh[i] if kind == "vp" else (1 - then) * x0 + then * fresh[i]
        else:
            x = x0
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4)


def test_a_changed_workflow_is_noticed(tmp_path):
    write_workflow(tmp_path, CONTRACTS["sd"], "x")
    verify_workflow(tmp_path, CONTRACTS["sd"], "x")
    found = json.loads((tmp_path / WORKFLOW).read_text())
    found["positive"]["inputs"]["text"] = "a cat"
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    verify_workflow(tmp_path, CONTRACTS["sd"], "x")  # the prompt is the user's
    found["sigmas"]["inputs"]["sigmas"] = "14.6, 7, 3, 1, 0"
    (tmp_path / WORKFLOW).write_text(json.dumps(found))
    with pytest.raises(StudentError, match="with other sigmas"):
        verify_workflow(tmp_path, CONTRACTS["sd"], "x")
    (tmp_path / WORKFLOW).write_text("{")
    with pytest.raises(StudentError, match="unreadable"):
        verify_workflow(tmp_path, CONTRACTS["sd"], "x")
