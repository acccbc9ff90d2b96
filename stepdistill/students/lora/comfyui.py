"""A workflow file for ComfyUI that generates images with a student under its sampling contract.

The file is in ComfyUI's API form: nodes by id, each with its class and inputs, where `[id, n]` is output n of another
node. All nodes are built into ComfyUI. `ManualSigmas` takes the noise levels as text, so no schedule or shift of
ComfyUI changes them.

ComfyUI's noise level is `sigma = sqrt((1 - abar) / abar)` for a variance-preserving process, and the time in [0, 1] for
a flow. With it, Euler is DDIM, and `lcm` is multi-step consistency sampling (`x0 + sigma noise`, or for a flow
`(1 - sigma) x0 + sigma noise`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.students.contract import Contract, scheduler_class, teacher
from stepdistill.students.lora.names import PIPELINES

WORKFLOW = "comfyui_workflow.json"
SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
LAST = 4.8973451890853435e-08  # ComfyUI's value for abar = 0, as in a table with zero terminal SNR
ZERO = 1e-6  # a last abar below it means zero terminal SNR: that of Stable Diffusion is 4.7e-3
TRAINED = ("lora", "prediction", "guider", "sampler", "sigmas")  # the nodes that are part of the contract
Node = dict[str, Any]


def sigmas(contract: Contract) -> list[float]:
    """ComfyUI's noise levels, from the start of the first step to the end of the last one."""
    if contract.prediction_type == "flow":
        return [t / 1000 for t in contract.timesteps] + [0.0]
    times = [round(t) for t in contract.timesteps] + ([] if contract.clean else [0])
    abar = _table(contract)[times].clamp(min=LAST)
    return ((1 - abar) / abar).sqrt().tolist() + ([0.0] if contract.clean else [])


def _table(contract: Contract) -> torch.Tensor:
    """The abar (T,) of a student on a table, whatever its scheduler computes it from."""
    return scheduler_class(contract).from_config(contract.scheduler).alphas_cumprod.double()


