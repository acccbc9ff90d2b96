"""The base's first steps before a student's: which network runs when, and that all is as before afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from oracles import close
from oracles.context import stable_diffusion
from oracles.gaussian import GaussianTeacher, ddim_gain
from oracles.mixture import Mixture
from safetensors.torch import load_file

import stepdistill
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.prediction import Estimate
from stepdistill.core.solvers import Sampler, few_step, relay
from stepdistill.networks.pipeline_loras import adapters_on, attach, strengths, switch_on
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import WEIGHTS
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.base_first import base_first
from stepdistill.students.single import network_state

SD = stable_diffusion()
TIMES = (999.0, 749.0, 499.0, 249.0)
PROMPTS = ["red apple", "cat face"]


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noises(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(64, 1, 1, 1, generator=generator, dtype=torch.float64)


# between any two denoisers


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base_steps", range(6))
def test_each_denoiser_takes_its_own_steps(eta, base_steps):
    seen: dict[str, list[float]] = {"base": [], "student": []}

    def watched(name, denoise):
        def call(x_t, t, cond):
            seen[name].append(t[0].item())
            return denoise(x_t, t, cond)

        return call

    base, student = watched("base", Mixture(SD)), watched("student", GaussianTeacher(SD, 0.3))
    cond, sampler = {"mean": torch.zeros(64, 1, 1, 1, dtype=torch.float64)}, Sampler(TIMES, eta)
    mine = few_step(relay(base, student, TIMES, base_steps), SD, sampler, start(), cond, noises(1))
    assert seen == {"base": list(TIMES[:base_steps]), "student": list(TIMES[base_steps:])}
    # by hand: the first part of the base's way, then the student's from where it ends
    x, fresh = start(), noises(1)
    for i, (t, s) in enumerate(zip(TIMES, (*TIMES[1:], 0.0), strict=True)):
        one = Sampler((t, s) if s else (t,), eta)
        x = few_step(Mixture(SD) if i < base_steps else GaussianTeacher(SD, 0.3), SD, one, x, cond, fresh, 1)
    close(mine, x, 0)
    whole = {0: GaussianTeacher(SD, 0.3), 4: Mixture(SD), 5: Mixture(SD)}
    if base_steps in whole:
        close(mine, few_step(whole[base_steps], SD, sampler, start(), cond, noises(1)), 0)


@pytest.mark.parametrize("base_steps", range(5))
def test_a_student_that_is_the_base_changes_nothing(base_steps):
    both, sampler = Mixture(SD), Sampler(TIMES, 0.3)
    mine = few_step(relay(both, both, TIMES, base_steps), SD, sampler, start(), {}, noises(2))
    close(mine, few_step(both, SD, sampler, start(), {}, noises(2)), 0)


def test_variety_that_a_collapsed_student_lost_comes_back():
    """A student that gives one image whatever the noise settles it in its first step, and trusts the state later."""
    cond = {"mean": torch.full((64, 1, 1, 1), 2.0, dtype=torch.float64)}
    teacher = GaussianTeacher(SD, 0.6)

    def collapsed(x_t, t, cond):
        at_once = Estimate(cond["mean"], torch.zeros_like(x_t))
        return at_once if t[0] == TIMES[0] else teacher(x_t, t, cond)

    alone, mixed = (
        few_step(relay(teacher, collapsed, TIMES, k), SD, Sampler(TIMES), start(), cond).std() for k in (0, 1)
    )
    close(alone, 0.0)
    close(mixed, ddim_gain(SD, 0.6, [*TIMES, None]) * start().std(), 1e-6)  # the teacher's own spread in four steps


def test_fewer_than_no_steps_are_refused():
    with pytest.raises(ValueError, match="base_steps is -1"):
        relay(Mixture(SD), Mixture(SD), TIMES, -1)
    with pytest.raises(ConfigError, match="base_steps -1"), base_first(tiny.pipeline("sd"), -1):
        pass


# in pipelines


def loaded(name: str, folder: Path, styles: tuple[str, ...] = ()):
    """A random pipeline with a student's LoRA and styles, from files as users load them; all are on."""
    pipe, family = tiny.pipeline(name), tiny.FAMILIES[name]
    bone, net = tiny.backbone(name, tiny.pipeline(name), alpha=8), family.network(pipe)
    for role in ("student", *styles):
        bone.add(role, Lora())
        tiny.awake(bone, role, 0.1)
        if not (folder / role).exists():
            (folder / role).mkdir()
            config = bone.lora_config(role)
            family.save_lora(
                folder / role, bone.state(role), config | {"target_modules": sorted(config["target_modules"])}
            )
        if family.loads_lora:
            pipe.load_lora_weights(folder / role, adapter_name=role)
        else:
            spec = LoraSpec(rank=4, alpha=8, target_modules=bone.targets)
            attach(net, spec, network_state(folder / role / WEIGHTS, family), role)
    switch_on(net, ["student", *styles])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weigh(net, weights: dict[str, float]) -> None:
    """These LoRAs alone, at these strengths, of alpha / rank 2."""
    switch_on(net, list(weights))
    for name, weight in weights.items():
        for kept, key in strengths(net, [name]):
            kept[key] = 2 * weight


