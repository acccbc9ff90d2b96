"""A student with a ControlNet of its base: in the stock pipelines, on the command line, and what does not fit."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_adapters import stirred
from test_generate import QUIET, folder_of
from tiny import FAMILIES, SIDE, backbone, controlnet, pipeline, sana

from stepdistill.cli import main as cli
from stepdistill.core.errors import ConfigError, DataError
from stepdistill.data.routing import Routing, consecutive
from stepdistill.families.sana import Sana
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.networks.roles import Adapters, Copy
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.control import controlled, read_control
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.load import load_student
from stepdistill.students.several import join_students
from stepdistill.students.write import write_student

NAMES = [name for name, family in FAMILIES.items() if family.controls is not None]
EACH = pytest.mark.parametrize("name", NAMES)


def edges(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 2, (side, side, 3), dtype=np.uint8) * 255)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A student of each family without fresh noise, with a ControlNet of its base in `controlnet`, on first use."""

    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = folder_of(name, tmp_path_factory.mktemp(name), QUIET)
            controlnet(name, pipeline(name)).save_pretrained(self[name].parent / "controlnet")
            return self[name]

    return Folders()


def drawn(student: StudentPipeline, image: Image.Image | None = None, **arguments: object) -> np.ndarray:
    """An image (H, W, 3) from fixed latents, so that nothing depends on what the pipeline draws before."""
    family, call = student.family, student.call(DrawOptions()).plus(output_type="np", **arguments)
    call = call if image is None else controlled(student, call, image)
    shape = family.latent_shape(student.pipe, SIDE, SIDE)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    (one,) = student.draw(["red apple"], [3], call.plus(latents=family.pack(noise), **arguments))
    return one.image


@EACH
def test_the_control_image_matters_and_the_times_are_the_contract_s(folders, name):
    folder = folders[name]
    student = StudentPipeline.load(folder)
    plain = drawn(student)
    student = StudentPipeline.load(folder, controlnet=str(folder.parent / "controlnet"))
    assert type(student.pipe) is student.family.controls.pipeline
    one, other = drawn(student, edges(0)), drawn(student, edges(1))
    assert np.abs(one - plain).max() > 0.1 and np.abs(one - other).max() > 1e-3
    torch.manual_seed(5)
    assert np.array_equal(drawn(student, edges(0)), one)  # though SD3 and Flux sample the control's latents
    off = drawn(student, edges(0), controlnet_conditioning_scale=0.0)
    assert np.abs(off - plain).max() < 1e-5
    net, seen, told = student.family.network(student.pipe), [], []
    arguments = inspect.signature(net.forward)

    def before(_, args, kwargs):
        given = arguments.bind(*args, **kwargs).arguments
        seen.append(student.family.time(net, float(given["timestep"].flatten()[0])))

    net.register_forward_pre_hook(before, with_kwargs=True)
    student.pipe.controlnet.register_forward_hook(lambda *_: told.append(True))
    drawn(student, edges(0))
    assert seen == pytest.approx(read_contract(folder).timesteps) and len(told) == len(seen) == 2


@EACH
def test_a_control_net_whose_outputs_are_zeros_changes_no_bit(folders, name):
    student = StudentPipeline.load(folders[name])
    plain, controls = drawn(student), student.family.controls
    pipe = controls.pipeline_of(student.pipe, controlnet(name, pipeline(name), size=0.0))
    assert np.array_equal(drawn(replace(student, pipe=pipe), edges(0)), plain)


@EACH
def test_load_student_takes_the_pipeline_that_a_user_builds(folders, name):
    folder, family = folders[name], FAMILIES[name]
    base = DiffusionPipeline.from_pretrained(folder.parent / "teacher")
    net = family.controls.model.from_pretrained(folder.parent / "controlnet")
    pipe = family.controls.pipeline.from_pipe(base, controlnet=net)
    call = load_student(pipe, folder)
    given = {family.controls.image: edges(0), "output_type": "np", "generator": torch.manual_seed(3)}
    user = pipe("red apple", **given, **call).images[0]
    ours = StudentPipeline.load(folder, controlnet=str(folder.parent / "controlnet"))
    (image,) = ours.draw(
        ["red apple"], [3], controlled(ours, ours.call(DrawOptions()).plus(output_type="np"), edges(0))
    )
    assert np.abs(image.image - user).max() < 1e-5


