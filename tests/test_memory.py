"""Predicted memory: by hand what stays, and at the peak what the same code takes on real tensors."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import sdxl_cycle as bench
from tables import memory_at_size as cycles
from tables.memory_at_size import VP, Cycle, Shape
from tables.render import render

from stepdistill.config.schema import Factory
from stepdistill.core.errors import ConfigError
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts, TeacherSamples, Trajectories
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Method
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.regression import Regression
from stepdistill.methods.reward import RewardTerm
from stepdistill.methods.scm import SCM
from stepdistill.methods.vsd import VSD
from stepdistill.networks.rewards.clip_score import ClipScore
from stepdistill.networks.rewards.pick_score import PickScore
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.networks.roles import LoraSpec
from stepdistill.training import distill as running
from stepdistill.training.cache import rows
from stepdistill.training.distill import dry_run
from stepdistill.training.memory import predict as predicting
from stepdistill.training.memory.forecast import (
    BASE,
    Prediction,
    Rehearsal,
    RoleMemory,
    by_foreach,
    cycle,
    forecast,
    prime,
)
from stepdistill.training.memory.outline import configs_of, networks_of, outline
from stepdistill.training.memory.predict import predict, rehearse
from stepdistill.training.memory.tracker import Tracker
from stepdistill.training.recipe import Run, TrainSpec

CPU = torch.device("cpu")
WIDTH, TOKENS, BLOCK = 16, 5, 32


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=2,
    )


def transformer() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=BLOCK,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
    )


LCM = Consistency(ema_decay=None)
RANK = 8
FLOW = Shape(transformer, {"states": (TOKENS, WIDTH), "pooled": (WIDTH,)}, Rectified(3.0), "flow")


def cycle_of(family: Family, shape: Shape, method: Method, **train) -> Cycle:
    """By default two samples with latents of 4 x 8 x 8."""
    given = {"output_dir": "unused", "mixed_precision": "bf16", "train_batch_size": 2, "resolution": 64} | train
    data = Prompts(prompts=("rose",))
    run = Run(family=family, method=method, data=data, lora=LoraSpec(rank=RANK), train=TrainSpec(**given))
    return Cycle(run, shape)


def sd3(method: Method = LCM, **train) -> Cycle:
    return cycle_of(StableDiffusion3(pretrained_teacher_model="random"), FLOW, method, **train)


def sd(method: Method = LCM, network: Callable[[], nn.Module] = unet, **train) -> Cycle:
    shape = Shape(network, {"states": (TOKENS, WIDTH)}, VP, "epsilon")
    return cycle_of(StableDiffusion(pretrained_teacher_model="random"), shape, method, **train)


def said(case: Cycle) -> Prediction:
    with torch.device("meta"):
        loop = cycles.build(case)
    return forecast(loop, {})


def real(case: Cycle) -> Rehearsal:
    """All that stays between steps, on real tensors."""
    loop = cycles.build(case)
    loop.optimizers.add(loop.roles)
    if loop.optimizers.spec.gradient_checkpointing:
        loop.optimizers.backbone.enable_checkpointing()
    loop.optimizers.build()
    prime(loop.optimizers)
    gc.collect()
    return loop


def taken(case: Cycle) -> int:
    """The most bytes that live at once on real tensors."""
    tracker = Tracker(CPU)
    with tracker:
        loop = real(case)
        tracker.reset()
        cycle(loop, next(loop.batches))
    return tracker.peak


def shapes(case: Cycle) -> nn.Module:
    """The network without content."""
    with torch.device("meta"):
        return case.shape.network()


def lora_numbers(case: Cycle) -> tuple[int, int]:
    """Numbers and tensors of a LoRA, from the layers' shapes."""
    net = shapes(case)
    layers = [net.get_submodule(name) for name in case.run.family.lora_targets(net)]
    return sum(RANK * (m.weight[0].numel() + m.weight.shape[0]) for m in layers), 2 * len(layers)


