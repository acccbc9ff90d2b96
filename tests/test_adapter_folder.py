"""A folder of guidance adapters: in plain pipelines of the base and of its relatives, with LoRAs, in one pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapters import stirred
from torch import nn

import stepdistill
from stepdistill.core.cost import count_calls
from stepdistill.core.denoise import with_scale
from stepdistill.core.errors import StudentError
from stepdistill.core.solvers import few_step
from stepdistill.data import Prompts, Trajectories
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.networks.roles import Adapters, Lora, LoraSpec
from stepdistill.students.contract import ADAPTERS, WEIGHTS, read_contract
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.call import generate, student_call
from stepdistill.students.load import load_student, start_from
from stepdistill.students.several import join_students
from stepdistill.students.verify import verify_student
from stepdistill.students.write import write_student
from stepdistill.training.distill import dry_run
from stepdistill.training.recipe import Run, TrainSpec

METHOD = AdapterGuidance(arch="mixed", width=16, guidance_range=(1.0, 8.0), num_inference_steps=4)
EACH = pytest.mark.parametrize("name", tiny.ADAPTED)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    found = {}
    for name in tiny.ADAPTED:
        family = tiny.FAMILIES[name]
        folder = tmp_path_factory.mktemp(name)
        tiny.pipeline(name).save_pretrained(folder)
        found[name] = replace(family, pretrained_teacher_model=str(folder))
    return found


def trained(family, name: str, method=METHOD, dtype=torch.float32):
    pipe = family.load()
    nn.Module.to(family.network(pipe), dtype)
    bone = tiny.backbone(name, pipe)
    for role, kind in method.roles().items():
        bone.add(role, kind)
    stirred(bone, "student", 0.1)
    return pipe, bone


def write(folder: Path, family, name: str, method=METHOD, dtype=torch.float32) -> float:
    pipe, bone = trained(family, name, method, dtype)
    options = {"role": "student", "resolution": (32, 32), "method": method, "licence": "mit"}
    return write_student(folder, family=family, pipe=pipe, backbone=bone, **options)


@pytest.fixture(scope="module")
def written(families, tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(f"student-{name}") for name in families}
    for name, folder in folders.items():
        assert write(folder, families[name], name) < 1e-5
    return folders


def noise_for(name: str) -> torch.Tensor:
    return torch.randn(2, *tiny.latent_shape(name), generator=torch.Generator().manual_seed(0))


def latents(pipe, call, name: str) -> torch.Tensor:
    """Latents of two samples, whatever the pipeline calls latents."""
    torch.manual_seed(0)
    family, start = tiny.FAMILIES[name], noise_for(name)
    made = pipe(prompt=["red apple", "cat face"], latents=family.pack(start), output_type="latent", **each(call, 2))[0]
    return family.latents_of(pipe, made, 8, 8)


@EACH
def test_the_folder_its_contract_and_its_proof(families, written, name):
    folder, contract = written[name], read_contract(written[name])
    assert contract.kind == "adapters" and contract.lora is None and contract.network is None
    assert contract.guidance_range == (1.0, 8.0) and contract.guidance_scale == 1
    assert families[name].guidance(1.0).items() <= contract.call.items()
    assert not contract.negative_prompt and len(contract.timesteps) == 4
    assert verify_student(folder) < 1e-5
    with safe_open(folder / ADAPTERS, "pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    assert tuple(manifest["sites"]) == contract.adapters.sites and manifest["guidance_scale"] == 7.5
    assert sum(v.numel() for v in load_file(folder / ADAPTERS).values()) == contract.adapters.parameters
    assert not (folder / WEIGHTS).exists()


@EACH
def test_a_plain_pipeline_draws_what_was_trained_at_every_scale_in_one_pass(families, written, name):
    family = families[name]
    (mine, bone), pipe = trained(family, name), family.load()
    keys = list(family.network(pipe).state_dict())
    call = stepdistill.load_student(pipe, written[name])
    assert isinstance(call, GuidedCall) and call.guidance_scale == 7.5
    assert family.guidance(1.0).items() <= call.items()
    schedule = family.schedule_at(mine, mine.scheduler, (32, 32))
    sampler = METHOD.sampler(schedule)
    denoiser = Denoiser(bone, "student", schedule, family.kind(mine), family.call)
    cond = family.condition(mine, ["red apple", "cat face"])
    drawn = []
    for w in (1.0, 3.0, 8.0):
        call.guidance_scale = w
        with count_calls(family.network(pipe)) as cost:
            drawn.append(latents(pipe, call, name))
        assert (cost.calls, cost.rows) == (4, 8)  # O-d5: as many as without guidance
        with torch.no_grad():
            ours = few_step(with_scale(denoiser, w), schedule, sampler, noise_for(name), cond)
        assert (drawn[-1] - ours).abs().max() < 1e-4 * ours.abs().max()
    assert (drawn[2] - drawn[1]).abs().max() > 1e-3 and list(family.network(pipe).state_dict()) == keys


@EACH
def test_taken_off_again_the_pipeline_guides_as_ever(families, written, name):
    """O-d8, and no second set of hooks by a second load."""
    family, plain, pipe = families[name], families[name].load(), families[name].load()
    call = load_student(pipe, written[name])
    once = latents(pipe, call, name)
    plain.scheduler = pipe.scheduler
    again = load_student(pipe, written[name])
    assert torch.equal(latents(pipe, again, name), once)
    again.remove()
    usual = {**again, **family.guidance(4.0)}
    assert torch.equal(latents(pipe, usual, name), latents(plain, usual, name))
    assert not any(module._forward_hooks for module in family.network(pipe).modules())


def test_a_scale_that_was_not_trained_is_warned_of(families, written, caplog):
    call = load_student(families["sd"].load(), written["sd"])
    call.guidance_scale = 8.0
    assert not [record for record in caplog.records if record.name.startswith("stepdistill")]
    for w in (0.5, 12.0):
        call.guidance_scale = w
        assert f"guidance_scale {w:g} is outside the range that the adapters were trained on, 1 to 8" in caplog.text
    assert call.guidance_scale == 12.0


@EACH
def test_with_a_style_lora_and_on_a_checkpoint_that_was_fine_tuned(families, written, tmp_path, name, caplog):
    """The adapters' effect is that of the same adapters on the other network, at whose keys nothing has changed."""
    family = families[name]
    pipe = family.load()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # a second checkpoint
        for p in family.network(pipe).parameters():
            p += 0.02 * p.abs().mean() * torch.randn(p.shape, generator=generator)
    pipe.save_pretrained(tmp_path / "tuned")
    tuned = replace(family, pretrained_teacher_model=str(tmp_path / "tuned"))
    styled = tuned.load()
    bone = tiny.backbone(name, styled)
    bone.add("style", Lora())
    tiny.awake(bone, "style", 0.02)
    tuned.save_lora(tmp_path, bone.state("style"), bone.lora_config("style"))

    plain, ours = tuned.load(), tuned.load()
    if not family.loads_lora:
        pytest.skip("Diffusers loads no style into this pipeline")
    for one in (plain, ours):
        one.load_lora_weights(tmp_path, adapter_name="style")
    call = load_student(ours, written[name])
    assert "has other weights" in caplog.text
    assert ours.get_active_adapters() == ["style"]
    both = latents(ours, call, name)
    plain.scheduler = ours.scheduler
    assert (both - latents(plain, call, name)).abs().max() > 1e-3  # the adapters have an effect
    net = tuned.network(plain)
    merged = Backbone(net, LoraSpec(), (), sites=tuned.sites(net))  # the same, put together by hand
    merged.add("student", Adapters("mixed", 16))
    merged.load_state("student", load_file(written[name] / ADAPTERS))
    merged._hooks.now = merged._context("student", torch.tensor(7.5))  # `use` would switch the style off
    assert (latents(plain, call, name) - both).abs().max() < 1e-4 * both.abs().max()
    ours.unload_lora_weights()  # with the adapters on
    assert (latents(ours, call, name) - both).abs().max() > 1e-3


