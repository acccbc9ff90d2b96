"""Every method on every family: two steps, the student folder, its proof. What is new is found, not listed."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tables import matrix
from tiny import CONTINUING, FAMILIES, FLOWS, ONE_STREAM, SIDE, VIDEOS, pipeline

from stepdistill import families, methods
from stepdistill.core.solvers import Sampler
from stepdistill.data import ImageFolder, Prompts, Source, TeacherSamples, Trajectories
from stepdistill.families.base import Family
from stepdistill.methods.base import Method, Tuning
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.disback import DisBack
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.gan import Ladd
from stepdistill.methods.pso_offline import PSOOffline
from stepdistill.methods.pso_online import PSOOnline
from stepdistill.methods.regression import Regression
from stepdistill.methods.reward import RewardTerm
from stepdistill.methods.scm import SCM
from stepdistill.methods.vsd import VSD
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.networks.roles import Adapters, Ema, LoraSpec
from stepdistill.students.draw.call import generate
from stepdistill.students.write import write_student
from stepdistill.training import finish as report
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec


def concrete(package, base) -> list[type]:
    """The finished subclasses of `base` in a package's modules."""
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}")).values()
        found += [c for c in members if inspect.isclass(c) and issubclass(c, base) and not inspect.isabstract(c)]
    assert found
    return sorted(set(found), key=lambda cls: cls.__name__)


def test_every_family_has_a_tiny_pipeline():
    assert {type(family) for family in (FAMILIES | CONTINUING).values()} == set(concrete(families, Family))


@pytest.mark.parametrize("method", concrete(methods, Method), ids=lambda cls: cls.__name__)
def test_the_first_role_is_the_student_whose_learning_rate_is_logged(method):
    assert next(iter(method().roles())) == "student"


def test_a_method_around_another_hands_on_all_that_the_inner_one_says():
    """Else an option of the inner method has no effect, without an error."""
    around = 0
    for outer in concrete(methods, Method):
        inner = [value for value in vars(outer()).values() if isinstance(value, Method)]
        around += len(inner)
        for one in inner:
            said = {name for kind in type(one).__mro__[:-1] if kind is not Method for name in vars(kind)}
            missing = {name for name in said & {*vars(Method)} - {*vars(outer)} if not name.startswith("_")}
            assert not missing, (outer.__name__, type(one).__name__, missing)
    assert around


def data(method: Method, folder: Path) -> Source:
    """What the teacher makes for a method."""
    options = {"source": Prompts(prompts=("rose", "octopus")), "count": 4, "num_inference_steps": 2}
    if "trajectories" in method.needs:
        return Trajectories(folder=str(folder / "trajectories"), kept_steps=2, **options)
    return TeacherSamples(folder=str(folder / "samples"), **options)


def quick(kind: type[Method], name: str) -> Method:
    """The method as it comes, but for the number of steps where a student takes as many as its teacher, for a
    recording stage of one step, after which the student is trained, and for what has no default of use: how a few-step
    model is sampled, and a reward without weights to download. Pipelines of videos take even steps alone."""
    method = kind()
    if isinstance(method, Tuning):
        method = replace(method, sampling=Sampler((1000.0, 500.0) if name in FLOWS else (999.0, 499.0), eta=1.0))
    if isinstance(method, SCM) and name in VIDEOS:
        method = replace(method, num_inference_steps=2)
    if isinstance(method, Consistency):
        method = replace(method, num_ddim_timesteps=40)
    if isinstance(method, PSOOnline):
        return replace(method, reward=WhiteBorder())
    if isinstance(method, Feedback):
        return replace(method, rewards=(RewardTerm(reward=WhiteBorder()),))
    if isinstance(method, DisBack):
        return replace(method, waypoints=1, recording_steps=1)
    steps = {f.name: f.default for f in fields(kind)}.get("num_inference_steps")
    return replace(method, num_inference_steps=5) if isinstance(steps, int) and steps > 8 else method


def adapts(method: type[Method]) -> bool:
    """Whether it trains guidance adapters, for which networks of one stream have no place."""
    return any(isinstance(role, Adapters) for role in method().roles().values())


CELLS = [
    pytest.param(method, name, id=f"{method.__name__}-{name}")
    for method in concrete(methods, Method)
    for name in FAMILIES
    if name not in ONE_STREAM or not adapts(method)
]


