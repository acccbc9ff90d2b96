"""Smaller students: the loss is 0 at the teacher, the network is smaller, and its folder is a whole network."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from huggingface_hub import ModelCard
from oracles import close
from oracles.context import Flow, Scripted, Tabular, column, stable_diffusion
from oracles.gaussian import GaussianTeacher
from safetensors.torch import load_file
from torch import nn

from stepdistill.core.denoise import Denoise, guided
from stepdistill.core.errors import StudentError
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.data import Partition, Prompts, TeacherSamples
from stepdistill.data.routing import Routing, cluster
from stepdistill.methods.base import Batch, Update
from stepdistill.methods.score_matching import TeacherScoreMatching
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Copy, LoraSpec
from stepdistill.students.contract import WEIGHTS, read_contract
from stepdistill.students.load import load_student, start_from
from stepdistill.students.several import Students, join_students
from stepdistill.students.verify import verify_student
from stepdistill.students.write import write_student
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec

MEAN, STD, N = 0.7, 0.6, 50
X0, EPS = column(-0.4, 0.3, 0.9, 2.0), column(1.1, -0.2, 0.5, -1.4)
COND, NULL = {"mean": torch.full_like(X0, MEAN)}, {"mean": column(-0.5)}


def update(method: TeacherScoreMatching, schedule: NoiseSchedule, learner: Denoise, t: float) -> Update:
    """The one update of the method at time t with a Gaussian teacher."""
    share = t / 1000 if isinstance(schedule, Flow) else (t + 0.5) / 1000  # the middle of a table's entry
    context = Scripted(
        schedule=schedule,
        null=NULL,
        denoiser={"student": learner, "teacher": GaussianTeacher(schedule, STD)}.__getitem__,
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=0,
        device=torch.device("cpu"),
        draws={"t": torch.full((4,), share, dtype=torch.float64)},
        eps=EPS,
    )
    (only,) = method.updates(context, Batch((0, 1, 2, 3), COND, (1, 1, 1), X0), 0)
    return only


@pytest.mark.parametrize("schedule", [stable_diffusion(), Flow()], ids=["table", "flow"])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_the_floor_is_zero_and_it_is_the_teacher(schedule, w):
    """Oracle: least squares reaches 0 at every time, which the denoising loss on the data does not."""
    method, learner = TeacherScoreMatching(guidance_scale=w), Tabular(schedule, N)
    teacher = guided(GaussianTeacher(schedule, STD), NULL, w)
    for j in range(1, N + 1):
        t = schedule.grid(N)[j].item()
        assert update(method, schedule, learner, t).loss > 1e-4
        learner.fit(j, update(method, schedule, learner, t).loss)
        assert update(method, schedule, learner, t).loss < 1e-20
        times = torch.full((4,), t, dtype=torch.float64)
        x_t = schedule.add_noise(X0, EPS, times) + 1  # states that were not trained on
        close(learner(x_t, times, COND).x0, teacher(x_t, times, COND).x0)
        denoising = (GaussianTeacher(schedule, STD)(x_t - 1, times, COND).x0 - X0).square().mean()
        assert denoising > 1e-3 or t < 100


def test_times_are_all_drawn_and_the_weight_is_one_plus_the_signal_to_noise_ratio():
    schedule, method, seen = stable_diffusion(), TeacherScoreMatching(), []

    def learner(x_t, t, cond):
        est = GaussianTeacher(schedule, STD)(x_t, t, cond)
        alpha_t, sigma_t = (expand(v, x_t) for v in schedule(t))
        seen.append(t.unique().item())
        return est._replace(x0=est.x0 + 1, eps=est.eps - alpha_t / sigma_t)  # off by 1 in x0, at the same x_t

    for t in (0, 1, 500, 998, 999):
        alpha_t, sigma_t = schedule(torch.tensor(float(t), dtype=torch.float64))
        close(update(method, schedule, learner, t).loss, 1 + (alpha_t / sigma_t) ** 2)
    assert seen == [0, 1, 500, 998, 999]


def test_odd_settings_are_refused():
    for width in (0.0, 1.0, -0.5, 2.0):
        with pytest.raises(ValueError, match=r"expected a share in \(0, 1\)"):
            TeacherScoreMatching(width=width)
    with pytest.raises(ValueError, match="the batch has none"):
        next(TeacherScoreMatching().updates(None, Batch((0,), {}, (1, 1, 1)), 0))


# the smaller network


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_narrow_network_fits_in_the_teacher_s_place(name):
    family, pipe = tiny.FAMILIES[name], tiny.pipeline(name)
    net = family.network(pipe)
    before = torch.get_rng_state()
    made = [Backbone(net, LoraSpec(), (), seed=seed, narrow=family.narrow) for seed in (0, 0, 1)]
    for bone in made:
        bone.add("student", Copy(width=0.5))
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = (bone.others["student"] for bone in made)
    # Z-Image's embedder of time has 1,024 channels inside, whatever the width
    whole, slim = (
        sum(p.numel() for key, p in one.named_parameters() if not key.startswith("t_embedder.")) for one in (net, first)
    )
    assert 0.15 * whole < slim < 0.35 * whole
    batch = tiny.batch(name, pipe)
    t = torch.full((2,), 500.0)
    outputs = [family.call(one, batch.noise, t, batch.cond) for one in (first, again, other)]
    assert outputs[0].shape == batch.noise.shape and torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with pytest.raises(ValueError, match="was given no `narrow`"):
        Backbone(net, LoraSpec(), ()).add("student", Copy(width=0.5))


def test_networks_of_the_usual_shapes_can_be_narrowed():
    """Most of their config is the class's default, which must not come back."""
    with torch.device("meta"):
        sd1 = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        sd2 = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20))
        sd3 = SD3Transformer2DModel(num_layers=2, num_attention_heads=24, caption_projection_dim=1536, sample_size=32)
        slim = [tiny.FAMILIES[name].narrow(net, 0.5) for name, net in (("sd", sd1), ("sd", sd2), ("sd3", sd3))]
    for net, small in zip((sd1, sd2, sd3), slim, strict=True):
        assert 0.2 < sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters()) < 0.3
    assert tuple(slim[1].config["block_out_channels"]) == (160, 320, 640, 640)
    assert slim[2].config["num_attention_heads"] == 12
    with torch.device("meta"):  # every head keeps whole channels
        odd = tiny.FAMILIES["sd"].narrow(sd2, 0.4).config["block_out_channels"]
    assert [c % heads for c, heads in zip(odd, (5, 10, 20, 20), strict=True)] == [0, 0, 0, 0]


