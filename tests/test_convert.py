"""Conversion of student folders and files: every format draws the same, and bad input is refused before a write."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import loras
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.cli.main import main
from stepdistill.core.errors import ConfigError, OutputError, StudentError
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.regression import Regression
from stepdistill.networks.lora.read import Layout, read_lora
from stepdistill.networks.pipeline_loras import adapters_on
from stepdistill.networks.roles import Lora, LoraSpec, RoleLora
from stepdistill.students import verify
from stepdistill.students.contract import CONTRACT, WEIGHTS, read_contract, teacher
from stepdistill.students.load import load_student
from stepdistill.students.lora.comfyui import WORKFLOW, write_workflow
from stepdistill.students.lora.files import convert_lora, write_lora
from stepdistill.students.lora.fuse import fuse_student
from stepdistill.students.proof import prove_workflow
from stepdistill.students.verify import export_formats, format_files, verify_formats
from stepdistill.students.write import write_student
from stepdistill.training.checks import check_export_formats, check_run
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

RANK, ALPHA = 4, 16
UNETS = ("sd", "sdxl")
FORMATS = {
    **{name: ("kohya", "comfyui") for name in ("sd", "sdxl", "sd3", "flux", "klein", "z_image", "qwen_image", "krea2")},
    **{name: ("comfyui",) for name in ("pixart_alpha", "pixart_sigma")},
    "sana": (),
}
METHOD = Consistency(ema_decay=None)


class Folders(dict):
    """A proven student of each base, with alpha other than rank, in every format; made when it is asked for."""

    def __init__(self, factory) -> None:
        self.factory = factory

    def __missing__(self, name: str) -> Path:
        base, folder = self.factory.mktemp(f"base-{name}"), self.factory.mktemp(f"student-{name}")
        tiny.pipeline(name).save_pretrained(base)
        family = replace(tiny.FAMILIES[name], pretrained_teacher_model=str(base))
        pipe = family.load()
        bone = tiny.backbone(name, pipe, RANK, ALPHA)
        bone.add("student", Lora())
        tiny.awake(bone, "student")
        options = {"role": "student", "method": METHOD, "resolution": (32, 32)}
        assert write_student(folder, family=family, pipe=pipe, backbone=bone, **options) < 1e-5
        export_formats(folder, FORMATS[name])
        self[name] = folder
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory)


def family_of(folder: Path):
    return teacher(read_contract(folder))


def drawn(family, pipe, call) -> torch.Tensor:
    torch.manual_seed(0)
    noise = torch.randn(1, *family.latent_shape(pipe, 32, 32))
    return pipe(prompt="a rose", latents=family.pack(noise), output_type="latent", **call).images


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / f"copy-{name}")


def edited(file: Path, change, keep_metadata: bool = True) -> Path:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if keep_metadata else None
    state = load_file(file)
    change(state)
    save_file(state, file, metadata)
    return file


# every format draws the same


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_draws_what_was_trained(folders, name, capsys):
    main(["verify", str(folders[name])])
    first, *others = (line.rpartition(": ") for line in capsys.readouterr().out.splitlines())
    assert first[0] == "largest difference of plain Diffusers from the library's sampler"
    drawn = "comfyui" in FORMATS[name] and name != "klein"  # the small one's prompts are not as ComfyUI encodes them
    files = [f"{to} file" for to in FORMATS[name]] + ["ComfyUI workflow"] * drawn
    assert [line[0] for line in others] == [f"largest difference with the {what}" for what in files]
    assert max(float(line[2]) for line in (first, *others)) < 1e-5
    assert (folders[name] / WORKFLOW).exists() == drawn


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_says_which_file_is_for_comfyui(folders, name):
    card = (folders[name] / "README.md").read_text()
    assert ("Do not load it in ComfyUI" in card) == ("comfyui" in FORMATS[name])


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_own_reader_of_kohya_files_draws_the_same(folders, name):
    """It finds the layers and the alphas by itself."""
    family = family_of(folders[name])
    nets = []
    for file in (WEIGHTS, format_files(folders[name])["kohya"].name):
        pipe = family.load()
        pipe.load_lora_weights(folders[name], weight_name=file)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        nets.append(pipe.unet.state_dict())
    base = family.load().unet.state_dict()
    assert all(torch.allclose(nets[0][key], nets[1][key], rtol=0, atol=1e-6) for key in base)
    moved = sum(not torch.equal(base[key], nets[1][key]) for key in base)
    assert moved == len(load_file(folders[name] / WEIGHTS)) / 2


def comfy_unet(net: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    """A reader as ComfyUI's for UNets that bear Diffusers' names: each key is loaded or left over."""
    left = set(state)
    for name, layer in net.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if isinstance(layer, nn.Linear | nn.Conv2d) and f"{key}.lora_up.weight" in state:
            up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
            alpha = state[f"{key}.alpha"].item() / down.shape[0]
            layer.weight.data += alpha * torch.mm(up.flatten(1), down.flatten(1)).reshape(layer.weight.shape)
            left -= {f"{key}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    return left


def comfy_transformer(net: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    """The same for transformers, by the names that it has of Diffusers' layers."""
    left = set(state)
    for name, layer in net.named_modules():
        key = f"transformer.{name}"
        if f"{key}.lora_B.weight" in state:
            up, down = state[f"{key}.lora_B.weight"], state[f"{key}.lora_A.weight"]
            alpha = state[f"{key}.alpha"].item() / down.shape[0]
            layer.weight.data += alpha * torch.mm(up.flatten(1), down.flatten(1)).reshape(layer.weight.shape)
            left -= {f"{key}.{end}" for end in ("lora_B.weight", "lora_A.weight", "alpha")}
    return left


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "pixart_sigma", "z_image", "qwen_image"])
def test_a_reader_as_comfyui_s_draws_the_same(folders, name):
    family = family_of(folders[name])
    plain, merged, bare = family.load(), family.load(), family.load()
    call = load_student(plain, folders[name])
    read = comfy_unet if name in UNETS else comfy_transformer
    assert read(family.network(merged), load_file(format_files(folders[name])["comfyui"])) == set()
    for pipe in (merged, bare):
        pipe.scheduler = type(plain.scheduler).from_config(plain.scheduler.config)
    taught = drawn(family, plain, call)
    torch.testing.assert_close(drawn(family, merged, call), taught, rtol=1e-4, atol=1e-4)
    assert (drawn(family, bare, call) - taught).abs().max() > 0.05


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, formats in FORMATS.items() for to in formats])
def test_a_folder_there_and_back_is_the_identity(folders, tmp_path, name, to):
    report = convert_lora(folders[name], tmp_path / "there.safetensors", to)
    if name != "sdxl":  # the small one has fewer layers in a block than a file of SDXL
        layout = "pixart" if name.startswith("pixart") else name
        convert_lora(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "diffusers", layout)
        there, back = load_file(folders[name] / WEIGHTS), load_file(tmp_path / "back.safetensors")
        assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)
        with safe_open(tmp_path / "back.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["lora_adapter_metadata"])
        part = loras.component(name)
        assert (facts[f"{part}.r"], facts[f"{part}.lora_alpha"]) == (RANK, ALPHA)
    count = len(load_file(folders[name] / WEIGHTS))
    assert report.source.tensors == count and len(report.source.lora) == count / 2
    assert f"{count} tensors read, {report.tensors} written, {count // 2} layers matched, 0 unmatched" in str(report)
    assert "alpha / rank: 4" in str(report)


def test_trap_t1_a_converted_file_brings_its_alpha_into_a_plain_pipeline(folders, tmp_path):
    file = tmp_path / "back.safetensors"
    convert_lora(format_files(folders["sd"])["kohya"], file, "diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(read_contract(folders["sd"]).base_model)
    pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="x")
    scales = {layer.scaling["x"] for layer in pipe.unet.modules() if "x" in vars(layer).get("scaling", {})}
    assert scales == {ALPHA / RANK}


def test_a_lost_alpha_shows_in_verify(copied, capsys):
    folder = copied("sd")
    format_files(folder)["comfyui"].unlink()
    (folder / WORKFLOW).unlink()

    def rank_for_alpha(state):
        state |= {key: torch.tensor(float(RANK)) for key in state if key.endswith("alpha")}

    edited(format_files(folder)["kohya"], rank_for_alpha)
    with pytest.raises(SystemExit) as error:
        main(["verify", str(folder)])
    assert error.value.code == 1
    right, wrong = (float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines())
    assert right < 1e-5 and wrong > 0.05


def test_another_matrix_shows_in_verify(copied):
    folder = copied("sd3")
    format_files(folder)["kohya"].unlink()

    def other_matrix(state):
        state["transformer.proj_out.lora_B.weight"] += 0.5

    edited(format_files(folder)["comfyui"], other_matrix)
    found = verify_formats(folder)
    assert found["diffusers"] < 1e-5 and found["comfyui"] > 1e-3


@pytest.mark.parametrize(
    "method", [Regression(timesteps=(399,), ema_decay=None), Consistency(ema_decay=None, end="edge")]
)
def test_verify_samples_by_the_workflow_file(folders, tmp_path, monkeypatch, method):
    """A student that starts below the highest noise, and one that ends at time 0, which is still noisy."""
    family = family_of(folders["sd"])
    pipe = family.load()
    bone = tiny.backbone("sd", pipe, RANK, ALPHA)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    options = {"role": "student", "method": method, "resolution": (32, 32)}
    write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options)
    contract = read_contract(tmp_path)
    write_workflow(tmp_path, contract, "x")
    monkeypatch.setattr(verify, "_difference", lambda *_: 0.0)  # of the folder itself, which takes as long again
    assert 0 < verify_formats(tmp_path)["workflow"] < 1e-5  # other arithmetic than the library's sampler
    nodes = json.loads((tmp_path / WORKFLOW).read_text())
    scaled = "scale" in nodes
    assert scaled or "start" in nodes
    nodes["decode"]["inputs"]["samples"] = ["sample", 0]
    (tmp_path / WORKFLOW).write_text(json.dumps(nodes))  # the contract's own nodes are there
    assert (verify_formats(tmp_path)["workflow"] > 3e-4) == scaled
    nodes["sample"]["inputs"]["latent_image"] = ["latent", 0]
    assert prove_workflow(contract, family, pipe, bone, nodes) > 3e-4
    nodes["lora"]["inputs"]["strength_model"] = 0.5  # what sampling does not see
    (tmp_path / WORKFLOW).write_text(json.dumps(nodes))
    with pytest.raises(StudentError, match="with other .*lora"):
        verify_formats(tmp_path)


