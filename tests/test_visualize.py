"""Frames of a course: the last is the image, the others what our own sampler estimates, and all one for one point."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from stepdistill.cli import main as cli
from stepdistill.core.denoise import guided
from stepdistill.core.errors import ConfigError
from stepdistill.core.pixels import frames_of, to_uint8
from stepdistill.core.schedule import DiscreteVP, expand
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.data.routing import Routing, consecutive
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.layers import time_given
from stepdistill.networks.roles import TEACHER, Lora
from stepdistill.students.contract import CONTRACT, STUDENTS, MultiContract, read_contract, teacher
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.call import PipelineCall, generate, teacher_call
from stepdistill.students.draw.sheet import LEFT
from stepdistill.students.draw.steps import Strip, View, picked, predictions_of_steps, view, view_sheet
from stepdistill.students.load import load_student
from stepdistill.students.write import write_student

PROMPTS = ["red apple", "cat face"]
EVEN = (999.0, 749.0, 499.0, 249.0)
SAMPLERS = {  # those that a table's and a flow's families have a scheduler for
    "lcm": Sampler(EVEN, eta=1.0),
    "tcd": Sampler(EVEN, eta=0.3, clean=False),
    "ddim": Sampler(EVEN, clean=False),
    "ddim, clean": Sampler(EVEN),
    "euler": Sampler((799.0, 500.0, 99.0)),
    "one step": Sampler((799.0,), eta=1.0),
}
FLOWS = {"euler": Sampler((1000.0, 700.0, 200.0)), "noised again": Sampler((1000.0, 500.0), eta=1.0)}
CASES = [
    (name, key, w)
    for name in sorted(tiny.FAMILIES)
    for key, w in [(key, 1.0) for key in (FLOWS if name in tiny.FLOWS else SAMPLERS)] + [("euler", 3.0)]
]


def noise_for(name: str) -> Tensor:
    """Latents of two samples to start from."""
    return torch.randn(2, *tiny.latent_shape(name), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny.pipeline(name) for name in tiny.FAMILIES}


def drawn(pipe, family: Family, sampler: Sampler, w: float):
    """A pipeline with the sampler's scheduler, and its call."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler, call = family.scheduler(pipe, sampler)
    return call | family.guidance(w) | family.arguments() | {"height": 32, "width": 32}