def workflow(contract: Contract, lora: str) -> dict[str, Node]:
    """The nodes of a student's workflow.

    Args:
        lora: file name of the LoRA in ComfyUI's `models/loras`.

    Raises:
        ConfigError: ComfyUI has no sampler for the student.
    """
    _refuse(contract)
    layout = PIPELINES[teacher(contract).pipeline_class.__name__]
    height, width = contract.resolution
    nodes = _loaders(contract, layout)
    nodes["lora"] = _node("LoraLoaderModelOnly", "student", model=["model", 0], lora_name=lora, strength_model=1.0)
    model = ["lora", 0]
    zero_snr = contract.prediction_type != "flow" and _table(contract)[-1].item() < ZERO
    if contract.prediction_type != "flow" and (contract.prediction_type != "epsilon" or zero_snr):
        kind = SAMPLING[contract.prediction_type]
        nodes["prediction"] = _node("ModelSamplingDiscrete", kind, model=model, sampling=kind, zsnr=zero_snr)
        model = ["prediction", 0]
    nodes["positive"] = _text(contract, layout, "red apple")
    nodes["negative"] = _text(contract, layout, "")
    positive = ["positive", 0]
    if contract.guidance_embedding is not None:
        scale = contract.guidance_embedding
        nodes["embedding"] = _node("FluxGuidance", "guidance embedding", conditioning=positive, guidance=scale)
        positive = ["embedding", 0]
    cfg = {"positive": positive, "negative": ["negative", 0], "cfg": contract.guidance_scale}
    text = ", ".join(f"{sigma:.9f}" for sigma in sigmas(contract))  # ManualSigmas reads no exponents
    empty = "EmptySD3LatentImage" if layout in ("sd3", "flux") else "EmptyLatentImage"
    sampler = "lcm" if contract.eta else "euler"
    return nodes | {
        "guider": _node("CFGGuider", "guidance as trained", model=model, **cfg),
        "noise": _node("RandomNoise", "seed", noise_seed=0),
        "sampler": _node("KSamplerSelect", "sampler as trained", sampler_name=sampler),
        "sigmas": _node("ManualSigmas", "noise levels as trained", sigmas=text),
        "latent": _node(empty, "size", width=width, height=height, batch_size=1),
        "sample": _node(
            "SamplerCustomAdvanced",
            "draw",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": _node("VAEDecode", "decode", samples=["sample", 0], vae=_vae(layout)),
        "save": _node("SaveImage", "save", images=["decode", 0], filename_prefix="student"),
    }


def write_workflow(folder: Path, contract: Contract, lora: str) -> None:
    """Write `comfyui_workflow.json` into a folder. Raises ConfigError as `workflow` does."""
    (folder / WORKFLOW).write_text(json.dumps(workflow(contract, lora), indent=1) + "\n")


def verify_workflow(folder: Path, contract: Contract, lora: str) -> None:
    """Raise StudentError if the workflow file in a folder does not follow the contract."""
    file = folder / WORKFLOW
    expected, todo = "the values of the contract", "export the workflow again"
    try:
        nodes = json.loads(file.read_text())
        odd = [name for name, node in workflow(contract, lora).items() if name in TRAINED and nodes.get(name) != node]
    except (OSError, ValueError, AttributeError) as error:
        raise StudentError(problem(f"unreadable {file}", "a workflow", str(error), todo)) from error
    if odd:
        why = "ComfyUI would not sample the student as it was trained"
        raise StudentError(problem(f"{file} with other {', '.join(odd)}", expected, why, todo))


def _refuse(contract: Contract) -> None:
    got = expected = None
    if contract.first_noise:
        got, expected = "steps that reuse the first noise", "steps with fresh noise or without noise"
    elif contract.eta not in (0, 1) or (contract.eta == 1 and not contract.clean):
        end = "clean data" if contract.clean else "time 0"
        got, expected = f"eta {contract.eta:g} with an end at {end}", "eta 0, or eta 1 with an end at clean data"
    if got:
        why, todo = "ComfyUI has no sampler for such steps", "generate the images with Diffusers"
        raise ConfigError(problem(got, expected, why, todo))


def _node(kind: str, title: str, **inputs: Any) -> Node:  # noqa: ANN401
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def _loaders(contract: Contract, layout: str) -> dict[str, Node]:
    """The nodes that load the base: one checkpoint, or separate files for Flux and PixArt."""
    name = Path(contract.base_model).stem + ".safetensors"
    title = f"base: {contract.base_model}"
    if layout == "flux":
        clip = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}
        return {
            "model": _node("UNETLoader", title, unet_name=name, weight_dtype="default"),
            "clip": _node("DualCLIPLoader", "text encoders", **clip),
            "vae": _node("VAELoader", "autoencoder", vae_name="ae.safetensors"),
        }
    if layout == "pixart":
        return {
            "model": _node("UNETLoader", title, unet_name=name, weight_dtype="default"),
            "clip": _node("CLIPLoader", "text encoder", clip_name="t5xxl_fp16.safetensors", type="pixart"),
            "vae": _node("VAELoader", "autoencoder", vae_name="vae.safetensors"),
        }
    return {"model": _node("CheckpointLoaderSimple", title, ckpt_name=name)}


def _vae(layout: str) -> list:
    return ["vae", 0] if layout in ("flux", "pixart") else ["model", 2]


def _text(contract: Contract, layout: str, prompt: str) -> Node:
    clip = ["clip", 0] if layout in ("flux", "pixart") else ["model", 1]
    if contract.family["type"].endswith("PixArtAlpha"):  # its text encoding includes the size
        height, width = contract.resolution
        return _node("CLIPTextEncodePixArtAlpha", "prompt", width=width, height=height, text=prompt, clip=clip)
    return _node("CLIPTextEncode", "prompt" if prompt else "negative prompt", text=prompt, clip=clip)
