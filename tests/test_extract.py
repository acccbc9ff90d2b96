"""`stepdistill extract`: a few-step model becomes a LoRA student of its base, without training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from oracles.planted import planted
from safetensors.torch import load_file
from torch import nn

from stepdistill.cli.main import main
from stepdistill.core.errors import ConfigError, OutputError, StudentError
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts
from stepdistill.families.base import Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.roles import Copy, Lora
from stepdistill.students import difference
from stepdistill.students.contract import WEIGHTS, read_contract
from stepdistill.students.difference import choose_targets, difference_of
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.extract import Extraction, extract_student
from stepdistill.students.extracted import Extracted
from stepdistill.students.load import load_student
from stepdistill.students.lora.fuse import fuse_student
from stepdistill.students.rollout import JUDGED, Rollout
from stepdistill.students.room import EXTRACTION
from stepdistill.students.verify import verify_student
from stepdistill.training.checks import check_run
from stepdistill.training.recipe import Run, TrainSpec

NAMES = ("sd", "sd3", "pixart_alpha")  # with convolutions, a flow, and without a LoRA loader in Diffusers
TIMES = (999.0, 749.0, 499.0, 249.0)
PROMPTS = ("red apple", "a rose", "")
FULL = 600  # no layer has a higher rank


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of each family, and a model whose LoRA targets have changed by a tenth of their size."""
    folder = tmp_path_factory.mktemp("extract")
    for name in NAMES:
        pipe = tiny.pipeline(name)
        pipe.save_pretrained(folder / name)
        family = tiny.FAMILIES[name]
        change(family.network(pipe), *family.lora_targets(family.network(pipe)))
        pipe.save_pretrained(folder / f"{name}-tuned")
    return folder


@torch.no_grad()
def change(net: nn.Module, *layers: str, by: float = 0.1) -> None:
    """Change the weights of layers by a share of their size, more in some directions than in others."""
    generator = torch.Generator().manual_seed(7)
    for layer in layers:
        weight: Any = net.get_submodule(layer).weight
        noise = torch.randn(weight.shape, generator=generator).flatten(1)
        noise = noise @ torch.linspace(2, 0.1, noise.shape[1]).diag()
        weight += by * weight.norm() / noise.norm() * noise.reshape(weight.shape)


def _weight(net: nn.Module, layer: str) -> torch.Tensor:
    weight = net.get_submodule(layer).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def family_of(place: Path, name: str) -> Family:
    return replace(tiny.FAMILIES[name], pretrained_teacher_model=str(place / name))


def extracted(place: Path, name: str, out: Path, tuned: Path | None = None, **options: Any) -> Extraction:
    method = options.pop("method", Extracted(tuned="", sha256="", timesteps=TIMES, eta=0.0))
    given = {"rank": FULL, "prompts": PROMPTS, "resolution": (32, 32), "batch": 2}
    family = options.pop("family", family_of(place, name))
    return extract_student(str(tuned or place / f"{name}-tuned"), family, out, method=method, **(given | options))


def edited(place: Path, name: str, out: Path, edit: Callable[[nn.Module], object]) -> Path:
    """A copy of a base with an edited network."""
    family = family_of(place, name)
    pipe = family.load()
    with torch.no_grad():
        edit(family.network(pipe))
    pipe.save_pretrained(out)
    return out


