"""Krea 2: its pipeline's steps, ragged text, schedule by size, files, and what its pipeline takes without a word."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import chat
import pytest
import tiny
import tiny_krea2
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, concatenated
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.guidance import LINEAR
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts, Trajectories
from stepdistill.families.krea2 import Krea2
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Copy, Lora, LoraSpec
from stepdistill.students.contract import WEIGHTS, read_contract, write_contract
from stepdistill.students.load import load_student
from stepdistill.students.verify import export_formats, format_files, verify_formats, verify_student
from stepdistill.students.write import write_student
from stepdistill.training.distill import dry_run
from stepdistill.training.recipe import Run, TrainSpec

FAMILY: Any = tiny.FAMILIES["krea2"]
PROMPTS = ["red apple", "a small blue circle on left"]  # 2 and 6 tokens
SIZES = [(32, 32), (16, 48)]
W = 3.0
PROVEN = Consistency(end="any", eta=1.0, ema_decay=None, guidance_scale=1.0, sampling_guidance_scale=W)


def plain(seed: int = 0, **more: Any) -> Krea2Pipeline:
    torch.manual_seed(seed)
    pipe = tiny_krea2.krea2(**more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(3))


def drawn(pipe: Any, start: Tensor, prompts: Sequence[str] = PROMPTS, **call: Any) -> list[Tensor]:
    """The latents (B, C, h, w) after each of the pipeline's own steps."""
    seen = []

    def keep(_: Any, i: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(FAMILY.unpack(given["latents"].clone(), *start.shape[-2:]))
        return given

    size = {"height": 4 * start.shape[-2], "width": 4 * start.shape[-1]}
    call = FAMILY.arguments() | size | {"num_inference_steps": 3, "output_type": "latent"} | call
    pipe(prompt=list(prompts), latents=FAMILY.pack(start), callback_on_step_end=keep, **call)
    return seen


def scaled(worst: Tensor, whole: Tensor) -> float:
    return (worst.abs().max() / whole.abs().max()).item()


# the pipeline's steps


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("w", [1.0, 4.0])
@torch.no_grad()
def test_every_step_of_the_pipeline_is_the_call_and_the_straight_path(w, size):
    """With two prompts of unequal length, and both of guidance's calls in one."""
    pipe, x = plain(), noise(*size)
    cond, null = FAMILY.condition(pipe, PROMPTS), FAMILY.unconditional(pipe)
    both = concatenated({key: value.expand(2, *value.shape[1:]) for key, value in null.items()}, cond)
    seen = drawn(pipe, x, **FAMILY.guidance(w))
    levels = pipe.scheduler.sigmas.tolist()
    for found, (s, then) in zip(seen, pairwise(levels), strict=True):
        t = torch.full((2,), 1000 * s)
        u, c = FAMILY.call(pipe.transformer, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        y = LINEAR(u, c, w, t)
        x = x + (then - s) * y  # (1 - then) x0 + then eps, with x0 = x - s y and eps = x + (1 - s) y
        assert scaled(found - x, x) < 1e-5
    assert len(seen) == 3


@torch.no_grad()
def test_one_is_no_guidance_in_the_pipeline_whose_own_one_is_two():
    pipe, start = plain(), noise(32, 32)
    assert FAMILY.guidance(1.0) == {"guidance_scale": 0.0} and FAMILY.guidance(4.5) == {"guidance_scale": 3.5}
    none, one = (drawn(pipe, start, guidance_scale=g)[-1] for g in (0.0, 1.0))
    two = drawn(pipe, start, **FAMILY.guidance(2.0))[-1]
    assert torch.equal(drawn(pipe, start, **FAMILY.guidance(1.0))[-1], none)
    assert torch.equal(one, two) and scaled(one - none, none) > 1e-4
    # the negative prompt that none is given for
    assert torch.equal(drawn(pipe, start, negative_prompt=["", ""], **FAMILY.guidance(2.0))[-1], two)


@torch.no_grad()
def test_the_autoencoder_s_latents_and_images_are_those_of_the_pipeline():
    pipe, start = plain(), noise(16, 48)
    call = {"height": 16, "width": 48, "num_inference_steps": 2, **FAMILY.arguments(), **FAMILY.guidance(1.0)}
    latents, image = (
        pipe(prompt=PROMPTS, latents=FAMILY.pack(start), output_type=kind, **call).images for kind in ("latent", "pt")
    )
    pixels = FAMILY.decode(pipe, FAMILY.latents_of(pipe, latents, 4, 12))
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), image, rtol=0, atol=1e-5)
    coded = FAMILY.encode(pipe, pixels)
    assert coded.shape == (2, *FAMILY.latent_shape(pipe, 16, 48))
    mean, std = (torch.tensor(pipe.vae.config[key]).view(4, 1, 1) for key in ("latents_mean", "latents_std"))
    raw = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(coded, (raw - mean) / std)


