"""LoRA files, wherever one is given: each layer has its own rank and alpha, and nothing of a file is left out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.cli.main import main
from stepdistill.core.errors import StudentError
from stepdistill.families.base import Family
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.lora import read
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.names import NETWORKS, with_text_model
from stepdistill.networks.lora.read import lora_path, read_lora
from stepdistill.networks.lora.tensors import FAMILIES, Format, Lora, lora_tensors, peft_state
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.roles import Ema
from stepdistill.networks.roles import Lora as LoraRole
from stepdistill.students.contract import WEIGHTS
from stepdistill.students.draw.loras import load_style, weigh_loras
from stepdistill.students.load import load_student, start_from
from stepdistill.students.lora.files import convert_lora, write_lora
from stepdistill.students.single import load_network
from stepdistill.students.write import write_student

NAMES = ("sd", "sdxl", "sd3", "flux", "sana", "z_image", "qwen_image", "krea2")
TEXT = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2"), "sd3": ("text_encoder", "text_encoder_2")}
FORMATS: tuple[Format, ...] = ("diffusers", "kohya", "comfyui")
CELLS = [(name, to) for name in NAMES for to in FORMATS if name in FAMILIES[to]]


class Bases(dict):
    """A saved base of each family, made when it is asked for."""

    def __init__(self, factory) -> None:
        self.factory = factory

    def __missing__(self, name: str) -> Family:
        place = self.factory.mktemp(f"base-{name}")
        tiny.pipeline(name).save_pretrained(place)
        self[name] = replace(tiny.FAMILIES[name], pretrained_teacher_model=str(place))
        return self[name]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory)


def weights(pipe: DiffusionPipeline, name: str) -> dict[str, Tensor]:
    """The weights of the layers that a LoRA may be on, by their names in files."""
    found = {}
    for part in (NETWORKS[name], *TEXT.get(name, ("text_encoder",) if name == "flux" else ())):
        for inner, layer in pipe.components[part].named_modules():
            inner = inner.removesuffix(".base_layer")
            plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
            clip = part == NETWORKS[name] or re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+$", inner)
            if plain and clip and ".lora_" not in inner:
                found[with_text_model(f"{part}.{inner}")] = layer.weight.detach().clone()
    return found


def mixed(pipe: DiffusionPipeline, name: str, rank: int | None = None, text: bool = True) -> Lora:
    """A LoRA whose layers differ in rank and alpha, and alpha is never the rank."""
    generator, lora = torch.Generator().manual_seed(1), {}
    for i, (layer, weight) in enumerate(weights(pipe, name).items()):
        if (text or not layer.startswith("text")) and i % 5 != 4:
            r = rank or 1 + i % 3
            down = torch.randn(r, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), r, *[1] * (weight.ndim - 2), generator=generator)
            lora[layer] = LayerLora(down, up, r * 2.0 ** (1 + i % 2) * 0.25)
    return lora


def write(lora: Lora, file: Path, to: Format, name: str) -> Path:
    state, metadata = lora_tensors(lora, to, name, 1 if name == "sdxl" else 2)
    save_file(state, file, metadata)
    return file


def added(before: dict[str, Tensor], lora: Lora, strength: float = 1.0) -> dict[str, Tensor]:
    """The weights with a LoRA in them, by the definition."""
    return before | {
        name: before[name]
        + strength * part.alpha / len(part.down) * (part.up.flatten(1) @ part.down.flatten(1)).view_as(before[name])
        for name, part in lora.items()
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "to"), CELLS)
def test_every_layer_has_its_own_rank_and_alpha_in_a_teacher_and_in_a_pipeline(bases, tmp_path, name, to):
    family = bases[name]
    pipe = family.load()
    before, lora = weights(pipe, name), mixed(pipe, name)
    file = write(lora, tmp_path / "x.safetensors", to, name)
    if (name, to) == ("qwen_image", "kohya"):  # Diffusers takes the alpha of each layer
        same(weights(replace(family, teacher_loras=(str(file),)).load(), name), added(before, lora))
    elif to != "diffusers":  # the card could not load it
        with pytest.raises(StudentError, match=f"in the {to} format|in the kohya format"):
            replace(family, teacher_loras=(str(file),)).load()
    own = write(lora, tmp_path / "own.safetensors", "diffusers", name)
    teacher = replace(family, teacher_loras=(str(own),)).load()
    same(weights(teacher, name), added(before, lora))
    assert not any(".lora_" in key for key, _ in teacher.components[NETWORKS[name]].named_parameters())
    style = load_style(family, pipe, str(file), "style")
    weigh_loras(family, pipe, {style: 0.5})
    fuse_loras(pipe)
    same(weights(pipe, name), added(before, lora, 0.5))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_kohya_file_of_one_alpha_makes_the_teacher_that_plain_diffusers_makes_of_it(bases, tmp_path, name):
    family = bases[name]
    pipe: Any = family.load()
    lora = {layer: replace(part, alpha=2.0) for layer, part in mixed(pipe, name).items()}
    file = write(lora, tmp_path / "x.safetensors", "kohya", name)
    teacher = replace(family, teacher_loras=(str(file),)).load()
    pipe.load_lora_weights(str(file))
    fuse_loras(pipe)
    same(weights(teacher, name), weights(pipe, name))


def test_a_kohya_file_of_qwen_image_makes_the_teacher_that_plain_diffusers_makes_of_it(bases, tmp_path):
    family = bases["qwen_image"]
    pipe: Any = family.load()
    file = write(mixed(pipe, "qwen_image"), tmp_path / "x.safetensors", "kohya", "qwen_image")
    teacher = replace(family, teacher_loras=(str(file),)).load()
    pipe.load_lora_weights(str(file))
    fuse_loras(pipe)
    same(weights(teacher, "qwen_image"), weights(pipe, "qwen_image"))


@pytest.mark.parametrize("alphas", [True, False])
def test_comfyui_s_name_of_the_denoiser_is_read_too(bases, tmp_path, alphas):
    """Most published LoRAs of Qwen-Image have it before Diffusers' names of the layers."""
    family, file = bases["qwen_image"], tmp_path / "x.safetensors"
    pipe = family.load()
    before, lora = weights(pipe, "qwen_image"), mixed(pipe, "qwen_image", 2)
    lora = lora if alphas else {name: replace(part, alpha=2.0) for name, part in lora.items()}
    state, _ = lora_tensors(lora, "comfyui", "qwen_image")
    state = {key.replace("transformer.", "diffusion_model.", 1): value for key, value in state.items()}
    save_file(state if alphas else {key: v for key, v in state.items() if not key.endswith(".alpha")}, file)
    found = read_lora(file)
    assert found.layout.family == "qwen_image" and found.lora.keys() == lora.keys()
    convert_lora(file, tmp_path / "own.safetensors", "diffusers")
    style = load_style(family, pipe, str(file), "style")
    weigh_loras(family, pipe, {style: 0.5})
    fuse_loras(pipe)
    same(weights(pipe, "qwen_image"), added(before, lora, 0.5))
    places = [tmp_path / "own.safetensors"] + ([] if alphas else [file])
    for place in places:
        same(weights(replace(family, teacher_loras=(str(place),)).load(), "qwen_image"), added(before, lora))


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_its_own_alpha_where_training_starts_and_after_conversion(bases, tmp_path, name):
    family = bases[name]
    pipe = family.load()
    before, bone = weights(pipe, name), tiny.backbone(name, pipe, 2, 8)
    bone.add("student", LoraRole())
    bone.add("ema", Ema("student", 0.9))
    lora = {}
    for alpha, inner in enumerate(sorted({key.partition(".lora_")[0] for key in bone.state("student")}), 1):
        outputs, *inputs = before[f"{NETWORKS[name]}.{inner}"].shape
        down, up = torch.ones(2, *inputs), torch.ones(outputs, 2, *[1] * (len(inputs) - 1))
        lora[f"{NETWORKS[name]}.{inner}"] = LayerLora(down, up, alpha)
    formats: list[Format] = [to for to in FORMATS if name in FAMILIES[to]]
    for to in formats:
        bone.load_state("student", {key: torch.zeros_like(value) for key, value in bone.state("student").items()})
        file = write(lora, tmp_path / f"{to}.safetensors", to, name)
        start_from(bone, str(file), family)
        for role in ("student", "ema"):
            state = bone.state(role)
            for layer, part in lora.items():
                a, b = (state[f"{layer.partition('.')[2]}.lora_{x}.weight"].flatten(1) for x in "AB")
                torch.testing.assert_close(8 / 2 * (b @ a), part.product())
        for other in formats:
            write_lora(read_lora(file, family.lora_layout()), tmp_path / "out.safetensors", other)
            for layer, part in read_lora(tmp_path / "out.safetensors", family.lora_layout()).lora.items():
                torch.testing.assert_close(part.product(), lora[layer].product())