@pytest.mark.parametrize(("name", "key", "w"), CASES)
def test_frames_are_our_own_sampler_s_estimates_and_the_last_is_the_image(pipes, name, key, w):
    pipe, family, sampler = pipes[name], tiny.FAMILIES[name], (FLOWS if name in tiny.FLOWS else SAMPLERS)[key]
    own, call, noise = pipe.scheduler, drawn(pipe, family, sampler, w), noise_for(name)
    schedule, kind = family.schedule(pipe.scheduler), family.kind(pipe)
    torch.manual_seed(5)
    seen = predictions_of_steps(pipe, family, PROMPTS, noise, call, clean=sampler.clean)
    assert seen.timesteps == pytest.approx(sampler.timesteps)
    assert "step" not in vars(pipe.scheduler)
    # the image, bit for bit
    torch.manual_seed(5)
    with torch.no_grad():
        image = pipe(prompt=list(PROMPTS), latents=family.pack(noise), output_type="pt", **each(call, 2))[0]
        frame = to_uint8((frames_of(family.decode(pipe, seen.final)) / 2 + 0.5).clamp(0, 1))
    off = (frame.int() - to_uint8(image.flatten(0, -4).clamp(0, 1)).int()).abs().max()
    assert off <= (1 if name == "klein" else 0)  # whose final latents are scaled to the network's, and back
    size = seen.final.abs().max()
    assert (seen.predicted[-1] - seen.final).abs().max() < 1e-5 * size
    # every frame by the library's own sampler
    estimates: list[Tensor] = []
    bone = tiny.backbone(name, pipe)
    plain = Denoiser(bone, TEACHER, schedule, kind, family.call, grad=False)
    alone = guided(plain, family.unconditional(pipe), w, family.combine(kind, schedule))

    def kept(x_t, t, cond):
        est = alone(x_t, t, cond)
        end = None if sampler.clean else torch.zeros_like(t)
        estimates.append(schedule.add_noise(est.x0, est.eps, end))
        return est

    def fresh(i):
        return family.fresh(noise)

    torch.manual_seed(5)
    with torch.no_grad():
        few_step(kept, schedule, sampler, noise, family.condition(pipe, PROMPTS), fresh)
    for mine, theirs in zip(estimates, seen.predicted, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * mine.abs().max()
    pipe.scheduler = own


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
def test_every_frame_of_a_single_point_is_the_point(pipes, name):
    pipe, family = pipes[name], tiny.FAMILIES[name]
    own, noise = pipe.scheduler, noise_for(name)
    call = drawn(pipe, family, (FLOWS if name in tiny.FLOWS else SAMPLERS)["euler"], 1.0)
    schedule, point = family.schedule(pipe.scheduler), torch.linspace(-1, 1, noise[0].numel()).reshape(noise[0].shape)

    def single(net, args, kwargs, output):
        given = inspect.signature(net.forward).bind(*args, **kwargs).arguments
        x_t = next(given[name] for name in ("sample", "hidden_states", "x") if name in given)
        x_t = torch.stack(x_t).squeeze(2) if isinstance(x_t, list) else family.unpack(x_t, 8, 8)
        time = torch.as_tensor(time_given(net, args, kwargs)).flatten()[0].item()
        t = torch.tensor(family.time(net, time)).expand(len(x_t))
        alpha_t, sigma_t = (expand(value, x_t) for value in schedule(t.float()))
        eps = (x_t - alpha_t * point) / sigma_t
        if name == "z_image":
            return (list((point - eps).unsqueeze(2)),)
        y = family.pack(eps if isinstance(schedule, DiscreteVP) else eps - point)
        y = y.flatten(2).transpose(1, 2) if name == "klein" else y  # whose network's tokens the pipeline makes itself
        return (torch.cat([y, y], 1) if output[0].shape[1] == 8 else y,)  # PixArt's predicts a variance, too

    hook = family.network(pipe).register_forward_hook(single, with_kwargs=True)
    seen = predictions_of_steps(pipe, family, PROMPTS, noise, call)
    hook.remove()
    assert (seen.predicted - point).abs().max() < 2e-5
    assert (seen.final - point).abs().max() < 2e-5
    pipe.scheduler = own


def test_the_scheduler_is_as_before_after_an_exception(pipes):
    pipe, family = pipes["sd"], tiny.FAMILIES["sd"]

    def broken(*_):
        raise KeyboardInterrupt

    hook = pipe.unet.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        predictions_of_steps(pipe, family, PROMPTS, noise_for("sd"), {"num_inference_steps": 2})
    hook.remove()
    assert "step" not in vars(pipe.scheduler)


def test_columns_are_even_with_both_ends():
    assert picked(3, 8) == [0, 1, 2]
    assert picked(25, 4) == [0, 8, 16, 24]
    assert picked(50, 2) == [0, 49]
    assert picked(1, 2) == [0]
    for count in range(2, 60):
        found = picked(count, 7)
        assert found[0] == 0 and found[-1] == count - 1 and len(set(found)) == min(count, 7)
    with pytest.raises(ConfigError, match="1 columns, expected 2 or more"):
        picked(9, 1)


# whole students


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A student folder on a teacher in a folder; and one of two students, the second of another strength."""
    base, found = tmp_path_factory.mktemp("base"), {}
    tiny.pipeline("sd").save_pretrained(base)
    family = StableDiffusion(pretrained_teacher_model=str(base))
    for name, size, method in (("a", 0.05, Consistency(ema_decay=None)), ("b", 0.2, Consistency(end="any"))):
        pipe = family.load()
        bone = tiny.backbone("sd", pipe, 4, 16)
        bone.add("student", Lora())
        tiny.awake(bone, "student", size)
        found[name] = tmp_path_factory.mktemp(name)
        write_student(
            found[name], family=family, pipe=pipe, backbone=bone, role="student", resolution=(32, 32), method=method
        )
    both = tmp_path_factory.mktemp("both")
    for k, name in enumerate("ab"):
        shutil.copytree(found[name], both / STUDENTS / str(k))
    fields = json.loads((found["a"] / CONTRACT).read_text())
    shared = {key: fields[key] for key in fields.keys() & MultiContract.__dataclass_fields__.keys()}
    (both / CONTRACT).write_text(json.dumps(shared | {"kind": "multi", "students": 2}))
    Routing(None, consecutive(PROMPTS, 2)).save(both)
    return found | {"both": both}


def alone(folder: Path, teacher_steps: int | None = None) -> Tensor:
    """The images of both prompts, one by one, of a student or of its teacher."""
    contract = read_contract(folder)
    family = teacher(contract)
    pipe = family.load()
    if teacher_steps:
        row = teacher_call(family, pipe, teacher_steps, 2.0, "teacher")
    else:
        call = load_student(pipe, folder)
        row = PipelineCall("student", pipe.scheduler, call, family)
    return torch.cat([generate(pipe, row, [p], 7, numbers=[i])[0] for i, p in enumerate(PROMPTS)])


@pytest.mark.parametrize("name", ["a", "both"])
def test_a_view_shows_teacher_and_student(folders, name):
    pipe = teacher(read_contract(folders["a"])).load()
    wanted = View(prompts=PROMPTS, seed=7, teacher_steps=5, teacher_guidance=2.0, columns=3)
    blocks = view(pipe, folders[name], wanted)
    named = [["student, 4 steps"] * 2, ["student 0, 4 steps", "student 1, 4 steps"]][name == "both"]
    for i, block in enumerate(blocks):
        assert [strip.label for strip in block] == ["teacher, 5 steps", "teacher, 4 steps", named[i]]
        assert [len(strip.frames) for strip in block] == [3, 3, 3]
        whole, few, learnt = block
        assert whole.timesteps == (999.0, 599.0, 199.0) and few.timesteps == (999.0, 499.0, 249.0)
        own = folders["ab"[i] if name == "both" else "a"]
        trained = read_contract(own).timesteps
        assert learnt.timesteps == (trained[0], trained[2], trained[3])
        assert torch.equal(whole.frames[-1], alone(folders["a"], 5)[i])
        assert torch.equal(few.frames[-1], alone(folders["a"], 4)[i])
        assert torch.equal(learnt.frames[-1], alone(own)[i])
        assert not torch.equal(whole.frames[0], whole.frames[-1])


def test_a_sheet_has_the_frames_where_they_belong():
    frames = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 32, 32) * 60
    blocks = [[Strip("a", (9.0, 5.0, 3.0, 1.0), frames), Strip("b", (9.0, 1.0), frames[2:])]] * 2
    made = view_sheet(blocks, ["one", "two"], scale=2)
    cell, tall = 64 + 6, 64 + 14 + 6
    assert made.size == (LEFT + 4 * cell, 2 * (20 + 2 * tall))
    for block in range(2):
        for line, shown in enumerate(([0, 60, 120, 180], [255, 255, 120, 180])):
            y = block * (20 + 2 * tall) + 20 + line * tall + 14 + 32
            assert [made.getpixel((LEFT + k * cell + 32, y)) for k in range(4)] == [(value,) * 3 for value in shown]


def test_the_command_writes_a_sheet(folders, tmp_path, capsys):
    out = tmp_path / "new" / "view.png"
    cli.main(["view", str(folders["a"]), *PROMPTS, "--teacher-steps", "5", "--columns", "3", "-o", str(out)])
    assert str(out) in capsys.readouterr().out
    assert Image.open(out).size == (LEFT + 3 * (96 + 6), 2 * (20 + 3 * (96 + 20)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["view", str(tmp_path / "nothing"), "red apple", "-o", str(tmp_path / "other.png")])
    assert ended.value.code == 2 and "expected a student folder or a hub id" in capsys.readouterr().err