# ragged text


def fill(cond: Condition, count: int) -> Condition:
    return {key: torch.cat([x, x.new_zeros(len(x), count, *x.shape[2:])], 1) for key, x in cond.items()}


@torch.no_grad()
def test_true_tokens_come_first_and_the_places_after_them_have_no_effect():
    pipe, x, t = plain(), noise(16, 48), torch.tensor([600.0, 200.0])
    net, cond = pipe.transformer, FAMILY.condition(pipe, PROMPTS)
    states, mask = cond["states"], cond["mask"]
    assert states.shape[2:] == (len(tiny_krea2.LAYERS), chat.WIDTH) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [2 + 5, 6 + 5] and not states[~mask].any()  # the prompt and the template's end
    assert (mask[:, :-1] >= mask[:, 1:]).all()
    y = FAMILY.call(net, x, t, cond)
    longest = int(mask.sum(1).max())
    trimmed = {key: value[:, :longest] for key, value in cond.items()}
    # as the pipeline has it: padded in the middle
    theirs, kept = pipe.encode_prompt(list(PROMPTS), max_sequence_length=FAMILY.max_sequence_length)
    assert not torch.equal(kept, mask)
    for other in (trimmed, fill(cond, 23), {"states": theirs, "mask": kept}):
        assert scaled(FAMILY.call(net, x, t, other) - y, y) < 1e-6
    for i in range(2):  # alone, at its own length
        one = {key: value[i : i + 1, : int(mask[i].sum())] for key, value in cond.items()}
        assert scaled(FAMILY.call(net, x[i : i + 1], t[i : i + 1], one) - y[i], y) < 1e-6
    forgotten = {**cond, "mask": torch.ones_like(mask)}
    assert scaled(FAMILY.call(net, x, t, forgotten) - y, y) > 1e-3


def test_a_condition_is_the_same_again_and_leaves_the_prompts_alone():
    pipe, prompts = plain(), list(PROMPTS)
    first, again = FAMILY.condition(pipe, prompts), FAMILY.condition(pipe, prompts)
    assert prompts == PROMPTS and all(torch.equal(first[key], again[key]) for key in first)


def test_prompts_are_cut_at_the_limit_and_keep_the_end_of_the_template(caplog):
    pipe = plain()
    limit = FAMILY.limits(pipe)["tokenizer"]
    assert limit == 12 - 5
    fits, long = ["red"] * limit, ["red"] * limit + ["apple"]
    conds = [FAMILY.condition(pipe, [" ".join(words)]) for words in (fits, long, [*fits[1:], "apple"])]
    assert torch.equal(conds[0]["states"], conds[1]["states"]) and conds[0]["mask"].all()  # what follows is lost
    assert not torch.equal(conds[0]["states"], conds[2]["states"])
    with caplog.at_level(logging.WARNING):
        assert not warn_of_cut(FAMILY, pipe, [" ".join(fits)]) and warn_of_cut(FAMILY, pipe, [" ".join(long)])
    assert "loses 'apple'" in caplog.text


@pytest.mark.parametrize("part", ["prefix", "suffix"])
def test_a_tokenizer_that_splits_the_template_otherwise_is_refused(part):
    """The pipeline would read the template's end as the prompt, or give all prompts the same states."""
    pipe: Any = plain()
    name = f"prompt_template_encode_{part}"
    setattr(pipe, name, getattr(pipe, name) + "a large green dog" * 5)
    count = {"prefix": 34, "suffix": 5}[part]
    with pytest.raises(ConfigError, match=rf"a tokenizer with \d+ tokens for .* of the template, expected {count}:"):
        FAMILY.condition(pipe, PROMPTS)
    if part == "prefix":
        theirs, _ = pipe.encode_prompt(list(PROMPTS), max_sequence_length=FAMILY.max_sequence_length)
        assert torch.equal(theirs[0], theirs[1])


# schedule