# CLIP's layers, which transformers 5 names otherwise than files do


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_plain_diffusers_reads_clip_layers_of_what_convert_writes(bases, tmp_path, name):
    pipe = bases[name].load()
    before, lora = weights(pipe, name), mixed(pipe, name)
    file = write(lora, tmp_path / "kohya.safetensors", "kohya", name)
    (tmp_path / "out").mkdir()
    write_lora(read_lora(file, bases[name].lora_layout()), tmp_path / "out" / WEIGHTS, "diffusers")
    pipe.load_lora_weights(tmp_path / "out")
    fuse_loras(pipe)
    same(weights(pipe, name), added(before, lora))


def test_clip_layers_of_a_file_of_today_s_diffusers_are_read(bases, tmp_path):
    family = bases["sd"]
    pipe, saved = family.load(), {}
    for part, alpha, targets in (("unet", 2, ["to_q", "to_v"]), ("text_encoder", 6, ["q_proj", "fc1"])):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        config.alpha_pattern = {"unet": {"to_v": 3}, "text_encoder": {"layers.1.mlp.fc1": 5}}[part]
        net = inject_adapter_in_model(config, pipe.components[part])
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(net)
        saved[f"{part}_lora_adapter_metadata"] = config.to_dict()
    before = weights(family.load(), "sd")
    pipe.save_lora_weights(tmp_path, **saved)
    file = tmp_path / WEIGHTS
    assert any(key.startswith("text_encoder.encoder.layers.0") for key in load_file(file))  # without `text_model`
    fuse_loras(pipe)
    expected = weights(pipe, "sd")
    for to in FORMATS:
        convert_lora(file, tmp_path / "out.safetensors", to, "sd")
        same(added(before, read_lora(tmp_path / "out.safetensors", family.lora_layout()).lora), expected)
    same(weights(replace(family, teacher_loras=(str(file),)).load(), "sd"), expected)