def network_bytes(case: Cycle, size: int) -> int:
    net = shapes(case)
    return size * sum(p.numel() for p in net.parameters()) + sum(b.nbytes for b in net.buffers())


SGD = Factory("torch.optim.SGD", {})
MOMENTUM = Factory("torch.optim.SGD", {"momentum": 0.9})


@pytest.mark.parametrize(
    ("optimizer", "states", "counters"),
    [(Factory("torch.optim.AdamW"), 2, 4), (SGD, 0, 0), (MOMENTUM, 1, 0)],
    ids=["adamw", "sgd", "momentum"],
)
def test_what_stays_is_counted_by_hand(optimizer, states, counters):
    """bfloat16 base; float32 LoRA and its average; Adam has two moments, and the number of steps for each tensor."""
    case = sd3(Consistency(), optimizer=optimizer)
    found, (numbers, tensors) = said(case), lora_numbers(case)
    size = 4 * numbers
    base = RoleMemory(BASE, found.parts[0].parameters, network_bytes(case, 2))
    assert found.parts == (
        base,
        RoleMemory("student", numbers, size, size, states * size + counters * tensors),
        RoleMemory("ema", numbers, size),
    )
    assert found.static == base.weights + (2 + states) * size + counters * tensors


def test_heads_copies_and_adapters_are_counted_by_hand():
    gan = said(sd3(DMD2(critic_steps=1, gan=Gan(), ema_decay=None), optimizer=SGD))
    parts = {part.name: part for part in gan.parts}
    assert list(parts) == [BASE, "student", "fake", "head"]
    # features of 4 x 4 tokens: a 4 x 4 convolution to one place, its norm, and the logit's weights
    head = BLOCK * BLOCK * 16 + BLOCK + 2 * BLOCK + BLOCK + 1
    assert parts["head"] == RoleMemory("head", head, 4 * head, 4 * head)

    case = sd(Reflow(width=0.5), wide, optimizer=MOMENTUM)
    with torch.device("meta"):
        slim = case.run.family.narrow(shapes(case), 0.5)
    count = sum(p.numel() for p in slim.parameters())
    student, ema = said(case).parts[1:]
    assert student == RoleMemory("student", count, 4 * count, 4 * count, 4 * count)
    assert ema == RoleMemory("ema", count, 4 * count)


def wide() -> nn.Module:
    return UNet2DConditionModel.from_config(dict(unet().config) | {"block_out_channels": (2 * WIDTH,)})


def test_primed_optimizers_have_states_and_no_gradients():
    loop = real(sd3(DMD2(critic_steps=1, gan=Gan())))
    assert list(loop.optimizers.by_role) == ["student", "fake", "head"]
    for role, optimizer in loop.optimizers.by_role.items():
        params = list(loop.optimizers.params(role).values())
        assert all(p.grad is None for p in params) and len(optimizer.state) == len(params)
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert not any(moment.any() for moment in moments)


def test_other_optimizers_by_role():
    case = sd3(DMD2(critic_steps=1, ema_decay=None), optimizers={"fake": SGD})
    found, size = said(case), 4 * lora_numbers(case)[0]
    student, fake = found.parts[1:]
    assert fake == replace(student, name="fake", optimizer=0) and student.optimizer > 2 * size