def other_kind(folder: Path, kind: str) -> Path:
    """A student of the base of `folder` that is no single LoRA."""
    family = replace(FAMILIES["sd"], pretrained_teacher_model=str(folder.parent / "teacher"))
    out, pipe = folder.parent / kind, family.load()
    bone = backbone("sd", pipe)
    if kind == "several":
        for k in range(2):
            shutil.copytree(folder, folder.parent / f"part-{k}", dirs_exist_ok=True)
            Routing(k, consecutive(["rose", "red apple"], 2)).save(folder.parent / f"part-{k}")
        return join_students(out, [folder.parent / f"part-{k}" for k in range(2)])
    method = AdapterGuidance(num_inference_steps=2) if kind == "adapters" else QUIET
    bone.add("student", Adapters("cross_attention", 16) if kind == "adapters" else Copy(width=float(kind)))
    if kind == "adapters":
        stirred(bone, "student", 0.1)
    options = {"role": "student", "resolution": (SIDE, SIDE), "method": method}
    write_student(out, family=family, pipe=pipe, backbone=bone, **options)
    return out


@pytest.mark.parametrize("kind", ["1.0", "adapters", "several"])
def test_other_kinds_of_students_take_a_control_net(folders, kind):
    folder = other_kind(folders["sd"], kind)
    student = StudentPipeline.load(folder)
    call = student.call(DrawOptions()).plus(output_type="np")

    def images(student: StudentPipeline, call: PipelineCall) -> np.ndarray:
        return np.stack([drawn.image for drawn in student.draw(["rose", "red apple"], [0, 1], call)])

    plain = images(student, call)
    student = StudentPipeline.load(folder, controlnet=str(folders["sd"].parent / "controlnet"))
    one, other = (images(student, controlled(student, call, edges(seed))) for seed in range(2))
    assert np.abs(one - plain).max(axis=(1, 2, 3)).min() > 0.1 and np.abs(one - other).max() > 1e-3


def test_a_narrower_network_is_refused_the_control_net_of_its_base():
    pipe = pipeline("sd")
    narrow = FAMILIES["sd"].narrow(pipe.unet, 0.5)
    with pytest.raises(ConfigError, match=r"block_out_channels \[32, 32\], expected \[16, 16\]"):
        FAMILIES["sd"].controls.check(pipe, narrow, controlnet("sd", pipe))


OTHERS = [
    ("sd", {"cross_attention_dim": 48}, "cross_attention_dim 48, expected 32"),
    ("sd", {"in_channels": 9}, "in_channels 9, expected 4"),
    ("sd", {"block_out_channels": (32, 64)}, r"block_out_channels \[32, 64\], expected \[32, 32\]"),
    ("sd", {"layers_per_block": 2}, "layers_per_block 2, expected 1"),
    ("sd", {"conditioning_channels": 1}, "conditioning_channels 1, expected 3"),
    ("sd", {"conditioning_embedding_out_channels": (16, 16)}, "expected 3 levels"),
    ("sd3", {"joint_attention_dim": 48}, "joint_attention_dim 48, expected 64"),
    ("sd3", {"num_layers": 3}, "num_layers 3, expected at most 2"),
    ("sd3", {"extra_conditioning_channels": 1}, "extra_conditioning_channels 1, expected 0"),
    ("flux", {"num_mode": 4}, "num_mode 4, expected None"),
    ("flux", {"num_single_layers": 3}, "num_single_layers 3, expected at most 2"),
    ("sana", {"caption_channels": 48}, "caption_channels 48, expected 32"),
    ("sana", {"attention_head_dim": 4}, "attention_head_dim 4, expected 8"),
]


@pytest.mark.parametrize(("name", "other", "said"), OTHERS)
def test_a_control_net_of_another_base_is_named(name, other, said):
    pipe, family = pipeline(name), FAMILIES[name]
    net = family.network(pipe)
    family.controls.check(pipe, net, controlnet(name, pipe))
    with pytest.raises(ConfigError, match=said):
        family.controls.check(pipe, net, controlnet(name, pipe, **other))


def test_a_control_net_of_another_family_or_for_a_scaled_time_is_named():
    pipe = pipeline("sd")
    with pytest.raises(ConfigError, match="got a SD3ControlNetModel, expected a ControlNetModel of the base model"):
        FAMILIES["sd"].controls.check(pipe, pipe.unet, controlnet("sd3", pipeline("sd3")))
    sprint = sana(sprint=True)
    with pytest.raises(ConfigError, match="got a base with timestep_scale 0.001, expected 1.0"):
        Sana.controls.check(sprint, sprint.transformer, controlnet("sana", pipeline("sana")))