# files that are not what they should be


def change(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def changed(file: Path) -> None:
        state = load_file(file)
        edit(state)
        save_file(state, file)

    return changed


def rename(old: str, new: str) -> Callable[[Path], object]:
    return change(lambda state: [state.update({key.replace(old, new, 1): state.pop(key)}) for key in list(state)])


def described(text: str) -> Callable[[Path], object]:
    return lambda file: save_file(load_file(file), file, {"lora_adapter_metadata": text})


def first(state: dict[str, Tensor], end: str = "to_q.lora_A.weight") -> str:
    return next(key for key in sorted(state) if key.endswith(end))


def lokr(state: dict[str, Tensor]) -> None:
    state.clear()
    state.update({"unet.conv_in.lokr_w1": torch.ones(2, 2), "unet.conv_in.lokr_w2": torch.ones(16, 18)})


def loha(state: dict[str, Tensor]) -> None:
    state.clear()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state.update({f"{name}.hada_w{i}_{x}": torch.ones(32, 2) for i in (1, 2) for x in "ab"})
    state[f"{name}.alpha"] = torch.tensor(2.0)


FLUX = "transformer.single_transformer_blocks.0.attn.to_q"
FAULTS = {
    "raw PEFT keys": (rename("unet.", "base_model.model."), "{all} of {all} keys unmatched, 0 matched"),
    "no component": (rename("unet.", ""), "{all} of {all} keys unmatched, 0 matched"),
    "another family": (rename("unet.", "transformer."), "{all} of {all} keys unmatched, 0 matched"),
    "another layer": (
        change(lambda s: s.update({f"unet.no.such.layer.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})),
        "2 of {more} keys unmatched, {all} matched|{all} names match, 2 do not",
    ),
    "another component": (
        change(lambda s: s.update({f"{FLUX}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"})),
        "2 of {more} keys unmatched, {all} matched",
    ),
    "half a layer": (change(lambda s: s.pop(first(s))), "1 of {less} keys unmatched"),
    "a DoRA": (
        change(lambda s: s.update({first(s).replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)})),
        "1 of {one} keys unmatched",
    ),
    "LoKr": (change(lokr), "keys unmatched, 0 matched|such as unet.conv_in.lokr_w1"),
    "LoHa": (change(loha), "keys unmatched, 0 matched|such as lora_unet_down"),
    "no rank": (
        change(lambda s: s.update({first(s): torch.ones(0, 32), first(s, "to_q.lora_B.weight"): torch.ones(32, 0)})),
        "mismatched .* rank 0 and alpha 0",
    ),
    "whole numbers": (
        change(lambda s: s.update({k: v.to(torch.int8) for k, v in s.items()})),
        "mismatched .*int8",
    ),
    "NaN": (change(lambda s: s[first(s)].fill_(torch.nan)), "mismatched .* NaN or infinite"),
    "no number": (described('{"unet.lora_alpha": NaN}'), "mismatched .* alpha nan"),
    "other ranks": (change(lambda s: s.update({first(s): torch.ones(7, 32)})), "mismatched .* no rank in common"),
    "other inputs": (
        change(lambda s: s.update({first(s): torch.ones(len(s[first(s)]), 7)})),
        "2 of {all} keys unmatched|size mismatch",
    ),
    "two alphas": (
        change(lambda s: s.update({first(s).replace("lora_A.weight", "alpha"): torch.ones(2)})),
        "mismatched shapes or metadata|in the comfyui format",
    ),
    "metadata that are no JSON": (described("{"), "mismatched shapes or metadata"),
    "metadata that are a list": (described("[]"), "mismatched shapes or metadata"),
    "an alpha that is a list": (described('{"unet.lora_alpha": []}'), "mismatched shapes or metadata"),
    "a pattern that is none": (
        described('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}'),
        "mismatched shapes or metadata",
    ),
    "a missing file": (Path.unlink, "unreadable"),
    "a cut file": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "unreadable"),
    "a text": (lambda file: file.write_text("<html>not found</html>"), "unreadable"),
}


@pytest.fixture(scope="module")
def fine(bases, tmp_path_factory):
    """A LoRA file that fits everywhere, and where it was loaded: a pipeline, and a role of that rank."""
    family, file = bases["sd"], tmp_path_factory.mktemp("fine") / "x.safetensors"
    pipe, bone = family.load(), tiny.backbone("sd", family.load(), 2, 2)
    bone.add("student", LoraRole())
    save_file({f"unet.{key}": value for key, value in bone.state("student").items()}, file)
    load_style(family, pipe, str(file), "fine")
    start_from(bone, str(file), family)
    return family, file, pipe, bone


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_whole_and_of_the_family_is_refused_everywhere(fine, tmp_path, fault):
    (family, whole, pipe, bone), (spoil, said) = fine, FAULTS[fault]
    file, size = Path(shutil.copy(whole, tmp_path)), len(load_file(whole))
    spoil(file)
    said = said.format(all=size, more=size + 2, less=size - 1, one=size + 1)
    with pytest.raises(StudentError, match=said):
        replace(family, teacher_loras=(str(file),)).load()
    with pytest.raises(StudentError, match=said):
        load_style(family, pipe, str(file), "style")
    assert pipe.get_list_adapters()["unet"] == ["fine"]
    with pytest.raises(StudentError, match=said):
        start_from(bone, str(file), family)
    if fault != "other inputs":  # a file says nothing of its base's widths
        with pytest.raises(StudentError, match="unmatched|unreadable|mismatched|such as"):
            convert_lora(file, tmp_path / "out.safetensors", "kohya", "sd")
        assert not (tmp_path / "out.safetensors").exists()


# PEFT's settings by what they do to a file of two matrices a layer
PLAIN = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "init_lora_weights"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "ensure_weight_tying"),
}
OTHER = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["to_q"]},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["weight"],
    "trainable_token_indices": [0],
    "modules_to_save": ["conv_in"],
}


