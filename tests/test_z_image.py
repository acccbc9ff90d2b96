"""Z-Image: lists of images and prompts, time and output the other way round, and guidance with rules of its own."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, awake, backbone, batch, pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.core.denoise import guided
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.schedule import expand
from stepdistill.core.solvers import Sampler, follow
from stepdistill.data import Prompts, Trajectories
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.families.z_image import ZImage
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Lora, LoraSpec
from stepdistill.students.draw.arguments import each
from stepdistill.students.verify import verify_student
from stepdistill.students.write import write_student
from stepdistill.training.distill import dry_run
from stepdistill.training.recipe import Run, TrainSpec

FAMILY: Any = FAMILIES["z_image"]
PROMPTS = ("a red apple", "a small blue circle on the left of a large dog")  # of 11 and 19 tokens, with the template's
TIMES = torch.tensor([600.0, 200.0])


@pytest.fixture
def pipe() -> Any:  # noqa: ANN401
    made: Any = pipeline("z_image")
    made.set_progress_bar_config(disable=True)
    return made


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def drawn(pipe: Any, family: ZImage, scale: float, noise: Tensor, **call: Any) -> list[Tensor]:  # noqa: ANN401
    """The latents before the first of four steps of the pipeline's own call, and after each of them."""
    states = [noise]
    height, width = (4 * side for side in noise.shape[-2:])
    pipe(
        prompt=list(PROMPTS),
        latents=noise,
        height=height,
        width=width,
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=lambda p, i, t, kept: states.append(kept["latents"].clone()) or {},
        **family.arguments() | family.guidance(scale) | call,
    )
    return states


# the pipeline's own steps

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "at most half": {"cfg_normalization": 0.5},
    "at most as much": {"cfg_normalization": 1.0},
    "early alone": {"cfg_truncation": 0.1},
    "both": {"cfg_normalization": 0.7, "cfg_truncation": 0.1},
}


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_every_step_of_the_pipeline_is_the_network_s_call_and_the_formula(pipe, rule, size, scale):
    """With two prompts of unequal length; the guided output is written out here, and is our own rule, too."""
    family = replace(FAMILY, **RULES[rule])
    noise = torch.randn(2, 4, *size)
    states = drawn(pipe, family, scale, noise)
    levels, net = [float(level) for level in pipe.scheduler.sigmas], pipe.transformer
    assert len(states) == 5 == len(levels) and levels[0] == 1
    cond, null = family.condition(pipe, PROMPTS), family.unconditional(pipe)
    null = {key: value.expand(2, *value.shape[1:]) for key, value in null.items()}
    for x, found, now, then in zip(states, states[1:], levels, levels[1:], strict=False):
        t = torch.full((2,), 1000 * now)
        y = c = family.call(net, x, t, cond)
        if scale > 1 and 1 - now <= family.cfg_truncation:
            u = family.call(net, x, t, null)
            y = c + (scale - 1) * (c - u)
            if family.cfg_normalization:
                most = family.cfg_normalization * c.flatten(1).norm(dim=1)
                y = y * expand((most / y.flatten(1).norm(dim=1)).clamp(max=1), y)
            assert relative(family.rule(u, c, scale, t), y) < 1e-6
        elif scale > 1:
            assert torch.equal(family.rule(c + 1, c, scale, t), c)
        assert relative((1 - then) * (x - now * y) + then * (x + (1 - now) * y), found) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_the_teacher_in_memory_draws_what_its_pipeline_draws(pipe, rule):
    """In one call of twice the rows, with an empty prompt that is shorter than the others."""
    family = replace(FAMILY, **RULES[rule])
    schedule, kind = family.schedule(pipe.scheduler), family.kind(pipe)
    noise = torch.randn(2, 4, 6, 12)
    expected = drawn(pipe, family, 4.0, noise)[-1]
    denoise = guided(
        Denoiser(backbone("z_image", pipe), TEACHER, schedule, kind, family.call),
        family.unconditional(pipe),
        4.0,
        family.combine(kind, schedule),
    )
    ours = follow(denoise, schedule, schedule.grid(4).flip(0).tolist(), noise, family.condition(pipe, PROMPTS))
    assert relative(ours, expected) < 1e-5
    if rule != "plain":
        assert relative(drawn(pipe, FAMILY, 4.0, noise)[-1], expected) > 1e-2


