"""Qwen-Image: the pipeline's own steps, prompts of unequal length, its guidance, its schedule, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_qwen_image import SCHEDULE, qwen_image
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, concatenated, guided
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.guidance import TokenNorm, on_estimates
from stepdistill.core.prediction import Estimate, estimate, output
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.families.qwen_image import UNUSED
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.roles import Adapters, Lora
from stepdistill.networks.taps import features_before
from stepdistill.students.draw.negative_prompt import negative_prompt
from stepdistill.students.write import write_student

FAMILY = tiny.FAMILIES["qwen_image"]
PROMPTS = ["a red cat", "a small blue circle on the left"]
SIZES = [(32, 32), (32, 48), (48, 16)]
FLOW = Rectified(1.0)


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    torch.manual_seed(0)
    made = qwen_image()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def own(pipe):
    """The pipeline, whose scheduler a test may replace."""
    before = pipe.scheduler
    yield pipe
    pipe.scheduler = before


def noise(height: int, width: int, seed: int = 3) -> Tensor:
    return torch.randn(2, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))


def drawn(pipe: Any, z: Tensor, scale: float, **call: Any) -> tuple[list[float], list[Tensor]]:
    """The levels of a call of the pipeline, and its latents after each step."""
    told, states = [], []

    def keep(_, i, t, kept):
        told.append(float(t) / 1000)
        states.append(FAMILY.unpack(kept["latents"].clone(), *z.shape[-2:]))
        return kept

    height, width = 4 * z.shape[-2], 4 * z.shape[-1]
    given = {"height": height, "width": width, "latents": FAMILY.pack(z), "output_type": "latent"}
    given |= FAMILY.arguments() | FAMILY.guidance(scale) | call
    pipe(prompt=PROMPTS, callback_on_step_end=keep, **given)
    return [*told, 0.0], states


def far(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max()).item()


# steps and guidance


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_step_of_the_pipeline_is_the_call_and_the_row(pipe, height, width, scale):
    z = noise(height, width)
    levels, states = drawn(pipe, z, scale, num_inference_steps=3)
    cond, null = FAMILY.condition(pipe, PROMPTS), FAMILY.unconditional(pipe)
    null = {key: value.expand(2, *value.shape[1:]) for key, value in null.items()}
    assert cond["mask"].sum(1).tolist() == [8, 12] and null["mask"].sum(1).tolist() == [5, 5]
    for i, state in enumerate(states):
        t = torch.full((2,), 1000 * levels[i])
        y = FAMILY.call(pipe.transformer, z, t, cond)
        if scale != 1:
            y = FAMILY.rule(FAMILY.call(pipe.transformer, z, t, null), y, scale, t)
        x0, eps = z - levels[i] * y, z + (1 - levels[i]) * y
        z = (1 - levels[i + 1]) * x0 + levels[i + 1] * eps
        assert far(z, state) < 1e-5
        z = state


def denoise(pipe: Any) -> Callable[[Tensor, Tensor, Condition], Estimate]:
    def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return estimate("flow", FAMILY.call(pipe.transformer, x_t, t, cond), x_t, t, FLOW)

    return call


@torch.no_grad()
def test_a_guided_estimate_with_a_null_of_another_length_is_two_calls_and_the_rule(pipe):
    """One scale, and one for each sample; by the norm of tokens of 2 x 2 latents and all channels."""
    x, t = noise(32, 48), torch.tensor([700.0, 300.0])
    cond, null = FAMILY.condition(pipe, PROMPTS), FAMILY.unconditional(pipe)
    combine = on_estimates(FAMILY.rule, "flow", FLOW)
    scales = torch.tensor([2.0, 6.0])
    made = guided(denoise(pipe), null, scales, combine)(x, t, cond)
    for i, scale in enumerate(scales.tolist()):
        one, at = x[i : i + 1], t[i : i + 1]
        c, u = (FAMILY.call(pipe.transformer, one, at, FAMILY.condition(pipe, [p])) for p in (PROMPTS[i], " "))
        c, u = FAMILY.pack(c), FAMILY.pack(u)
        y = u + scale * (c - u)
        y = FAMILY.unpack(y * c.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True), 8, 12)
        got = output("flow", Estimate(*(v[i : i + 1] for v in made)), at, FLOW)
        assert far(got, y) < 1e-5
        assert far(guided(denoise(pipe), null, scale, combine)(one, at, FAMILY.condition(pipe, [PROMPTS[i]])).x0,
                   made.x0[i : i + 1]) < 1e-5  # fmt: skip
    linear = guided(denoise(pipe), null, scales)(x, t, cond)
    assert far(output("flow", linear, t, FLOW), output("flow", made, t, FLOW)) > 1e-3
    assert FAMILY.rule == TokenNorm(2)


@torch.no_grad()
def test_guidance_always_departs_from_a_negative_prompt(pipe):
    """Without one the pipeline uses none, with no more than a warning."""
    z, steps = noise(32, 32), {"num_inference_steps": 2}
    assert FAMILY.guidance(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    assert FAMILY.guidance(1.0) == {"true_cfg_scale": 1.0}
    none, four = (drawn(pipe, z, scale, **steps)[1][-1] for scale in (1.0, 4.0))
    assert torch.equal(drawn(pipe, z, 4.0, negative_prompt=None, **steps)[1][-1], none)
    assert far(four, none) > 1e-3
    other = replace(FAMILY, negative_prompt="a dog")
    assert other.guidance(4.0)["negative_prompt"] == "a dog"
    assert torch.equal(other.unconditional(pipe)["states"], FAMILY.condition(pipe, ["a dog"])["states"])
    assert far(drawn(pipe, z, 4.0, negative_prompt="a dog", **steps)[1][-1], four) > 1e-4


# prompts


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompts", [PROMPTS, ["a red cat"] * 2, ["cat"], ["a red cat " * 20, "dog"], ["{} {0}", ""]])
def test_embeddings_are_those_of_the_pipeline(pipe, monkeypatch, prompts, side):
    """Cut alike, too, and where all tokens are true the pipeline has no mask."""
    monkeypatch.setattr(pipe.tokenizer, "padding_side", side)
    given = list(prompts)
    cond = FAMILY.condition(pipe, given)
    states, mask = pipe.encode_prompt(list(prompts), max_sequence_length=FAMILY.max_sequence_length)
    assert torch.equal(cond["states"], states)
    assert torch.equal(cond["mask"], torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool())
    assert given == list(prompts) and torch.equal(FAMILY.condition(pipe, given)["states"], states)


@torch.no_grad()
def test_filled_up_or_trimmed_it_is_the_same_prompt(pipe):
    x, t = noise(32, 48), torch.tensor([600.0, 200.0])
    cond = FAMILY.condition(pipe, PROMPTS)
    plain = FAMILY.call(pipe.transformer, x, t, cond)
    more = {key: value.new_zeros(1, value.shape[1] + 23, *value.shape[2:]) for key, value in cond.items()}
    longer = {key: value[:2] for key, value in concatenated(cond, more).items()}
    assert longer["mask"].shape[1] == 12 + 23
    assert far(FAMILY.call(pipe.transformer, x, t, longer), plain) < 1e-6
    for i in range(2):
        alone = {key: value[i : i + 1, : [8, 12][i]] for key, value in cond.items()}
        assert far(FAMILY.call(pipe.transformer, x[i : i + 1], t[i : i + 1], alone), plain[i : i + 1]) < 1e-5
    forgotten = {**longer, "mask": torch.ones_like(longer["mask"])}
    assert far(FAMILY.call(pipe.transformer, x, t, forgotten), plain) > 1e-2


@pytest.mark.parametrize("arch", ["cross_attention", "mixed", "offset"])
def test_guidance_adapters_do_not_see_what_fills_a_prompt_up(pipe, arch):
    bone = tiny.backbone("qwen_image", pipe)
    bone.add("student", Adapters(arch, 8))
    for p in bone.parameters_of("student").values():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    x, t = noise(32, 32), torch.tensor([600.0, 200.0])
    cond = FAMILY.condition(pipe, PROMPTS)
    more = {key: value.new_zeros(1, 40, *value.shape[2:]) for key, value in cond.items()}
    longer = {key: value[:2] for key, value in concatenated(cond, more).items()}
    with torch.no_grad(), bone.use("student", scale=torch.tensor([3.0, 5.0])) as net:
        made, same = (FAMILY.call(net, x, t, one) for one in (cond, longer))
    with torch.no_grad():
        assert far(made, FAMILY.call(pipe.transformer, x, t, cond)) > 1e-3
    assert far(same, made) < 1e-5


def test_a_tokenizer_of_another_template_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "prompt_template_encode", "system : Describe " + pipe.prompt_template_encode)
    with pytest.raises(ConfigError, match="makes 37 tokens of the template before the prompt, expected 34"):
        FAMILY.condition(pipe, ["a red cat"])


def test_the_limit_counts_the_template_s_end(pipe, caplog):
    """A prompt that fits is not cut, and one of a token more loses the end of the template, and then words."""
    assert FAMILY.limits(pipe) == {"tokenizer": 24 - 5}
    assert not warn_of_cut(FAMILY, pipe, ["cat " * 19])
    assert warn_of_cut(FAMILY, pipe, ["cat " * 19 + "dog"]) and "loses 'dog'" in caplog.text
    full, cut = (FAMILY.condition(pipe, ["cat " * n])["mask"].sum().item() for n in (19, 40))
    assert full == cut == 24
    assert FAMILY.arguments() == {"max_sequence_length": 24}


# noise levels


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (512, 768), (32, 48)])
@pytest.mark.parametrize("steps", [4, 50])
def test_the_teacher_s_solver_has_the_levels_of_its_pipeline_at_every_size(own, height, width, steps):
    tokens = FAMILY.tokens(own, height, width)
    assert tokens == height * width // 64  # 16 x 16 pixels a token at the published scale, 8 x 8 here
    theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
    mu = 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    ours, call = FAMILY.solver(own, steps, tokens)
    ours.set_timesteps(**call)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=1e-6)
    assert ours.sigmas[-2].item() == pytest.approx(0.02, abs=1e-6)
    schedule = FAMILY.schedule(own.scheduler, tokens)
    theirs.register_to_config(shift_terminal=None)
    theirs.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    torch.testing.assert_close(schedule.grid(steps).flip(0) / 1000, theirs.sigmas, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
@pytest.mark.parametrize("steps", [2, 5])
def test_the_levels_of_a_call_are_those_of_the_solver(own, height, width, steps):
    z = noise(height, width)
    levels, states = drawn(own, z, 1.0, num_inference_steps=steps)
    own.scheduler, call = FAMILY.solver(own, steps, FAMILY.tokens(own, height, width))
    again, same = drawn(own, z, 1.0, **call)
    assert again == pytest.approx(levels, abs=1e-6) and far(same[-1], states[-1]) < 1e-5


def test_the_native_shift_is_that_of_1024_pixels(pipe):
    assert FAMILY.schedule(pipe.scheduler).shift == pytest.approx(2.0, abs=5e-3)  # not e ** 0.9
    assert FAMILY.schedule(pipe.scheduler, 1024).shift == pytest.approx(1.714, abs=1e-3)
    assert FAMILY.schedule(FlowMatchEulerDiscreteScheduler(shift=3.0)).shift == 3.0


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("n", range(1, 9))
def test_a_student_visits_its_levels_whatever_the_teacher_s_scheduler(own, n, eta):
    times = tuple(1000 - 980 * i / n for i in range(n))
    stock, call = FAMILY.scheduler(own, Sampler(times, eta=eta))
    own.scheduler = FlowMatchEulerDiscreteScheduler.from_config(json.loads(json.dumps(dict(stock.config))))
    levels, states = drawn(own, noise(32, 32), 1.0, **call)
    assert [1000 * level for level in levels[:-1]] == pytest.approx(times, rel=1e-6)
    assert states[-1].isfinite().all()


@torch.no_grad()
def test_one_step_of_the_teacher_s_solver_is_finite(own):
    """With its `shift_terminal` it is 0 / 0."""
    z = noise(32, 32)
    assert drawn(own, z, 1.0, num_inference_steps=1)[1][-1].isnan().all()
    own.scheduler, call = FAMILY.solver(own, 1)
    assert drawn(own, z, 1.0, **call)[1][-1].isfinite().all()


# the proof


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("teacher")
    pipe.save_pretrained(place)
    return place


def student(folder: Path, out: Path, **changes: Any) -> float:
    family = replace(FAMILY, pretrained_teacher_model=str(folder))
    pipe = family.load()
    bone = tiny.backbone("qwen_image", pipe, 4, 10.0)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    method = replace(DMD2(timesteps=(1000.0, 937.5, 833.3, 625.0), ema_decay=None), **changes)
    return write_student(
        out, family=family, pipe=pipe, backbone=bone, role="student", method=method, resolution=(32, 48), seed=3
    )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_student_of_unequal_sides_is_proven(folder, tmp_path, eta):
    assert student(folder, tmp_path, eta=eta) < 1e-5
    contract = json.loads((tmp_path / "distill_config.json").read_text())
    assert contract["scheduler"]["shift"] == 1.0 and not contract["scheduler"]["shift_terminal"]
    assert not contract["scheduler"]["use_dynamic_shifting"]
    assert contract["call"]["true_cfg_scale"] == 1.0 and "negative_prompt" not in contract["call"]
    assert contract["call"]["max_sequence_length"] == 24


SPOILT = {
    "the teacher's levels": ("scheduler", lambda self, pipe, sampler: (pipe.scheduler, {"num_inference_steps": 4})),
    "the terminal kept": (
        "scheduler",
        lambda self, pipe, sampler: (
            FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, stochastic_sampling=sampler.eta == 1),
            {"sigmas": [t / 1000 for t in sampler.timesteps], "num_inference_steps": 4},
        ),
    ),
    "guided without saying so": ("guidance", lambda self, scale: {"true_cfg_scale": 4.0, "negative_prompt": "cat"}),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_student_is_not_proven(folder, tmp_path, monkeypatch, fault):
    name, other = SPOILT[fault]
    monkeypatch.setattr(type(FAMILY), name, other)
    with pytest.raises(StudentError, match=r"timesteps \[1000.0, .* in a plain pipeline|a difference of 0\.\d"):
        student(folder, tmp_path)


def test_a_proof_fails_with_another_alpha(folder, tmp_path, monkeypatch):
    before = type(FAMILY).save_lora
    monkeypatch.setattr(
        type(FAMILY),
        "save_lora",
        lambda self, place, state, config, *rest: before(self, place, state, config | {"lora_alpha": 4.0}, *rest),
    )
    with pytest.raises(StudentError, match=r"a difference of 0\.\d"):
        student(folder, tmp_path)


# layers


@torch.no_grad()
@pytest.mark.parametrize("negative", ["dog", "a large green dog on a yellow apple"])
def test_a_negative_prompt_in_attention_is_that_prompt_s_own_attention(pipe, negative):
    """In the first block, whose image is the same with either prompt: of any length and at any size."""
    x, t = noise(32, 48), torch.tensor([600.0, 200.0])

    def attended(prompts: list[str]) -> Tensor:
        seen, layer = [], pipe.transformer.transformer_blocks[0].attn.to_out[0]
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        FAMILY.call(pipe.transformer, x, t, FAMILY.condition(pipe, prompts))
        handle.remove()
        return seen[-1]

    positive, other = attended(PROMPTS), attended([negative] * 2)
    with negative_prompt(pipe, negative, 0.6, family=FAMILY):
        made = attended(PROMPTS)
    assert far(made, positive - 0.6 * other) < 1e-5
    assert far(made, positive) > 1e-2
    with negative_prompt(pipe, [negative, "a cat"], 0.6, family=FAMILY):
        torch.testing.assert_close(attended(PROMPTS)[:1], made[:1], rtol=1e-4, atol=1e-5)


def test_the_layers_without_effect_are_those_that_get_no_lora(pipe):
    net = pipe.transformer
    net.requires_grad_(True)
    cond = FAMILY.condition(pipe, PROMPTS)
    FAMILY.call(net, noise(32, 48), torch.tensor([600.0, 200.0]), cond).square().sum().backward()
    linear = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    dead = {n for n, layer in linear.items() if layer.weight.grad is None or not layer.weight.grad.any()}
    net.zero_grad()
    net.requires_grad_(False)
    assert dead == {f"transformer_blocks.1.{name}" for name in UNUSED}
    targets = set(FAMILY.lora_targets(net))
    assert len(targets) == 2 * 12 - 4 and not targets & dead
    assert not any("_mod" in name for name in targets)


@torch.no_grad()
def test_features_are_the_image_s_tokens_whatever_the_prompt_s_length(pipe):
    seen, tap = {}, FAMILY.tap(pipe.transformer)
    block = pipe.transformer.get_submodule(tap.before)
    handle = block.register_forward_pre_hook(lambda m, args, given: seen.update(given), with_kwargs=True)
    x, t = noise(32, 48), torch.tensor([600.0, 200.0])
    cond = FAMILY.condition(pipe, PROMPTS)
    FAMILY.call(pipe.transformer, x, t, cond)
    handle.remove()
    tokens = seen["hidden_states"]
    assert tokens.shape == (2, 4 * 6, tap.channels) and (tap.patch, tap.side) == (2, 64)
    (made,) = features_before(pipe.transformer, [tap], x, lambda: FAMILY.call(pipe.transformer, x, t, cond))
    torch.testing.assert_close(made, tokens.transpose(1, 2).unflatten(2, (4, 6)))


# the autoencoder


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_decodes_them(pipe):
    z = noise(32, 48)
    call = FAMILY.arguments() | {"height": 32, "width": 48, "latents": FAMILY.pack(z), "num_inference_steps": 2}
    latents = FAMILY.unpack(pipe(prompt=PROMPTS, output_type="latent", **call).images, 8, 12)
    theirs = pipe(prompt=PROMPTS, output_type="pt", **call).images
    pixels = FAMILY.decode(pipe, latents)
    assert pixels.shape == (2, 3, 32, 48)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-5)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
    coded = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(FAMILY.encode(pipe, pixels), (coded - mean) / std)


def test_a_gradient_passes_where_a_pixel_is_beyond_its_end(pipe, monkeypatch):
    """The autoencoder's own `decode` clamps there."""
    monkeypatch.setattr(pipe.vae.decoder.conv_out, "bias", nn.Parameter(torch.full((3,), 2.0)))
    latents = noise(32, 32).requires_grad_()
    pixels = FAMILY.decode(pipe, latents)
    assert pixels.min() > 1
    pixels.square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().max() > 1e-6


