"""FLUX.2 klein: every step of its pipeline, its conditions, latents, schedule and layers."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import loras
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from safetensors.torch import save_file
from tiny_klein import FAMILY, klein
from torch import Tensor

from stepdistill.core.denoise import guided
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.prediction import estimate
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.read import check_plain, guess, read_lora
from stepdistill.networks.lora.tensors import lora_tensors, parse_lora
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.pipeline import StudentPipeline

PROMPTS = ["red apple", "a small blue circle on a large green heart"]  # of two and nine tokens
SIZES = [(32, 32), (32, 48)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    made = klein()
    made.set_progress_bar_config(disable=True)
    return made


def noise_of(pipe: Any, height: int, width: int, seed: int = 3) -> Tensor:
    shape = FAMILY.latent_shape(pipe, height, width)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(seed))


def drawn(pipe: Any, noise: Tensor, size: tuple[int, int], **call: Any) -> tuple[Tensor, list[Tensor], list[float]]:
    """The pipeline's latents, those after each step, and the timesteps."""
    states, times = [], []

    def keep(_: Any, i: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(FAMILY.unpack(given["latents"].clone(), *noise.shape[-2:]))
        times.append(float(t))
        return given

    height, width = size
    call = {**FAMILY.arguments(), "height": height, "width": width, "callback_on_step_end": keep, **call}
    made = pipe(prompt=list(PROMPTS), latents=FAMILY.pack(noise), output_type="latent", **call)[0]
    return FAMILY.latents_of(pipe, made, *noise.shape[-2:]), states, times


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_every_step_of_the_pipeline_is_a_call_and_the_row_of_a_flow(pipe, size, scale):
    noise = noise_of(pipe, *size)
    last, states, times = drawn(pipe, noise, size, num_inference_steps=3, **FAMILY.guidance(scale))
    cond, null = FAMILY.condition(pipe, PROMPTS), FAMILY.unconditional(pipe)
    levels, x = pipe.scheduler.sigmas.tolist(), noise
    for i, (t, state) in enumerate(zip(times, states, strict=True)):
        time = torch.full((2,), t)
        y = FAMILY.call(pipe.transformer, x, time, cond)
        if scale != 1:
            u = FAMILY.call(pipe.transformer, x, time, {"states": null["states"].expand(2, -1, -1)})
            assert (y - u).abs().max() > 1e-3
            y = u + scale * (y - u)
        x = x + (levels[i + 1] - levels[i]) * y
        assert (x - state).abs().max() < 1e-5 * state.abs().max()
    assert (last - x).abs().max() < 1e-5 * x.abs().max()


def test_guidance_of_1_is_none_in_the_pipeline(pipe):
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    for scale, count in ((1.0, 2), (1.5, 4)):
        calls.clear()
        drawn(pipe, noise_of(pipe, 32, 32), (32, 32), num_inference_steps=2, **FAMILY.guidance(scale))
        assert len(calls) == count
    handle.remove()


@torch.no_grad()
def test_the_network_attends_to_the_padding(pipe):
    """So a cache must keep all of it; and the padding of two prompts differs."""
    noise, time = noise_of(pipe, 32, 32), torch.full((2,), 600.0)
    cond = FAMILY.condition(pipe, PROMPTS)
    states = cond["states"]
    assert states.shape == (2, 24, 96) and (states[0, -1] - states[1, -1]).abs().max() > 1e-3
    y = FAMILY.call(pipe.transformer, noise, time, cond)
    trimmed = FAMILY.call(pipe.transformer, noise, time, {"states": states[:, :16]})  # the first prompt's own tokens
    assert (trimmed - y)[0].abs().max() > 1e-3 * y.abs().max()
    assert not FAMILY.ragged


def test_conditions_repeat_and_leave_the_prompts_as_they_are(pipe):
    prompts = list(PROMPTS)
    first, second = FAMILY.condition(pipe, prompts), FAMILY.condition(pipe, prompts)
    assert prompts == PROMPTS and torch.equal(first["states"], second["states"])
    given = FAMILY.condition(pipe, PROMPTS[1:])["states"]
    torch.testing.assert_close(first["states"][1:], given, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="with 4, expected at most 3"):
        replace(FAMILY, text_encoder_out_layers=(1, 2, 4)).condition(pipe, PROMPTS)


# latents


def test_latents_are_encoded_as_the_pipeline_encodes_images(pipe):
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipe._encode_vae_image(pixels, None)
    assert torch.equal(FAMILY.encode(pipe, pixels), expected) and expected.shape == (2, 16, 8, 12)
    pipe.vae.train()  # the batch norm is not of this batch
    assert torch.equal(FAMILY.encode(pipe, pixels), expected)
    pipe.vae.eval()


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_decodes_them(pipe):
    made, call = {}, {"num_inference_steps": 2, "height": 32, "width": 48, **FAMILY.arguments()}
    for kind in ("latent", "pt"):
        noise = noise_of(pipe, 32, 48)
        made[kind] = pipe(prompt=list(PROMPTS), latents=noise, output_type=kind, **call)[0]
    latents = FAMILY.latents_of(pipe, made["latent"], 8, 12)
    assert made["latent"].shape == (2, 4, 16, 24) and latents.shape == (2, 16, 8, 12)
    pixels = FAMILY.decode(pipe, latents)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), made["pt"], atol=1e-6, rtol=0)