def test_what_is_no_control_net_is_named(folders, tmp_path):
    controls, folder = FAMILIES["sd"].controls, folders["sd"]
    for place, said in [
        (tmp_path, "as a ControlNet, expected a folder or hub id of a ControlNetModel"),
        (folder, "as a ControlNet, expected a folder or hub id of a ControlNetModel"),
        (folder.parent / "teacher" / "unet", "its config.json is of a UNet2DConditionModel"),
        (folders["sd3"].parent / "controlnet", "its config.json is of a SD3ControlNetModel"),
    ]:
        with pytest.raises(ConfigError, match=said):
            controls.read(str(place))
    controlnet("sd", pipeline("sd")).save_config(tmp_path / "bare")
    with pytest.raises(ConfigError, match="got .*bare as a ControlNet"):
        controls.read(str(tmp_path / "bare"))
    cut = shutil.copytree(folder.parent / "controlnet", tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    state = load_file(cut)
    save_file({key: state[key] for key in sorted(state)[1:]}, cut, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"its files lack 1 of {len(state)} tensors, such as {sorted(state)[0]}"):
        controls.read(str(cut.parent))
    with pytest.raises(DataError, match="got the control image .*nothing.png, expected an image file"):
        read_control(tmp_path / "nothing.png")


def test_load_student_refuses_a_control_net_of_another_base(folders):
    base = DiffusionPipeline.from_pretrained(folders["sd"].parent / "teacher")
    nets = [controlnet("sd", base), controlnet("sd", base, cross_attention_dim=48)]
    pipe = FAMILIES["sd"].controls.pipeline.from_pipe(base, controlnet=nets)
    with pytest.raises(ConfigError, match="cross_attention_dim 48"):
        load_student(pipe, folders["sd"])


def test_a_family_without_control_nets_says_so(tmp_path):
    folder = folder_of("pixart_sigma", tmp_path, QUIET)
    with pytest.raises(ConfigError, match="got a ControlNet for a PixArtSigmaPipeline, expected none"):
        StudentPipeline.load(folder, controlnet="anywhere")


def test_the_command_draws_with_a_control_net(folders, tmp_path, capsys):
    folder, image = folders["sd"], tmp_path / "edges.png"
    edges(0).save(image)
    control = ["--controlnet", folder.parent / "controlnet", "--control_image", image]

    def pixels(name: str, *options: object) -> np.ndarray:
        cli.main(list(map(str, ["generate", folder, "rose", "red apple", "-o", tmp_path / name, *options])))
        rows = [json.loads(line) for line in (tmp_path / name / "images.jsonl").read_text().splitlines()]
        return np.stack([np.asarray(Image.open(tmp_path / name / row["file"]), dtype=float) for row in rows])

    plain, steered = pixels("plain"), pixels("control", *control)
    assert np.abs(steered - plain).max(axis=(1, 2, 3)).min() > 20
    assert np.array_equal(pixels("off", *control, "--controlnet_conditioning_scale", 0), plain)
    student = StudentPipeline.load(folder, controlnet=str(control[1]))
    (one, _) = student.draw(["rose", "red apple"], [0, 1], controlled(student, student.call(), edges(0)))
    assert np.array_equal(np.asarray(one.image), steered[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--controlnet", "CONTROL"], "got --controlnet without --control-image, expected both"),
        (["--control-image", "IMAGE"], "got options of a ControlNet without --controlnet, expected both"),
        (["--controlnet-conditioning-scale", "1"], "got options of a ControlNet without --controlnet"),
        (
            ["--controlnet", "CONTROL", "--control-image", "IMAGE", "--width", "64"],
            "got a control image of 32 x 32 pixels, expected 64 x 32",
        ),
        (["--controlnet", "CONTROL", "--control-image", "CONTROL"], "expected an image file"),
        (["--controlnet", "nowhere", "--control-image", "IMAGE"], "got nowhere as a ControlNet"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(folders, tmp_path, capsys, options, said):
    edges(0).save(tmp_path / "edges.png")
    places = {"CONTROL": str(folders["sd"].parent / "controlnet"), "IMAGE": str(tmp_path / "edges.png")}
    with pytest.raises(SystemExit) as left:
        cli.main(
            ["generate", str(folders["sd"]), "rose", "-o", str(tmp_path / "out")] + [places.get(o, o) for o in options]
        )
    assert left.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_code_in_the_guide_runs(folders, tmp_path, monkeypatch):
    folder, text = folders["sd"], (Path(__file__).parents[1] / "docs/guides/controlnet.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    edges(0).save("edges.png")
    teacher, control = folder.parent / "teacher", folder.parent / "controlnet"
    places = {"stable-diffusion-v1-5/stable-diffusion-v1-5": teacher, "lllyasviel/sd-controlnet-canny": control}
    images = []
    for snippet in snippets:
        for name, place in (places | {"runs/mine": folder}).items():
            snippet = snippet.replace(name, str(place))
        exec(snippet, {})
        images.append(np.asarray(Image.open("cat.png")))
    assert len(images) == 2 and np.array_equal(*images)
