"""A workflow file for ComfyUI that generates images with a student under its sampling contract.

The file is in ComfyUI's API form: nodes by id, each with its class and inputs, where `[id, n]` is output n of another
node. All nodes are built into ComfyUI. `ManualSigmas` takes the noise levels as text, so no schedule or shift of
ComfyUI changes them. ComfyUI has it since version 0.7.0 (December 2025).

ComfyUI's noise level is `sigma = sqrt((1 - abar) / abar)` for a variance-preserving process, and the time in [0, 1] for
a flow. With it, Euler is DDIM, and `lcm` is multi-step consistency sampling (`x0 + sigma noise`, or for a flow
`(1 - sigma) x0 + sigma noise`). `students.lora.comfyui_draw` computes what the nodes compute.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path, PurePath
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.files import is_single_file
from stepdistill.core.guidance import LINEAR
from stepdistill.networks.lora.names import PIPELINES
from stepdistill.students.contract import Contract, scheduler_class, teacher
from stepdistill.students.lora.comfyui_files import APART, EMPTY
from stepdistill.students.sizes import sizes_in_words

logger = logging.getLogger(__name__)

WORKFLOW = "comfyui_workflow.json"
SAMPLING = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
LAST = 4.8973451890853435e-08  # ComfyUI's value for abar = 0, as in a table with zero terminal SNR
ZERO = 1e-6  # a last abar below it means zero terminal SNR: that of Stable Diffusion is 4.7e-3
SIGMA_FOR_ALPHA = 0.13025 / 0.18215  # ComfyUI's scale of PixArt-Sigma's latents over that of PixArt-alpha's
# the nodes that are part of the contract
TRAINED = (
    *("lora", "prediction", "embedding", "embedding_2", "zero", "guider"),
    *("sampler", "sigmas", "start_level", "start", "sample", "scale"),
)
KLEIN_TEXT = {"max_sequence_length": 512, "text_encoder_out_layers": [9, 18, 27]}  # as ComfyUI encodes its prompts
Node = dict[str, Any]


def comfy_table(layout: str, zero_snr: bool) -> Tensor:
    """The noise levels (1000,) that ComfyUI has for a variance-preserving base, by timestep, in float64."""
    if layout == "pixart":
        betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt()
    if zero_snr:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        alphas[-1] = LAST**0.5
    return (1 - alphas**2).sqrt() / alphas


def sigmas(contract: Contract) -> list[float]:
    """ComfyUI's noise levels, from the start of the first step to the end of the last one."""
    if contract.prediction_type == "flow":
        return [t / 1000 for t in contract.timesteps] + [0.0]
    times = [round(t) for t in contract.timesteps] + ([] if contract.clean else [0])
    return comfy_levels(contract)[times].tolist() + ([0.0] if contract.clean else [])


def comfy_levels(contract: Contract) -> Tensor:
    """ComfyUI's noise levels (1000,) by timestep. Raises ConfigError if the student was trained on others."""
    levels = comfy_table(PIPELINES[teacher(contract).pipeline_class.__name__], _zero_snr(contract))
    trained = _table(contract)
    angle = ((1 - trained) / trained.clamp(min=LAST)).sqrt().atan()
    if len(angle) != len(levels) or (angle - levels.atan()).abs().max() > 1e-3:
        why = "ComfyUI has one table for all bases of this kind, and would pass other timesteps to the network"
        todo = "sample with Diffusers"
        raise ConfigError(problem("a noise schedule that ComfyUI does not have", "the usual one", why, todo))
    return levels


def _table(contract: Contract) -> Tensor:
    """The abar (T,) of a student on a table, whatever its scheduler computes it from."""
    return scheduler_class(contract).from_config(contract.scheduler).alphas_cumprod.double()


def _zero_snr(contract: Contract) -> bool:
    return contract.prediction_type != "flow" and _table(contract)[-1].item() < ZERO


def latent_scale(contract: Contract) -> float:
    """The factor from ComfyUI's last latents to those that the autoencoder decodes."""
    factor = 1.0
    if not contract.clean and contract.prediction_type != "flow":  # ComfyUI ends at x0 + sigma noise
        factor = 1 / math.sqrt(1 + sigmas(contract)[-1] ** 2)
    return factor * (SIGMA_FOR_ALPHA if read_as_sigma(contract) else 1.0)


def read_as_sigma(contract: Contract) -> bool:
    """Whether ComfyUI takes the base for PixArt-Sigma: PixArt-alpha, but without an input for the image size."""
    family = teacher(contract)
    if family.pipeline_class.__name__ != "PixArtAlphaPipeline":
        return False
    with family.reached():
        place: Any = family.location()
        config: Any = PixArtTransformer2DModel.load_config(place, subfolder="transformer", revision=family.revision)
    return config["sample_size"] != 128