def test_sides_are_multiples_of_16_pixels_at_the_published_scale(pipe):
    """The pipeline rounds others down, with a warning alone."""
    assert FAMILY.latent_shape(pipe, 32, 48) == (4, 8, 12)
    with pytest.raises(ConfigError, match="multiples of 8"):  # the tiny autoencoder's factor is 4, and not 8
        FAMILY.latent_shape(pipe, 32, 44)
    assert FAMILY.native_size(pipe) == (512, 512)


# teachers


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("model_index", {"_class_name": "QwenImage21Pipeline"}, "a QwenImage21Pipeline in .*, expected a QwenImageP"),
        ("model_index", {"_class_name": "QwenImageEditPlusPipeline"}, "a QwenImageEditPlusPipeline in .*, expected a"),
        ("model_index", {"_class_name": "QwenImageLayeredPipeline"}, "a QwenImageLayeredPipeline in .*, expected a "),
        ("transformer/config", {"zero_cond_t": True}, "a transformer of .* with zero_cond_t True, expected False"),
        ("transformer/config", {"use_layer3d_rope": True}, "with use_layer3d_rope True, expected False"),
        ("transformer/config", {"guidance_embeds": True}, "with guidance_embeds True, expected False"),
        ("transformer/config", {"in_channels": 64}, "with in_channels 64, expected 16"),
        ("transformer/config", {"joint_attention_dim": 48}, "with joint_attention_dim 48, expected 32"),
        ("vae/config", {"input_channels": 4}, "a vae of .* with input_channels 4, expected 3"),
    ],
)
def test_other_pipelines_of_the_same_makers_are_refused(folder, tmp_path, part, change, said):
    place = shutil.copytree(folder, tmp_path / "copy")
    edited(place / f"{part}.json", **change)
    with pytest.raises(ConfigError, match=said):
        replace(FAMILY, pretrained_teacher_model=str(place)).check_files()


def test_a_pipeline_for_another_task_of_the_same_model_is_read(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "copy")
    edited(place / "model_index.json", _class_name="QwenImageImg2ImgPipeline")
    replace(FAMILY, pretrained_teacher_model=str(place)).check_files()


def test_a_single_file_is_refused(tmp_path):
    file = tmp_path / "qwen_image.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="reads no single file into a QwenImagePipeline"):
        replace(FAMILY, pretrained_teacher_model=str(file)).check_files()