def draw(pipe, name: str, guidance: float = 1.0, **more):
    """Final latents from fixed noises, in four steps where `more` does not say otherwise."""
    family = tiny.FAMILIES[name]
    torch.manual_seed(5)
    latents = family.pack(torch.randn(2, *tiny.latent_shape(name), generator=torch.Generator().manual_seed(3)))
    call = {"num_inference_steps": 4, "height": 32, "width": 32} | more
    call |= family.guidance(guidance) | family.arguments()
    with torch.no_grad():
        return pipe(prompt=list(PROMPTS), latents=latents, output_type="latent", **each(call, 2))[0]


BOTH = {"student": 1.0, "style": 0.7}


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def scene(request, tmp_path_factory):
    """A pipeline with student and style, its network, and what it draws with both and with the style alone."""
    pipe = loaded(request.param, tmp_path_factory.mktemp(request.param), ("style",))
    net = tiny.FAMILIES[request.param].network(pipe)
    weigh(net, {"style": 0.7})
    base = draw(pipe, request.param)
    weigh(net, BOTH)
    both = draw(pipe, request.param)
    assert (both - base).abs().max() > 1e-3
    return pipe, net, request.param, both, base


def test_no_step_is_the_student_and_all_are_the_base_bit_for_bit(scene):
    pipe, _, name, both, base = scene
    for steps, expected in ((0, both), (4, base), (7, base)):
        with base_first(pipe, steps):
            assert torch.equal(draw(pipe, name), expected)
            assert torch.equal(draw(pipe, name), expected)  # each call begins anew
    assert torch.equal(draw(pipe, name), both)


def scales(net) -> dict[str, set[float]]:
    """The strengths of each LoRA, alpha / rank among them, over the layers."""
    return {name: {kept[key] for kept, key in strengths(net, [name])} for name in BOTH}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("base_steps", [1, 3])
def test_each_part_runs_at_its_times_and_a_style_keeps_its_strength(scene, guidance, base_steps):
    pipe, net, name, *_ = scene
    seen, before = [], scales(net)
    with base_first(pipe, base_steps):
        hook = net.register_forward_pre_hook(lambda net, args: seen.append(scales(net)))
        draw(pipe, name, guidance=guidance)
        hook.remove()
    twice = ("flux", "klein", "wan", "qwen_image", "krea2")
    calls = 2 if name in twice and guidance > 1 else 1  # of the network, a step
    assert seen == [{**before, "student": {0.0}}] * calls * base_steps + [before] * calls * (4 - base_steps)
    assert scales(net) == before == {"student": {2.0}, "style": {0.7 * 2}}