CASES = {
    "lcm": sd3(Consistency()),
    "dmd2": sd3(DMD2(critic_steps=3)),
    "gan": sd3(DMD2(critic_steps=1, gan=Gan(), ema_decay=None)),
    "ladd": sd3(Consistency(gan=Ladd(misaligned_pairs=True)), gradient_checkpointing=True),
    "ladd on a unet": sd(Consistency(gan=Ladd())),
    "scm": sd3(SCM(), mixed_precision="no"),
    "scm on a unet": sd(SCM(), mixed_precision="no", gradient_checkpointing=True),
    "scm by differences": sd3(SCM(difference=0.1), mixed_precision="no"),
    "boot": sd3(Boot()),
    "copy": sd3(Reflow(width=0.5)),
    "float32": sd3(mixed_precision="no"),
    "unet, checkpointed": sd(gradient_checkpointing=True),
    "sd3, checkpointed": sd3(DMD2(critic_steps=2), gradient_checkpointing=True),
    "accumulated": sd3(Regression(), gradient_accumulation_steps=3),
    "weak to strong": sd3(DMD2(critic_steps=2, weak=0.25), mixed_precision="no"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_the_same_code_on_real_tensors(name):
    assert said(CASES[name]).peak == taken(CASES[name])


def allocated(case: Cycle) -> tuple[int, int]:
    """What stays and the peak by the profiler's log of the CPU's allocator, which knows of no operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        loop = real(case)
        torch.empty(12345, dtype=torch.uint8)  # a mark
        cycle(loop, next(loop.batches))
    now, sizes, marked = 0, [], 0
    for event in log.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            sizes.append(now)
            marked = len(sizes) if event.nbytes() == 12345 else marked
    return sizes[marked], max(sizes[marked:])


@pytest.mark.parametrize("case", [sd3(), sd()], ids=["sd3", "unet"])
def test_the_allocator_saw_the_same(case):
    """A little more: kernels have temporaries of their own, and blocks are rounded up."""
    found, (static, peak) = said(case), allocated(case)
    assert found.static <= static <= 1.02 * found.static
    assert found.peak <= peak <= 1.1 * found.peak


def test_checkpointing_lowers_the_peak_and_samples_raise_it_in_line():
    method = Consistency(ema_decay=None, guidance_scale=1.0)
    sizes = [said(sd3(method, train_batch_size=batch)).activations for batch in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0.5 * sizes[0]
    whole, less = (said(sd(method, gradient_checkpointing=each)).activations for each in (False, True))
    assert less < 0.7 * whole


def test_many_micro_batches_are_extrapolated():
    case = sd3(Regression(), gradient_accumulation_steps=8)
    assert said(case).peak == pytest.approx(taken(case), rel=0.002)


def test_a_role_that_starts_late_is_counted():
    """Here the student steps once in three, and not at all in the first steps."""
    methods = [DMD2(critic_steps=3, warmup_steps=warm, num_inference_steps=1, ema_decay=None) for warm in (0, 30)]
    at_once, late = (said(sd3(method, max_train_steps=31)) for method in methods)
    assert at_once == late
    never = said(sd3(methods[1], max_train_steps=3))
    assert never.static == late.static and never.peak < late.peak


def test_the_sum_of_the_parts_is_the_peak():
    found = said(sd3(DMD2(critic_steps=1)))
    lines = {line.strip().rsplit(maxsplit=1)[0]: line.split()[-1] for line in str(found).splitlines() if "  " in line}
    rows = [line.split() for line in str(found).splitlines() if line.split()[0:1] in ([p.name] for p in found.parts)]
    assert [row[0] for row in rows] == [BASE, "student", "fake", "ema"]
    kept = sum(float(row[k]) for row in rows for k in (3, 5))
    shown = {key: float(lines[name]) for key, name in SHOWN.items() if name in lines}
    assert shown["static"] == pytest.approx(kept, abs=0.5)
    assert shown["peak"] == pytest.approx(sum(size for key, size in shown.items() if key != "peak"), abs=0.2)
    assert "not counted: the allocator's slack" in str(found) and "CUDA context" in str(found)
    assert "while loading" not in str(found) and "while loading" in str(replace(found, loading=2**30))


SHOWN = {
    "static": "static: weights and optimizer states",
    "gradients": "gradients at the peak, dropped after each update",
    "activations": "activations and batches at the peak",
    "peak": "peak",
}


def test_gradients_at_the_peak():
    """With SGD on a tiny batch all gradients are there at the peak, but those of the last layers to be done."""
    found = said(sd3(train_batch_size=1, resolution=16, optimizer=SGD))
    student = found.parts[1]
    assert 0.5 * student.gradients < found.gradients <= student.gradients


def test_an_optimizer_that_needs_content_is_refused(monkeypatch):
    def step(self: object) -> None:
        raise RuntimeError("Cannot access data pointer of a fake tensor")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(ConfigError, match="SGD, which cannot step .Cannot access.*states"):
        said(sd3(optimizer=SGD))


def test_on_a_gpu_adam_takes_a_copy_of_its_moments():
    peaks = []
    for wanted in (False, True):
        tracker = Tracker(CPU)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            params = [nn.Parameter(torch.empty(1000)) for _ in range(10)]
            optimizer = torch.optim.AdamW(params)
            if wanted:
                by_foreach(optimizer)
            for _ in range(2):
                tracker.reset()
                for p in params:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
        peaks.append(tracker.peak - tracker.total)
    one, every = 4000, 40000
    assert peaks[0] <= 3 * one and every <= peaks[1] <= every + 3 * one
    fused = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    by_foreach(fused)
    assert not fused.param_groups[0]["foreach"]


# the tracker


def test_storages_count_while_they_live():
    tracker = Tracker(CPU)
    with tracker:
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]
        assert tracker.total == tracker.peak == 4000
        c = a + a
        assert tracker.total == 8000 and tracker.bytes([a, b, c]) == 8000 and tracker.bytes([b]) == 4000
        del a
        assert tracker.total == 8000
        del b
        assert tracker.total == 4000 and tracker.peak == 8000
        tracker.reset()
        assert tracker.peak == 4000
        elsewhere = torch.ones(5, device="meta")
        assert tracker.total == 4000 and elsewhere.is_meta
        # (a + a) and its square root are saved for backward, the exponential is the root's square's
        x = torch.ones(1000, requires_grad=True)
        y = (x.exp() * 2).sqrt().sum()
        assert tracker.total == 4000 + 4000 + 4000 + 4000 + 4
        y.backward()
        del y
        assert tracker.total == 4000 + 4000 + 4000 and x.grad is not None
        tracker.mark(x.grad)
        tracker.mark(x.grad)
        assert tracker.gradients == 4000
        tracker.reset()
        assert tracker.gradients_at_peak == 4000
        x.grad = None
        assert tracker.gradients == 0 and tracker.total == 8000
    torch.ones(9)
    assert tracker.total == 8000


def test_fake_tensors_have_size_and_say_one():
    tracker = Tracker(CPU)
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        fake = torch.empty(1000, dtype=torch.bfloat16)
    with tracker:
        assert tracker.total == 2000
        mixed = fake * torch.ones(1000)
        assert tracker.total == 2000 + 4000 and tracker.peak == 2000 + 4000 + 4000
        assert mixed.sum().item() == 1 and bool(torch.isfinite(mixed.sum())) and int(mixed[0].long()) == 1
        assert torch.tensor(3.5).item() == 3.5


# whole configs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """A pipeline's folder without any weights, by family."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny.pipeline(name).save_pretrained(made[name])
            for file in made[name].rglob("*.safetensors"):
                file.unlink()
        return made[name]

    return folder


def run(folder: Path, name: str, method: Method, tmp_path: Path, **train) -> Run:
    data = Prompts(prompts=("red apple", "rose", "octopus", "cat face"))
    if method.needs - {"prompts"}:
        kind = Trajectories if "trajectories" in method.needs else TeacherSamples
        data = kind(source=data, folder=str(tmp_path / "unmade"), count=4)
    given = {"output_dir": str(tmp_path / "out"), "train_batch_size": 2, "max_train_steps": 20, "report_to": "none"}
    family = replace(tiny.FAMILIES[name], pretrained_teacher_model=str(folder))
    return Run(family=family, method=method, data=data, lora=LoraSpec(rank=4), train=TrainSpec(**(given | train)))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_an_outline_is_the_pipeline_without_content(folders, name):
    pipe = tiny.pipeline(name)
    found = outline(replace(tiny.FAMILIES[name], pretrained_teacher_model=str(folders(name))))
    assert type(found) is type(pipe) and found.config.keys() == pipe.config.keys()
    public = [{k: v for k, v in p.scheduler.config.items() if not k.startswith("_")} for p in (found, pipe)]
    assert public[0] == public[1]
    ours, theirs = networks_of(found), networks_of(pipe)
    assert ours.keys() == theirs.keys()
    for part in ours:
        shapes = [{key: (p.shape, p.dtype) for key, p in net.named_parameters()} for net in (ours[part], theirs[part])]
        assert shapes[0] == shapes[1], part
        assert all(p.is_meta for p in ours[part].parameters())


@pytest.mark.parametrize(
    ("name", "method", "train"),
    [
        ("sd3", DMD2(critic_steps=2), {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("pixart_alpha", AdapterGuidance(width=8), {"mixed_precision": "no"}),
        ("z_image", VSD(), {"mixed_precision": "no", "resolution": 32}),
    ],
)
def test_a_dry_run_reads_no_weights_and_is_right(folders, tmp_path, monkeypatch, name, method, train):
    given = run(folders(name), name, method, tmp_path, **train)
    pipe = tiny.pipeline(name)  # the same configs, with weights

    AcceleratorState._reset_state()  # another test's precision
    predictions: list[Prediction] = []

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(Family, "load", never)
        patch.setattr(torch, "load", never)
        patch.setattr(safetensors, "safe_open", never)
        patch.setattr(running, "predict", lambda run: predictions.append(predict(run)) or predictions[0])
        shown = dry_run(given)
    (found,) = predictions
    assert shown == str(found) and not (tmp_path / "out").exists() and not (tmp_path / "unmade").exists()

    # a prediction does not know how many zeros pad a prompt, and counts cached rows with them: as if each were a fake
    if name != "z_image":  # whose masks are the tokenizer's own, and have content
        monkeypatch.setattr(rows, "FakeTensor", torch.Tensor)
    accelerator, net = Accelerator(mixed_precision=given.train.mixed_precision), given.family.network(pipe)
    assert found.loading == sum(4 * p.numel() for part in networks_of(pipe).values() for p in part.parameters())
    tracker = Tracker(CPU)
    with tracker:
        for part in networks_of(pipe).values():
            for module in part.modules():  # made anew, so that the tracker sees them
                for key, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, key, buffer.clone())
            for p in part.parameters():
                p.data = p.data.clone()
        if accelerator.mixed_precision == "bf16":
            net.to(torch.bfloat16)
        loop = rehearse(given, accelerator, pipe)
        loop.optimizers.declare(method)
        if given.train.gradient_checkpointing:
            loop.optimizers.backbone.enable_checkpointing()
        loop.optimizers.build()
        prime(loop.optimizers)
        gc.collect()
        kept = tracker.total
        tracker.reset()
        cycle(loop, next(loop.batches))
    assert (found.static, found.peak) == (kept, tracker.peak)


def test_the_networks_of_rewards_are_counted(folders, tmp_path):
    """Each once, though its weights are read for it; a reward without a network has no row."""
    places = [str(tiny.clip(tmp_path / name)) for name in ("a", "b")]
    rewards = (ClipScore(pretrained_clip_model=places[0]), PickScore(pretrained_clip_model=places[0]), WhiteBorder())
    terms, held_out = tuple(RewardTerm(reward=each) for each in rewards), ClipScore(pretrained_clip_model=places[1])
    sampler = Sampler((999.0, 499.0), eta=1.0, clean=True)
    given = run(folders("sd"), "sd", Feedback(sampling=sampler, rewards=terms, held_out=held_out), tmp_path)
    AcceleratorState._reset_state()
    found = predict(given)
    model = CLIPModel.from_pretrained(places[0])
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), torch.empty(6)))  # with a mean and a deviation
    rows = [(part.name, part.weights) for part in found.parts if "reward" in part.name]
    assert rows == [("reward ClipScore", size), ("reward ClipScore_2", size)]
    assert found.static == sum(part.weights + part.optimizer for part in found.parts)


