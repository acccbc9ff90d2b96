"""Traps of the libraries below, each as it springs there and as it does not here. T1 is in test_convert.py, T2 in
test_formats.py, T10 in test_families.py."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from peft import LoraConfig
from tiny import FAMILIES, awake, backbone, pipeline
from torch.utils.checkpoint import CheckpointError

from stepdistill.core.solvers import Sampler
from stepdistill.networks.roles import TEACHER, Lora

FLOWS = ("sd3", "flux", "sana")
TABLES = ("sd", "sdxl", "pixart_alpha", "pixart_sigma")


def taken(name: str, sampler: Sampler) -> tuple[list[float], list[float]]:
    """Timesteps and sigmas that a pipeline of the family takes with what the family gives it."""
    pipe = pipeline(name)
    scheduler, call = FAMILIES[name].scheduler(pipe, sampler)
    steps = {key: call[key] for key in ("sigmas", "timesteps") if key in call}
    # Flux hands on a shift, which a scheduler without a dynamic one leaves aside
    steps |= {"mu": 1.15} if name in FLOWS else {}
    scheduler.set_timesteps(**(steps or {"num_inference_steps": call["num_inference_steps"]}))
    return scheduler.timesteps.tolist(), scheduler.sigmas.tolist() if name in FLOWS else []


@pytest.mark.parametrize("name", FLOWS)
def test_trap_t3_explicit_sigmas_are_warped_by_the_shift(name):
    wanted = [1.0, 0.75, 0.5, 0.25]
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(sigmas=wanted)
    assert stock.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    times, sigmas = taken(name, Sampler(tuple(1000 * sigma for sigma in wanted)))
    assert sigmas == pytest.approx([*wanted, 0]) and times == pytest.approx([1000, 750, 500, 250])


def test_trap_t4_explicit_timesteps_of_a_flow_go_without_their_sigmas():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(timesteps=[1000.0, 750.0, 500.0, 250.0])
    apart = (stock.sigmas[:-1] * 1000 - stock.timesteps).abs().max()
    assert apart > 1, "Diffusers keeps both alike now: contracts may name timesteps"
    for name in FLOWS:
        _, call = FAMILIES[name].scheduler(pipeline(name), Sampler((1000.0, 500.0)))
        assert "timesteps" not in call and call["sigmas"] == [1.0, 0.5]


def test_trap_t5_the_last_of_few_default_steps_has_next_to_no_noise():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(4)
    assert stock.sigmas[3] < 0.01
    for name in FLOWS:
        schedule = FAMILIES[name].schedule(pipeline(name).scheduler)
        assert schedule.grid(4)[1] > 200, name  # where the last of four steps begins, of 1000


@pytest.mark.parametrize("name", TABLES)
def test_trap_t6_few_step_schedulers_have_times_of_their_own(name):
    for stock in (LCMScheduler(), TCDScheduler()):
        stock.set_timesteps(4)
        assert stock.timesteps.tolist() == [999, 759, 499, 259]
    for eta in (0.0, 0.3, 1.0):
        assert taken(name, Sampler((999.0, 749.0, 499.0, 249.0), eta=eta))[0] == [999, 749, 499, 249]
        assert taken(name, Sampler((999.0, 700.0, 20.0), eta=eta))[0] == [999, 700, 20]


def network(checkpointing: bool):
    """A UNet with a LoRA by Diffusers' own way, an input, and a way to call it."""
    pipe = pipeline("sd")
    net, family = pipe.unet.requires_grad_(False), FAMILIES["sd"]
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    if checkpointing:
        net.train().enable_gradient_checkpointing()
    cond = family.condition(pipe, ["rose"])
    return net, lambda: family.call(net, torch.randn(1, 4, 8, 8), torch.tensor([500.0]), cond)


def ours(checkpointing: bool):
    pipe = pipeline("sd")
    bone, cond = backbone("sd", pipe, 2), FAMILIES["sd"].condition(pipe, ["rose"])
    for role in ("student", "fake"):
        bone.add(role, Lora())
        awake(bone, role)
    if checkpointing:
        bone.enable_checkpointing()

    def call(role: str) -> torch.Tensor:
        with bone.use(role) as net:
            return FAMILIES["sd"].call(net, torch.randn(1, 4, 8, 8), torch.tensor([500.0]), cond)

    return bone, call


def test_trap_t7_switching_adapters_off_before_backward_drops_their_gradients():
    net, call = network(False)
    y = call()
    net.disable_adapters()
    params = [p for key, p in net.named_parameters() if "lora_" in key]
    y.square().sum().backward()
    assert all(p.grad is None for p in params)
    bone, ask = ours(False)
    y = ask("student")
    with torch.no_grad():
        ask(TEACHER)
    y.square().sum().backward()
    assert all(p.grad is not None for p in bone.parameters_of("student").values())


def test_trap_t8_the_same_with_checkpointing_fails():
    net, call = network(True)
    y = call()
    net.disable_adapters()
    with pytest.raises((CheckpointError, RuntimeError)):
        y.square().sum().backward()
    bone, ask = ours(True)
    y = ask("student")
    with torch.no_grad():
        ask(TEACHER)
    y.square().sum().backward()
    assert all(p.grad is not None for p in bone.parameters_of("student").values())


def test_trap_t9_choosing_one_adapter_freezes_the_others():
    net, _ = network(False)
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="fake")
    net.set_adapter("fake")
    assert not any(p.requires_grad for key, p in net.named_parameters() if ".default." in key)
    bone, ask = ours(False)
    for role in ("fake", "student", "fake"):
        ask(role)
    for role in ("student", "fake"):
        assert all(p.requires_grad for p in bone.parameters_of(role).values()), role
