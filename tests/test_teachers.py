"""Teachers that are not what their family expects are refused before weights are read, each with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    SCMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_families import one_file
from tiny import FAMILIES, VIDEOS, pipeline

from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts
from stepdistill.families.base import Family
from stepdistill.families.vp import VariancePreserving
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.meta import is_shell
from stepdistill.training.checks import check_run
from stepdistill.training.recipe import Run, TrainSpec


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of each family; tests that change one take a copy."""
    places = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, place in places.items():
        pipeline(name).save_pretrained(place)
    return places


def of(name: str, place: Path | str, **settings: Any) -> Family:
    return replace(FAMILIES[name], pretrained_teacher_model=str(place), **settings)


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(family: Family, match: str) -> None:
    """By whoever loads the teacher, too."""
    for call in (family.check_files, family.load):
        with pytest.raises(ConfigError, match=match):
            call()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_its_own_pipeline_and_no_other(folders, name):
    for other, place in folders.items():
        if other == name:
            of(name, place).check_files()
            continue
        theirs, ours = (FAMILIES[n].pipeline_class.__name__ for n in (other, name))
        refused(of(name, place), f"got a {theirs} in {place}, expected a {ours}: .* choose the family of a {theirs}")


def test_the_wrong_family_is_the_first_thing_that_a_run_says(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # nothing is loaded
    run = Run(
        family=of("sdxl", folders["sd"]),
        method=Consistency(),
        data=Prompts(prompts=("rose",)),  # which gives no latents
        train=TrainSpec(output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ConfigError, match="got a StableDiffusionPipeline .* expected a StableDiffusionXLPipeline"):
        check_run(run)


def test_pipelines_for_other_tasks_of_the_same_model_have_the_same_parts(folders, tmp_path):
    for name, kind in [
        ("sd", "StableDiffusionImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
        ("sana", "SanaSprintPipeline"),
    ]:
        place = shutil.copytree(folders[name], tmp_path / name)
        edited(place / "model_index.json", _class_name=kind)
        of(name, place).check_files()
        edited(place / "model_index.json", _class_name="FluxKontextPipeline")
        refused(of(name, place), "FluxKontextPipeline")


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
TABLES = {
    "ddim": DDIMScheduler(),
    "ddpm": DDPMScheduler(prediction_type="sample"),
    "pndm": PNDMScheduler(),
    "euler a": EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
    "dpm": DPMSolverMultistepScheduler(),
}
FLOWS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=2.0),
    "flow heun": FlowMatchHeunDiscreteScheduler(shift=2.0),
    "flow dpm": DPMSolverMultistepScheduler(**FLOW, flow_shift=2.0),
    "flow unipc": UniPCMultistepScheduler(**FLOW, flow_shift=2.0),
}
NEITHER = {
    "edm": EDMEulerScheduler(),
    "edm dpm": EDMDPMSolverMultistepScheduler(),
    "cm": CMStochasticIterativeScheduler(),
    "ipndm": IPNDMScheduler(),
    "trigflow": SCMScheduler(),
    "continuous": EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    ),
    "500": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500),
    "inverted": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scheduler_of_another_noise_process_is_refused(folders, tmp_path, name):
    place, family = shutil.copytree(folders[name], tmp_path / "copy"), FAMILIES[name]
    good, other = (TABLES, FLOWS) if isinstance(family, VariancePreserving) else (FLOWS, TABLES)
    for kind, scheduler in {**good, **other, **NEITHER}.items():
        scheduler.save_pretrained(place / "scheduler")
        edited(place / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
        if kind in good:
            of(name, place).check_files()
            schedule = family.schedule(scheduler)
            assert schedule.straight == (good is FLOWS)
            if good is FLOWS:
                assert schedule.shift == (vars(family).get("shift") or 2.0)  # the tiny LTX-Video has its own
            continue
        with pytest.raises(
            ConfigError, match=f"scheduler {type(scheduler).__name__} with .* {family.pipeline_class.__name__}"
        ):
            of(name, place).check_files()
    with pytest.raises(ConfigError, match="scheduler FlowMatch"):
        of(name, place).load()


@pytest.mark.parametrize(
    "kind", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, IPNDMScheduler, CMStochasticIterativeScheduler]
)
def test_a_scheduler_made_of_the_teacher_s_config_is_refused_if_it_has_no_table(folders, tmp_path, kind):
    """Its config has a `beta_schedule`, which it does not use: a traceback, in `family.schedule`."""
    place = shutil.copytree(folders["sd"], tmp_path / "copy")
    scheduler = kind.from_config(DDIMScheduler(beta_schedule="linear", num_train_timesteps=1000).config)
    assert "beta_schedule" in scheduler.config
    scheduler.save_pretrained(place / "scheduler")
    edited(place / "model_index.json", scheduler=["diffusers", kind.__name__])
    refused(of("sd", place), f"scheduler {kind.__name__} with")


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("model_index.json", "[]", "complete pipeline"),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": []}', "without unet"),
        ("unet/config.json", "[]", "complete pipeline"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "a"}', "complete pipeline"),
        ("text_encoder/config.json", None, "without text_encoder"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_no_traceback(folders, tmp_path, file, text, match):
    place = shutil.copytree(folders["sd"], tmp_path / "copy")
    if text is None:  # Transformers takes the defaults then, of another width
        (place / file).unlink()
    else:
        (place / file).write_text(text)
    refused(of("sd", place), match)


def test_a_folder_may_be_named_like_a_file(folders, tmp_path):
    place = Path(shutil.copytree(folders["sd"], tmp_path / "base.safetensors"))
    assert of("sd", place).load().unet.config["sample_size"] == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_that_is_missing_is_named(folders, tmp_path, name):
    """A folder without its tokenizer was read with an empty one."""
    parts = [key for key, value in json.loads((folders[name] / "model_index.json").read_text()).items()]
    parts = [part for part in parts if (folders[name] / part).is_dir()]
    assert {"vae", "scheduler", "text_encoder", "tokenizer", FAMILIES[name].network_name} <= set(parts)
    for part in parts:
        place = shutil.copytree(folders[name], tmp_path / part)
        for change in ({part: [None, None]}, {}):
            index = json.loads((folders[name] / "model_index.json").read_text()) | change
            if not change:
                del index[part]
            (place / "model_index.json").write_text(json.dumps(index))
            if part.endswith("_3"):  # Stable Diffusion 3 does without its largest text encoder
                of(name, place).check_files()
                continue
            refused(of(name, place), f"{place} without {part}, .* {FAMILIES[name].pipeline_class.__name__} needs it")
        shutil.copy(folders[name] / "model_index.json", place)
        shutil.rmtree(place / part)
        refused(of(name, place), f"{place} without {part}")


NETWORKS: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd", "unet", {"in_channels": 9}, "in_channels 9, expected 4"),  # inpainting
    ("sdxl", "unet", {"in_channels": 8}, "in_channels 8, expected 4"),  # edits by instruction
    ("flux", "transformer", {"in_channels": 96}, "in_channels 96, expected 16"),  # Fill
    ("sd", "unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim 8, expected None"),  # LCM
    ("sdxl", "unet", {"time_cond_proj_dim": 8}, "time_cond_proj_dim 8, expected None"),
    ("sd", "unet", {"addition_embed_type": "text"}, "addition_embed_type 'text', expected None"),
    ("sdxl", "unet", {"addition_embed_type": None}, "addition_embed_type None, expected 'text_time'"),
    ("sana", "transformer", {"guidance_embeds": True}, "guidance_embeds True, expected False"),  # Sprint
    ("sd", "text_encoder", {"hidden_size": 48}, "cross_attention_dim 32, expected 48"),
    ("sdxl", "text_encoder_2", {"hidden_size": 48}, "cross_attention_dim 64, expected 80"),
    ("sd3", "text_encoder_3", {"d_model": 48}, "joint_attention_dim 64, expected 48"),
    ("flux", "text_encoder_2", {"d_model": 48}, "joint_attention_dim 32, expected 48"),
    ("pixart_alpha", "text_encoder", {"d_model": 48}, "caption_channels 32, expected 48"),
    ("pixart_sigma", "text_encoder", {"d_model": 48}, "caption_channels 32, expected 48"),
    ("sana", "text_encoder", {"hidden_size": 48}, "caption_channels 32, expected 48"),
    ("sd3", "vae", {"latent_channels": 8}, "in_channels 4, expected 8"),
    ("sdxl", "vae", {"latents_mean": [0.0] * 4}, "latents_mean, expected one without"),  # Playground 2.5
    ("sd", "vae", {"in_channels": 4}, "in_channels 4, expected 3"),  # with transparency
    ("sana", "vae", {"in_channels": 4}, "in_channels 4, expected 3"),
    ("flux", "vae", {"out_channels": 6}, "out_channels 6, expected 3"),
    ("sd3", "vae", {"shift_factor": None}, "shift_factor None, expected a number"),
    ("flux", "vae", {"shift_factor": None}, "shift_factor None, expected a number"),
    ("sd", "unet", {"sample_size": None}, "sample_size None, expected a number"),
    ("pixart_sigma", "transformer", {"sample_size": None}, "sample_size None, expected a number"),
    ("sana", "vae", {"scaling_factor": None}, "scaling_factor None, expected a number"),
]