def test_tokens_and_the_argument_come_back_as_latents(pipe):
    latents = noise_of(pipe, 32, 48)
    assert torch.equal(FAMILY.unpack(Flux2KleinPipeline._pack_latents(latents), 8, 12), latents)
    assert torch.equal(FAMILY.unpack(FAMILY.pack(latents), 8, 12), latents)


# the student


@torch.no_grad()
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_a_student_s_scheduler_visits_its_levels_and_draws_as_we_do(size, eta):
    torch.manual_seed(0)
    pipe: Any = klein()  # whose scheduler has a dynamic shift
    pipe.set_progress_bar_config(disable=True)
    noise, cond = noise_of(pipe, *size), FAMILY.condition(pipe, PROMPTS)
    schedule = FAMILY.schedule(pipe.scheduler)

    def denoise(x_t, t, cond):
        return estimate("flow", FAMILY.call(pipe.transformer, x_t, t, cond), x_t, t, schedule)

    for count in range(1, 9):
        times = tuple(1000 * (1 - i / (count + 0.5)) for i in range(count))
        sampler = Sampler(times, eta, guidance_scale=2.0)
        scheduler, call = FAMILY.scheduler(pipe, sampler)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler.config))
        torch.manual_seed(5)
        last, _, visited = drawn(pipe, noise, size, **call, **FAMILY.guidance(2.0))
        assert visited == pytest.approx(times, rel=1e-6)
        torch.manual_seed(5)
        with_guidance = guided(denoise, FAMILY.unconditional(pipe), 2.0)
        ours = few_step(with_guidance, schedule, sampler, noise, cond, lambda i, x=noise: FAMILY.fresh(x))
        assert last.isfinite().all() and (last - ours).abs().max() < 1e-5 * ours.abs().max()


def test_levels_that_the_teacher_s_scheduler_would_shift_again_are_not_the_student_s(pipe):
    scheduler, call = FAMILY.scheduler(pipe, Sampler((1000.0, 600.0), 0))
    assert not scheduler.config["use_dynamic_shifting"] and scheduler.config["shift_terminal"] is None
    _, _, shifted = drawn(pipe, noise_of(pipe, 32, 32), (32, 32), **call)  # with the teacher's
    assert shifted[1] > 700


# the schedule


@pytest.mark.parametrize(("side", "tokens"), [(64, 256), (256, 4096), (320, 6400)])
def test_the_schedule_is_the_pipeline_s_own_of_50_steps_at_each_size(monkeypatch, side, tokens):
    pipe: Any = klein()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    noise = noise_of(pipe, side, side)
    assert noise[0, 0].numel() == tokens
    call = {"latents": noise, "height": side, "width": side, "output_type": "latent", **FAMILY.arguments()}
    schedule = FAMILY.schedule(pipe.scheduler, tokens)
    for steps in (50, 8):
        pipe(prompt=PROMPTS, num_inference_steps=steps, **call)
        same = torch.allclose(schedule.grid(steps).flip(0), 1000 * pipe.scheduler.sigmas, rtol=0, atol=1e-3)
        assert same == (steps == 50 or tokens > 4300)  # of more tokens the shift is that of any number of steps
    if tokens == 4096:
        assert FAMILY.schedule(pipe.scheduler).shift == schedule.shift == pytest.approx(7.6, abs=0.05)


def test_a_shift_of_ours_and_a_fixed_one_of_the_scheduler_hold(pipe):
    assert replace(FAMILY, shift=3.0).schedule(pipe.scheduler, 4096).shift == 3.0
    assert FAMILY.schedule(FlowMatchEulerDiscreteScheduler(shift=2.0), 4096).shift == 2.0


# layers


