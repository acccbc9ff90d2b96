"""A base that is sharded over two processes: gradients, roles, memory, and whole runs are as without."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import FAMILIES, awake, backbone, batch, context, pipeline, tokens
from torch import nn
from torch.distributed.tensor import DTensor

from stepdistill.config.schema import Factory
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.data.bundled import build
from stepdistill.families.base import Family
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.score_matching import TeacherScoreMatching
from stepdistill.networks import sharding
from stepdistill.networks.roles import TEACHER, Lora, LoraSpec, Module
from stepdistill.students.contract import read_contract
from stepdistill.training import loop as trainer
from stepdistill.training.checks import check_sharding
from stepdistill.training.distill import distill
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec

CPU = torch.device("cpu")
SGD = torch.optim.SGD


def _begin(rank: int, port: int, job, *given) -> None:
    """One of two processes, as torchrun starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        job(rank, *given)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort another exit


def two(job, *given, seconds: float = 300) -> None:
    """Run `job(rank, *given)` in two processes; each must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # forked after other tests, autograd has threads
    processes = [context.Process(target=_begin, args=(rank, port, job, *given)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        alive = process.is_alive()
        if alive or process.exitcode:
            for other in processes:
                other.kill()
        assert not alive, "two processes wait for each other"
    assert [process.exitcode for process in processes] == [0, 0]


def rows(part, keep: slice):
    """Some samples of a batch."""
    cond = {key: value[keep] for key, value in part.cond.items()}
    return replace(part, index=part.index[keep], cond=cond, latents=part.latents[keep], noise=part.noise[keep])


def gradients(name: str, method: DMD2, keep: list[int], shard: bool, checkpointing: bool, late: bool = True) -> dict:
    """Each role's gradient at each of its optimizer's steps, in two of the method's steps at equal weights."""
    pipe = pipeline(name)
    if name == "sd":  # epsilon multiplies rounding by sigma / alpha = 14.6 at t = 999
        pipe.scheduler = build.vp_scheduler("v_prediction")
    bone = backbone(name, pipe)
    size = sum(p.numel() for p in bone.net.parameters())
    if shard and late:
        sharding.shard(bone, CPU, torch.float32)
    spec = TrainSpec(output_dir="unused", max_grad_norm=None, learning_rate=1e-2)
    optimizers = Optimizers(bone, spec).declare(method).build()
    for role in ("student", "fake"):
        awake(bone, role)
    if shard and not late:
        sharding.shard(bone, CPU, torch.float32)
    if checkpointing:
        bone.enable_checkpointing()
    found = {}
    for role in optimizers.by_role:
        params = list(optimizers.params(role).values())
        optimizers.by_role[role] = SGD(params, lr=0.0)  # as they were: a step would make more of rounding

        def record(optimizer, *_, role=role, params=params):
            key = f"{role} {sum(k.startswith(role) for k in found)}"
            found[key] = torch.cat([p.grad.flatten() for p in params])

        optimizers.by_role[role].register_step_pre_hook(record)
    whole = batch(name, pipe, 4)
    parts = [rows(whole, slice(i, i + 1)) for i in keep]
    before = optimizers.fingerprint()
    for step in range(2):
        trainer.train_step(method, optimizers, context(name, pipe, bone, step), parts)
    if shard:
        own = {id(p) for role in bone.declared for p in optimizers.params(role).values()}
        base = [p for p in bone.net.parameters() if id(p) not in own]
        assert all(isinstance(p, DTensor) and not p.requires_grad for p in base)  # none is left gathered
        assert not any(isinstance(p, DTensor) for role in bone.declared for p in optimizers.params(role).values())
        now = optimizers.fingerprint()
        assert all((now[key] == before[key]).item() for key in now if key.startswith("base/"))
        assert len([key for key in now if key.startswith("base/")]) == len(base)
        found["share"] = torch.tensor(sum(p.to_local().numel() for p in base) / size)
    return found


GAN = Gan(generator_weight=0.1, discriminator_weight=0.1)


class Smooth(nn.Module):
    """A head without the group norms of `Head`: on maps of 4 x 4 these turn rounding into 1e-3 of the gradient."""

    def __init__(self, tap):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(tap.channels, 16, 3), nn.SiLU(), nn.Conv2d(16, 1, 1))

    def forward(self, features):
        return self.layers(features.float()).mean((2, 3))