@pytest.mark.parametrize("size", [(512, 512), (1024, 1536)])
@pytest.mark.parametrize("steps", [4, 28])
@pytest.mark.parametrize("turbo", [False, True])
def test_the_teacher_s_grid_is_that_of_its_pipeline_at_each_size(turbo, steps, size):
    """The pipeline's own call at that many tokens, without the network."""
    pipe, family = plain(is_distilled=turbo), replace(FAMILY, is_distilled=turbo)
    height, width = (side // 16 * 8 for side in size)  # tokens of 8 pixels here, and of 16 at the real scale
    pipe.transformer.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states),)
    drawn(pipe, noise(height, width, 1), ["red"], num_inference_steps=steps, **family.guidance(1.0))
    tokens = family.tokens(pipe, height, width)
    assert tokens == size[0] * size[1] // 256
    grid = family.schedule(pipe.scheduler, tokens).grid(steps).flip(0)
    torch.testing.assert_close(grid, 1000 * pipe.scheduler.sigmas, rtol=0, atol=1e-3)


def test_the_shift_of_a_square_of_1024_pixels_is_the_default_and_turbo_has_one_at_all_sizes():
    scheduler = plain().scheduler
    shifts = [FAMILY.schedule(scheduler, n * n // 256).shift for n in (512, 1024, 2048)]
    assert shifts == pytest.approx([1.788, 2.475, 9.082], rel=1e-3)
    assert FAMILY.schedule(scheduler).shift == shifts[1]
    turbo = replace(FAMILY, is_distilled=True)
    assert [turbo.schedule(scheduler, n).shift for n in (None, 1024, 16384)] == pytest.approx([3.158] * 3, rel=1e-3)
    still = FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert FAMILY.schedule(still).shift == turbo.schedule(still).shift == 2.0


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("eta", [0.0, 1.0])
@torch.no_grad()
def test_a_student_s_scheduler_visits_the_trained_levels_from_its_config_alone(n, eta, tmp_path):
    """And Turbo's or Raw's own shift of the levels that the call passes has no part in them."""
    pipe = plain(is_distilled=n % 2 == 0)
    times = tuple(1000 * (1 - i / n) ** 1.5 for i in range(n))
    scheduler, call = FAMILY.scheduler(pipe, Sampler(times, eta=eta))
    scheduler.save_pretrained(tmp_path)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    told = []
    pipe.transformer.register_forward_pre_hook(
        lambda net, args, given: told.append(1000 * given["timestep"][0].item()), with_kwargs=True
    )
    latents = drawn(pipe, noise(16, 16, 1), ["red"], **call, **FAMILY.guidance(1.0))[-1]
    assert told == pytest.approx(times, rel=1e-6) and latents.isfinite().all()


# what the pipeline takes without a word


@pytest.mark.parametrize("size", [(36, 32), (32, 20)])
def test_a_side_that_the_pipeline_rounds_up_is_refused(size):
    pipe = plain()
    assert drawn_size(pipe, *size) > size[0] * size[1] // 64
    with pytest.raises(ConfigError, match=r"sides that are multiples of 8"):
        FAMILY.latent_shape(pipe, *size)


def drawn_size(pipe: Any, height: int, width: int) -> int:
    """Tokens of what the pipeline draws."""
    call = FAMILY.arguments() | FAMILY.guidance(1.0) | {"height": height, "width": width, "num_inference_steps": 1}
    return pipe(prompt="red", output_type="latent", **call).images.shape[1]


def test_at_the_real_scale_sides_are_multiples_of_16(monkeypatch):
    pipe: Any = plain()
    monkeypatch.setattr(pipe, "vae_scale_factor", 8)
    assert FAMILY.latent_shape(pipe, 1024, 1008) == (4, 128, 126) and FAMILY.native_size(pipe) == (1024, 1024)
    with pytest.raises(ConfigError, match="multiples of 16"):
        FAMILY.latent_shape(pipe, 1024, 1000)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    plain().save_pretrained(folder)
    return folder


def edited(base: Path, to: Path, **changes: Any) -> Krea2:
    """A family whose teacher's index has other settings."""
    place = Path(shutil.copytree(base, to / "teacher"))
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | changes))
    return replace(FAMILY, pretrained_teacher_model=str(place))


def test_turbo_is_a_teacher_only_where_the_config_says_so(base, tmp_path):
    turbo = edited(base, tmp_path, is_distilled=True)
    for call in (turbo.check_files, turbo.load):
        with pytest.raises(ConfigError, match="with is_distilled True, expected False: .* distill krea/Krea-2-Raw"):
            call()
    replace(turbo, is_distilled=True).load()
    raw = replace(FAMILY, pretrained_teacher_model=str(base), is_distilled=True)
    with pytest.raises(ConfigError, match="with is_distilled False, expected True: .* leave family.is_distilled out"):
        raw.check_files()