@torch.no_grad()
def test_guidance_of_one_is_none_in_the_pipeline(pipe):
    """Its own number for it is 0; 1 would be a scale of 2, without a word."""
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
    noise = torch.randn(2, 4, 8, 8)
    none = drawn(pipe, FAMILY, 1.0, noise)[-1]
    assert FAMILY.guidance(1.0) == {"guidance_scale": 0} and rows == [2] * 4
    assert FAMILY.guidance(4.0) == {"guidance_scale": 3}
    both = replace(FAMILY, cfg_normalization=0.5, cfg_truncation=0.5)
    assert both.guidance(1.0) == FAMILY.guidance(1.0)
    assert both.guidance(4.0) == {"guidance_scale": 3, "cfg_normalization": 0.5, "cfg_truncation": 0.5}
    assert torch.equal(drawn(pipe, both, 1.0, noise)[-1], none)
    rows.clear()
    assert relative(drawn(pipe, FAMILY, 2.0, noise)[-1], none) > 1e-2 and rows == [4] * 4


@torch.no_grad()
def test_each_prompt_has_its_negative_prompt(pipe):
    """Of one for several the pipeline says nothing but that an assertion failed."""
    noise = torch.randn(2, 4, 8, 8)
    with pytest.raises(AssertionError):
        drawn(pipe, FAMILY, 4.0, noise, negative_prompt="a dog")
    told = each({"negative_prompt": "a dog"}, 2)
    assert relative(drawn(pipe, FAMILY, 4.0, noise, **told)[-1], drawn(pipe, FAMILY, 4.0, noise)[-1]) > 1e-3


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_decodes_them_and_encoded_in_the_same_scale(pipe):
    """Its autoencoder has a shift beside the scale."""
    call = {"num_inference_steps": 1, "height": 32, "width": 32} | FAMILY.arguments() | FAMILY.guidance(1.0)
    noise = torch.randn(1, 4, 8, 8)
    latents, image = (
        pipe(prompt=["rose"], latents=noise, output_type=kind, **call).images for kind in ("latent", "pt")
    )
    pixels = FAMILY.decode(pipe, latents)
    torch.testing.assert_close(pixels.clamp(-1, 1), image * 2 - 1, atol=1e-5, rtol=0)
    coded = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(FAMILY.encode(pipe, pixels), (coded - 0.1159) * 0.3611)


# prompts


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_are_read_as_the_pipeline_reads_them_and_stay_as_they_are(pipe, side):
    pipe.tokenizer.padding_side = side
    given = list(PROMPTS)
    first, again = FAMILY.condition(pipe, given), FAMILY.condition(pipe, given)
    assert given == list(PROMPTS)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    theirs, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=24)
    assert first["states"].shape == (2, 19, 32) and first["mask"].sum(1).tolist() == [11, 19] == list(map(len, theirs))
    for row, mask, rows in zip(first["states"], first["mask"], theirs, strict=True):
        assert torch.equal(row[: len(rows)], rows) and mask[: len(rows)].all()
        assert not row[len(rows) :].any() and not mask[len(rows) :].any()
    used = list(PROMPTS)
    pipe(prompt=used, num_inference_steps=1, height=32, width=32, output_type="latent", max_sequence_length=24)
    assert used[0].startswith("<|im_start|>")  # what the pipeline itself does with a caller's list