class Judged(DMD2):
    def roles(self):
        return DMD2.roles(self) | {"head": Module(Smooth)}


METHOD = {"num_inference_steps": 2, "critic_steps": 1, "guidance_scale": 3.0}
FAKE = Judged(**METHOD, gan=GAN)
REAL = Judged(**METHOD, gan=replace(GAN, features="teacher", divergence="forward_kl"))
# family, method, gradient checkpointing, whether the roles come after sharding
CASES = [("sd", FAKE, False, True), ("sd", FAKE, True, True), ("sd3", FAKE, True, True), ("sd3", REAL, False, False)]


def _exact(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    for i, (name, method, checkpointing, late) in enumerate(CASES):
        torch.save(gradients(name, method, [rank], True, checkpointing, late), folder / f"{i}-{rank}.pt")
    for name in FAMILIES:
        _alone(rank, name)
    _memory("sd3")
    dist.destroy_process_group()


def _alone(rank: int, name: str) -> None:
    """A pass that ends early; what one process does alone; and a gradient after that."""
    pipe = pipeline(name)
    bone, part = backbone(name, pipe), batch(name, pipe)
    bone.add("student", Lora())
    awake(bone, "student")
    teacher, student = (context(name, pipe, bone).denoiser(role) for role in (TEACHER, "student"))
    x, t = part.latents, torch.full((2,), 300.0)

    def gradient() -> torch.Tensor:
        x0 = student(x, t, part.cond).x0
        with torch.no_grad():  # another role between forward and backward
            real = teacher(x, t, part.cond).x0
        found = student.features(x, t, part.cond), *student.features_at(x, t, part.cond, (0.3, 0.6, 1.0))
        loss = (x0 - real).square().mean() + sum(maps.square().mean() for maps in found)
        wanted = list(bone.parameters_of("student").values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, materialize_grads=True)])

    with torch.no_grad():
        expected = teacher(x, t, part.cond).x0, student(x, t, part.cond).x0, student.features(x, t, part.cond)
    expected_gradient = gradient()
    own = {id(p) for p in bone.parameters_of("student").values()}
    shards = sharding.shard(bone, CPU, torch.float32)

    def base_is_sharded() -> bool:
        return all(isinstance(p, DTensor) for p in bone.net.parameters() if id(p) not in own)

    @torch.no_grad()
    def job():
        return teacher(x, t, part.cond).x0, student(x, t, part.cond).x0

    with torch.no_grad():
        assert torch.equal(student.features(x, t, part.cond), expected[2]) and base_is_sharded()
    with shards.leading() as leader:
        assert leader == (rank == 0)
        if leader:
            assert all(torch.equal(a, b) for a, b in zip(job(), expected[:2], strict=True))
    assert base_is_sharded()
    assert (gradient() - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()
    assert base_is_sharded()


def _memory(name: str) -> None:
    """Half of the base's bytes are given back, also after a pass in both directions."""
    pipe = pipeline(name)
    bone, part = backbone(name, pipe), batch(name, pipe)
    size, before = sum(p.numel() * p.element_size() for p in bone.net.parameters()), held()
    sharding.shard(bone, CPU, torch.float32)
    saved = [before - held()]
    context(name, pipe, bone).denoiser(TEACHER)(
        part.latents.requires_grad_(), torch.ones(2), part.cond
    ).x0.sum().backward()
    part.latents.grad = None
    saved.append(before - held())
    assert saved == pytest.approx([size / 2] * 2, rel=0.02)


def held() -> int:
    """Bytes of all tensors in this process."""
    while gc.collect():  # what one collection frees may hold more, as generators do
        pass
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and type(o) is not DTensor]
    return sum({s.data_ptr(): s.nbytes() for o in found for s in [o.untyped_storage()]}.values())


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    tokens()  # once for both
    two(_exact, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)))
def test_gradients_are_those_of_one_process(exact, case):
    """Of student, fake score and head, in two steps of DMD2; a process has one of two samples."""
    name, method, checkpointing, _ = CASES[case]
    whole = gradients(name, method, [0, 1], False, checkpointing)
    first, second = (torch.load(exact / f"{case}-{rank}.pt") for rank in (0, 1))
    assert {"student 0", "student 1", "fake 0", "fake 1", "head 0", "head 1"} == whole.keys()
    for key, gradient in whole.items():
        assert torch.equal(first[key], second[key])
        assert (first[key] - gradient).norm() <= 1e-6 * gradient.norm(), key
    for found in (first, second):
        assert found["share"] == pytest.approx(0.5, abs=0.01)