def test_every_setting_of_peft_is_known():
    assert not PLAIN & OTHER.keys()
    assert {setting.name for setting in fields(LoraConfig)} - {"runtime_config"} <= PLAIN | OTHER.keys()


SETTINGS = [*OTHER.items(), *(("init_lora_weights", how) for how in ("pissa_niter_4", "olora", "corda", "loftq"))]


@pytest.mark.parametrize(("setting", "value"), [*SETTINGS, ("init_lora_weights", "lora_ga"), ("lora_alpha", None)])
def test_a_variant_of_lora_that_a_file_s_metadata_tell_of_is_refused(bases, fine, tmp_path, setting, value):
    family, whole, *_ = fine
    facts = {"unet.r": 2, "unet.lora_alpha": 2, f"unet.{setting}": value}
    facts = {key: fact for key, fact in facts.items() if fact is not None}
    file = Path(shutil.copy(whole, tmp_path))
    described(json.dumps(facts))(file)
    said = f"unet.{setting}"
    with pytest.raises(StudentError, match=said):
        family.read_lora(file)
    with pytest.raises(StudentError, match=said):
        convert_lora(file, tmp_path / "out.safetensors", "comfyui", "sd")
    state = load_file(file)
    state |= {key.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for key in state if "lora_A" in key}
    save_file(state, file, {"lora_adapter_metadata": json.dumps(facts)})
    if setting != "lora_alpha":
        with pytest.raises(StudentError, match=said):
            read_lora(file, family.lora_layout())