@torch.no_grad()
def test_what_lies_after_a_prompt_s_tokens_has_no_effect(pipe):
    cond, x = FAMILY.condition(pipe, PROMPTS), torch.randn(2, 4, 6, 12)
    expected = FAMILY.call(pipe.transformer, x, TIMES, cond)
    longer = {key: torch.cat([v, v.new_zeros(2, 23, *v.shape[2:])], 1) for key, v in cond.items()}
    other = {**longer, "states": longer["states"].where(longer["mask"][..., None], 7.0)}
    for given in (longer, other):
        assert relative(FAMILY.call(pipe.transformer, x, TIMES, given), expected) < 1e-6
    for i in range(2):
        length = int(cond["mask"][i].sum())
        one = {key: value[i : i + 1, :length] for key, value in cond.items()}
        alone = FAMILY.call(pipe.transformer, x[i : i + 1], TIMES[i : i + 1], one)
        assert relative(alone, expected[i : i + 1]) < 2e-6
    forgotten = {**longer, "mask": torch.ones_like(longer["mask"])}
    assert relative(FAMILY.call(pipe.transformer, x, TIMES, forgotten), expected) > 1e-2


@torch.no_grad()
def test_one_reading_of_the_mask_serves_all_rows(pipe, monkeypatch):
    """Each reading waits for the device; and a row taken by its mask would be one."""
    reading = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            reading.extend([str(func)] if str(func).startswith(("aten._local_scalar_dense", "aten.nonzero")) else [])
            masks = args[1] if str(func).startswith("aten.index.") else ()
            reading.extend("a mask as an index" for mask in masks if mask is not None and mask.dtype == torch.bool)
            return func(*args, **(kwargs or {}))

    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: reading.append("tolist") or tolist(tensor))
    cond, x = FAMILY.condition(pipe, PROMPTS), torch.randn(2, 4, 8, 8)
    reading.clear()
    with Watched():
        FAMILY.call(pipe.transformer, x, TIMES, cond)
    assert reading == ["tolist"]


def test_a_prompt_over_the_limit_is_warned_of_with_the_template_counted(pipe, caplog):
    assert FAMILY.limits(pipe) == {"tokenizer": 16}  # of 24
    with caplog.at_level(logging.WARNING):
        assert not warn_of_cut(FAMILY, pipe, ["a " * 16])
        assert warn_of_cut(FAMILY, pipe, ["a " * 16 + "dog"])
    assert "loses 'dog'" in caplog.text
    states = [FAMILY.condition(pipe, ["a " * 24 + end])["states"] for end in ("dog", "cat")]
    assert torch.equal(*states)


# the student's sampler


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", range(1, 9))
def test_the_student_s_scheduler_visits_exactly_the_levels(pipe, n, eta):
    """Whatever the teacher's shift, which would move them again."""
    times = tuple(1000 * 0.83**i for i in range(n))
    scheduler, call = FAMILY.scheduler(pipe, Sampler(times, eta=eta, clean=True))
    retrieve_timesteps(scheduler, **call, mu=1.15)  # the pipeline gives it, too
    levels = torch.tensor([*times, 0.0]) / 1000
    assert torch.allclose(scheduler.sigmas, levels, rtol=1e-6, atol=0)
    assert scheduler.config["stochastic_sampling"] == (eta == 1)
    if n > 1:
        retrieve_timesteps(pipe.scheduler, **call, mu=1.15)
        assert (pipe.scheduler.sigmas - levels).abs().max() > 0.05


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student in four steps with fresh noise, proven."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("student")
    pipeline("z_image").save_pretrained(base)
    family = replace(FAMILY, pretrained_teacher_model=str(base))
    pipe = family.load()
    bone = backbone("z_image", pipe)
    bone.add("student", Lora())
    awake(bone, "student")
    method = DMD2(timesteps=(1000, 937.5, 833.25, 600), eta=1, ema_decay=None)
    options: dict[str, Any] = {"role": "student", "method": method, "resolution": (32, 48)}
    assert write_student(folder, family=family, pipe=pipe, backbone=bone, **options) < 1e-5
    return folder


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("distill_config.json", {"sigmas": [1.0, 0.9375, 0.83325, 0.59]}),
        ("distill_config.json", {"guidance_scale": 1.0}),  # the pipeline's number for a scale of 2
        ("scheduler/scheduler_config.json", {"shift": 6.0}),  # the teacher's, which moves the levels again
        ("scheduler/scheduler_config.json", {"stochastic_sampling": False}),
        ("pytorch_lora_weights.safetensors", {"transformer.lora_alpha": 6.5}),
    ],
)
def test_whatever_is_spoilt_fails_the_proof(student, tmp_path, file, change):
    folder = Path(shutil.copytree(student, tmp_path / "copy"))
    assert verify_student(folder) < 1e-5
    if file.endswith("safetensors"):
        with safe_open(folder / file, "pt") as opened:
            facts = json.loads(opened.metadata()["lora_adapter_metadata"]) | change
        save_file(load_file(folder / file), folder / file, {"format": "pt", "lora_adapter_metadata": json.dumps(facts)})
    else:
        told = json.loads((folder / file).read_text())
        told |= {"call": told["call"] | change} if "call" in told else change
        (folder / file).write_text(json.dumps(told))
    try:
        assert verify_student(folder) > 1e-3
    except StudentError as error:
        assert "sigmas" in change or "shift" in change, error
        assert "timesteps" in str(error)