def test_what_an_outline_does_not_show_is_said(folders, tmp_path, monkeypatch):
    plain = Prediction((), 0, 0)
    monkeypatch.setattr(predicting, "forecast", lambda *args: plain)
    given = run(folders("sd3"), "sd3", DMD2(), tmp_path, shard_base=True, cache_dir=str(tmp_path / "cache"))
    few = replace(given.family, quantization=Factory("torchao.quantization.Int8WeightOnlyConfig"))
    said_of = str(predict(replace(given, family=few)))
    for words in (
        "counted without family.quantization",
        "train.shard_base each process",
        "if train.cache_dir has everything",
    ):
        assert words in said_of
    assert not (tmp_path / "cache").exists()
    assert predict(run(folders("sd3"), "sd3", DMD2(), tmp_path)) == plain


def test_a_single_file_is_outlined_by_its_config_or_its_header(folders, tmp_path):
    key = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"  # of SDXL's second text encoder
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(4)}, file)
    assert configs_of(str(file)) == "stabilityai/stable-diffusion-xl-base-1.0"
    family = replace(tiny.FAMILIES["sdxl"], pretrained_teacher_model=str(file), single_file_config=str(folders("sdxl")))
    found = networks_of(outline(family))
    assert found.keys() == networks_of(tiny.pipeline("sdxl")).keys()