def test_every_student_has_files_of_its_own_names(copied):
    """They lie in one folder with those of other students."""
    folder = copied("sd")
    first = format_files(folder)
    steps = len(read_contract(folder).timesteps)
    base = Path(read_contract(folder).base_model).name
    assert all(re.fullmatch(rf"{base}_{steps}-steps_[0-9a-f]{{8}}_{to}.safetensors", f.name) for to, f in first.items())
    nodes = json.loads((folder / WORKFLOW).read_text())
    assert nodes["lora"]["inputs"]["lora_name"] == first["comfyui"].name

    def other(state):
        state[next(iter(state))] += 0.01

    edited(folder / WEIGHTS, other)
    mine = Path(shutil.copy(first["kohya"], folder / "my_kohya.safetensors"))
    export_formats(folder, ("kohya", "comfyui"))
    assert not {f.name for f in first.values()} & {f.name for f in format_files(folder).values()}
    assert mine.exists() and not any(f.exists() for f in first.values())


@pytest.mark.parametrize(
    ("place", "base"),
    [("black-forest-labs/FLUX.1-dev", "FLUX.1-dev"), ("models/photo.v2.safetensors", "photo.v2")],
)
def test_the_name_of_a_base_is_whole_in_the_names_of_files(copied, place, base):
    folder = copied("sd")
    contract = json.loads((folder / CONTRACT).read_text())
    (folder / CONTRACT).write_text(json.dumps(contract | {"base_model": place}))
    export_formats(folder, ("kohya",))
    assert re.fullmatch(
        rf"{re.escape(base)}_\d-steps_[0-9a-f]{{8}}_kohya.safetensors", format_files(folder)["kohya"].name
    )


