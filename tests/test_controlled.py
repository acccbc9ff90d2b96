"""Training with a ControlNet in the loop: what networks compute, what a run learns, what the contract records."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_control import edges as noisy_image
from tiny import FAMILIES, SIDE, backbone, controlnet, pipeline
from torch import Tensor

from stepdistill.core.denoise import CONTROL, guided, without_prompt
from stepdistill.core.errors import ConfigError
from stepdistill.core.prediction import Estimate
from stepdistill.core.trigflow import central_difference, tangent
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.data.control import edges
from stepdistill.families.controlled import Controlled, with_control
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, LoraSpec
from stepdistill.students.base_model import controlnet_hash
from stepdistill.students.contract import WEIGHTS, read_contract
from stepdistill.students.load import load_student
from stepdistill.training.checks import check_control, check_run
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare

EACH = pytest.mark.parametrize("name", ["sd", "sana"])


def family_of(name: str) -> Controlled:
    family = FAMILIES[name]
    assert isinstance(family, Controlled)
    return family


@EACH
def test_the_networks_compute_what_the_stock_pipeline_computes(name):
    family, pipe = family_of(name), pipeline(name)
    assert family.controls is not None
    net, control = family.network(pipe), controlnet(name, pipe)
    both = family.controls.pipeline_of(pipe, control)
    seen, signature = [], inspect.signature(net.forward)

    def after(_, args, kwargs, output):
        given = signature.bind(*args, **kwargs).arguments
        seen.append((given.get("sample", given.get("hidden_states")), given["timestep"], output[0]))

    handle = net.register_forward_hook(after, with_kwargs=True)
    call = family.arguments() | family.guidance(1.0) | {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    image = noisy_image(0)
    both("red apple", **{family.controls.image: image}, output_type="latent", **call)
    handle.remove()
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    cond = {**family.condition(pipe, ["red apple"]), CONTROL: family.prepared_control(pipe, pixels / 255)}
    assert len(seen) == 2
    for x_t, t, y in seen:
        t = torch.as_tensor(t, dtype=torch.float32).flatten()
        made = with_control(family, control, net, x_t, t, cond)
        assert torch.allclose(made, y, rtol=0, atol=1e-5)
        assert (with_control(family, None, net, x_t, t, cond) - y).abs().max() > 0.01


@EACH
def test_zeroed_outputs_change_no_bit_and_a_gradient_passes_through_the_control_net(name):
    family, pipe = family_of(name), pipeline(name)
    net = family.network(pipe)
    x, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([999.0, 300.0])
    cond = {
        **family.condition(pipe, ["rose", "octopus"]),
        CONTROL: family.control_rows(pipe, torch.randn(2, 3, 32, 32)),
    }
    plain = family.call(net, x, t, cond)
    assert torch.equal(with_control(family, controlnet(name, pipe, 0.0), net, x, t, cond), plain)
    control = controlnet(name, pipe)
    out = with_control(family, control, net, x, t, cond)
    (through,) = torch.autograd.grad(out.square().sum(), x)
    fixed = {
        key: [part.detach() for part in value] if isinstance(value, list | tuple) else value.detach()
        for key, value in family.residuals(control, x, t, cond).items()
    }
    (around,) = torch.autograd.grad(family.call(net, x, t, cond, **fixed).square().sum(), x)
    assert (through - around).abs().max() > 1e-3
    assert all(p.grad is None and not p.requires_grad for p in control.parameters())


@EACH
def test_the_derivative_along_the_inputs_passes_through_the_control_net(name):
    """Zeroed outputs change no bit of it; with others it is the central difference, in float64."""
    family, pipe = family_of(name), pipeline(name)
    nets = {"zero": controlnet(name, pipe, 0.0), "some": controlnet(name, pipe), "none": None}
    bone = backbone(name, pipe)
    schedule = family.schedule(pipe.scheduler)
    x, dx = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([900.3, 300.6], dtype=torch.float64)
    cond = {
        **family.condition(pipe, ["rose", "octopus"]),
        CONTROL: family.control_rows(pipe, torch.randn(2, 3, 32, 32)),
    }
    cond = {key: value.double() if value.is_floating_point() else value for key, value in cond.items()}
    bone.net.double()
    found = {}
    for key, net in nets.items():
        call = partial(with_control, family, None if net is None else net.double())
        denoiser = Denoiser(bone, TEACHER, schedule, family.kind(pipe), call)
        given = (denoiser, schedule, x, schedule.angle(t), t, cond, dx)
        found[key] = tangent(*given)
        if key == "some":
            assert (central_difference(*given, 0.05) - found[key]).norm() < 2e-3 * found[key].norm()
    assert torch.equal(found["zero"], found["none"])
    assert (found["some"] - found["none"]).norm() > 0.05 * found["none"].norm()


def test_guidance_keeps_the_control_of_each_sample():
    rows: list[Tensor] = []

    def denoise(x_t, t, cond):
        rows.append(cond[CONTROL])
        return Estimate(x_t, x_t)

    control = torch.arange(2.0).view(2, 1)
    guided(denoise, {"states": torch.zeros(1, 1)}, 3.0)(torch.zeros(2, 1), torch.zeros(2), {CONTROL: control})
    assert torch.equal(rows[0], torch.cat([control, control]))


def test_edges_are_one_beside_a_straight_edge_and_zero_elsewhere():
    pixels = torch.full((1, 3, 4, 6), -1.0)
    pixels[..., 3:] = 1
    expected = torch.tensor([0.0, 0, 1, 1, 0, 0]).expand(1, 3, 4, 6)
    assert torch.equal(edges(pixels), expected)
    assert torch.equal(edges(pixels.transpose(2, 3)), expected.transpose(2, 3))


def run_of(place: Path, name: str, out: str, control: str | None) -> Run:
    family = replace(family_of(name), pretrained_teacher_model=str(place / "teacher"), controlnet=control)
    prompts = Prompts(prompts=("red apple", "rose", "octopus"))
    samples = TeacherSamples(source=prompts, folder=str(place / "samples"), count=4, num_inference_steps=2)
    spec = TrainSpec(
        output_dir=str(place / out), max_train_steps=2, train_batch_size=2, learning_rate=1e-2, report_to="none"
    )
    method = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, ema_decay=None, loss_type="l2")
    return Run(family=family, method=method, data=samples, lora=LoraSpec(rank=2, alpha=3), train=spec)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Of each family a teacher, a ControlNet, one whose outputs are zeros, and students that were trained with them."""

    class Places(dict):
        def __missing__(self, name: str) -> Path:
            place = self[name] = tmp_path_factory.mktemp(name)
            pipe = pipeline(name)
            pipe.save_pretrained(place / "teacher")
            controlnet(name, pipe).save_pretrained(place / "control")
            controlnet(name, pipe, 0.0).save_pretrained(place / "zero")
            for out, control in (("none", None), ("with-zero", "zero"), ("with", "control")):
                distill(run_of(place, name, out, control and str(place / control)))
            return place

    return Places()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@EACH