def test_layers_of_the_text_that_the_network_does_not_take_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="2 text_encoder_select_layers in .*, expected 3:"):
        edited(base, tmp_path, text_encoder_select_layers=[1, 2]).check_files()


def test_a_single_file_is_refused(tmp_path):
    save_file({"txtfusion.projector.weight": torch.zeros(1, 12)}, tmp_path / "raw.safetensors")
    with pytest.raises(ConfigError, match="Diffusers reads no single file into a Krea2Pipeline"):
        replace(FAMILY, pretrained_teacher_model=str(tmp_path / "raw.safetensors")).load()


# layers


def test_every_target_of_the_lora_and_every_weight_of_a_narrow_network_is_reached():
    pipe = plain()
    net, targets = pipe.transformer, FAMILY.lora_targets(pipe.transformer)
    assert len(targets) == 8 * 2 and not any("text_fusion" in name for name in targets)
    bone = Backbone(net, LoraSpec(rank=2), targets, narrow=FAMILY.narrow)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    assert not any("text_fusion" in key for key in bone.parameters_of("student"))
    bone.add("slim", Copy(width=0.5))
    cond = FAMILY.condition(pipe, PROMPTS)
    for role in ("student", "slim"):
        with bone.use(role) as used:
            FAMILY.call(used, noise(16, 48), torch.tensor([500.0, 900.0]), cond).square().sum().backward()
        without = [key for key, p in bone.parameters_of(role).items() if p.grad is None or not p.grad.any()]
        assert not without
    slim: Any = FAMILY.narrow(net, 0.5)
    config = {key: slim.config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    assert config == {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}


@torch.no_grad()
def test_features_are_the_image_s_tokens_however_long_the_text_is():
    pipe = plain()
    bone, x, t = tiny.backbone("krea2", pipe), noise(16, 48), torch.tensor([600.0, 200.0])
    schedule = FAMILY.schedule(pipe.scheduler)
    denoiser = Denoiser(bone, TEACHER, schedule, "flow", FAMILY.call)
    cond, seen = FAMILY.condition(pipe, PROMPTS), []
    handle = bone.net.get_submodule("transformer_blocks.1").register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    denoiser(x, t, cond)
    handle.remove()
    (whole,) = seen
    image = whole[:, -12:].unflatten(1, (2, 6)).movedim(-1, 1)  # 16 x 48 pixels are 2 x 6 tokens
    assert torch.equal(denoiser.features(x, t, cond), image)
    longer = denoiser.features(x, t, fill(cond, 23))
    assert longer.shape == image.shape and scaled(longer - image, image) < 1e-6


# the student folder


def write(folder: Path, base: Path, method: Method = PROVEN, dtype: torch.dtype = torch.float32) -> float:
    """A student of rank 4 and alpha 6, its folder and its proof."""
    family = replace(FAMILY, pretrained_teacher_model=str(base))
    pipe = family.load()
    nn.Module.to(pipe.components["transformer"], dtype)
    bone = tiny.backbone("krea2", pipe)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    options = {"role": "student", "resolution": (16, 48), "method": method, "licence": "other"}
    return write_student(folder, family=family, pipe=pipe, backbone=bone, **options)


@pytest.fixture(scope="module")
def student(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    assert write(folder, base) < 1e-5
    return folder


def test_a_student_with_fresh_noise_and_guidance_is_proven_off_the_square(student):
    contract = read_contract(student)
    assert contract.eta == 1 and contract.guidance_scale == W and contract.call["guidance_scale"] == W - 1
    assert contract.family["is_distilled"] is False and contract.call["max_sequence_length"] == 12
    assert verify_student(student) < 1e-5


@pytest.mark.parametrize("spoilt", ["levels", "guidance", "alpha", "noise"])
def test_a_proof_notices(spoilt, student, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    contract = read_contract(folder)
    call = dict(contract.call)
    match spoilt:
        case "levels":
            call["sigmas"] = [0.99 * s for s in call["sigmas"]]
        case "guidance":
            call["guidance_scale"] += 1.0  # this package's number where the pipeline's is meant
        case "noise":
            monkeypatch.setattr(Krea2, "fresh", lambda self, latents: torch.randn_like(latents))
        case "alpha":
            save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without the metadata that hold it
    write_contract(folder, replace(contract, call=call))
    if spoilt == "levels":
        with pytest.raises(StudentError, match="timesteps"):
            verify_student(folder)
    else:
        assert verify_student(folder) > 1e-3


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_base_in_bfloat16_is_the_student_s_own_though_diffusers_keeps_its_norms(stored, student, tmp_path, caplog):
    """`from_pretrained` leaves them in float32, where a checkpoint of halves has the rounded values."""
    place = Path(read_contract(student).family["pretrained_teacher_model"])
    if stored is torch.bfloat16:
        plain().to(stored).save_pretrained(place := tmp_path / "halves")
    pipe: Any = Krea2Pipeline.from_pretrained(place, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    block = pipe.transformer.transformer_blocks[0]
    assert block.norm1.weight.dtype == torch.float32 and block.attn.to_q.weight.dtype == torch.bfloat16
    with caplog.at_level(logging.WARNING, "stepdistill"):
        call = load_student(pipe, student)
        assert "other weights" not in caplog.text
        latents = pipe(prompt="red apple", output_type="latent", **call).images
        assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
        pipe.transformer.img_in.weight.data += 1
        load_student(pipe, student, adapter_name="again")
    assert "other weights" in caplog.text


def test_a_student_of_a_base_in_bfloat16_is_proven_in_it(base, tmp_path):
    assert 0 < write(tmp_path / "student", base, dtype=torch.bfloat16) < 5e-2
    assert read_contract(tmp_path / "student").dtype == "bfloat16"


def run(base: Path, to: Path, method: Method) -> Run:
    train = TrainSpec(output_dir=str(to / "out"), resolution=32, max_train_steps=2, report_to="none")
    family = replace(FAMILY, pretrained_teacher_model=str(base))
    data = Trajectories(source=Prompts(prompts=("red", "cat")), folder=str(to / "samples"), count=2)
    return Run(family=family, method=method, data=data, train=train)


def test_guidance_adapters_are_refused_in_one_line_by_a_dry_run(base, tmp_path):
    with pytest.raises(ConfigError, match="there are no guidance adapters for this family") as caught:
        dry_run(run(base, tmp_path, AdapterGuidance(width=8)))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# files


def test_a_student_is_exported_in_every_format_with_a_workflow(student, tmp_path):
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    export_formats(folder, ("kohya", "comfyui"))
    found = verify_formats(folder)
    assert found.keys() == {"diffusers", "kohya", "comfyui", "workflow"} and max(found.values()) < 1e-5
    files = format_files(folder)
    kohya, comfyui = load_file(files["kohya"]), load_file(files["comfyui"])
    assert kohya["lora_unet_blocks_1_attn_gate.alpha"] == comfyui["transformer.transformer_blocks.1.attn.to_gate.alpha"]
    assert kohya["lora_unet_blocks_1_attn_gate.alpha"] == 6 and len(kohya) == len(comfyui) == 3 * 16


@pytest.mark.parametrize(
    ("prefix", "match"),
    [("diffusion_model", "in the comfyui format.*plain Diffusers"), ("base_model.model", "keys unmatched")],
)
def test_a_teacher_takes_loras_with_the_original_s_names_but_none_whose_alpha_would_be_lost(
    prefix, match, base, tmp_path
):
    """As ComfyUI and AI-Toolkit name them. Diffusers' own reader of these has no place for an alpha."""
    layers = {"blocks.0.attn.wo": (64, 64), "blocks.1.mlp.down": (64, 192), "txtfusion.projector": (1, 3)}
    state = {}
    for name, (rows, columns) in layers.items():
        key = f"{prefix}.{name}"
        state |= {f"{key}.lora_A.weight": torch.randn(2, columns), f"{key}.lora_B.weight": torch.randn(rows, 2)}
    save_file(state, tmp_path / "style.safetensors")
    family = replace(FAMILY, pretrained_teacher_model=str(base), teacher_loras=(str(tmp_path / "style.safetensors"),))
    before, after = (replace(family, teacher_loras=()).load().transformer, family.load().transformer)
    ours = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.ff.down", "text_fusion.projector")
    for name, key in zip(ours, layers, strict=True):
        b, a = (state[f"{prefix}.{key}.lora_{x}.weight"] for x in "BA")
        moved = after.get_submodule(name).weight - before.get_submodule(name).weight
        torch.testing.assert_close(moved, b @ a, rtol=1e-4, atol=1e-4)
    save_file(state | {f"{prefix}.blocks.0.attn.wo.alpha": torch.tensor(1.0)}, tmp_path / "style.safetensors")
    with pytest.raises(StudentError, match=match):
        family.load()