@pytest.mark.parametrize(("name", "part", "change", "match"), NETWORKS)
def test_a_part_of_another_model_is_refused(folders, tmp_path, name, part, change, match):
    place = shutil.copytree(folders[name], tmp_path / "copy")
    edited(place / part / "config.json", **change)
    refused(of(name, place), match)


def test_a_part_of_another_class_is_refused(folders, tmp_path):
    for name, part, kind, wanted in [
        ("sd", "unet", ["diffusers", "UNet2DModel"], "UNet2DConditionModel"),
        ("sd3", "text_encoder", ["transformers", "CLIPTextModel"], "CLIPTextModelWithProjection"),
        ("flux", "transformer", ["diffusers", "SD3Transformer2DModel"], "FluxTransformer2DModel"),
        ("sd", "vae", ["diffusers", "VQModel"], "AutoencoderKL"),
        ("sdxl", "vae", ["diffusers", "ConsistencyDecoderVAE"], "AutoencoderKL"),
        ("sd3", "vae", ["diffusers", "AutoencoderKLQwenImage"], "AutoencoderKL"),
        ("pixart_alpha", "vae", ["diffusers", "AutoencoderKLTemporalDecoder"], "AutoencoderKL"),
        ("pixart_sigma", "vae", ["diffusers", "AutoencoderDC"], "AutoencoderKL"),
        ("sana", "vae", ["diffusers", "AutoencoderKL"], "AutoencoderDC"),
        ("sd", "vae", ["diffusers", "Transformer2DModel"], "AutoencoderKL"),
    ]:
        place = shutil.copytree(folders[name], tmp_path / f"{name} {kind[1]}")
        edited(place / "model_index.json", **{part: kind})
        refused(of(name, place), f"got a {kind[1]} as {part} of .*, expected a {wanted}")