@pytest.mark.parametrize(("method", "name"), CELLS)
def test_two_steps_and_a_student(method, name, tmp_path, monkeypatch, record_property):
    record_property("cell", f"{method.__name__}/{name}")
    record_property("proof", trained(quick(method, name), name, tmp_path, monkeypatch))


@pytest.mark.parametrize("name", CONTINUING)
@pytest.mark.parametrize("method", [Consistency, Regression, VSD], ids=lambda cls: cls.__name__)
def test_two_steps_and_a_student_that_continues_images(method, name, tmp_path):
    """One method of each kind: of latents, of pairs, and of scores alone; DMD2 has tests of its own."""
    pipeline(name).save_pretrained(tmp_path / "teacher")
    for i in range(2):
        Image.effect_noise((SIDE, SIDE), 60 + 20 * i).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("rose")
    images = ImageFolder(train_data_dir=str(tmp_path), resolution=SIDE, center_crop=True)
    made = TeacherSamples(source=images, folder=str(tmp_path / "made"), count=2, num_inference_steps=2)
    run = Run(
        family=replace(CONTINUING[name], pretrained_teacher_model=str(tmp_path / "teacher")),
        method=quick(method, name),
        data=images if method.needs == {"prompts"} else made,
        lora=LoraSpec(rank=2, alpha=6),
        train=TrainSpec(
            output_dir=str(tmp_path / "out"), max_train_steps=2, train_batch_size=2, resolution=SIDE, report_to="none"
        ),
    )
    contract = json.loads((distill(run) / "distill_config.json").read_text())
    assert contract["proof"]["difference"] < 1e-5


@pytest.mark.parametrize("name", ["sd", "sana", "flux"])
def test_two_steps_with_a_term_on_the_teacher_s_depths(name, tmp_path, monkeypatch):
    trained(Consistency(gan=Ladd(misaligned_pairs=True)), name, tmp_path, monkeypatch)


def test_two_steps_with_the_sampler_of_sdxl_turbo(tmp_path, monkeypatch):
    trained(PSOOffline(sampling=Sampler((999.0, 499.0), eta=1.0, ancestral=True)), "sd", tmp_path, monkeypatch)


def trained(method: Method, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Train two steps; the difference between the student and its folder in a plain pipeline."""
    drawn, exported = {}, {}

    def recorded(pipe, row, prompts, seed, numbers, size):
        own = pipe.scheduler
        made = generate(pipe, row, prompts, seed, numbers=numbers, size=size)
        assert pipe.scheduler is own  # else the next row takes its noise process from this one's scheduler
        drawn[row.name] = row.arguments
        return made

    def written(folder, **options):
        exported.update(options)
        return write_student(folder, **options)

    monkeypatch.setattr(report, "generate", recorded)
    monkeypatch.setattr(report, "write_student", written)
    pipeline(name).save_pretrained(tmp_path / "teacher")
    out = distill(
        Run(
            family=replace(FAMILIES[name], pretrained_teacher_model=str(tmp_path / "teacher")),
            method=method,
            data=data(method, tmp_path),
            lora=LoraSpec(rank=2, alpha=6),
            train=TrainSpec(
                output_dir=str(tmp_path / "out"),
                max_train_steps=2,
                train_batch_size=2,
                learning_rate=1e-2,
                resolution=SIDE,
                report_to="none",
                validation_prompts=("rose",),
                teacher_steps=4,
            ),
        )
    )
    contract = json.loads((out / "distill_config.json").read_text())
    assert contract["proof"] is not None
    role, bone = exported["role"], exported["backbone"]
    averages = {key for key, other in bone.declared.items() if isinstance(other, Ema) and other.decay}
    assert {role} == (averages or {"student"})  # where there is an average, it is exported
    if averages:
        assert any(not torch.equal(bone.state(role)[key], value) for key, value in bone.state("student").items())
    steps = len(contract["timesteps"])
    if steps in (1, 2, report.FEW):  # else the student is no few-step one yet
        assert contract["call"] | drawn[f"student, {steps} step{'s' * (steps > 1)}"] == contract["call"]
    assert (out / "samples" / "grid.png").exists()
    return contract["proof"]["difference"]


def test_the_matrix_in_the_readme_is_of_these_cells():
    """Written by `python eval/tables.py families`."""
    stored = json.loads((Path(__file__).parent.parent / "eval" / "results" / "families.json").read_text())
    cells = {str(cell.id).replace("-", "/", 1) for cell in CELLS}
    assert {key for key, cell in stored.items() if "proof" in cell} == cells == set(stored)
    assert set(matrix.FAMILIES) == set(FAMILIES)