def test_a_rank_stabilised_lora_has_its_own_scale(bases, tmp_path):
    """alpha / sqrt(rank), of every layer's own rank and alpha."""
    family = bases["sd"]
    pipe = family.load()
    before = weights(pipe, "sd")
    patterns = {"rank_pattern": {"conv_in": 9}, "alpha_pattern": {"conv_out": 1.5}}
    targets = ["conv_in", "conv_out", "to_q"]
    rs = LoraConfig(r=4, lora_alpha=3, target_modules=targets, use_rslora=True, **patterns)
    pipe.unet.add_adapter(rs, "rs")
    generator = torch.Generator().manual_seed(2)
    for key, weight in pipe.unet.named_parameters():
        if ".lora_" in key:
            weight.data = torch.randn(weight.shape, generator=generator)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="rs")
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=pipe.unet.peft_config["rs"].to_dict()
    )
    lora = family.read_lora(tmp_path)
    scales = {
        name: lora[f"unet.{name}"].scale
        for name in ("conv_in", "conv_out", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    }
    assert [round(scale, 6) for scale in scales.values()] == [1.0, 0.75, 1.5]
    fuse_loras(pipe)
    expected = weights(pipe, "sd")
    same(added(before, lora), expected)
    same(weights(replace(family, teacher_loras=(str(tmp_path),)).load(), "sd"), expected)


def test_a_pickle_is_not_opened(bases, tmp_path):
    torch.save({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(StudentError, match="pickle|with 0 .safetensors files"):
            replace(bases["sd"], teacher_loras=(str(source),)).load()


@pytest.mark.parametrize(
    ("family", "name"), [("flux", "text_encoder_2"), ("sd3", "text_encoder_3"), ("sana", "text_encoder")]
)
def test_layers_of_encoders_that_diffusers_loads_nothing_into_are_refused(bases, tmp_path, family, name):
    """Diffusers takes the rest, and says nothing of these."""
    layer = f"{name}.encoder.block.0.layer.0.SelfAttention.q"
    net = next(iter(weights(bases[family].load(), family)))
    state = {f"{key}.lora_{x}.weight": torch.ones(2, 2) for key in (layer, net) for x in "AB"}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(StudentError, match="keys unmatched"):
        replace(bases[family], teacher_loras=(str(tmp_path / "x.safetensors"),)).load()


def test_a_folder_is_a_lora_where_it_is_clear_which(tmp_path):
    for names, expected in (([], None), (["a"], "a"), (["a", "b"], None), (["a", "b", WEIGHTS[:-12]], WEIGHTS[:-12])):
        place = tmp_path / str(len(names))
        place.mkdir()
        for name in names:
            (place / f"{name}.safetensors").touch()
        if expected:
            assert lora_path(place) == place / f"{expected}.safetensors"
        else:
            with pytest.raises(StudentError, match=f"with {len(names)} .safetensors files"):
                lora_path(place)
    with pytest.raises(StudentError, match="no such file or folder"):
        lora_path(tmp_path / "nowhere")


def test_a_hub_id_is_the_file_of_diffusers_or_else_the_only_one(tmp_path, monkeypatch):
    two = ["x.safetensors", "y.safetensors"]
    there = {"a/student": [WEIGHTS, *two], "a/style": ["ink.safetensors", "README.md"], "a/two": two}

    def download(name: str, file: str) -> str:
        if name not in there:
            raise OSError("offline")
        if file not in there[name]:
            raise EntryNotFoundError(file)
        return f"{name}/{file}"

    monkeypatch.setattr(read, "hf_hub_download", download)
    monkeypatch.setattr(read.HfApi, "list_repo_files", lambda self, name: there[name])
    monkeypatch.chdir(tmp_path)
    assert lora_path("a/student") == Path("a/student") / WEIGHTS
    assert lora_path("a/style") == Path("a/style/ink.safetensors")
    for name, said in (("a/two", "a/two with 2 .safetensors files"), ("a/none", "LoRA a/none, .* offline")):
        with pytest.raises(StudentError, match=said):
            lora_path(name)


@pytest.mark.parametrize("name", ["sd", "sana", "pixart_sigma"])
def test_a_student_s_file_that_lacks_a_layer_is_not_loaded(bases, tmp_path, name):
    """Its contract knows its layers."""
    family = bases[name]
    pipe = family.load()
    bone = tiny.backbone(name, pipe, 2, 4)
    bone.add("student", LoraRole())
    tiny.awake(bone, "student")
    options = {"role": "student", "method": Consistency(ema_decay=None), "resolution": (32, 32)}
    write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options)
    state = load_file(tmp_path / WEIGHTS)
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    gone = first(state, "lora_A.weight").removesuffix("A.weight")
    save_file({key: value for key, value in state.items() if not key.startswith(gone)}, tmp_path / WEIGHTS, metadata)
    plain = family.load()
    with pytest.raises(StudentError, match=f"{len(state) - 2} match the network's layers and 0 do not, 2 are missing"):
        load_student(plain, tmp_path)
    assert not any(".lora_" in key for key, _ in family.network(plain).named_parameters())
    with pytest.raises(StudentError):
        start_from(bone, str(tmp_path), family)


def test_a_student_s_file_that_lost_its_alpha_is_not_loaded(bases, tmp_path):
    family = bases["sd"]
    pipe = family.load()
    bone = tiny.backbone("sd", pipe, 2, 4)
    bone.add("student", LoraRole())
    tiny.awake(bone, "student")
    options = {"role": "student", "method": Consistency(ema_decay=None), "resolution": (32, 32)}
    write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    plain = family.load()
    with pytest.raises(StudentError, match="got alpha / rank 1 for .* layers in .*, expected 2"):
        load_student(plain, tmp_path)
    assert not any(".lora_" in key for key, _ in family.network(plain).named_parameters())


@pytest.mark.parametrize(
    ("lacks", "said"), [(True, "0 do not, and 1 are missing"), (False, "1 do not, and 0 are missing")]
)
def test_a_network_in_a_student_folder_is_whole(bases, tmp_path, lacks, said):
    """Diffusers draws at random what a file lacks, and leaves out what the network has no place for."""
    family = bases["sd"]
    net: Any = family.load().unet
    net.save_pretrained(tmp_path / "unet")
    assert load_network(tmp_path, family, net)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    state = load_file(file)
    size = len(state)
    state = (
        {key: value for key, value in state.items() if key != "conv_out.weight"}
        if lacks
        else state | {"x": torch.ones(1)}
    )
    save_file(state, file, {"format": "pt"})
    with pytest.raises(StudentError, match=f"{size - lacks} tensors match the network, {said}"):
        load_network(tmp_path, family, net)


# formats that only Diffusers converts


def test_the_old_names_of_diffusers_are_read(bases, tmp_path):
    family = bases["sd"]
    pipe = family.load()
    lora = {n: p for n, p in mixed(pipe, "sd").items() if "attn" in n and "ff" not in n}
    lora = {name: LayerLora(part.down, part.up, len(part.down)) for name, part in lora.items()}
    old = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    text = {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"}
    state = {}
    for key, value in peft_state(lora).items():
        end = key[-len("lora_A.weight") :]
        state[key.replace(end, (text if key.startswith("text") else old)[end])] = value
    save_file(state, tmp_path / "x.safetensors")
    teacher = replace(family, teacher_loras=(str(tmp_path / "x.safetensors"),)).load()
    same(weights(teacher, "sd"), added(weights(pipe, "sd"), lora))


def test_a_run_says_so_in_one_line_before_it_makes_anything(tmp_path, capsys):
    save_file({"base_model.model.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3)}, tmp_path / "x.safetensors")
    for option in ("family.teacher_loras=[{}]", "lora.init_from={}"):
        option = option.format(tmp_path / "x.safetensors")
        with pytest.raises(SystemExit) as error:
            main(["train", "configs/quickstart.yaml", option, f"train.output_dir={tmp_path / 'run'}"])
        assert error.value.code == 2 and "1 of 1 keys unmatched, 0 matched" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