def test_a_zeroed_control_net_trains_the_plain_student_and_another_does_not(places, name):
    """The first loss is the same bit for bit. Then the zeros, in gradients that are sums, change what is rounded."""
    outs = [places[name] / out for out in ("none", "with-zero", "with")]
    plain, zero, steered = map(losses, outs)
    assert zero[0] == plain[0] != steered[0] and zero[1] == pytest.approx(plain[1], rel=1e-5)
    none, same, other = (torch.cat([v.flatten() for _, v in sorted(load_file(out / WEIGHTS).items())]) for out in outs)
    assert (same - none).norm() < 1e-3 * none.norm() and (other - none).norm() > 0.01 * none.norm()


def test_the_contract_names_the_control_net_and_sampling_without_it_is_noticed(places, caplog):
    place, family = places["sd"], family_of("sd")
    assert family.controls is not None
    control, zero = (family.controls.read(str(place / name)) for name in ("control", "zero"))
    contract = read_contract(place / "with")
    assert contract.controlnet == controlnet_hash(control) == controlnet_hash(control.to(torch.bfloat16))
    assert contract.controlnet != controlnet_hash(zero) and read_contract(place / "none").controlnet is None
    assert contract.family["controlnet"] == str(place / "control")
    said = "trained with the ControlNet"

    def warned(student: str, *nets) -> bool:
        caplog.clear()
        pipe = replace(family, pretrained_teacher_model=str(place / "teacher")).load()
        load_student(family.controls.pipeline_of(pipe, *nets) if nets else pipe, place / student)
        return said in caplog.text

    with caplog.at_level(logging.WARNING):
        assert warned("with") and warned("with", zero)
        assert not warned("with", control.float()) and not warned("none", zero)


def test_what_the_control_net_sees_comes_from_pixels_or_from_latents(places):
    place = places["sd"]
    session = prepare(run_of(place, "sd", "batch", str(place / "control")).resolved())
    (batch,) = next(session.batches.steps(session.run.data, 0, 0, 1))
    family = session.run.family
    assert isinstance(family, Controlled) and batch.latents is not None
    with torch.no_grad():
        expected = edges(family.decode(session.pipe, batch.latents))
    assert torch.equal(batch.cond[CONTROL], expected) and expected.std() > 0.01
    assert session.controlnet is not None and not any(p.requires_grad for p in session.controlnet.parameters())


def test_the_memory_of_a_run_is_predicted_and_says_what_it_leaves_out(places):
    run = run_of(places["sd"], "sd", "dry", str(places["sd"] / "control"))
    assert "family.controlnet is not counted" in dry_run(run)


def test_what_cannot_train_is_said_before_training(places, tmp_path):
    place = places["sd"]
    run = run_of(place, "sd", "odd", str(place / "control"))
    with pytest.raises(ConfigError, match="got family.controlnet with a Prompts source, expected one that provides"):
        check_control(replace(run, data=Prompts(prompts=("rose",))))
    with pytest.raises(ConfigError, match="edgs"):
        check_run(replace(run, family=replace(run.family, control="stepdistill.data.control.edgs")))
    controlnet("sd", pipeline("sd"), cross_attention_dim=48).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="cross_attention_dim 48, expected 32"):
        prepare(replace(run, family=replace(run.family, controlnet=str(tmp_path / "other"))))


def test_what_is_no_part_of_the_prompt_stays_without_it():
    cond = {"states": torch.ones(3, 2, 4), CONTROL: torch.rand(3, 1, 4, 4)}
    empty = without_prompt({"states": torch.zeros(1, 2, 4)}, cond)
    assert torch.equal(empty["states"], torch.zeros(3, 2, 4)) and empty[CONTROL] is cond[CONTROL]
    assert empty.keys() == cond.keys()