def test_a_first_step_of_the_base_is_the_base_s_then_the_student_s(scene):
    """By hand: the student's way, with the base's first output in place of its own."""
    pipe, net, name, *_ = scene
    with stepdistill.base_first(pipe):
        mine = draw(pipe, name)
    outputs: list = []
    hook = net.register_forward_hook(lambda net, args, output: outputs.append(output))
    weigh(net, {"style": 0.7})
    draw(pipe, name)
    hook.remove()
    weigh(net, BOTH)
    taken: list[int] = []

    def exchange(net, args, output):
        taken.append(1)
        return outputs[0] if len(taken) == 1 else output

    hook = net.register_forward_hook(exchange)
    assert torch.equal(mine, draw(pipe, name)) and len(taken) == 4
    hook.remove()


def test_all_is_as_before_also_after_an_exception(scene):
    pipe, net, name, both, _ = scene
    flags = {key: p.requires_grad for key, p in net.named_parameters()}
    hooks, before = len(net._forward_pre_hooks), scales(net)

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), base_first(pipe):
        hook = net.register_forward_hook(broken)
        draw(pipe, name)
    hook.remove()
    assert scales(net) == before and adapters_on(net) == ["student", "style"]
    assert {key: p.requires_grad for key, p in net.named_parameters()} == flags
    assert len(net._forward_pre_hooks) == hooks and torch.equal(draw(pipe, name), both)


def test_one_step_calls_follow_each_other(scene):
    pipe, _, name, *_ = scene
    own = pipe.scheduler
    pipe.scheduler, call = tiny.FAMILIES[name].scheduler(
        pipe, Sampler((1000.0 if name in tiny.FLOWS else 999.0,), eta=1.0)
    )
    alone = draw(pipe, name, **call)
    with base_first(pipe, 1):
        first, second = draw(pipe, name, **call), draw(pipe, name, **call)
    pipe.scheduler = own
    assert torch.equal(first, second) and not torch.equal(first, alone)


def test_a_student_at_zero_is_the_base_for_any_number_of_steps(tmp_path):
    pipe = loaded("sd", tmp_path)
    weigh(pipe.unet, {"student": 0.0})
    base = draw(pipe, "sd")
    for k in range(5):
        with base_first(pipe, k):
            assert torch.equal(draw(pipe, "sd"), base)


def test_what_has_no_base_beside_it_is_refused(tmp_path):
    with pytest.raises(StudentError, match="has replaced the base in the pipeline"), base_first(tiny.pipeline("sd")):
        pass
    pipe = loaded("sd", tmp_path)
    with pytest.raises(StudentError, match=r"expected the LoRA other, loaded"), base_first(pipe, 1, ["other"]):
        pass
    pipe.fuse_lora()
    with pytest.raises(StudentError, match="not fused"), base_first(pipe):
        pass


# several LoRAs together


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
def test_adapters_together_equal_merged_weights(name, tmp_path):
    """W + sum over LoRAs of strength alpha / rank B A, calculated from the files alone."""
    weights, family = {"student": 1.0, "second": 0.5, "style": 0.7}, tiny.FAMILIES[name]
    pipe, plain = loaded(name, tmp_path, ("second", "style")), tiny.pipeline(name)
    weigh(family.network(pipe), weights)
    together = draw(pipe, name)
    plain.set_progress_bar_config(disable=True)
    base = draw(plain, name)
    state, part, moved = family.network(plain).state_dict(), family.network_name, set()
    for role, strength in weights.items():
        file = load_file(tmp_path / role / WEIGHTS)
        for key, down in file.items():
            if key.endswith("lora_A.weight"):
                layer = key.removeprefix(f"{part}.").removesuffix(".lora_A.weight")
                up, weight = file[key.replace("lora_A", "lora_B")].double(), state[f"{layer}.weight"]
                delta = (up.flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
                weight += (strength * 8 / 4 * delta).float()
                moved.add(layer)
    assert moved == set(family.lora_targets(family.network(plain)))
    merged = draw(plain, name)
    assert (merged - together).abs().max() < 2e-4 * together.abs().max()
    assert (merged - base).abs().max() > 0.05 * base.abs().max()