def test_every_target_has_a_gradient_and_the_shared_modulation_may_be_named(pipe):
    net = klein().transformer
    targets = FAMILY.lora_targets(net)
    assert len(targets) == 2 * 12 + 2 * 2 and not any("modulation" in name for name in targets)
    shared = ["double_stream_modulation_img.linear", "double_stream_modulation_txt.linear"]
    bone = Backbone(net, LoraSpec(rank=2), [*targets, *shared, "single_stream_modulation.linear"])
    bone.add("student", Lora())
    for key, p in bone.parameters_of("student").items():
        p.data += 0.05 * torch.randn(p.shape) if "lora_B" in key else 0
    cond, x_t = FAMILY.condition(pipe, PROMPTS), noise_of(pipe, 32, 48)
    with bone.use("student") as used:
        FAMILY.call(used, x_t, torch.tensor([500.0, 900.0]), cond).square().sum().backward()
    without = [key for key, p in bone.parameters_of("student").items() if p.grad is None or not p.grad.any()]
    assert without == [] and len(bone.parameters_of("student")) == 2 * (len(targets) + 3)


# what the pipeline takes without a word


def test_a_teacher_that_ignores_guidance_is_refused(tmp_path):
    for distilled in (True, False):
        klein(is_distilled=distilled).save_pretrained(tmp_path)
        family = replace(FAMILY, pretrained_teacher_model=str(tmp_path))
        if distilled:
            with pytest.raises(ConfigError, match="is_distilled True, expected False: its pipeline ignores"):
                family.check_files()
        else:
            family.check_files()
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"is_distilled": false,', ""))  # Diffusers' default
    family.check_files()


def test_sides_that_the_pipeline_would_round_are_refused(pipe):
    with pytest.raises(ConfigError, match="images of 32 x 40 pixels, expected sides that are multiples of 16"):
        FAMILY.latent_shape(pipe, 32, 40)


def test_a_prompt_that_loses_the_end_of_its_chat_is_warned_of(pipe, caplog):
    fits = " ".join(["apple"] * 10)
    with caplog.at_level(logging.WARNING):
        assert not warn_of_cut(FAMILY, pipe, [fits])
        assert warn_of_cut(FAMILY, pipe, [f"{fits} heart"]) and "loses 'heart'" in caplog.text
    ids = [
        pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        for text in (fits, f"{fits} heart")
    ]
    assert [len(each) for each in ids] == [24, 25]


def test_a_negative_prompt_of_a_guided_student_is_refused(pipe):
    """Its call would end in a TypeError."""
    student: Any = SimpleNamespace(family=FAMILY, pipe=pipe)
    call = PipelineCall("student", pipe.scheduler, FAMILY.guidance(4.0), FAMILY)
    against = StudentPipeline.against
    with pytest.raises(StudentError, match="a negative prompt for a Flux2KleinPipeline, expected none"):
        against(student, "heart", call).__enter__()
    with against(student, None, call) as same:
        assert same is call


# LoRA files


def kohya(family: str, only: str = "") -> dict[str, Tensor]:
    made = loras.state(family, only=lambda name: only in name)
    return lora_tensors(parse_lora(made, loras.metadata(family), family).lora, "kohya", family)[0]


def test_files_of_klein_and_flux_are_told_apart_by_the_shapes_of_their_layers(tmp_path):
    """Their blocks have the same names in kohya's files; where no shape differs, none is guessed."""
    for family in ("klein", "flux"):
        for only in ("ff.", "attn."):  # of the second, the single blocks' alone differ
            assert guess(kohya(family, only), tmp_path).family == family
    double = {key: value for key, value in kohya("klein", "attn.").items() if "double" in key}
    with pytest.raises(ConfigError, match="fit flux and klein, .* the family is ambiguous"):
        guess(double, tmp_path)


def test_a_kohya_file_of_which_diffusers_loses_layers_is_no_lora_of_a_teacher(tmp_path):
    for only in ("attn.", ""):
        save_file(kohya("klein", only), tmp_path / "x.safetensors")
        read = read_lora(tmp_path / "x.safetensors", FAMILY.lora_layout()).lora
        assert len({layer.alpha for layer in read.values()}) == 1
        if only:
            check_plain(tmp_path / "x.safetensors", read, "klein")
        else:
            with pytest.raises(StudentError, match="in the kohya format.* --to diffusers"):
                check_plain(tmp_path / "x.safetensors", read, "klein")


def test_a_single_file_is_refused(tmp_path):
    file = tmp_path / "klein.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="Diffusers reads no single file into a Flux2KleinPipeline"):
        replace(FAMILY, pretrained_teacher_model=str(file)).check_files()
