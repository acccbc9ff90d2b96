"""Guided trajectories: the same by any number of processes, cut or not, and never of another teacher."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, FakeTeacher, pipeline

from stepdistill.core.denoise import guided
from stepdistill.core.errors import ConfigError, DataError
from stepdistill.core.solvers import Sampler, follow
from stepdistill.data import Partition, Prompts, Trajectories, check_source, inside, trajectories
from stepdistill.data import made as chunks
from stepdistill.data.base import GuidedState
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.anchor import Anchor
from stepdistill.methods.base import Batch
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.guided_lora import GuidedLora
from stepdistill.networks.roles import TEACHER
from stepdistill.students.draw.call import scheduled, teacher_call
from stepdistill.training.checks import check_guidance_range, check_stored
from stepdistill.training.distill import distill, make_data
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare
from stepdistill.training.teacher import TeacherSampler

ROOT = Path(__file__).parent.parent
PROMPTS = Prompts(prompts=("red apple", "cat face", "rose"))
RANGE = (1.0, 8.0)


def source(folder: Path, **fields) -> Trajectories:
    options = {"source": PROMPTS, "folder": str(folder), "count": 40, "num_inference_steps": 4, "kept_steps": 2}
    return Trajectories(**options | {"guidance_range": RANGE, "guidance_hole": (4.5, 5.5)} | fields)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("sd", "sd3"):
        pipeline(name).save_pretrained(folder / name)
    return folder


def stage_of(place: Path, data: Trajectories, name: str = "sd", method=None):
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / name))
    method = method or AdapterGuidance(width=8, guidance_range=RANGE, num_inference_steps=4)
    spec = TrainSpec(output_dir=str(Path(data.folder).parent / "out"), report_to="none", max_train_steps=2)
    return prepare(Run(family=family, method=method, data=data, train=replace(spec, train_batch_size=2)))


def filled(place: Path, folder: Path, name: str = "sd", **fields) -> Trajectories:
    data = source(folder, **fields)
    make_data(stage_of(place, data, name))
    return data


def files(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert not [name for name in found if name.endswith(".part")]
    return found


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "states"
    filled(place, folder)
    return folder


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_state_is_on_its_guided_trajectory_and_its_output_is_the_guided_one(place, tmp_path, name):
    data = filled(place, tmp_path / "states", name, count=3)
    session = stage_of(place, data, name)
    context, teacher = session.context(0), session.denoiser(TEACHER)
    grid = context.schedule.grid(4).flip(0).tolist()
    assert len(data) == 6
    for i in range(6):
        sample, (w, kept) = data.sample(i, random.Random(0)), data.drawn(i // 2)
        state, cond = sample.state, session.batches.condition([sample.prompt])
        assert sample.prompt == data.prompt_of(i // 2) and state.guidance_scale == pytest.approx(w)
        assert state.t == grid[kept[i % 2]]
        denoise, start = guided(teacher, context.null, w), trajectories.noise_of(0, i // 2, (4, 8, 8))[None]
        with torch.no_grad():
            x_t = follow(denoise, context.schedule, grid[: kept[i % 2] + 1], start, cond)
            y = teacher.native(denoise(state.x_t[None], state.t[None], cond), state.t[None])
        assert (x_t - state.x_t).abs().max() < 1e-2 * x_t.abs().max()  # states are rounded to half precision
        assert (y - state.output).abs().max() < 1e-3 * y.abs().max()  # of the state as it is stored
    session.accelerator.end_training()


def test_listed_steps_are_kept_with_the_noise_that_an_anchor_starts_from(place, tmp_path, monkeypatch):
    """The stored anchor is the live one, up to half precision; after the last kept step the teacher is not called."""
    term = Anchor(steps=2, num_inference_steps=4, stored=True)
    method = DMD2(num_inference_steps=4, guidance_scale=3.0, anchor=term)
    kept = {"kept_steps": (2,), "guidance_range": (3.0, 3.0), "guidance_hole": None, "count": 2}
    data = source(tmp_path / "states", **kept)
    session, calls = stage_of(place, data, "sd3", method), []
    whole_call = type(session.run.family).call
    monkeypatch.setattr(type(session.run.family), "call", lambda *given: calls.append(1) or whole_call(*given))
    make_data(session)
    make_data(session)  # what lies there is used
    assert len(calls) == 3 and len(data) == 2 and data.name(1).startswith("state 0 of trajectory 1")
    context = session.context(0)
    for i in range(2):
        sample = data.sample(i, random.Random(0))
        cond = session.batches.condition([sample.prompt])
        state = GuidedState(*(part[None] for part in sample.state))
        batch = Batch((i,), cond, (4, 8, 8), noise=sample.noise[None], state=state)
        start, x_k, t_k = term.path(context, batch, torch.zeros(1, 4, 8, 8), 3.0)
        live = replace(term, stored=False).path(context, batch, start, 3.0)
        assert torch.equal(start, trajectories.noise_of(0, i, (4, 8, 8))[None]) and torch.equal(live[0], start)
        assert torch.equal(t_k, live[2]) and (x_k - live[1]).abs().max() < 1e-2 * x_k.abs().max()
    assert method.needs == {"trajectories"}
    check_stored(session.run)
    for other in (replace(term, steps=1), replace(term, guidance_scale=2.0)):
        run = replace(session.run, method=replace(method, anchor=other))
        with pytest.raises(ConfigError, match=r"kept_steps, num_inference_steps and guidance_range \(\(2,\), 4"):
            check_stored(run)
    session.accelerator.end_training()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_samples_are_what_plain_diffusers_draws_with_guidance(place, tmp_path, name):
    session = stage_of(place, source(tmp_path / "states"), name)
    family, prompts, (height, width) = session.run.family, ["rose", "red apple"], session.batches.size
    noise = torch.stack([trajectories.noise_of(3, i, session.batches.shape) for i in range(2)])
    ours = TeacherSampler(session).sample(prompts, noise, 4, 6.0)
    pipe = family.load()
    call, size = teacher_call(family, pipe, 4, 6.0, "teacher"), {"height": height, "width": width}
    with scheduled(pipe, call.scheduler):
        drawn = pipe(prompt=prompts, latents=family.pack(noise), output_type="latent", **call.arguments, **size).images
    theirs = family.unpack(drawn, *noise.shape[2:])
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    session.accelerator.end_training()


def test_scales_are_uniform_outside_of_the_hole_and_steps_a_random_subset(tmp_path):
    drawn = [source(tmp_path, num_inference_steps=10, kept_steps=3).drawn(i) for i in range(4000)]
    scales = torch.tensor([w for w, _ in drawn])
    assert scales.min() > 1 and scales.max() < 8 and not ((scales > 4.5) & (scales < 5.5)).any()
    assert (scales < 4.5).float().mean() == pytest.approx(3.5 / 6, abs=0.025)
    assert all(len(set(kept)) == 3 and kept == sorted(kept) for _, kept in drawn)
    counts = torch.bincount(torch.tensor([k for _, kept in drawn for k in kept]), minlength=10)
    assert counts.min() > 1050 and counts.max() < 1350
    fixed = source(tmp_path, guidance_range=(7.5, 7.5), guidance_hole=None)
    assert {fixed.drawn(i)[0] for i in range(5)} == {7.5}


def test_cut_generation_goes_on_and_loses_nothing(place, whole, tmp_path):
    before = files(whole)
    assert len(before) == 4 and load_file(whole / "chunk-00002.safetensors")["x_t"].shape == (8, 2, 4, 8, 8)
    folder = Path(shutil.copytree(whole, tmp_path / "states"))
    (folder / "chunk-00001.safetensors").unlink()
    (folder / "chunk-00001.safetensors.stepdistill.part").write_bytes(b"half a file")
    kept = (folder / "chunk-00000.safetensors").stat().st_mtime_ns
    filled(place, folder)
    assert files(folder) == before and (folder / "chunk-00000.safetensors").stat().st_mtime_ns == kept
    (folder / "trajectories.json").unlink()  # of nobody knows which teacher
    (folder / "chunk-00000.safetensors").write_bytes(b"")
    filled(place, folder)
    assert files(folder) == before


def test_fewer_are_used_and_more_are_added(place, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "states"))
    few = filled(place, folder, count=20)
    assert len(few) == 40 and files(folder) == files(whole)
    more = filled(place, folder, count=48)
    one, two = (data.sample(70, random.Random(0)).state for data in (source(whole), more))
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(one, two, strict=True)) and len(more) == 96


@pytest.mark.slow
def test_two_processes_write_what_one_writes(place, whole, tmp_path):
    """By the script, under accelerate."""
    import yaml

    config = {
        "family": {"type": "stepdistill.families.sd.StableDiffusion", "pretrained_teacher_model": str(place / "sd")},
        "method": {
            "type": "stepdistill.methods.agd.AdapterGuidance",
            "guidance_range": list(RANGE),
            "num_inference_steps": 4,
        },
        "data": {
            "type": "stepdistill.data.Trajectories",
            "source": {"type": "stepdistill.data.Prompts", "prompts": list(PROMPTS.prompts)},
            "folder": str(tmp_path / "states"),
            **{"count": 40, "num_inference_steps": 4, "kept_steps": 2},
            **{"guidance_range": list(RANGE), "guidance_hole": [4.5, 5.5]},
        },
        "train": {"output_dir": str(tmp_path / "out"), "report_to": "none"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ROOT / "configs" / "accelerate" / "two_processes_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    done = subprocess.run(
        [*command, str(ROOT / "sample" / "trajectories.py"), str(tmp_path / "config.yaml")],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(tmp_path / "states") == files(whole)


def test_shares_of_processes_are_whole_together(place, whole, tmp_path):
    data = source(tmp_path / "states")
    session = stage_of(place, data)
    for rank in (1, 0):
        data.fill(TeacherSampler(session), rank, 2)
        names = {file.stem for file in Path(data.folder).glob("chunk-*")}
        assert names == ({"chunk-00001"} if rank else {f"chunk-0000{k}" for k in range(3)})
    assert files(tmp_path / "states") == files(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance_range": (1.0, 9.0)}, "other guidance_range"),
        ({"guidance_hole": None}, "other guidance_hole"),
        ({"num_inference_steps": 5}, "other num_inference_steps"),
        ({"seed": 3}, "other seed"),
        ({"source": Prompts(prompts=("red apple", "cat face", "octopus"))}, "of other prompts"),
    ],
)
def test_other_settings_are_refused(place, whole, change, said):
    with pytest.raises(DataError, match=said):
        data = source(whole, **change)
        data.fill(FakeTeacher(lambda *given: pytest.fail("made"), (4, 8, 8), stage_of(place, data).digest))


def test_another_teacher_is_refused(whole):
    with pytest.raises(DataError, match="other teacher"):
        source(whole).fill(FakeTeacher(lambda *given: pytest.fail("made"), (4, 8, 8), "another"))


def test_a_full_disk_leaves_what_is_complete(place, whole, tmp_path, monkeypatch):
    folder, save = tmp_path / "states", chunks.save_file

    def full(tensors, file, metadata):
        if "chunk-00002" in str(file):
            Path(file).write_bytes(b"the part that went on the disk")
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata)

    monkeypatch.setattr(chunks, "save_file", full)
    with pytest.raises(DataError, match=r"the first 32 samples are complete.*data.count=32"):
        filled(place, folder)
    assert len(files(folder)) == 3
    data = filled(place, folder, count=32)
    assert data.sample(63, random.Random(0)).state.x_t.shape == (4, 8, 8)
    monkeypatch.undo()
    filled(place, folder)
    assert files(folder) == files(whole)


def test_odd_settings_and_files_are_refused(tmp_path, whole):
    for fields, said in (
        ({"guidance_range": (8.0, 1.0)}, "low <= high"),
        ({"guidance_hole": (0.5, 2.0)}, "the hole strictly inside"),
        ({"kept_steps": 5}, "kept_steps 5 of num_inference_steps 4"),
        ({"kept_steps": 0}, "kept_steps 0 of num_inference_steps 4"),
        ({"kept_steps": (2, 1)}, "ascending numbers of steps, 1 to 3"),
        ({"kept_steps": (0, 1)}, "ascending numbers of steps, 1 to 3"),
        ({"kept_steps": (4,)}, "ascending numbers of steps, 1 to 3"),
        ({"kept_steps": ()}, "ascending numbers of steps, 1 to 3"),
        ({"proportion_empty_prompts": 0.1}, "set it on data.source"),
    ):
        with pytest.raises(ConfigError, match=said):
            source(tmp_path, **fields)
    with pytest.raises(DataError, match="no readable"):
        source(tmp_path / "nothing").sample(0, random.Random(0))
    with pytest.raises(ConfigError, match="set data.guidance_range and method.guidance_range to the same range"):
        check_guidance_range(source(whole), Sampler((999.0,), adapter_scale=2.0, adapter_range=(1.0, 12.0)))
    check_guidance_range(source(whole), Sampler((999.0,)))  # a LoRA promises no range
    assert "Prompts: 3 samples" in check_source(source(whole))  # the rest is made when training starts
    part = Partition(source=source(whole), students=2)
    assert any(isinstance(inner, Trajectories) for inner in inside(part)) and len(part) in range(2, 79)


def test_methods_train_on_them(place, whole, tmp_path):
    data = source(whole)
    lora = GuidedLora(states="trajectories", num_inference_steps=4)
    for n, method in enumerate((lora, AdapterGuidance(width=8, guidance_range=RANGE, num_inference_steps=4))):
        run = stage_of(place, data, method=method).run
        spec = replace(run.train, output_dir=str(tmp_path / str(n)), dataloader_num_workers=n)
        assert (distill(replace(run, train=spec)) / "distill_config.json").exists()
    with pytest.raises(ConfigError, match=r"one that provides \['latents'\]"):
        distill(replace(run, method=Consistency()))
    with pytest.raises(ConfigError, match="stepdistill.data.Trajectories around your prompts"):
        distill(replace(run, data=PROMPTS))