def test_half_precision_and_a_pipeline_that_is_moved_later(families, tmp_path):
    assert write(tmp_path, families["sd3"], "sd3", dtype=torch.bfloat16) < 1e-5
    assert read_contract(tmp_path).proof.dtype == "bfloat16"
    pipe, other = families["sd3"].load().to(torch.bfloat16), families["sd3"].load()
    call = load_student(pipe, tmp_path)
    adapters = call.attachment.adapters
    assert {p.dtype for p in adapters.parameters()} == {torch.bfloat16}
    half, whole = latents(pipe, call, "sd3"), latents(other, load_student(other, tmp_path), "sd3")
    assert (half - whole).abs().max() < 0.1 * whole.abs().max()
    call.attachment.net.to("meta")  # anywhere else
    call.attachment._follow(call.attachment.net, ())
    assert {p.device.type for p in adapters.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_card_s_snippet_runs_as_pasted(families, written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(str(written[name] / "README.md"))
    assert "lora" not in card.data.tags
    assert "Guidance adapters" in card.text and "Load it with stepdistill." in card.text
    assert "| scale of the adapters | 1 to 8 (default: 7.5) |" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith("import stepdistill\n") and "call.guidance_scale = 7.5" in code
    names: dict = {}
    exec(code, names)
    pipe = families[name].load()
    call = load_student(pipe, written[name])
    expected = pipe("red apple", generator=torch.manual_seed(0), **call).images[0]
    assert np.array_equal(np.asarray(names["image"]), np.asarray(expected)) and (tmp_path / "student.png").exists()


def test_training_goes_on_from_a_folder(families, written):
    pipe = families["sd"].load()
    bone = tiny.backbone("sd", pipe)
    bone.add("student", Adapters("mixed", 16))
    start_from(bone, str(written["sd"]), families["sd"])
    stored = load_file(written["sd"] / ADAPTERS)
    assert all(torch.equal(value, stored[key]) for key, value in bone.state("student").items())
    wide = tiny.backbone("sd", pipe)
    wide.add("student", Adapters("mixed", 24))
    with pytest.raises(StudentError, match=f"{written['sd'].name}: .*size mismatch"):
        start_from(wide, str(written["sd"]), families["sd"])


def test_what_does_not_fit_is_refused(families, written, tmp_path):
    folder = Path(shutil.copytree(written["sd"], tmp_path / "copy"))
    state = load_file(folder / ADAPTERS)
    save_file({key: value for key, value in state.items() if not key.startswith("0.")}, folder / ADAPTERS)
    for use in (verify_student, lambda place: load_student(families["sd"].load(), place)):
        with pytest.raises(StudentError, match="Missing key"):
            use(folder)
    (folder / ADAPTERS).unlink()
    with pytest.raises(StudentError, match="unreadable"):
        load_student(families["sd"].load(), folder)
    other = tiny.pipeline("sd")
    other.unet = families["sdxl"].network(families["sdxl"].load())
    with pytest.raises(StudentError, match="for 7 attention layers, and the network has 8"):
        load_student(other, written["sd"])
    with pytest.raises(StudentError, match="which holds guidance adapters"):
        join_students(tmp_path / "all", [written["sd"], written["sd3"]])


def test_images_and_a_dry_run(families, written, tmp_path):
    family = families["sd"]
    data = Trajectories(source=Prompts(prompts=("rose",)), folder=str(tmp_path / "t"), count=2, kept_steps=2)
    spec = TrainSpec(output_dir=str(tmp_path / "out"), report_to="none")
    run = Run(family=family, method=METHOD, data=replace(data, guidance_range=(1.0, 8.0)), train=spec)
    size = read_contract(written["sd"]).adapters.parameters
    line = next(line for line in dry_run(run).splitlines() if line.split()[0] == "student")
    assert f"{size / 1e6:.2f} M" in line
    assert line.split()[3:] == [f"{each * size / 2**20:.1f}" for each in (4, 4, 8)]
    started = replace(run, lora=LoraSpec(init_from=str(written["sd"])))
    assert dry_run(started) == dry_run(run)
    with pytest.raises(StudentError, match="size mismatch"):
        dry_run(replace(started, method=replace(METHOD, width=8)))
    pipe, teacher = family.load(), family.load()
    load_student(pipe, written["sd"])
    images, cost = generate(pipe, student_call(run.family, run.method, teacher, 4), ["rose", "cat face"], 0)
    assert images.shape == (2, 3, 32, 32) and (cost.calls, cost.rows) == (4, 8)