# the folder


def run(place: Path, name: str, out: str, **fields) -> Run:
    train = {"output_dir": str(place / out), "max_train_steps": 3, "train_batch_size": 2, "learning_rate": 1e-3}
    train |= {"resolution": tiny.SIDE}
    source = Prompts(prompts=("red apple", "green apple", "cat face", "dog face"))
    samples = TeacherSamples(source=source, folder=str(place / f"samples-{name}"), count=8, num_inference_steps=2)
    fields = {
        "family": replace(tiny.FAMILIES[name], pretrained_teacher_model=str(place / name)),
        "method": TeacherScoreMatching(num_inference_steps=2),
        "data": samples,
        "train": TrainSpec(**train, report_to="none"),
    } | fields
    return Run(**fields)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("score_matching")
    for name in tiny.FAMILIES:
        tiny.pipeline(name).save_pretrained(folder / name)
        distill(run(folder, name, f"student-{name}"))
    return folder


def images(pipe, family: str = "sd", **call) -> torch.Tensor:
    """Latents as the pipeline has them."""
    noises = tiny.FAMILIES[family].pack(
        torch.randn(2, *tiny.latent_shape(family), generator=torch.Generator().manual_seed(0))
    )
    prompts = ["red apple", "cat face"]
    given: dict = {"latents": noises, "output_type": "latent", **call}
    made = pipe(prompts, **given) if isinstance(pipe, Students) else pipe(prompt=prompts, **given)
    return made if isinstance(made, torch.Tensor) else made[0]


@pytest.mark.parametrize(("name", "part"), [("sd", "unet"), ("sd3", "transformer")])
def test_the_folder_holds_a_whole_network(place, monkeypatch, tmp_path, name, part):
    folder, family = place / f"student-{name}", run(place, name, "").family
    contract = read_contract(folder)
    assert contract.kind == "full" and contract.lora is None and contract.proof and contract.proof.difference < 1e-5
    net = family.network(family.load())
    assert contract.network and contract.network.parameters < 0.35 * sum(p.numel() for p in net.parameters())
    assert verify_student(folder) < 1e-5 and not (folder / WEIGHTS).exists()

    plain, ours = family.load(), family.load()
    call = load_student(ours, folder)
    setattr(plain, part, type(net).from_pretrained(folder, subfolder=part))
    plain.scheduler = ours.scheduler
    assert torch.equal(images(plain, **call), images(ours, **call))

    monkeypatch.chdir(tmp_path)
    card = ModelCard.load(str(folder / "README.md"))
    assert "lora" not in card.data.tags and "A smaller network" in card.text
    names: dict = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], names)
    expected = ours("red apple", generator=torch.manual_seed(0), **call).images[0]
    assert np.array_equal(np.asarray(names["image"]), np.asarray(expected))


