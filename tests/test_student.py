"""The student folder in plain Diffusers draws what the student in memory draws; else writing it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler
from huggingface_hub import ModelCard
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.core.errors import StudentError
from stepdistill.core.solvers import few_step
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.regression import Regression
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Ema, Lora, LoraSpec, Module
from stepdistill.students import load, proof
from stepdistill.students.card import write_card
from stepdistill.students.contract import CONTRACT, FORMAT, WEIGHTS, read_contract, scheduler_class
from stepdistill.students.licence import is_non_commercial, licence_of, warn_of_licence
from stepdistill.students.load import load_student, start_from
from stepdistill.students.verify import verify_student
from stepdistill.students.write import keep_proof, write_student

ROOT = Path(__file__).parents[1]
RANK, ALPHA = 4, 16
SIZE = (32, 24)
CARD = "---\nlicense: cc-by-nc-4.0\n---\n# A base\n"
LCM = Consistency(ema_decay=None)
TCD = Consistency(end="any", ema_decay=None, guidance_scale=1.0, sampling_guidance_scale=3.0)
PCM = Consistency(end="edge", segments=(2,), ema_decay=None)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Family]:
    """Teachers in folders: `sd3` has shift 3, and lacks the largest text encoder."""
    found: dict[str, Family] = {}
    for name, kind, cls in [
        ("sd", "epsilon", StableDiffusion),
        ("sd-v", "v_prediction", StableDiffusion),
        ("sd3", None, StableDiffusion3),
    ]:
        pipe = tiny.pipeline(name.partition("-")[0])
        if kind:
            pipe.scheduler.register_to_config(prediction_type=kind)
        folder = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        found[name] = cls(pretrained_teacher_model=str(folder))
    return found


def trained(family: Family, dtype: torch.dtype = torch.float32, size: float = 0.05):
    """A pipeline whose network has a student that differs from its teacher, with alpha other than rank."""
    pipe = family.load()
    nn.Module.to(family.network(pipe), dtype)
    bone = tiny.backbone("sd" if isinstance(family, StableDiffusion) else "sd3", pipe, RANK, ALPHA)
    bone.add("student", Lora())
    tiny.awake(bone, "student", size)
    return pipe, bone


def write(folder: Path, family: Family, method=LCM, dtype: torch.dtype = torch.float32, **options) -> float:
    pipe, bone = trained(family, dtype)
    options = {"role": "student", "resolution": SIZE, "method": method} | options
    return write_student(folder, family=family, pipe=pipe, backbone=bone, **options)


@pytest.fixture(scope="module")
def written(families, tmp_path_factory):
    """A student folder of each base; tests that change one take a copy."""
    folders = {name: tmp_path_factory.mktemp(f"student-{name}") for name in ("sd", "sd3")}
    for name, folder in folders.items():
        write(folder, families[name], seed=3)
    return folders


def copied(written: dict[str, Path], name: str, to: Path) -> Path:
    return shutil.copytree(written[name], to / "copy")


# with and without fresh noise, guidance, and a clean end
@pytest.mark.parametrize(
    ("name", "method", "scheduler"),
    [
        ("sd", LCM, "LCMScheduler"),
        ("sd-v", TCD, "TCDScheduler"),
        ("sd", PCM, "TCDScheduler"),
        ("sd", Regression(ema_decay=None), "DDIMScheduler"),
        ("sd", Regression(timesteps=(799.0, 599.0, 299.0, 99.0), ema_decay=None), "EulerDiscreteScheduler"),
        ("sd", Reflow(num_inference_steps=4, first_noise=True, ema_decay=None), "FirstNoiseDDIMScheduler"),
        ("sd3", Reflow(num_inference_steps=4, first_noise=True, ema_decay=None), "FirstNoiseEulerScheduler"),
        ("sd3", LCM, "FlowMatchEulerDiscreteScheduler"),
        ("sd3", replace(TCD, eta=0.0), "FlowMatchEulerDiscreteScheduler"),
        ("sd3", Regression(ema_decay=None), "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_fresh_plain_pipeline_draws_what_was_trained(families, tmp_path, name, method, scheduler):
    family = families[name]
    pipe, bone = trained(family)
    shapes = {v.ndim for v in bone.state("student").values()}
    assert shapes == ({2} if name == "sd3" else {2, 4})  # linear layers, and convolutions
    options = {"role": "student", "method": method, "resolution": SIZE, "seed": 3}
    difference = write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options)
    assert difference < 1e-5
    contract = read_contract(tmp_path)
    assert contract.proof and contract.proof.difference == difference
    assert contract.scheduler["_class_name"] == scheduler
    assert (contract.lora.rank, contract.lora.alpha, contract.lora.strength) == (RANK, ALPHA, 1.0)
    times = method.sampler(family.schedule(family.load().scheduler)).timesteps
    assert len(times) == 4 and contract.timesteps == times
    assert contract.proof.timesteps == (pytest.approx(times, rel=1e-6, abs=0) if name == "sd3" else times)


# as NoobAI ships: the table of Euler's class ends just above 0, where those of other classes end at 0
NOOB = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def noob(request, tmp_path_factory) -> tuple[str, Family]:
    pipe, folder = tiny.pipeline(request.param), tmp_path_factory.mktemp(f"noob-{request.param}")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **NOOB)
    pipe.save_pretrained(folder)
    return request.param, replace(tiny.FAMILIES[request.param], pretrained_teacher_model=str(folder))


@pytest.mark.parametrize("method", [LCM, Regression(ema_decay=None)])
def test_the_table_of_a_student_is_its_teacher_s_own(noob, tmp_path, method):
    name, family = noob
    pipe = family.load()
    bone = tiny.backbone(name, pipe, RANK, ALPHA)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    options = {"role": "student", "method": method, "resolution": SIZE, "seed": 3}
    assert write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options) < 1e-5
    own = pipe.scheduler.alphas_cumprod
    assert 0 < own[-1] < 1e-7
    theirs = scheduler_class(read_contract(tmp_path)).from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(theirs.alphas_cumprod, own, rtol=2e-6, atol=0)
    assert verify_student(tmp_path) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_plain_pipeline_visits_the_trained_times_and_no_others(families, written, name):
    family, folder = families[name], written[name]
    times = LCM.sampler(family.schedule(family.load().scheduler)).timesteps
    pipe, seen = family.load(), []

    def before(_, args, kwargs):
        seen.append(float(kwargs["timestep"][0]) if "timestep" in kwargs else float(args[1]))

    call = load_student(pipe, folder)
    family.network(pipe).register_forward_pre_hook(before, with_kwargs=True)
    pipe("a rose", output_type="latent", **call)
    # shift 3 spaces the teacher's grid, and 1000 sigma is rounded twice on the way
    assert seen == (pytest.approx(times, rel=1e-6, abs=0) if name == "sd3" else [999, 759, 499, 259])
    assert verify_student(folder) < 1e-5


def without_metadata(file: Path) -> None:
    save_file(load_file(file), file)


@pytest.mark.parametrize(("name", "dtype"), [("sd", "float32"), ("sd3", "float32"), ("sd3", "bfloat16")])
def test_a_lost_alpha_fails_the_proof(families, tmp_path, monkeypatch, name, dtype):
    family, kind = families[name], getattr(torch, dtype)
    save = type(family).save_lora

    def careless(self, folder, state, config):
        save(self, folder, state, config)
        without_metadata(folder / WEIGHTS)

    monkeypatch.setattr(type(family), "save_lora", careless)
    with pytest.raises(StudentError, match=r"expected at most .* does not generate the images"):
        write(tmp_path, family, dtype=kind)
    assert read_contract(tmp_path).proof is None
    assert "has not been compared" in (tmp_path / "README.md").read_text()
    assert verify_student(tmp_path) > 0.05


def test_a_base_in_half_precision_is_compared_in_it(families, tmp_path):
    assert write(tmp_path, families["sd3"], dtype=torch.bfloat16) < 1e-5
    contract = read_contract(tmp_path)
    assert contract.proof and contract.dtype == contract.proof.dtype == "bfloat16"


def edited(folder: Path, file: str, **changes) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_proof_adds_other_noise_than_it_starts_from(families, tmp_path, monkeypatch, name):
    """Else a scheduler that adds the starting noise again, as rf++'s does, would pass for a stochastic one."""
    drawn = []

    def recorded(denoise, schedule, sampler, x_t, cond, noise):
        def fresh(i):
            drawn.append(noise(i))
            return drawn[-1]

        drawn.append(x_t)
        return few_step(denoise, schedule, sampler, x_t, cond, fresh)

    monkeypatch.setattr(proof, "few_step", recorded)
    write(tmp_path, families[name])
    ours, taught = drawn[:4], drawn[4:]  # the start, and the noise after each step but the last
    assert len(drawn) == 8 and all(torch.equal(a, b) for a, b in zip(ours, taught, strict=True))
    values = [noise.flatten()[:8] for noise in ours]
    assert not any(torch.allclose(a, b) for a, b in combinations(values, 2))