# bench and table


FIGURES = {
    "predicted": {
        "parameters": 2_567_463_684,
        "parts": {"base": [2**31, 0, 0], "student": [2**30, 2**30, 2**31], "fake": [2**29, 2**29, 2**30]},
        "static": 7 * 2**30,
        "gradients": 2**30,
        "activations": 2**28,
        "peak": 9 * 2**30,
    },
    "measured": {"static": 7.07 * 2**30, "peak": 10 * 2**30, "seconds": 12.34},
    "ratio": 1.1111,
    "static_ratio": 1.01,
}


def test_the_bench_says_what_is_asked():
    line = json.loads(json.dumps(bench.summary("sdxl", FIGURES)))
    asked = {"name": "sdxl_cycle", "case": "sdxl", "peak_gib": 10.0, "predicted_gib": 9.0, "ratio": 1.1111}
    asked |= {"static_ratio": 1.01, "seconds": 12.3, "method": "DMD2", "steps": 5, "rank": 64, "latents": [4, 32, 32]}
    assert asked.items() <= line.items() and {"machine", "torch", "threads"} <= line.keys()
    rows = [row.split() for row in bench.table(FIGURES).splitlines()]
    assert ["student", "1.0", "1.0", "2.0"] in rows and ["peak", "9.0", "10.0", "1.1111"] in rows