def drawn(family: Family, pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    noise = torch.randn(1, *family.latent_shape(pipe, 32, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return pipe(prompt="a rose", latents=family.pack(noise), output_type="latent", **call).images


def same_network(place: Path, name: str, student: Path, tuned: Path) -> None:
    """The base with the student fused in has the tuned model's weights."""
    family = family_of(place, name)
    plain, theirs = family.load(), replace(family, pretrained_teacher_model=str(tuned)).load()
    load_student(plain, student)
    fuse_loras(plain)
    ours = {k.replace(".base_layer", ""): v for k, v in family.network(plain).state_dict().items() if "lora_" not in k}
    for key, value in family.network(theirs).state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=key)


# what comes out


@pytest.mark.parametrize("name", NAMES)
def test_at_full_rank_the_student_is_the_tuned_model(name: str, place: Path, tmp_path: Path) -> None:
    extraction = extracted(place, name, tmp_path / "out", method=Extracted(tuned="", sha256="", timesteps=TIMES, eta=1))
    assert list(extraction.gap_left) == list(TIMES) and max(extraction.gap_left.values()) < 1e-8
    assert min(layer.energy for layer in extraction.layers.values()) > 1 - 1e-9
    assert extraction.difference < 1e-4 and not extraction.left_out and not extraction.beside
    assert verify_student(tmp_path / "out") < 1e-4
    same_network(place, name, tmp_path / "out", place / f"{name}-tuned")
    family = family_of(place, name)
    bare, ours = family.load(), family.load()
    theirs = replace(family, pretrained_teacher_model=str(place / f"{name}-tuned")).load()
    call = load_student(ours, tmp_path / "out")
    for pipe in (bare, theirs):
        pipe.scheduler = type(ours.scheduler).from_config(ours.scheduler.config)
    taught = drawn(family, theirs, call)
    torch.testing.assert_close(drawn(family, ours, call), taught, rtol=1e-3, atol=1e-3)
    assert (drawn(family, bare, call) - taught).abs().max() > 0.05


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_gap_falls_with_the_rank_and_what_is_kept_rises(name: str, place: Path, tmp_path: Path) -> None:
    found = [extracted(place, name, tmp_path / str(rank), rank=rank) for rank in (2, 8, 24)]
    gaps = [sum(one.gap_left.values()) for one in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 1.3 * gaps[2] > 0.01
    for layer in found[0].layers:
        energies = [one.layers[layer].energy for one in found]
        assert energies == sorted(energies) and 0 < energies[0] < 1 and found[0].layers[layer].outputs is None
    contract = read_contract(tmp_path / "8")
    assert contract.lora is not None and (contract.lora.rank, contract.lora.alpha) == (8, 8)
    tuned = replace(family_of(place, name), pretrained_teacher_model=str(place / f"{name}-tuned")).load()
    base = family_of(place, name).load()
    layer = next(iter(found[1].layers))
    ours, theirs = (_weight(family_of(place, name).network(pipe), layer) for pipe in (base, tuned))
    values = torch.linalg.svdvals((theirs - ours).double().flatten(1)).square()
    assert found[1].layers[layer].energy == pytest.approx((values[:8].sum() / values.sum()).item(), abs=1e-5)
    assert found[1].layers[layer].change == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_prompts_fit_linear_layers_to_their_inputs(name: str, place: Path, tmp_path: Path) -> None:
    """Their outputs are closer, and their weights further off; convolutions are as without."""
    fitted = Extracted(tuned="", sha256="", timesteps=TIMES, whitened=True)
    plain = extracted(place, name, tmp_path / "0", rank=4)
    whitened = extracted(place, name, tmp_path / "1", rank=4, method=fitted)
    linear = [layer for layer in whitened.layers if whitened.layers[layer].outputs is not None]
    assert (len(linear) < len(whitened.layers)) == (name == "sd")
    assert read_contract(tmp_path / "1").method["whitened"] and not read_contract(tmp_path / "0").method["whitened"]
    for layer, one in whitened.layers.items():
        if layer in linear:
            assert one.energy <= plain.layers[layer].energy + 1e-6
        else:
            assert one.energy == pytest.approx(plain.layers[layer].energy, abs=1e-6)
    outputs = [whitened.layers[layer].outputs or 0.0 for layer in linear]
    assert min(outputs) > 0 and sum(outputs) > sum(plain.layers[layer].energy for layer in linear)


def test_the_contract_and_the_card_say_where_it_comes_from(place: Path, tmp_path: Path, caplog: Any) -> None:
    tuned = shutil.copytree(place / "sd-tuned", tmp_path / "tuned")
    (tuned / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    method = Extracted(tuned="", sha256="", timesteps=(999.0, 499.0), eta=0.5, sampling_guidance_scale=2.0)
    extracted(place, "sd", tmp_path / "out", tuned, rank=2, method=method)
    assert "cc-by-nc-4.0, which excludes commercial use" in caplog.text
    contract = read_contract(tmp_path / "out")
    assert contract.sampler() == Sampler((999.0, 499.0), eta=0.5, clean=False, guidance_scale=2.0)
    assert contract.method["tuned"] == str(tuned) and contract.licence == "cc-by-nc-4.0"
    assert contract.method["sha256"] == hash_of_tuned(place) != contract.base_hash["float32"]
    assert contract.base_model == str(place / "sd") and contract.proof is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from the few-step model `{tuned}`" in card and "It was not trained" in card.replace("\n", " ")
    assert "trained student" not in card and "distilled from" not in card and "the extracted student" in card
    told = json.loads((tmp_path / "out" / EXTRACTION).read_text())
    assert list(told["gap_left"]) == ["999.0", "499.0"] and len(told["layers"]) > 100


def hash_of_tuned(place: Path) -> str:
    from stepdistill.students.base_model import base_hash

    family = replace(family_of(place, "sd"), pretrained_teacher_model=str(place / "sd-tuned"))
    return base_hash(family.load(), family)


def test_it_is_drawn_and_measured_with_other_steps_as_every_student(place: Path, tmp_path: Path) -> None:
    extracted(place, "sd", tmp_path / "out", rank=2)
    student = StudentPipeline.load(str(tmp_path / "out"), None, torch.device("cpu"), None, [])
    call = student.call(DrawOptions(steps=2))
    assert call.arguments["num_inference_steps"] == 2


def test_every_form_of_the_tuned_model_gives_the_same(place: Path, tmp_path: Path) -> None:
    """A pipeline, its network in a folder of its own, and a student folder with a whole network."""
    first = extracted(place, "sd3", tmp_path / "pipeline", rank=4)
    assert first.layers == extracted(place, "sd3", tmp_path / "net", place / "sd3-tuned" / "transformer", rank=4).layers
    fuse_student(tmp_path / "pipeline", tmp_path / "fused")
    again = extracted(place, "sd3", tmp_path / "again", tmp_path / "fused", rank=4)
    assert max(again.gap_left.values()) < 1e-8  # it has rank 4
    assert min(layer.energy for layer in again.layers.values()) > 1 - 1e-6


def test_steps_are_those_of_the_base_s_solver(place: Path, tmp_path: Path) -> None:
    method = Extracted(tuned="", sha256="", num_inference_steps=3)
    extraction = extracted(place, "sd3", tmp_path / "out", rank=2, method=method)
    family = family_of(place, "sd3")
    pipe = family.load()
    assert tuple(extraction.gap_left) == family.schedule_at(pipe, pipe.scheduler, (32, 32)).starts(3)


# layers without a LoRA


def test_what_differs_outside_of_the_targets_is_told_and_with_all_included(
    place: Path, tmp_path: Path, caplog: Any
) -> None:
    def edit(net: Any) -> None:
        change(net, "conv_in", "time_embedding.linear_1", "mid_block.attentions.0.proj_in")
        net.conv_norm_out.bias += 0.2

    tuned = edited(place, "sd", tmp_path / "tuned", edit)
    few = extracted(place, "sd", tmp_path / "few", tuned)
    assert list(few.layers) == ["mid_block.attentions.0.proj_in"] and few.beside == ("conv_norm_out.bias",)
    assert few.left_out.keys() == {"conv_in", "time_embedding.linear_1"}
    assert "2 layers outside the LoRA's targets differ from the base, by up to 0.1 of" in caplog.text
    assert "conv_in" in caplog.text and "With --all" in caplog.text and "holds them: conv_norm_out.bias" in caplog.text
    every = extracted(place, "sd", tmp_path / "every", tuned, every=True)
    assert every.layers.keys() == {*few.left_out, *few.layers} and not every.left_out
    assert "unet.conv_in.lora_A.weight" in load_file(tmp_path / "every" / WEIGHTS)
    assert max(every.gap_left.values()) < max(few.gap_left.values())
    assert 1e-6 < max(every.gap_left.values())  # the bias


def test_an_added_layer_brings_those_that_its_name_is_the_end_of() -> None:
    """PEFT takes a whole name for an end as well."""
    base = nn.ModuleDict(
        {"proj": nn.Linear(2, 2), "block": nn.ModuleDict({"q": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})}
    )
    tuned = deepcopy(base)
    change(tuned, "proj")
    found = difference_of(base, tuned, ("tuned", "base"))
    assert found.outside(["block.q"]) == ("proj",)
    assert choose_targets(found, base, ["block.q"], True) == ["proj", "block.q", "block.proj"]


# refusals


def half(net: nn.Module) -> None:
    for value in net.parameters():
        value.copy_(value.half().float())


def test_a_copy_of_the_base_is_refused_in_half_precision_too(place: Path, tmp_path: Path) -> None:
    rounded = edited(place, "sd", tmp_path / "half", half)
    for tuned in (place / "sd", rounded):
        with pytest.raises(StudentError, match="there is nothing to extract"):
            extracted(place, "sd", tmp_path / "out", tuned)
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    tiny.pipeline("sd", seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(StudentError, match=r"differ from those of .*sd by 1\.\d+ of their size.*at most 0.5"):
        extracted(place, "sd", tmp_path / "out", tmp_path / "other")


def test_another_architecture_is_refused(place: Path, tmp_path: Path) -> None:
    config = family_of(place, "sd").load().unet.config
    wide: Any = UNet2DConditionModel.from_config(config | {"cross_attention_dim": 16})
    wide.save_pretrained(tmp_path / "wide" / "unet")
    with pytest.raises(StudentError, match=r"differ in name or shape: .*attn2.to_k.weight \(32, 16\) for \(32, 32\)"):
        extracted(place, "sd", tmp_path / "out", tmp_path / "wide")
    with pytest.raises(ConfigError, match="expected a StableDiffusionPipeline"):
        extracted(place, "sd", tmp_path / "out", place / "sd3-tuned")


def test_a_model_with_another_noise_process_is_refused(place: Path, tmp_path: Path) -> None:
    for key, value, match in (
        ("prediction_type", "v_prediction", "predicts v.* at"),
        ("beta_end", 0.02, "noise levels"),
    ):
        tuned = shutil.copytree(place / "sd-tuned", tmp_path / key)
        scheduler: Any = DDIMScheduler.from_pretrained(tuned, subfolder="scheduler")
        scheduler.register_to_config(**{key: value})
        scheduler.save_pretrained(tuned / "scheduler")
        with pytest.raises(StudentError, match=match):
            extracted(place, "sd", tmp_path / "out", tuned)


def test_a_change_that_no_lora_would_hold_is_refused(place: Path, tmp_path: Path) -> None:
    tuned = edited(place, "sd", tmp_path / "one", lambda net: change(net, "conv_in"))
    with pytest.raises(StudentError, match="the LoRA would be zero; add --all"):
        extracted(place, "sd", tmp_path / "out", tuned)
    tuned = edited(place, "sd", tmp_path / "two", lambda net: net.get_parameter("conv_in.bias").add_(0.1))
    with pytest.raises(StudentError, match="the LoRA would be zero; biases and norms"):
        extracted(place, "sd", tmp_path / "out", tuned, every=True)


def test_bases_and_steps_that_do_not_fit_are_refused_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    family = family_of(place, "sd")
    with pytest.raises(ConfigError, match="a quantized base"):
        extracted(place, "sd", tmp_path / "out", family=replace(family, quantization=object()))
    with pytest.raises(ConfigError, match="the states of a rollout depend on images"):
        extracted(place, "sd", tmp_path / "out", family=tiny.CONTINUING["wan_image"])
    method = Extracted(tuned="", sha256="", timesteps=(999.5,))
    with pytest.raises(ConfigError, match="the steps of the few-step model.*whole numbers"):
        extracted(place, "sd", tmp_path / "out", method=method)
    with pytest.raises(ValueError, match="expected descending"):
        Extracted(tuned="", sha256="", timesteps=(1.0, 2.0))


def test_an_output_in_use_is_refused_and_an_extracted_student_replaced_if_asked(place: Path, tmp_path: Path) -> None:
    for used in (place / "sd-tuned", place / "sd"):
        with pytest.raises(OutputError):
            extracted(place, "sd", used, overwrite=True)
    extracted(place, "sd", tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="add --overwrite"):
        extracted(place, "sd", tmp_path / "out")
    extracted(place, "sd", tmp_path / "out", rank=3, overwrite=True)
    contract = read_contract(tmp_path / "out")
    assert contract.lora is not None and contract.lora.rank == 3
    (tmp_path / "out" / "config.yaml").touch()  # as in a run's folder
    with pytest.raises(OutputError, match="not the output of an earlier run of this command"):
        extracted(place, "sd", tmp_path / "out", overwrite=True)


def test_it_is_no_method_to_train_with(place: Path, tmp_path: Path) -> None:
    run = Run(
        family=family_of(place, "sd"),
        method=Extracted(tuned="", sha256=""),
        data=Prompts(prompts=("rose",)),
        train=TrainSpec(output_dir=str(tmp_path / "out")),
    )
    with pytest.raises(ConfigError, match="call `stepdistill extract`"):
        check_run(run)


# the command


def command(place: Path, *more: str) -> None:
    main(["extract", str(place / "sd-tuned"), "--size", "32x32", "--rank", "4", "--eta", "0", "--device", "cpu", *more])


def test_the_command_extracts_and_reports(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\na rose\n")
    out = ["--base", str(place / "sd"), "--timesteps", "999,499", "-o", str(tmp_path / "out")]
    command(place, *out, "--prompts-file", str(tmp_path / "prompts.txt"))
    told = capsys.readouterr().out
    assert "energy kept of 114 layers' weights: at least" in told and "layers' outputs: at least" in told
    assert "share of the x0 gap to the base that is left:" in told and "at 999," in told and "at 499" in told
    assert read_contract(tmp_path / "out").method["whitened"]
    main(["generate", str(tmp_path / "out"), "a rose", "-o", str(tmp_path / "images"), "--device", "cpu"])
    assert list((tmp_path / "images").glob("*.png"))


def test_the_base_of_a_config(place: Path, tmp_path: Path, capsys: Any) -> None:
    """With the settings that its family has there."""
    (tmp_path / "run.yaml").write_text(
        f"family: {{type: stepdistill.families.sd3.StableDiffusion3, pretrained_teacher_model: {place / 'sd3'}, "
        "max_sequence_length: 16}\nmethod: {type: stepdistill.methods.dmd2.DMD2}\n"
        "data: {type: stepdistill.data.Prompts, prompts: [rose]}\ntrain: {output_dir: unused}\n"
    )
    given = ["--config", str(tmp_path / "run.yaml"), "--steps", "1", "-o", str(tmp_path / "out"), "--rank", "2"]
    main(["extract", str(place / "sd3-tuned"), "--eta", "0", "--device", "cpu", "--size", "32x32", *given])
    assert read_contract(tmp_path / "out").family["max_sequence_length"] == 16
    with pytest.raises(SystemExit):
        command(place, *given, "--family", "sd3")
    assert "the config names the family" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--base", "x", "--steps", "2", "--timesteps", "999"], "not allowed with"),
        (["--base", "x"], "one of the arguments --steps --timesteps is required"),
        (["--steps", "2"], "one of the arguments --base --config is required"),
        (["--base", "x", "--timesteps", "499,999"], "expected descending timesteps"),
        (["--base", "nowhere", "--steps", "2"], "does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    place: Path, tmp_path: Path, capsys: Any, more: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        command(place, "-o", str(tmp_path / "out"), *more)
    assert said in capsys.readouterr().err


# the rollout


def rollout_of(place: Path, timesteps: tuple[float, ...], prompts: tuple[str, ...], size: float = 0.0) -> Rollout:
    """With a student whose LoRA has this size."""
    family = family_of(place, "sd")
    pipe, other = family.load(), replace(family, pretrained_teacher_model=str(place / "sd-tuned")).load()
    backbone = tiny.backbone("sd", pipe)
    backbone.add("student", Lora())
    backbone.add("tuned", Copy(lambda: family.network(other)))
    if size:
        tiny.awake(backbone, "student", size)
    return Rollout(family, pipe, backbone, Sampler(timesteps), (32, 32), prompts, 2)


def test_of_the_base_itself_the_whole_gap_is_left(place: Path) -> None:
    assert rollout_of(place, TIMES, PROMPTS).gap_left("student") == dict.fromkeys(TIMES, 1.0)


@torch.no_grad()
def by_hand(place: Path) -> None:
    """The gap at the second step, at the state that the tuned model's first step leads to."""
    rollout = rollout_of(place, (999.0, 499.0), ("a rose",), 0.05)
    family, pipe = rollout.family, rollout.pipe
    schedule, cond = family.schedule(pipe.scheduler), family.condition(pipe, ["a rose"])
    base, student, tuned = (
        Denoiser(rollout.backbone, role, schedule, "epsilon", family.call) for role in ("teacher", "student", "tuned")
    )
    first, second = torch.tensor([999.0]), torch.tensor([499.0])
    noise = noise_of(JUDGED, 0, (4, 8, 8))[None]
    state = schedule.add_noise(*tuned(noise, first, cond), second)
    near, far = (
        (one(state, second, cond).x0 - tuned(state, second, cond).x0).square().sum() for one in (student, base)
    )
    assert rollout.gap_left("student")[499.0] == pytest.approx((near / far).item(), rel=1e-4)


def test_the_gap_is_that_at_the_states_of_the_tuned_model(place: Path) -> None:
    by_hand(place)


@torch.no_grad()
def inputs_by_hand(place: Path) -> None:
    """The inputs of the layer that embeds the time are known; there are two rollouts of each prompt."""
    rollout = rollout_of(place, (999.0, 499.0), PROMPTS)
    net: Any = rollout.backbone.others["tuned"]
    rows = net.time_proj(torch.tensor([999.0, 499.0]))
    found = rollout.moments(["time_embedding.linear_1", "time_embedding.linear_2"])
    torch.testing.assert_close(found["time_embedding.linear_1"], 2 * 3 * rows.T @ rows, rtol=1e-4, atol=1e-4)
    first: Any = net.time_embedding
    rows = first.act(first.linear_1(rows))
    torch.testing.assert_close(found["time_embedding.linear_2"], 2 * 3 * rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_moments_are_those_of_the_tuned_model_s_inputs(place: Path) -> None:
    inputs_by_hand(place)


BUGS: dict[str, tuple[Callable, str, str, Callable[[Path], None]]] = {
    "the base's states": (Rollout.gap_left, "return est", "return base(x_t, t, cond)", by_hand),
    "the student's states": (Rollout.gap_left, "return est", "return judged(x_t, t, cond)", by_hand),
    "the base for the student": (
        Rollout.gap_left,
        "((near, judged), (far, base))",
        "((near, base), (far, judged))",
        by_hand,
    ),
    "noise of the fit": (Rollout.gap_left, "self._starts(JUDGED)", "self._starts(FITTED[0])", by_hand),
    "one rollout": (Rollout.moments, "in FITTED", "in FITTED[:1]", inputs_by_hand),
    "the first batch alone": (Rollout._starts, "range(0, len(self.prompts), self.batch)", "[0]", inputs_by_hand),
}


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_of_the_rollout_is_noticed(name: str, place: Path) -> None:
    function, old, new, oracle = BUGS[name]
    with planted(function, old, new), pytest.raises(AssertionError):
        oracle(place)


def test_bugs_of_the_difference_are_noticed(place: Path, tmp_path: Path) -> None:
    bugs = [
        (difference._change, "tuned.float() - base.float()", "base.float() - tuned.float()"),
        (difference.difference_of, "changed == 0", "False"),
        (difference._change, "for half in HALVES", "for half in ()"),
    ]
    oracles = [
        test_at_full_rank_the_student_is_the_tuned_model,
        *[test_a_copy_of_the_base_is_refused_in_half_precision_too] * 2,
    ]
    for i, ((function, old, new), oracle) in enumerate(zip(bugs, oracles, strict=True)):
        (tmp_path / str(i)).mkdir()
        given = ("sd3", place, tmp_path / str(i)) if i == 0 else (place, tmp_path / str(i))
        with planted(function, old, new), pytest.raises((AssertionError, pytest.fail.Exception)):
            oracle(*given)