def test_the_noise_of_a_proof_follows_its_seed(families, tmp_path, monkeypatch):
    drawn = {}

    def recorded(denoise, schedule, sampler, x_t, cond, noise):
        first, *_ = noises = [x_t, noise(0)]
        drawn.setdefault(seed, noises)
        return first

    monkeypatch.setattr(proof, "few_step", recorded)
    for seed in (0, 3):
        with pytest.raises(StudentError, match="does not generate the images"):
            write(tmp_path / str(seed), families["sd"], seed=seed)
        start = torch.randn(drawn[seed][0].shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(drawn[seed][0], start)
    assert not any(torch.allclose(a, b) for a, b in zip(*drawn.values(), strict=True))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_lora_that_is_not_loaded_fails_the_proof(tmp_path, monkeypatch, name):
    """The LoRAs of these tests are far above the tolerance of a proof: one that is lost cannot pass."""
    pipe = tiny.pipeline(name)
    pipe.save_pretrained(tmp_path / "teacher")
    family = replace(tiny.FAMILIES[name], pretrained_teacher_model=str(tmp_path / "teacher"))
    bone = tiny.backbone(name, pipe, RANK, ALPHA)
    bone.add("student", Lora())
    tiny.awake(bone, "student")
    method = replace(LCM, num_ddim_timesteps=40)  # videos take even steps alone
    options = {"family": family, "pipe": pipe, "backbone": bone, "role": "student", "method": method}
    options["resolution"] = (32, 32)  # Sana takes no smaller side, and the tiny SD3 no larger one
    assert write_student(tmp_path / "student", **options) < 1e-5
    contract, plain = read_contract(tmp_path / "student"), family.load()
    plain.scheduler = scheduler_class(contract).from_pretrained(tmp_path / "student", subfolder="scheduler")
    found = proof.prove(contract, family, plain, pipe, bone, "student", 0)
    assert found.difference > 20 * found.tolerance


def test_a_student_of_nans_fails_the_proof(written, tmp_path):
    contract = read_contract(written["sd"])
    for difference in (float("nan"), float("inf"), 1.1 * contract.proof.tolerance):
        with pytest.raises(StudentError, match=f"a difference of {difference:.3g}"):
            keep_proof(tmp_path, contract, replace(contract.proof, difference=difference))
    assert not list(tmp_path.iterdir())
    assert contract.proof.tolerance == 1e-4


def test_other_noise_levels_fail_the_proof(written, tmp_path):
    # the default spacing of LCMScheduler with an original grid of 40 steps, not the trained times
    call = read_contract(written["sd"]).call
    call |= {"timesteps": [999, 749, 499, 249]}
    other = edited(copied(written, "sd", tmp_path), CONTRACT, call=call)
    with pytest.raises(StudentError, match=r"999.0, 749.0.* expected \[999.0, 759.0"):
        verify_student(other)
    # explicit sigmas are warped where the scheduler keeps the base's shift
    config = "scheduler/scheduler_config.json"
    warped = edited(copied(written, "sd3", tmp_path / "sd3"), config, shift=3.0)
    with pytest.raises(StudentError, match="timesteps"):
        verify_student(warped)


def test_a_deterministic_scheduler_in_place_of_a_stochastic_one_fails_the_proof(written, tmp_path):
    assert read_contract(written["sd3"]).eta == 1
    config = "scheduler/scheduler_config.json"
    quiet = edited(copied(written, "sd3", tmp_path), config, stochastic_sampling=False)
    assert verify_student(quiet) > 1e-2


def test_what_is_no_denoiser_is_refused(families, tmp_path):
    pipe, bone = trained(families["sd3"])
    bone.add("head", Module(lambda tap: nn.Linear(1, 1)))
    with pytest.raises(StudentError, match="role 'head', which is not a denoiser"):
        options = {"role": "head", "method": LCM, "resolution": SIZE}
        write_student(tmp_path, family=families["sd3"], pipe=pipe, backbone=bone, **options)


# loading


def latents(pipe, call) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    return pipe("a rose", latents=noise, output_type="latent", **call).images


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_style_stays_active_at_its_strength(families, written, tmp_path, name):
    family, folder = families[name], written[name]
    pipe, bone = trained(family, size=0.02)
    config = bone.lora_config("student")
    family.save_lora(tmp_path, bone.state("student"), config)  # another LoRA on the same layers

    ours, plain, alone = family.load(), family.load(), family.load()
    for each in (ours, plain):
        each.load_lora_weights(tmp_path, adapter_name="style")
    ours.set_adapters("style", 0.5)
    call = load_student(ours, folder)
    assert load_student(alone, folder) == call

    plain.load_lora_weights(folder, adapter_name="student")
    plain.scheduler = ours.scheduler
    plain.set_adapters(["style", "student"], [0.5, 1.0])
    both = latents(ours, call)
    assert torch.equal(both, latents(plain, call))
    assert (both - latents(alone, call)).abs().max() > 1e-3 * both.abs().max()
    with pytest.raises(StudentError, match="already in use"):
        load_student(ours, folder)
    load_student(ours, folder, adapter_name="another")


def test_another_base_is_warned_of_and_another_precision_or_a_style_is_not(families, written, caplog):
    family, folder = families["sd"], written["sd"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = family.load().to(torch_dtype=dtype)
        load_student(pipe, folder, adapter_name="style")
        load_student(pipe, folder)
    ours = [record for record in caplog.records if record.name.startswith("stepdistill")]
    assert not ours

    pipe = family.load()
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.01)
    load_student(pipe, folder)
    assert "this pipeline's unet has other weights" in caplog.text


def test_what_does_not_fit_is_refused(families, written, tmp_path):
    with pytest.raises(StudentError, match="StableDiffusion3Pipeline, which has no unet"):
        load_student(families["sd3"].load(), written["sd"])
    with pytest.raises(StudentError, match="nowhere, which does not exist"):
        load_student(families["sd"].load(), "nowhere")
    broken = copied(written, "sd", tmp_path)
    (broken / WEIGHTS).unlink()
    with pytest.raises(StudentError, match="unreadable"):
        load_student(families["sd"].load(), broken)
    with pytest.raises(StudentError, match="unreadable"):
        verify_student(broken)


def test_a_hub_id_is_downloaded(families, written, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "snapshot_download", lambda name, **_: asked.append(name) or written["sd"])
    load_student(families["sd"].load(), "someone/student")
    assert asked == ["someone/student"]


# the contract


def test_the_contract_survives_json_and_is_checked(written, tmp_path):
    contract = read_contract(written["sd3"])
    assert FORMAT.validate_json(FORMAT.dump_json(contract)) == contract
    assert contract.sigmas == pytest.approx([t / 1000 for t in contract.timesteps])
    assert contract.call["sigmas"] == pytest.approx(contract.sigmas, rel=1e-6)
    assert (contract.call["guidance_scale"], contract.call["height"], contract.call["width"]) == (1.0, *SIZE)
    assert contract.licence == "cc-by-nc-4.0" and contract.method["end"] == "clean"

    folder = copied(written, "sd3", tmp_path)
    for change, said in [
        ({"schema_version": 2}, "got schema version 2 .*, expected 1"),
        ({"kind": "half"}, "kind: Input should be 'lora', 'full' or 'adapters'"),
        ({"strenght": 0.7}, "strenght: Unexpected keyword argument"),
        ({"timesteps": ["many"]}, "timesteps.0: Input should be a valid number"),
    ]:
        before = (folder / CONTRACT).read_text()
        edited(folder, CONTRACT, **change)
        with pytest.raises(StudentError, match=said):
            read_contract(folder)
        (folder / CONTRACT).write_text(before)
    for text in ("{", "[1]"):
        (folder / CONTRACT).write_text(text)
        with pytest.raises(StudentError, match="no readable"):
            read_contract(folder)
    with pytest.raises(StudentError, match="no readable"):
        read_contract(tmp_path)


def test_the_lora_metadata_are_in_the_same_order_in_every_process(written):
    with safe_open(written["sd3"] / WEIGHTS, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    targets = facts["transformer.target_modules"]  # PEFT holds them in a set
    assert len(targets) > 5 and targets == sorted(targets)
    assert (facts["transformer.r"], facts["transformer.lora_alpha"]) == (RANK, ALPHA)


# the card


def pasted(folder: Path, plain: bool = True) -> np.ndarray:
    """The image that the card's snippet draws, in pixels."""
    text = (folder / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert ("stepdistill" not in code.replace(str(folder), "")) == plain
    names: dict = {}
    exec(code, names)
    return np.asarray(names["image"])


def expected(family: Family, folder: Path) -> np.ndarray:
    pipe = family.load()
    call = load_student(pipe, folder)
    return np.asarray(pipe("red apple", generator=torch.manual_seed(0), **call).images[0])


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_snippet_runs_as_pasted(families, written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pasted(written[name]), expected(families[name], written[name]))
    assert (tmp_path / "student.png").exists()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_snippet_of_a_scheduler_of_ours_runs_as_pasted(families, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "student", families[name], Reflow(num_inference_steps=4, first_noise=True, ema_decay=None))
    assert verify_student(tmp_path / "student") < 1e-5
    drawn = pasted(tmp_path / "student", plain=False)
    assert np.array_equal(drawn, expected(families[name], tmp_path / "student"))


def test_the_snippet_fuses_the_loras_of_the_teacher(families, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = replace(families["sd3"], teacher_loras=(str(written["sd3"]),))
    assert write(tmp_path / "student", family) < 1e-5
    drawn = pasted(tmp_path / "student")
    assert np.array_equal(drawn, expected(family, tmp_path / "student"))
    assert not np.array_equal(drawn, expected(families["sd3"], tmp_path / "student"))


def test_relative_paths_are_stored_absolute(families, tmp_path, monkeypatch):
    base = Path(families["sd3"].pretrained_teacher_model)
    monkeypatch.chdir(base.parent)
    write(tmp_path, replace(families["sd3"], pretrained_teacher_model=base.name))
    monkeypatch.chdir(tmp_path)
    assert verify_student(tmp_path) < 1e-5


def test_the_front_matter_is_what_the_hub_reads(written, tmp_path):
    folder = copied(written, "sd", tmp_path)
    data = ModelCard.load(str(folder / "README.md")).data
    assert data.license == "cc-by-nc-4.0" and data.library_name == "diffusers"
    assert {"lora", "diffusers", "stepdistill"} <= set(data.tags)
    assert data.base_model is None  # a local folder is no id

    contract = read_contract(folder)
    hub = replace(contract, base_model="owner/base", licence="their-own-terms")
    hub = replace(hub, family=hub.family | {"pretrained_teacher_model": "owner/base", "revision": "v2"})
    (folder / "samples").mkdir()
    (folder / "samples" / "grid.png").touch()
    write_card(folder, hub, "me/student")
    card = ModelCard.load(str(folder / "README.md"))
    assert card.data.base_model == "owner/base"
    assert (card.data.license, card.data.license_name) == ("other", "their-own-terms")
    assert "from_pretrained('owner/base', revision='v2')" in card.text
    assert "student = 'me/student'" in card.text
    assert "![" in card.text and "samples/grid.png" in card.text and "999, 759, 499, 259" in card.text
    assert "Beside the teacher" not in card.text


def measured_row(name: str, nfe: float, excess: list[float], **more: dict) -> dict:
    delta = {"fd": {"value": excess[0], "ci95": excess[1:]}}
    return {"name": name, "cost": {"nfe": nfe}, "metrics": {"delta_vs_teacher": delta} | more}


def test_the_card_shows_what_was_measured(written, tmp_path):
    folder = copied(written, "sd", tmp_path)
    row = measured_row("student, 4 steps", 4, [12.34, 10.0, 14.5])
    teacher = {"name": "teacher, 25 steps", "cost": {"nfe": 50}, "metrics": {}}
    found = {"features": {"id": "net@1", "key": "fd"}, "reference": {"n": 256}, "rows": [teacher, row]}

    def shown() -> str:
        (folder / "eval.json").write_text(json.dumps(found))
        write_card(folder, read_contract(folder))
        return (folder / "README.md").read_text()

    text = shown()
    assert "| | network evaluations | excess [95 %] |\n| --- | --- | --- |\n" in text
    assert "| student, 4 steps | 4 | 12.3 [10.0, 14.5] |\n\nEach row is measured on 256 images" in text
    assert "teacher, 25 steps |" not in text and "iversity" not in text and "`net@1`" in text
    spreads = {"a": ({"value": 0.93, "ci95": [0.912, 0.95]}, "0.930 [0.912, 0.950]")}
    spreads |= {"b": ({"value": 0.93, "ci95": None}, "0.930"), "c": ({"value": None, "ci95": [None, None]}, "–")}
    more = {name: measured_row(name, 2, [1.0, 0.0, 2.0], diversity_vs_teacher=v) for name, (v, _) in spreads.items()}
    found["rows"] = [teacher, *more.values()]
    text = shown()
    assert "| | network evaluations | excess [95 %] | diversity [95 %] |\n| --- | --- | --- | --- |\n" in text
    for name, (_, cell) in spreads.items():
        assert f"| {name} | 2 | 1.0 [0.0, 2.0] | {cell} |\n" in text
    assert "1 is the teacher's variety.\n" in text and "for one.\n\n## Base model and licence\n" in text


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        *((name, True) for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC BY-NC-ND 4.0", "noncommercial")),
        *((name, True) for name in ("sai-nc-community", "stabilityai-nc-research-community")),
        *((name, True) for name in ("flux-1-dev-non-commercial-license", "sdxl-0.9-research-license")),
        *((name, False) for name in ("apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "ncsa")),
        *((name, False) for name in ("cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "stabilityai-ai-community")),
    ],
)
def test_non_commercial_licences_are_known_by_name(licence, found):
    assert is_non_commercial(licence) == found


def test_the_licence_of_the_teacher_is_read_and_warned_of(families, tmp_path, caplog):
    warn_of_licence(families["sd"])
    assert "cc-by-nc-4.0, which excludes commercial use" in caplog.text
    base = shutil.copytree(families["sd"].pretrained_teacher_model, tmp_path / "base")
    family = replace(families["sd"], pretrained_teacher_model=str(base))
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: house-rules\n---\n")
    assert licence_of(family.location()) == "house-rules"
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(family.location()) is None and "cannot read the licence" in caplog.text
    (base / "README.md").unlink()
    assert licence_of(family.location()) is None


# training on


def test_training_goes_on_from_a_student_at_the_same_strength(families, written):
    family = families["sd3"]
    pipe = family.load()
    bone = tiny.backbone("sd3", pipe, RANK, RANK)  # a quarter of the scale that the folder has
    bone.add("student", Lora())
    bone.add("ema", Ema("student", 0.9))
    start_from(bone, str(written["sd3"]), family)
    contract = read_contract(written["sd3"])
    for role in ("student", "ema"):
        plain = family.load()
        load_student(plain, written["sd3"])
        assert proof.prove(contract, family, plain, pipe, bone, role, 0).difference < 1e-5

    pipe, plain = family.load(), family.load()
    wide = tiny.backbone("sd3", pipe, 2 * RANK)
    wide.add("student", Lora())
    start_from(wide, str(written["sd3"] / WEIGHTS), family)
    load_student(plain, written["sd3"])
    assert proof.prove(contract, family, plain, pipe, wide, "student", 0).difference < 1e-5

    few = Backbone(family.load().transformer, LoraSpec(rank=RANK, target_modules=("to_q",)), ())
    few.add("student", Lora())
    with pytest.raises(StudentError, match=WEIGHTS):
        start_from(few, str(written["sd3"] / WEIGHTS), family)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_training_goes_on_at_the_alpha_of_each_layer_as_diffusers_reads_it(families, written, tmp_path, name):
    family, part = families[name], families[name].network_name
    with safe_open(written[name] / WEIGHTS, "pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    strong = sorted(state)[0].removeprefix(f"{part}.").removesuffix(".lora_A.weight")
    facts = json.loads(metadata["lora_adapter_metadata"])
    facts |= {f"{part}.lora_alpha": RANK, f"{part}.alpha_pattern": {f"^{strong}": 4 * RANK}}
    save_file(state, tmp_path / WEIGHTS, metadata | {"lora_adapter_metadata": json.dumps(facts)})

    plain, bone = family.load(), tiny.backbone(name, family.load(), RANK, 3)
    plain.load_lora_weights(tmp_path, adapter_name="student")
    theirs = {key: layer for key, layer in family.network(plain).named_modules() if isinstance(layer, LoraLayer)}
    assert {key: layer.scaling["student"] for key, layer in theirs.items()} == dict.fromkeys(theirs, 1.0) | {
        strong: 4.0
    }
    bone.add("student", Lora())
    start_from(bone, str(tmp_path / WEIGHTS), family)
    for key, layer in theirs.items():
        ours = bone.net.get_submodule(key).get_delta_weight("student")
        assert torch.allclose(ours, layer.get_delta_weight("student"), rtol=1e-5, atol=1e-8), key


WRITES = """
import sys
from pathlib import Path

import tiny
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.roles import Lora
from stepdistill.students.base_model import base_of
from stepdistill.students.verify import export_formats
from stepdistill.students.write import write_student, write_unproven

family, out = StableDiffusion3(pretrained_teacher_model=sys.argv[1]), Path(sys.argv[2])
pipe = family.load()
bone = tiny.backbone("sd3", pipe, 4, 16)
bone.add("student", Lora())
tiny.awake(bone, "student", 0.05)
given = {"family": family, "role": "student", "resolution": (32, 32)}
write_student(out / "lora", pipe=pipe, backbone=bone, method=Consistency(ema_decay=None), **given)
export_formats(out / "lora", ("kohya", "comfyui"))
pipe, method = family.load(), AdapterGuidance()
bone = tiny.backbone("sd3", pipe)
bone.add("student", method.roles()["student"])
write_unproven(out / "adapters", pipe=pipe, backbone=bone, method=method, base=base_of(pipe, family), **given)
"""


def test_two_processes_write_the_same_bytes(families, tmp_path):
    """Cards name their folder, so both processes write the same one."""
    contents = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        arguments = [families["sd3"].pretrained_teacher_model, str(tmp_path / "out")]
        subprocess.run([sys.executable, "-c", WRITES, *arguments], check=True, capture_output=True, env=environment)
        files = sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
        contents.append({str(file.relative_to(tmp_path)): file.read_bytes() for file in files})
        shutil.rmtree(tmp_path / "out")
    first, second = contents
    assert len([name for name in first if name.endswith(".safetensors")]) == 4
    assert first.keys() == second.keys() and not [name for name in first if first[name] != second[name]]