def test_sd3_s_other_files_are_not_for_diffusers(folders):
    """As the guide says: of a kohya file it loads nothing, and a ComfyUI file is an error."""
    folder = folders["sd3"]
    pipe = family_of(folder).load()
    pipe.load_lora_weights(folder, weight_name=format_files(folder)["kohya"].name, adapter_name="x")
    assert not adapters_on(pipe.transformer)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(folder, weight_name=format_files(folder)["comfyui"].name, adapter_name="x")


# what sd-scripts load of a file in their format


@pytest.mark.parametrize(
    ("family", "ignored"), [("sd", 4), ("sdxl", 6), ("sd3", 0), ("flux", 2), ("klein", 9), ("qwen_image", 6)]
)
def test_layers_that_sd_scripts_ignore_are_counted_and_named(tmp_path, capsys, caplog, family, ignored):
    save_file(loras.state(family), tmp_path / "x.safetensors", loras.metadata(family))
    if family == "sdxl":  # the small one has fewer layers in a block
        layout = Layout("sdxl", 1)
        report = write_lora(read_lora(tmp_path / "x.safetensors", layout), tmp_path / "y.safetensors", "kohya")
    else:
        report = convert_lora(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "kohya", family)
    count = len(report.source.lora)
    program = "musubi-tuner" if family in ("klein", "qwen_image") else "sd-scripts"
    assert f"{program} can load {count - ignored} of {count} layers" in str(report)
    assert (f"{program} will ignore {ignored} layers" in caplog.text) == (ignored > 0)
    caplog.clear()
    if family != "sdxl":
        report = convert_lora(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "comfyui", family)
        assert program not in str(report) + caplog.text  # ComfyUI loads them all