TINY = [name for name, f in FAMILIES.items() if not (name in VIDEOS or name == "klein" or f.needs.scales_channels)]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_autoencoder_of_the_same_latents_may_be_in_the_place_of_the_teacher_s(folders, tmp_path, name):
    place, widths = shutil.copytree(folders[name], tmp_path / "copy"), (8,) * 3
    shutil.rmtree(place / "vae")
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(place / "vae")
    edited(place / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    family = of(name, place)
    family.check_files()
    pipe = family.load()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode(pipe, pixels)
    torch.testing.assert_close(latents, pipe.vae.encode(pixels).latents)  # its latents are in the network's scale
    assert latents.shape == (1, *family.latent_shape(pipe, 32, 32)) == (1, 4, 8, 8)
    torch.testing.assert_close(family.decode(pipe, latents), pipe.vae.decode(latents).sample)


def test_pixart_was_once_saved_under_a_class_of_all_transformers(folders, tmp_path):
    place = shutil.copytree(folders["pixart_alpha"], tmp_path / "copy")
    edited(place / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    of("pixart_alpha", place).check_files()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_variant_that_is_not_there_is_refused(folders, tmp_path, name):
    refused(of(name, folders[name], variant="fp16"), "family.variant 'fp16', .* no file in .* is named so")
    place = shutil.copytree(folders[name], tmp_path / "copy")
    for file in place.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    of(name, place, variant="fp16").check_files()


# single files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("files")
    save_file({"some.weight": torch.zeros(2)}, place / "odd.safetensors")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.zeros(2, 2)}, place / "lora.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2, 2)}, place / "kohya.safetensors")
    save_file({"first_stage_model.x": torch.zeros(2)}, place / "vae.safetensors")
    xl = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    save_file({xl: torch.zeros(2)}, place / "xl.safetensors")
    (place / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("model.ckpt", "model.bin", "model.gguf"):
        (place / name).write_bytes(b"weights")
    return place


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_file_that_is_no_checkpoint_of_the_family_is_refused(folders, files, name):
    def no(file: str, match: str) -> None:
        refused(of(name, files / file, single_file_config=str(folders[name])), match)

    pipe = FAMILIES[name].pipeline_class.__name__
    no("odd.safetensors", f"odd.safetensors with 1 tensors such as some.weight, expected a checkpoint of a {pipe}")
    for file in ("lora.safetensors", "kohya.safetensors"):
        no(file, f"the LoRA .*{file}, .* in family.pretrained_teacher_model, and the LoRA in family.teacher_loras")
    no("vae.safetensors", "model.diffusion_model" if name == "sd" else "does not know the names")
    no("xl.safetensors", "no tensor whose name begins with model.diff" if name == "sdxl" else "takes it for 'xl_base'")
    no("pointer.safetensors", "pointer.safetensors, which is no safetensors file")


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma", "sana"])
def test_diffusers_reads_no_single_file_of_some_families(files, name):
    refused(of(name, files / "odd.safetensors"), "Diffusers reads no single file into a")


def test_other_files_are_no_hub_ids(files, monkeypatch):
    for name in FAMILIES:
        refused(of(name, files / "model.ckpt"), "model.ckpt, .* is a pickle, .* `save_pretrained`")
        refused(of(name, files / "model.bin"), "is a pickle")
        refused(
            of(name, files / "model.gguf"), "the file .*model.gguf, expected a pipeline folder or a .safetensors file"
        )
    monkeypatch.chdir(files.parent)
    for suffix in ("ckpt", "safetensors", "gguf", "bin"):
        refused(of("sd", f"models/none.{suffix}"), f"'models/none.{suffix}', which does not exist")


def test_a_file_that_is_marked_as_v_prediction_is_not_read_as_epsilon(folders, tmp_path):
    """Diffusers does not read the marks that NoobAI's files have."""
    config, file = shutil.copytree(folders["sd"], tmp_path / "folder"), tmp_path / "model.safetensors"
    one_file(pipeline("sd"), file)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(file) | marks, file)
    family = of("sd", file, single_file_config=str(config))

    def no(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            family.load()

    no("marked as v_pred, .* expected prediction_type v_prediction: .* family.single_file_config")
    edited(config / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    no("marked as ztsnr, .* expected rescale_betas_zero_snr True")
    edited(config / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert family.kind(family.load()) == "v_prediction"


def test_configs_that_say_nothing_or_nonsense_are_refused(folders, tmp_path):
    place = shutil.copytree(folders["sd"], tmp_path / "copy")
    edited(place / "scheduler" / "scheduler_config.json", beta_schedule="round")
    refused(of("sd", place), f"teacher {place}, .* round")
    for text, match in [("{}", f"a None in {place}"), ("{", "not a valid JSON file")]:
        (place / "model_index.json").write_text(text)
        refused(of("sd", place), match)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_that_lacks_a_tensor_is_refused(folders, tmp_path, name):
    """Of which Diffusers and Transformers only warn: the tensor would be random."""
    place = Path(shutil.copytree(folders[name], tmp_path / "teacher"))
    for part in sorted(folder.name for folder in place.iterdir() if any(folder.glob("*.safetensors"))):
        (file,) = (place / part).glob("*.safetensors")
        whole = load_file(file)
        save_file({key: value for key, value in whole.items() if key != sorted(whole)[-1]}, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=f"whose {part} lacks [12] of .* tensors, such as"):
            of(name, place).load()
        save_file(whole, file, {"format": "pt"})
    of(name, place).load()


@pytest.fixture
def cached(folders, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Lay a family's pipeline into an empty cache of the hub, as `owner/NAME`; its files' folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def cache(name: str, revision: str = "main") -> Path:
        place = tmp_path / "hub" / f"models--owner--{name}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit := f"{revision:0<40}")
        return Path(shutil.copytree(folders[name], place / "snapshots" / commit))

    return cache


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_of_a_hub_s_teacher_that_lacks_a_tensor_is_refused(folders, cached, name):
    place, family = cached(name), of(name, f"owner/{name}")
    ours, theirs = (teacher.network(teacher.load()).state_dict() for teacher in (family, of(name, folders[name])))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for part in ("vae", "text_encoder", family.network_name):
        (file,) = (place / part).glob("*.safetensors")
        whole = load_file(file)
        save_file({key: value for key, value in whole.items() if key != sorted(whole)[-1]}, file, {"format": "pt"})
        with pytest.raises(ConfigError, match=f"whose {part} lacks [12] of .* tensors, such as"):
            family.load()
        save_file(whole, file, {"format": "pt"})


def test_a_hub_s_teacher_is_read_at_its_revision_in_its_variant_and_without_what_is_left_out(cached, monkeypatch):
    main, other = cached("sd"), cached("sd", "other")
    for file in (other / "unet").glob("*.safetensors"):
        save_file({key: value + 1 for key, value in load_file(file).items()}, file, {"format": "pt"})
        save_file({key: value + 2 for key, value in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    plain, revised, half = (
        of("sd", "owner/sd", **given).load().unet.conv_in.bias
        for given in ({}, {"revision": "other"}, {"revision": "other", "variant": "fp16"})
    )
    torch.testing.assert_close(revised, plain + 1)
    torch.testing.assert_close(half, plain + 3)
    for part in ("vae", "text_encoder"):
        for file in (main / part).glob("*.safetensors"):
            file.unlink()
    pipe = of("sd", "owner/sd").load(("text", "vae"))
    assert is_shell(pipe.vae) and is_shell(pipe.text_encoder) and torch.equal(pipe.unet.conv_in.bias, plain)
    with pytest.raises(ConfigError, match="teacher owner/sd, .* network connection"):
        of("sd", "owner/sd").load()
    asked: list[dict] = []
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda _, **given: asked.append(given) or str(main))
    of("sd", "owner/sd").load(("text", "vae"))
    assert asked[0].keys() >= {"text_encoder", "vae"} and "unet" not in asked[0]  # these are not fetched


@pytest.mark.parametrize("spoil", ["cut", "gone", "other"])
def test_weights_that_do_not_read_are_an_error_of_the_folder(folders, tmp_path, spoil):
    place = shutil.copytree(folders["sd"], tmp_path / "copy")
    file = place / "unet" / "diffusion_pytorch_model.safetensors"
    spoiling: dict[str, Callable[[], object]] = {
        "cut": lambda: file.write_bytes(file.read_bytes()[:1000]),
        "gone": file.unlink,
        "other": lambda: edited(place / "unet" / "config.json", block_out_channels=[64, 64]),
    }
    spoiling[spoil]()
    with pytest.raises(ConfigError, match=f"teacher {place}, .* check that all files are there"):
        of("sd", place).load()