def _zero_negative(contract: Contract, layout: str) -> bool:
    """Whether the unconditional embeddings are zeros, as in SDXL, and not those of the empty prompt."""
    if layout != "sdxl" or contract.guidance_scale == 1:
        return False
    family = teacher(contract)
    if is_single_file(family.location()):
        return True
    with family.reached():
        index: Any = family.pipeline_class.load_config(family.location(), revision=family.revision)
    return index.get("force_zeros_for_empty_prompt", True)


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
    model, clip = ["model", 0], ["clip", 0] if layout in APART else ["model", 1]
    for i, place in enumerate(contract.family.get("teacher_loras", ())):
        strength = {"strength_model": 1.0, "strength_clip": 1.0}
        files = {"model": model, "clip": clip, "lora_name": _file_name(place)}
        nodes[f"teacher_lora_{i}"] = _node("LoraLoader", f"LoRA of the base: {place}", **files, **strength)
        model, clip = [f"teacher_lora_{i}", 0], [f"teacher_lora_{i}", 1]
    nodes["lora"] = _node("LoraLoaderModelOnly", "student", model=model, lora_name=lora, strength_model=1.0)
    model, zero_snr = ["lora", 0], _zero_snr(contract)
    if contract.prediction_type != "flow" and (contract.prediction_type != "epsilon" or zero_snr):
        kind = SAMPLING[contract.prediction_type]
        nodes["prediction"] = _node("ModelSamplingDiscrete", kind, model=model, sampling=kind, zsnr=zero_snr)
        model = ["prediction", 0]
    nodes["positive"] = _text(contract, clip, "red apple")
    nodes["negative"] = _text(contract, clip, "")
    positive, negative = ["positive", 0], ["negative", 0]
    if contract.guidance_embedding is not None:  # ComfyUI takes 3.5 where none is set
        told = {"guidance": contract.guidance_embedding}
        nodes["embedding"] = _node("FluxGuidance", "guidance embedding", conditioning=positive, **told)
        nodes["embedding_2"] = _node("FluxGuidance", "guidance embedding", conditioning=negative, **told)
        positive, negative = ["embedding", 0], ["embedding_2", 0]
    if _zero_negative(contract, layout):
        nodes["zero"] = _node("ConditioningZeroOut", "no negative prompt: zeros", conditioning=negative)
        negative = ["zero", 0]
    cfg = {"positive": positive, "negative": negative, "cfg": contract.guidance_scale}
    empty, more = EMPTY.get(layout, ("EmptyLatentImage", {}))
    nodes |= {
        "guider": _node("CFGGuider", "guidance as trained", model=model, **cfg),
        "noise": _node("RandomNoise", "seed", noise_seed=0),
        "sampler": _node("KSamplerSelect", "sampler as trained", sampler_name="lcm" if contract.eta else "euler"),
        "sigmas": _levels("noise levels as trained", *sigmas(contract)),
        "latent": _node(empty, _size_title(contract), width=width, height=height, batch_size=1, **more),
    }
    return nodes | _drawing(contract, model, ["vae", 0] if layout in APART else ["model", 2])


def _drawing(contract: Contract, model: list, vae: list) -> dict[str, Node]:
    """The nodes from noise to image. A student starts from unit noise at every level.

    ComfyUI does so at its highest level only. Below, it starts from `sigma noise + latent`, or for a flow from
    `sigma noise + (1 - sigma) latent`. The latent therefore brings what is missing, from the same seed. (If it brought
    all of it and the sampler node had no noise, `lcm` would draw its fresh noise from seed 0 for every image.)
    """
    nodes, latent, first = {}, ["latent", 0], sigmas(contract)[0]
    top = 1.0 if contract.prediction_type == "flow" else comfy_levels(contract)[-1].item()
    if first < top:
        missing = 1.0 if contract.prediction_type == "flow" else math.sqrt(1 + first**2) - first
        nodes["start_level"] = _levels("what the first level lacks", missing)
        given = {"model": model, "noise": ["noise", 0], "sigmas": ["start_level", 0], "latent_image": latent}
        nodes["start"] = _node("AddNoise", "start below the highest noise", **given)
        latent = ["start", 0]
    parts = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
    nodes["sample"] = _node("SamplerCustomAdvanced", "draw", **parts, latent_image=latent)
    samples, factor = ["sample", 0], latent_scale(contract)
    if factor != 1:
        title = "latents as the autoencoder takes them"
        nodes["scale"] = _node("LatentMultiply", title, samples=samples, multiplier=factor)
        samples = ["scale", 0]
    nodes["decode"] = _node("VAEDecode", "decode", samples=samples, vae=vae)
    nodes["save"] = _node("SaveImage", "save", images=["decode", 0], filename_prefix="student")
    return nodes


def _size_title(contract: Contract) -> str:
    """The title of the node with the size: the file has no notes, and the other sizes in training are good as well."""
    others = [size for size in contract.sizes if size != contract.resolution]
    return f"size; also trained at {sizes_in_words(others)}" if others else "size"


def moved_sizes(contract: Contract) -> list[tuple[int, int]]:
    """The sizes of which ComfyUI counts a Qwen-Image's tokens from another middle: with an odd number along a side."""
    if PIPELINES[teacher(contract).pipeline_class.__name__] != "qwen_image":
        return []
    return [size for size in dict.fromkeys((contract.resolution, *contract.sizes)) if any(s % 32 for s in size)]