@pytest.mark.parametrize(
    ("family", "ignored"),
    [
        ("sd", ["conv_in", "time_embedding.linear_1"]),
        ("sdxl", ["conv_in", "time_embedding.linear_1", "add_embedding.linear_1"]),
        ("sd3", []),
        ("flux", ["proj_out"]),
    ],
)
def test_they_are_named_before_training_too(folders, tmp_path, caplog, family, ignored):
    """By the targets of the role that is exported."""
    plain = run("tiny-sd", tmp_path, export_formats=("kohya",))
    plain = replace(plain, family=family_of(folders[family]))
    targets = {"target_modules": ("to_q", "conv_in", "linear_1", "proj_out")}
    for lora in (LoraSpec(), LoraSpec(roles={"student": RoleLora(target_modules=("to_q",))}, **targets)):
        check_export_formats(replace(plain, lora=lora))
        assert "sd-scripts" not in caplog.text
    for lora in (LoraSpec(**targets), LoraSpec(roles={"student": RoleLora(**targets)})):
        caplog.clear()
        check_export_formats(replace(plain, lora=lora))
        expected = f"sd-scripts will ignore {len(ignored)} layers of the kohya file ({', '.join(ignored)})"
        assert (expected in caplog.text) if ignored else not caplog.text


# fused


@pytest.mark.parametrize("name", FORMATS)
def test_a_fused_student_draws_the_same_without_any_lora(folders, tmp_path, name):
    assert fuse_student(folders[name], tmp_path / "fused") < 1e-5
    contract = read_contract(tmp_path / "fused")
    assert (contract.kind, contract.lora) == ("full", None)
    assert contract.network and contract.network.fused and contract.proof and contract.proof.difference < 1e-5
    family = family_of(folders[name])
    lora, whole = family.load(), family.load()
    call = load_student(lora, folders[name])
    assert call == load_student(whole, tmp_path / "fused")
    torch.testing.assert_close(drawn(family, whole, call), drawn(family, lora, call), rtol=1e-4, atol=1e-4)
    with pytest.raises(OutputError, match="add --overwrite"):
        fuse_student(folders[name], tmp_path / "fused")
    with pytest.raises(StudentError, match="holds full weights"):
        convert_lora(tmp_path / "fused", tmp_path / "x.safetensors", "kohya")