def test_the_average_is_what_is_exported(place):
    roles = place / "student-sd3" / "checkpoint-3"
    stored = SD3Transformer2DModel.from_pretrained(place / "student-sd3", subfolder="transformer").state_dict()
    trained, average = (load_file(roles / f"{role}.safetensors") for role in ("student", "ema"))
    assert stored.keys() == average.keys()
    assert all(torch.equal(stored[key], average[key]) for key in stored)
    assert any(not torch.equal(trained[key], average[key]) for key in stored)


def test_a_base_in_half_precision_is_compared_in_it(place, tmp_path):
    family = run(place, "sd3", "").family
    pipe = family.load()
    net = nn.Module.to(family.network(pipe), torch.bfloat16)
    bone = Backbone(net, LoraSpec(), (), narrow=family.narrow)
    bone.add("student", Copy(width=0.5))
    assert {p.dtype for p in bone.parameters_of("student").values()} == {torch.float32}
    options = {"role": "student", "method": TeacherScoreMatching(num_inference_steps=2), "resolution": (32, 32)}
    assert write_student(tmp_path, family=family, pipe=pipe, backbone=bone, **options) < 1e-5
    assert read_contract(tmp_path).dtype == "bfloat16"


def test_training_goes_on_from_a_folder(place, tmp_path):
    family = run(place, "sd3", "").family
    net = family.network(family.load())
    stored = SD3Transformer2DModel.from_pretrained(place / "student-sd3", subfolder="transformer").state_dict()
    bone = Backbone(net, LoraSpec(), (), seed=5, narrow=family.narrow)
    for name, role in TeacherScoreMatching().roles().items():
        bone.add(name, role)
    start_from(bone, str(place / "student-sd3"), family)
    for role in ("student", "ema"):
        assert all(torch.equal(value, stored[key]) for key, value in bone.state(role).items())
    wide = Backbone(net, LoraSpec(), ())
    wide.add("student", Copy())
    with pytest.raises(StudentError, match="size mismatch"):
        start_from(wide, str(place / "student-sd3"), family)
    with pytest.raises(StudentError, match="unreadable"):
        start_from(wide, str(tmp_path), family)


def test_a_folder_without_its_network_is_refused(place, tmp_path):
    folder = shutil.copytree(place / "student-sd", tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    with pytest.raises(StudentError, match="unreadable"):
        load_student(run(place, "sd", "").family.load(), folder)


def test_a_dry_run_counts_the_smaller_network(place):
    said = dry_run(run(place, "sd", "dry"))
    size = read_contract(place / "student-sd").network.parameters
    for role in ("student", "ema"):
        assert any(line.split()[0] == role and f"{size / 1e6:.2f} M" in line for line in said.splitlines()), said


def test_a_dry_run_refuses_a_start_of_another_width(place):
    plain = run(place, "sd", "dry")
    started = replace(plain, lora=LoraSpec(init_from=str(place / "student-sd")))
    assert dry_run(started) == dry_run(plain)
    with pytest.raises(StudentError, match="size mismatch"):
        dry_run(replace(started, method=replace(plain.method, width=0.75)))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_several_smaller_students_in_one_folder(place, tmp_path, name):
    part = tiny.FAMILIES[name].network_name
    for k in range(2):
        whole = run(place, name, "")
        spec = replace(whole.train, output_dir=str(tmp_path / str(k)), seed=k)
        distill(replace(whole, data=Partition(source=whole.data, students=2, student=k), train=spec))
    folder = join_students(tmp_path / "all", [tmp_path / "0", tmp_path / "1"])
    assert verify_student(folder) < 1e-5
    pipe = whole.family.load()
    students = load_student(pipe, folder)
    assert [net is pipe.components[part] for net in students.nets] == [True, False]
    made = images(students, name)
    assert students.route(["red apple", "cat face"]).keys() == {0, 1}
    for i, prompt in enumerate(["red apple", "cat face"]):
        alone = whole.family.load()
        call = load_student(alone, tmp_path / str(students.router.route(prompt)))
        expected = images(alone, name, **call)[i]
        assert (made[i] - expected).abs().max() < 1e-4 * expected.abs().max()
    with students.use(1):
        assert students.nets[1] is pipe.components[part]
    assert students.nets[0] is pipe.components[part]


def test_the_other_students_are_not_taken_for_another_base(place, tmp_path, caplog):
    first, whole = place / "student-sd", run(place, "sd", "").family
    for k in range(2):
        copy = shutil.copytree(first, tmp_path / str(k))
        Routing(k, cluster(["a", "b"], 2)).save(copy)
    load_student(whole.load(), join_students(tmp_path / "all", [tmp_path / "0", tmp_path / "1"]))
    assert "has other weights" not in caplog.text


def test_the_loss_falls_on_a_real_network(place, tmp_path):
    whole = run(place, "sd", "")
    spec = replace(whole.train, output_dir=str(tmp_path / "out"), max_train_steps=40, train_batch_size=4)
    distill(replace(whole, train=replace(spec, learning_rate=3e-3)))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10]), losses