def write_workflow(folder: Path, contract: Contract, lora: str) -> None:
    """Write `comfyui_workflow.json` into a folder. Raises ConfigError as `workflow` does."""
    (folder / WORKFLOW).write_text(json.dumps(workflow(contract, lora), indent=1) + "\n")
    if read_as_sigma(contract):
        logger.warning(
            "ComfyUI takes this PixArt-alpha base for PixArt-Sigma, so its final latents are 1.40 times too large. "
            "%s corrects them. In other workflows, add a LatentMultiply node with 0.715 before VAEDecode",
            WORKFLOW,
        )
    if moved := moved_sizes(contract):
        what = "ComfyUI moves the image by one token against the prompt at %s (no multiples of 32 pixels)"
        logger.warning(what, sizes_in_words(moved))


def read_workflow(folder: Path, contract: Contract) -> dict[str, Node]:
    """The nodes of the workflow file in a folder. Raises StudentError if they do not follow the contract."""
    file = folder / WORKFLOW
    expected, todo = "the values of the contract", "export the workflow again"
    try:
        nodes = json.loads(file.read_text())
        wanted = workflow(contract, "")
        names = [name for name in wanted if name in TRAINED or name.startswith("teacher_lora")]
        odd = [name for name in names if _trained(nodes.get(name)) != _trained(wanted[name])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StudentError(problem(f"unreadable {file}", "a workflow", str(error), todo)) from error
    if odd:
        why = "ComfyUI would not sample the student as it was trained"
        raise StudentError(problem(f"{file} with other {', '.join(odd)}", expected, why, todo))
    return nodes


def _trained(node: Node | None) -> Any:  # noqa: ANN401
    """The parts of a node that belong to the contract: not the name of a LoRA file, nor the title."""
    return node and (node["class_type"], {k: v for k, v in node["inputs"].items() if k != "lora_name"})


def _refuse(contract: Contract) -> None:
    got = expected = None
    if contract.first_noise:
        got, expected = "steps that reuse the first noise", "steps with fresh noise or without noise"
    elif contract.ancestral:
        got, expected = "ancestral steps", "eta 0 or 1 without ancestral"
    elif contract.eta not in (0, 1) or (contract.eta == 1 and not contract.clean):
        end = "clean data" if contract.clean else "time 0"
        got, expected = f"eta {contract.eta:g} with an end at {end}", "eta 0, or eta 1 with an end at clean data"
    if got:
        why, todo = "the workflow has no sampler for such steps", "generate the images with Diffusers"
        raise ConfigError(problem(got, expected, why, todo))
    family = teacher(contract)
    if PIPELINES[family.pipeline_class.__name__] == "klein" and family.arguments() != KLEIN_TEXT:
        why, todo = "ComfyUI encodes its prompts in no other way", "generate the images with Diffusers"
        raise ConfigError(problem(f"prompts with {family.arguments()}", f"{KLEIN_TEXT}", why, todo))
    rule = family.rule.name
    if contract.guidance_scale != 1 and rule != LINEAR.name:
        got, why = f"guidance {contract.guidance_scale:g} by the rule {rule}", "CFGGuider has no other rule"
        raise ConfigError(problem(got, f"the {LINEAR.name} rule, or no guidance", why, "generate with Diffusers"))


def _node(kind: str, title: str, **inputs: Any) -> Node:  # noqa: ANN401
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def _levels(title: str, *levels: float) -> Node:
    text = ", ".join(f"{level:.9f}" for level in levels)  # ManualSigmas reads no exponents
    return _node("ManualSigmas", title, sigmas=text)


def _file_name(place: str) -> str:
    """A name for a model's file in ComfyUI's folders: the last part of its path or hub id."""
    return PurePath(place).name.removesuffix(".safetensors") + ".safetensors"


def _loaders(contract: Contract, layout: str) -> dict[str, Node]:
    """The nodes that load the base: one checkpoint, or separate files."""
    name = _file_name(contract.base_model)
    title = f"base: {contract.base_model}"
    if layout in APART:
        kind, encoders, clip, vae = APART[layout]
        return {
            "model": _node("UNETLoader", title, unet_name=name, weight_dtype="default"),
            "clip": _node(kind, encoders, **clip),
            "vae": _node("VAELoader", "autoencoder", vae_name=vae),
        }
    return {"model": _node("CheckpointLoaderSimple", title, ckpt_name=name)}


def _text(contract: Contract, clip: list, prompt: str) -> Node:
    if contract.family["type"].endswith("PixArtAlpha"):  # its text encoding includes the size
        height, width = contract.resolution
        return _node("CLIPTextEncodePixArtAlpha", "prompt", width=width, height=height, text=prompt, clip=clip)
    return _node("CLIPTextEncode", "prompt" if prompt else "negative prompt", text=prompt, clip=clip)