# --- whole runs ------------------------------------------------------------------------------------------------------


class Interrupted(DMD2):
    """One process is asked to stop in the first step."""

    def updates(self, context, batch, step):
        if step == 0 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return DMD2.updates(self, context, batch, step)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    pipeline("sd3").save_pretrained(folder)
    return folder


def make(teacher: Path, out: Path, method: DMD2, **train) -> Run:
    given = {
        "output_dir": str(out),
        "max_train_steps": 3,
        "train_batch_size": 1,
        "optimizer": Factory("torch.optim.SGD", {"lr": 2.0}),
        "report_to": "none",
        "checkpointing_steps": 1,
        "validation_prompts": ("rose", "octopus"),
        "validation_steps": 2,
        "watch_samples": 2,
        "teacher_steps": 1,
    }
    return Run(
        family=replace(FAMILIES["sd3"], pretrained_teacher_model=str(teacher)),
        method=method,
        data=TeacherSamples(
            source=Prompts(prompts=("red apple", "rose", "octopus")),
            folder=f"{out}-samples",
            count=5,
            num_inference_steps=2,
        ),
        lora=LoraSpec(rank=4, alpha=6),
        train=TrainSpec(**(given | train)),
    )


SHORT = {"num_inference_steps": 1, "critic_steps": 2, "guidance_scale": 3.0, "ema_decay": 0.9}


def _run(rank: int, run: Run) -> None:
    distill(run)


def measured(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_is_as_one_process_makes_it(teacher, tmp_path):
    out, whole = tmp_path / "sharded", tmp_path / "whole"
    sharded = {"shard_base": True, "gradient_checkpointing": True}
    two(_run, make(teacher, out, Interrupted(**SHORT), **sharded))
    assert [f.name for f in sorted(out.glob("checkpoint-*"))] == ["checkpoint-1"]
    assert not (out / "distill_config.json").exists()
    two(_run, make(teacher, out, Interrupted(**SHORT), resume_from_checkpoint="latest", **sharded))
    distill(make(teacher, whole, DMD2(**SHORT), gradient_accumulation_steps=2))

    assert read_contract(out).proof.difference < 1e-4
    for role in ("student", "fake", "ema"):
        ours, theirs = (
            torch.cat([p.flatten() for _, p in sorted(load_file(f / "checkpoint-3" / f"{role}.safetensors").items())])
            for f in (out, whole)
        )
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    for ours, theirs in zip(measured(out), measured(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # also the images of validation, and the best student by the watch
    assert len({tuple(sorted(str(f.relative_to(place)) for f in place.rglob("*"))) for place in (out, whole)}) == 1


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_network_of_its_own_is_refused_before_anything_is_loaded(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "load", lambda self: pytest.fail("loaded"))
    for method in (Reflow(width=0.5), TeacherScoreMatching()):
        run = replace(make(teacher, tmp_path / "out", DMD2(), shard_base=True, validation_steps=None), method=method)
        with pytest.raises(ConfigError, match="shard_base with role 'student', a whole network.*optimizer"):
            distill(run)
    check_sharding(make(teacher, tmp_path / "out", DMD2(gan=Gan(), ema_decay=0.9), shard_base=True))


def test_a_quantised_base_is_refused_before_anything_is_loaded(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "load", lambda self: pytest.fail("loaded"))
    run = make(teacher, tmp_path / "out", DMD2(), shard_base=True)
    fewer = Factory("torchao.quantization.Int8WeightOnlyConfig")
    with pytest.raises(ConfigError, match="shard_base with family.quantization"):
        distill(replace(run, family=replace(run.family, quantization=fewer)))


def test_one_process_is_refused_before_anything_is_loaded(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="shard_base with one process.*multi_gpu_sharded.yaml"):
        distill(make(teacher, tmp_path / "out", DMD2(), shard_base=True))


def test_compilation_is_refused():
    with pytest.raises(ValueError, match="the combination is untested"):
        TrainSpec(output_dir="out", shard_base=True, torch_compile=True)