# the network


def test_the_lora_is_on_all_layers_of_attention_and_feed_forward_and_the_loss_reaches_each(pipe):
    targets = FAMILY.lora_targets(pipe.transformer)
    assert len(targets) == 7 * (2 + 1 + 1) and len(set(targets)) == len(targets)
    assert all(name.split(".")[0] in ("layers", "noise_refiner", "context_refiner") for name in targets)
    part, gradients = batch("z_image", pipe), []
    bone = backbone("z_image", pipe)
    bone.add("student", Lora())
    awake(bone, "student")
    for recomputed in (False, True):
        if recomputed:
            bone.enable_checkpointing()
        with bone.use("student") as net:
            FAMILY.call(net, part.latents, TIMES, part.cond).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in bone.parameters_of("student").items()})
        for p in bone.parameters_of("student").values():
            p.grad = None
    assert all(grad.any() for grad in gradients[0].values())
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_head_reads_the_image_s_tokens_whatever_the_caption_s_length(pipe):
    """They come first in the sequence, and are filled up: 6 x 12 latents are 18 tokens, and 14 of padding."""
    net, x, seen = pipe.transformer, torch.randn(2, 4, 6, 12), []
    bone = backbone("z_image", pipe)
    denoiser = Denoiser(bone, TEACHER, FAMILY.schedule(pipe.scheduler), "flow", FAMILY.call)
    family = replace(FAMILY, max_sequence_length=64)
    for prompts in (PROMPTS, ("a red apple", " ".join(["dog"] * 40))):  # of one 32 tokens, and of two
        cond = family.condition(pipe, prompts)
        handle = net.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        family.call(net, x, TIMES, cond)
        handle.remove()
        found = denoiser.features(x, TIMES, cond)
        assert found.shape == (2, 48, 3, 6)
        for row in range(3):
            for column in range(6):
                assert torch.equal(found[:, :, row, column], seen[-1][:, 6 * row + column])
    assert [states.shape[1] for states in seen] == [64, 96]


@torch.no_grad()
def test_a_narrow_network_keeps_the_width_of_its_heads(pipe):
    slim = FAMILY.narrow(pipe.transformer, 0.5)
    assert (slim.config["dim"], slim.config["n_heads"], slim.config["n_kv_heads"]) == (24, 1, 1)
    cond = FAMILY.condition(pipe, PROMPTS)
    assert FAMILY.call(slim, torch.randn(2, 4, 8, 8), TIMES, cond).shape == (2, 4, 8, 8)
    with torch.device("meta"):
        whole = FAMILY.narrow(ZImageTransformer2DModel(n_layers=1), 0.5)
    assert (whole.config["dim"], whole.config["n_heads"], whole.config["n_layers"]) == (1920, 15, 1)