def test_both_sides_of_a_cycle_have_the_same_parts(monkeypatch):
    """In one process: what is measured has the parts that are predicted."""
    monkeypatch.setattr(cycles, "resident", lambda field: 0)
    case = sd3(DMD2(critic_steps=2, ema_decay=None), max_train_steps=2)
    line = cycles.predicted(case)
    assert line["peak"] == line["static"] + line["gradients"] + line["activations"]
    assert list(line["parts"]) == [BASE, "student", "fake"]
    assert cycles.measured(case).keys() == {"static", "peak", "seconds"}


def test_the_large_networks_have_their_published_sizes():
    sizes = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd3": 2_028_328_000, "pixart": 610_856_096}
    sizes |= {"flux2_klein": 3_875_544_576, "z_image": 6_154_908_736, "qwen_image": 20_430_401_088}
    sizes |= {"krea2": 12_820_073_036}
    for name, size in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in cycles.cycle_of(name).shape.network().parameters()) == size, name


def test_the_table_shows_each_part(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps({"sdxl": FIGURES}))
    made = render("<!-- table memory -->\n<!-- end -->", tmp_path)
    cells = "SDXL, 2.57 B | 2.00 | 1.00 | 0.50 | 3.00 | 1.00 | 0.25 | 9.00 | 10.00 | 1.111"
    assert f"| {cells} |" in made