def test_the_card_of_a_fused_pixart_needs_nothing_but_diffusers(folders, tmp_path, monkeypatch):
    """Which has no LoRA loader for it."""
    monkeypatch.chdir(tmp_path)
    fuse_student(folders["pixart_sigma"], tmp_path / "fused")
    card = (tmp_path / "fused" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "import stepdistill" not in code and "load_lora" not in code and "A smaller network" not in card
    names: dict = {}
    exec(code, names)
    pipe = family_of(folders["pixart_sigma"]).load()
    call = load_student(pipe, folders["pixart_sigma"])
    expected = np.asarray(pipe("red apple", generator=torch.manual_seed(0), **call).images[0]).astype(int)
    assert np.abs(np.asarray(names["image"]).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["sd", "sana"])
def test_a_fused_network_is_the_base_with_the_lora(folders, tmp_path, name):
    """In the names and shapes of the base: Diffusers loads Stable Diffusion's LoRA, and this package Sana's."""
    fuse_student(folders[name], tmp_path / "fused")
    family = family_of(folders[name])
    expected = dict(family.network(family.load()).state_dict())
    for layer, part in read_lora(folders[name] / WEIGHTS, family.lora_layout()).lora.items():
        key = f"{layer.removeprefix(f'{family.network_name}.')}.weight"
        expected[key] = expected[key] + part.product().reshape(expected[key].shape)
    files = sorted((tmp_path / "fused" / family.network_name).glob("*.safetensors"))
    fused = load_file(*files)
    assert fused.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(fused[key], weight, rtol=1e-5, atol=1e-5)


# bad input


def refused(source: Path, tmp_path: Path, said: str, to: str = "comfyui", family: str | None = None) -> str:
    """The conversion fails, says so, and leaves nothing behind."""
    out = tmp_path / "out"
    with pytest.raises((StudentError, ConfigError), match=said) as error:
        convert_lora(source, out / "x.safetensors", to, family)
    assert not out.exists()
    return str(error.value)


def test_a_pickle_is_refused(tmp_path):
    for suffix in ("bin", "pt", "ckpt"):
        file = tmp_path / f"lora.{suffix}"
        file.write_bytes(pickle.dumps({}))
        refused(file, tmp_path, "the pickle .* runs any code in it")
    disguised = tmp_path / "lora.safetensors"
    disguised.write_bytes(pickle.dumps({"a": 1}))
    refused(disguised, tmp_path, "unreadable")
    with pytest.raises(ConfigError, match="the target .*x.bin"):
        convert_lora(disguised, tmp_path / "x.bin", "kohya")


def test_a_file_that_is_cut_short_or_corrupted_is_refused(folders, tmp_path):
    whole = format_files(folders["sd"])["kohya"].read_bytes()
    file = tmp_path / "cut.safetensors"
    for content in (whole[: len(whole) // 2], whole[:4], b"", whole[:8] + b"x" * 100 + whole[108:]):
        file.write_bytes(content)
        refused(file, tmp_path, "unreadable .*cut.safetensors, expected a complete .safetensors file")
    refused(tmp_path / "nowhere.safetensors", tmp_path, "unreadable .*nowhere")


def test_a_lora_of_another_family_is_refused(tmp_path):
    save_file(loras.state("flux"), tmp_path / "flux.safetensors", loras.metadata("flux"))
    said = refused(tmp_path / "flux.safetensors", tmp_path, "keys unmatched", family="sd3")
    assert "they look like flux" in said and said.count("\n") == 11
    save_file(loras.state("sd"), tmp_path / "sd.safetensors", loras.metadata("sd"))
    assert "they look like sd;" in refused(tmp_path / "sd.safetensors", tmp_path, "unmatched", family="sdxl")


def test_a_student_folder_with_the_lora_of_another_family_is_refused(copied, tmp_path):
    folder = copied("sd3")
    shutil.copy(copied("sd") / WEIGHTS, folder / WEIGHTS)
    assert "they look like sd" in refused(folder, tmp_path, "keys of a sd3 LoRA in the diffusers format")


def test_unmatched_keys_are_listed_with_the_nearest_names(folders, tmp_path):
    file = Path(shutil.copy(folders["sd"] / WEIGHTS, tmp_path / "odd.safetensors"))
    old = "unet.down_blocks.0.resnets.0.conv1"

    def misspell(state):
        for x in "AB":
            state[f"{old}x.lora_{x}.weight"] = state.pop(f"{old}.lora_{x}.weight")

    edited(file, misspell)
    said = refused(file, tmp_path, "2 of .* keys unmatched")
    assert f"{old}x.lora_A.weight  (the nearest layer: {old})" in said


@pytest.mark.parametrize("end", ["dora_scale", "hada_w1_a", "lora_mid.weight", "diff"])
def test_what_is_no_plain_lora_is_refused(folders, tmp_path, end):
    file = Path(shutil.copy(format_files(folders["sd"])["kohya"], tmp_path / "odd.safetensors"))
    name = next(iter(load_file(file))).split(".")[0]
    edited(file, lambda state: state.update({f"{name}.{end}": torch.ones(1)}))
    assert f"{name}.{end}" in refused(file, tmp_path, "1 of .* keys unmatched", "diffusers", "sd")


def test_a_layer_without_one_of_its_matrices_is_refused(folders, tmp_path):
    file = Path(shutil.copy(format_files(folders["sd3"])["kohya"], tmp_path / "odd.safetensors"))
    gone = next(key for key in load_file(file) if "lora_up" in key)
    edited(file, lambda state: state.pop(gone))
    assert gone.replace("lora_up", "lora_down") in refused(file, tmp_path, "2 of .* unmatched", "diffusers", "sd3")


def test_text_encoders_without_a_name_are_refused(tmp_path):
    made = loras.state("flux")
    made |= {f"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(made, tmp_path / "t5.safetensors", loras.metadata("flux"))
    assert "T5 are not supported" in refused(tmp_path / "t5.safetensors", tmp_path, "2 of .* unmatched")


def test_a_missing_alpha_is_the_rank_of_all_or_an_error(folders, tmp_path):
    file = Path(shutil.copy(format_files(folders["sd"])["kohya"], tmp_path / "mute.safetensors"))
    alphas = [key for key in load_file(file) if key.endswith(".alpha")]
    edited(file, lambda state: state.pop(alphas[0]))
    refused(file, tmp_path, "1 layers without an alpha, the first " + alphas[0].split(".")[0], "diffusers")
    edited(file, lambda state: [state.pop(key) for key in alphas[1:]])
    report = convert_lora(file, tmp_path / "there.safetensors", "diffusers")
    assert f"{len(alphas)} layers have no alpha" in str(report) and "alpha / rank: 1\n" in str(report)
    # the same of Diffusers' format without metadata
    edited(tmp_path / "there.safetensors", lambda state: None, keep_metadata=False)
    report = convert_lora(tmp_path / "there.safetensors", tmp_path / "back.safetensors", "kohya")
    assert report.source.mute == len(alphas)
    state = load_file(tmp_path / "back.safetensors")
    assert all(value.item() == RANK for key, value in state.items() if key.endswith("alpha"))


def test_odd_shapes_are_refused(folders, tmp_path):
    file = Path(shutil.copy(format_files(folders["sd3"])["kohya"], tmp_path / "odd.safetensors"))
    fused = next(key for key in load_file(file) if "x_block_attn_qkv.lora_up" in key)
    edited(file, lambda state: state.update({fused: state[fused][:-1].clone()}))
    refused(file, tmp_path, "mismatched shapes or metadata in .* rows, expected", "diffusers", "sd3")
    edited(file, lambda state: state.update({fused: state[fused][:, 1:].clone()}))
    refused(file, tmp_path, "have no rank in common", "diffusers", "sd3")


def test_what_is_no_lora_is_refused(tmp_path):
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "net.safetensors")
    refused(tmp_path / "net.safetensors", tmp_path, "expected lora_A and lora_B")
    save_file({}, tmp_path / "none.safetensors")
    refused(tmp_path / "none.safetensors", tmp_path, "with 0 tensors")


def test_names_of_several_families_ask_for_one(tmp_path):
    save_file(loras.state("pixart", only=lambda name: "attn" in name), tmp_path / "attn.safetensors")
    refused(tmp_path / "attn.safetensors", tmp_path, "pixart and sana.*pass --family pixart")
    assert convert_lora(tmp_path / "attn.safetensors", tmp_path / "x.safetensors", "comfyui", "pixart")


@pytest.mark.parametrize(("width", "family"), [(768, "sd"), (1024, "sd"), (2048, "sdxl")])
def test_unets_are_told_apart_by_the_prompt_s_width(tmp_path, width, family):
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(640, 2)}
    save_file(state, tmp_path / "x.safetensors")
    assert read_lora(tmp_path / "x.safetensors").layout.family == family
    report = convert_lora(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "kohya")
    assert report.source.layout.family == family
    assert ("input_blocks_4_1" if family == "sdxl" else "down_blocks_1") in next(
        iter(load_file(tmp_path / "y.safetensors"))
    )


@pytest.mark.parametrize(("family", "to"), [("pixart", "kohya"), ("sana", "kohya"), ("sana", "comfyui")])
def test_formats_without_names_for_a_family_are_refused(tmp_path, family, to):
    save_file(loras.state(family), tmp_path / "x.safetensors", loras.metadata(family))
    assert "--to fused" in refused(tmp_path / "x.safetensors", tmp_path, f"{to} for {family}", to)


def test_a_contract_of_a_newer_schema_is_refused(copied, tmp_path):
    folder = copied("sd")
    contract = json.loads((folder / CONTRACT).read_text())
    (folder / CONTRACT).write_text(json.dumps(contract | {"schema_version": 2}))
    refused(folder, tmp_path, "got schema version 2 .*, expected 1")
    with pytest.raises(StudentError, match="schema version 2"):
        fuse_student(folder, tmp_path / "fused")
    with pytest.raises(StudentError, match="schema version 2"):
        verify_formats(folder)
    assert not (tmp_path / "fused").exists()


def test_the_command(folders, tmp_path, capsys):
    out = tmp_path / "new" / "x.safetensors"
    main(["convert", str(folders["sd"]), str(out), "--to", "kohya"])
    assert "0 unmatched" in capsys.readouterr().out and out.exists()
    main(["convert", str(folders["sd"]), str(tmp_path / "fused"), "--to", "fused"])
    assert "its largest difference from" in capsys.readouterr().out
    assert UNet2DConditionModel.from_pretrained(tmp_path / "fused", subfolder="unet")
    with pytest.raises(SystemExit) as error:
        main(["convert", str(out), str(tmp_path / "y.safetensors"), "--to", "diffusers", "--family", "flux"])
    assert error.value.code == 2 and "unmatched" in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()


# export


def test_the_exports_stand_in_no_one_s_way(folders):
    """Diffusers still picks its own file of the folder."""
    state, alphas, facts = StableDiffusionPipeline.lora_state_dict(folders["sd"], return_lora_metadata=True)
    assert state.keys() == load_file(folders["sd"] / WEIGHTS).keys()
    assert alphas is None and facts["unet.lora_alpha"] == ALPHA


def test_a_student_that_comfyui_cannot_sample_gets_no_workflow_and_a_reason(copied, caplog):
    folder = copied("sd")
    (folder / WORKFLOW).unlink()
    contract = json.loads((folder / CONTRACT).read_text())
    (folder / CONTRACT).write_text(json.dumps(contract | {"eta": 0.3}))
    export_formats(folder, ("comfyui",))
    assert not (folder / WORKFLOW).exists() and "the workflow has no sampler for such steps" in caplog.text


def run(base: str, out: Path, **train) -> Run:
    options = {"max_train_steps": 1, "train_batch_size": 2, "report_to": "none", "watch_samples": 0}
    source = TeacherSamples(source=Prompts(prompts=("rose",)), folder=str(out / "kept"), count=2, num_inference_steps=2)
    return Run(
        family=StableDiffusion(pretrained_teacher_model=base),
        method=Regression(num_inference_steps=2, ema_decay=None),
        data=source,
        lora=LoraSpec(rank=2, alpha=8),
        train=TrainSpec(output_dir=str(out / "run"), **options, **train),
    )


def test_a_run_exports_what_it_is_told_to_and_nothing_of_an_earlier_run_stays(folders, tmp_path):
    base = read_contract(folders["sd"]).base_model
    old = tmp_path / "run"
    old.mkdir()
    for file in (folders["sd"] / WORKFLOW, format_files(folders["sd"])["comfyui"]):
        shutil.copy(file, old)
    (old / "metrics.jsonl").touch()
    out = distill(run(base, tmp_path, export_formats=("kohya",), overwrite_output_dir=True))
    assert not (out / WORKFLOW).exists() and list(format_files(out)) == ["kohya"]
    with safe_open(format_files(out)["kohya"], "pt") as file:
        assert {file.get_tensor(key).item() for key in file.keys() if key.endswith("alpha")} == {8.0}  # noqa: SIM118


def test_formats_that_there_will_not_be_are_refused_at_the_start(folders, tmp_path):
    one = run(read_contract(folders["sd"]).base_model, tmp_path, export_formats=("kohya",))
    check_run(one)
    with pytest.raises(ConfigError, match="only a LoRA has other formats"):
        check_run(replace(one, method=Reflow(num_inference_steps=2, width=0.5, ema_decay=None)))