def test_sizes_and_lengths_for_which_the_network_has_no_places_are_refused(pipe, tmp_path):
    """Its tables would be left with an IndexError, in the first step."""
    assert FAMILY.latent_shape(pipe, 512, 512) == (4, 128, 128)  # 64 tokens a side
    for size in ((520, 32), (32, 520), (36, 32)):
        with pytest.raises(ConfigError, match="sides that are multiples of 8, at most 512"):
            FAMILY.latent_shape(pipe, *size)
    net, cond = pipe.transformer, FAMILY.condition(pipe, ["rose"])
    with pytest.raises(IndexError), torch.no_grad():
        FAMILY.call(net, torch.randn(1, 4, 130, 8), TIMES[:1], cond)
    pipe.save_pretrained(tmp_path)
    for length, good in ((224, True), (225, False)):  # of 256 places the prompt has 32 k, and the image one more
        family = replace(FAMILY, pretrained_teacher_model=str(tmp_path), max_sequence_length=length)
        states = {"states": torch.randn(1, length, 32), "mask": torch.ones(1, length, dtype=torch.bool)}
        if good:
            family.check_files()
            with torch.no_grad():
                family.call(net, torch.randn(1, 4, 8, 8), TIMES[:1], states)
            continue
        with pytest.raises(ConfigError, match="max_sequence_length 225, expected at most 224"):
            family.check_files()
        with pytest.raises(IndexError), torch.no_grad():
            family.call(net, torch.randn(1, 4, 8, 8), TIMES[:1], states)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"siglip_feat_dim": 16}, "siglip_feat_dim 16, expected None"),
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, "all_patch_size .2, 4., expected .2."),
        ({"cap_feat_dim": 48}, "cap_feat_dim 48, expected 32"),
        ({"in_channels": 8}, "in_channels 8, expected 4"),
    ],
)
def test_a_network_that_the_pipeline_calls_otherwise_is_refused(pipe, tmp_path, change, match):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=match):
        replace(FAMILY, pretrained_teacher_model=str(tmp_path)).check_files()


# teachers, and runs

NAMES = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_in_the_original_layout_is_the_same_network(pipe, tmp_path, prefix):
    """The other parts are those of `single_file_config`; of a file Diffusers reads none of them for Z-Image."""
    pipe.save_pretrained(tmp_path / "folder")
    state, file = dict(pipe.transformer.state_dict()), tmp_path / "model.safetensors"
    for block in [name.removesuffix("to_q.weight") for name in state if name.endswith("to_q.weight")]:
        state[f"{block}qkv.weight"] = torch.cat([state.pop(f"{block}to_{x}.weight") for x in "qkv"])
    for ours, theirs in NAMES.items():
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, file)
    family = replace(FAMILY, pretrained_teacher_model=str(file))
    with pytest.raises(ConfigError, match="expected family.single_file_config with a text_encoder"):
        family.load()
    loaded: Any = replace(family, single_file_config=str(tmp_path / "folder")).load()
    for name in ("transformer", "vae", "text_encoder"):
        expected, got = pipe.components[name].state_dict(), loaded.components[name].state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    assert loaded.scheduler.config.shift == 6.0


def run(folder: Path, method: Any) -> Run:  # noqa: ANN401
    pipeline("z_image").save_pretrained(folder / "teacher")
    source = Prompts(prompts=("rose", "a small blue circle on the left of a large dog"))
    data = Trajectories(source=source, folder=str(folder / "made"), count=2) if method.needs - {"prompts"} else source
    spec = TrainSpec(output_dir=str(folder / "out"), train_batch_size=2, resolution=32, report_to="none")
    family = replace(FAMILY, pretrained_teacher_model=str(folder / "teacher"))
    return Run(family=family, method=method, data=data, lora=LoraSpec(rank=2), train=spec)


def test_guidance_adapters_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there are no guidance adapters for this family") as caught:
        dry_run(run(tmp_path, AdapterGuidance(width=8)))
    assert "\n" not in str(caught.value)
