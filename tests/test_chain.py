"""`start_from`: a run begins as the few-step student, and what it exports is one LoRA for both."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.files import file_digest
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.families.base import Family
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Tuning, Update
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.chain import LAST, chained, fuse_start
from stepdistill.students.contract import WEIGHTS, read_contract
from stepdistill.students.load import load_student
from stepdistill.students.lora.files import convert_lora
from stepdistill.students.lora.fuse import fuse_student
from stepdistill.students.verify import verify_student
from stepdistill.students.write import write_student
from stepdistill.training import distill as distilling
from stepdistill.training.checks import check_run, check_start_from
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.sampling import sample_student, sample_teacher
from stepdistill.training.setup import prepare

NAMES = ("sd", "sd3", "pixart_alpha")  # with convolutions, a flow, and without a LoRA loader in Diffusers
LCM, TCD = Consistency(ema_decay=None), Consistency(end="any", ema_decay=None)
RANK, ALPHA = 4, 16


@dataclass(frozen=True, kw_only=True)
class Shift(Tuning):
    """A tuning method for the tests: latents move towards 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"prompts"})

    def updates(self, context, batch, step):
        x_t = context.noise(batch, "start")
        t = torch.full((len(x_t),), self.sampler(context.schedule).timesteps[0])
        yield Update("student", (context.denoiser("student")(x_t, t, batch.cond).x0 - 1).square().mean())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher of each family, and a student of it with alpha other than rank."""
    folder = tmp_path_factory.mktemp("chain")
    for name in NAMES:
        tiny.pipeline(name).save_pretrained(folder / name)
        family = family_of(folder, name)
        pipe = family.load()
        backbone = tiny.backbone(name, pipe, RANK, ALPHA)
        backbone.add("student", Lora())
        tiny.awake(backbone, "student", 0.05)
        options = {"role": "student", "method": LCM if name == "sd3" else TCD, "resolution": (32, 32), "steps": 3}
        write_student(folder / f"{name}-student", family=family, pipe=pipe, backbone=backbone, **options)
    return folder


def family_of(folder: Path, name: str) -> Family:
    return replace(tiny.FAMILIES[name], pretrained_teacher_model=str(folder / name))


def run_of(folder: Path, name: str, out: Path, start: str | None = None, **options) -> Run:
    train = {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 1e-2, "teacher_steps": 4}
    given = {
        "method": Shift(ema_decay=None),
        "start_from": start or str(folder / f"{name}-student"),
        "lora": LoraSpec(rank=2, alpha=3),
    }
    return Run(
        family=family_of(folder, name),
        data=Prompts(prompts=("rose", "octopus")),
        train=TrainSpec(output_dir=str(out), resolution=32, report_to="none", **train),
        **(given | options),
    )


def test_a_chain_adds_what_both_add():
    torch.manual_seed(0)

    def layer(rank: int, alpha: float, *kernel: int) -> LayerLora:
        down, up = torch.randn(rank, 5, *kernel), torch.randn(7, rank, *[1] * len(kernel))
        return LayerLora(down, up, alpha)

    first = {"a": layer(3, 6.0), "b": layer(2, 1.0, 3, 3), "c": layer(3, 2.0)}
    second = {"a": layer(2, 5.0), "b": layer(4, 3.0, 3, 3), "d": layer(1, 1.0)}
    both = chained(first, second)
    assert both.keys() == {"a", "b", "c", "d"}
    for name, one in both.items():
        wanted = sum(part[name].product() for part in (first, second) if name in part)
        assert one.scale == 1 and len(one.down) == 3 + 4
        torch.testing.assert_close(one.product(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_run_begins_as_the_student_bit_for_bit(name, place, tmp_path):
    session = prepare(run_of(place, name, tmp_path).resolved())
    family, student = family_of(place, name), family_of(place, name).load()
    load_student(student, place / f"{name}-student")
    fuse_loras(student)
    ours = session.backbone.net.state_dict()
    theirs = {key.replace(".base_layer", ""): value for key, value in family.network(student).state_dict().items()}
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    session.backbone.add("student", *session.run.method.roles().values())
    drawn = sample_student(session, ["rose"], [0])
    assert torch.equal(drawn, sample_teacher(session, ["rose"], [0]))
    assert session.run.method.sampler(session.context(0).schedule) == read_contract(place / f"{name}-student").sampler()


@pytest.mark.parametrize("name", NAMES)
def test_the_export_is_one_lora_and_the_last_one_alone(name, place, tmp_path):
    first = place / f"{name}-student"
    out = distill(run_of(place, name, tmp_path / "out"))
    contract, before = read_contract(out), read_contract(first)
    assert contract.lora is not None and (contract.lora.rank, contract.lora.alpha) == (RANK + 2, RANK + 2)
    assert contract.proof is not None and contract.proof.difference < 1e-4
    assert contract.sampler() == before.sampler() and contract.base_hash == before.base_hash
    assert [stage.method for stage in contract.start_from] == [before.method]
    assert verify_student(out) < 1e-4
    card = (out / "README.md").read_text()
    assert "on top of a student of `Consistency`" in card and LAST in card
    assert LAST not in (first / "README.md").read_text()
    family = family_of(place, name)
    both, one, last = (family.read_lora(file) for file in (out, first, out / LAST))
    assert both.keys() == one.keys() == last.keys()
    moved = 0.0
    for key, layer in both.items():
        torch.testing.assert_close(layer.product(), one[key].product() + last[key].product(), rtol=1e-5, atol=1e-6)
        moved = max(moved, last[key].product().abs().max().item())
    assert moved > 1e-3 and {layer.scale for layer in last.values()} == {1.5}


def test_the_start_is_that_of_the_first_step_whatever_becomes_of_its_folder(place, tmp_path, monkeypatch):
    first = shutil.copytree(place / "sd-student", tmp_path / "first")
    loop = distilling.training_loop

    def removed(*given):
        shutil.rmtree(first)
        return loop(*given)

    monkeypatch.setattr(distilling, "training_loop", removed)
    contract = read_contract(distill(run_of(place, "sd", tmp_path / "out", start=str(first))))
    assert contract.proof is not None and contract.proof.difference < 1e-4
    assert [stage.sha256 for stage in contract.start_from] == [file_digest(place / "sd-student" / WEIGHTS)]


def test_a_third_stage_goes_on_from_the_second(place, tmp_path):
    second = distill(run_of(place, "sd", tmp_path / "second"))
    third = distill(run_of(place, "sd", tmp_path / "third", start=str(second)))
    contract = read_contract(third)
    assert contract.lora is not None and contract.lora.rank == RANK + 4
    kinds = [stage.method["type"].rpartition(".")[2] for stage in contract.start_from if stage.method]
    assert kinds == ["Consistency", "Shift"]
    convert_lora(third, tmp_path / "kohya.safetensors", "kohya")
    kohya = load_file(tmp_path / "kohya.safetensors")
    assert {len(value) for key, value in kohya.items() if "lora_down" in key} == {RANK + 4}


def test_a_foreign_lora_starts_a_run_with_its_sampler_in_the_config(place, tmp_path):
    file = tmp_path / "foreign.safetensors"
    state = load_file(place / "sd-student" / WEIGHTS)
    few = {key: value for key, value in state.items() if "down_blocks.0" in key}  # alpha is the rank without metadata
    save_file(few, file)
    sampler = Sampler((999.0, 499.0), eta=1.0)
    method = Shift(ema_decay=None, sampling=sampler)
    out = distill(run_of(place, "sd", tmp_path / "out", start=str(file), method=method))
    contract = read_contract(out)
    assert contract.sampler() == sampler and contract.start_from[0].method is None
    with pytest.raises(ConfigError, match=r"sampling is none.*start_from to a student folder"):
        distill(run_of(place, "sd", tmp_path / "none", start=str(file)))


def test_what_cannot_be_a_start_is_refused_before_anything_is_loaded(place, tmp_path):
    fuse_student(place / "sd-student", tmp_path / "full")
    with pytest.raises(StudentError, match="a student of kind 'full'.*take it as the teacher"):
        run_of(place, "sd", tmp_path / "out", start=str(tmp_path / "full")).resolved()
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}
    text |= {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(32, 2)}
    save_file(text, tmp_path / "text.safetensors")
    method = Shift(sampling=Sampler((999.0,)))
    with pytest.raises(StudentError, match="1 layers outside the unet"):
        check_run(run_of(place, "sd", tmp_path / "out", start=str(tmp_path / "text.safetensors"), method=method))
    quantized = replace(family_of(place, "sd"), quantization=object())
    for changed, match in (({"method": AdapterGuidance()}, "guidance adapters"), ({"family": quantized}, "quantiz")):
        with pytest.raises(ConfigError, match=match):
            check_start_from(replace(run_of(place, "sd", tmp_path / "out"), **changed))
    wide = UNet2DConditionModel.from_config(family_of(place, "sd").load().unet.config | {"cross_attention_dim": 16})
    pipe = family_of(place, "sd").load()
    pipe.unet = wide
    with pytest.raises(StudentError, match="layers of this pipeline"):
        fuse_start(pipe, family_of(place, "sd"), str(place / "sd-student"))


def test_another_base_and_a_method_of_many_steps_are_told(place, tmp_path, caplog):
    pipe = tiny.pipeline("sd", seed=3)
    pipe.save_pretrained(tmp_path / "other")
    family = replace(family_of(place, "sd"), pretrained_teacher_model=str(tmp_path / "other"))
    fuse_start(family.load(), family, str(place / "sd-student"))
    assert "the weights of" in caplog.text and "are others" in caplog.text
    samples = TeacherSamples(source=Prompts(prompts=("rose",)), folder=str(tmp_path / "samples"), count=2)
    check_run(replace(run_of(place, "sd", tmp_path / "out", method=Consistency()), data=samples))
    assert "use lora.init_from" in caplog.text
