"""Numbers out of range, devices that are not there, sizes that a pipeline refuses, places that cannot be written to:
each is one line, before any work."""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args, get_origin

import pytest
import yaml
from images import noise
from surface import arguments, config_classes
from tiny import FAMILIES, pipeline

from stepdistill.cli import main as cli
from stepdistill.cli.main import _parser
from stepdistill.config.load import read_node
from stepdistill.config.schema import arms, fields
from stepdistill.config.template import template
from stepdistill.core.devices import usable_device
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.data.made import VALIDATION
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.regression import Regression
from stepdistill.students.draw.call import teacher_call
from stepdistill.training.checks import check_loaded, check_noise_process
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare


def shaped(hint: object, whole: Sequence[float], real: Sequence[float]) -> Iterator[object]:
    """These whole and real numbers where the annotation takes such ones, in the shape that it has."""
    for arm in arms(hint):
        inner = [part for part in get_args(arm) if part is not ...]
        if get_origin(arm) is tuple:
            yield from ([value] * len(inner) for value in shaped(inner[0], whole, real))
        elif arm is float or (inner and inner[0] is float):
            yield from real
        elif arm is int or (inner and inner[0] is int):
            yield from whole


ZERO = {  # the fields that may be 0
    *("guidance_scale", "sampling_guidance_scale", "guidance_embedding", "teacher_guidance_scale", "guidance_range"),
    *("ema_decay", "dropout", "ema", "eta", "proportion_empty_prompts", "threshold", "timestep", "timesteps"),
    *("warmup_steps", "lr_warmup_steps", "annealing_steps", "dataloader_num_workers", "student"),
    *("seed", "validation_seed", "learning_rate", "watch_samples", "eval_samples"),
    *("boundary_weight", "kappa", "decode_timestep", "curriculum_steps", "max_time_probability", "cfg_truncation"),
    *(
        "regression_weight",
        "weak",
        "off_path",
        "fake_decay",
        "slope",
        "WhiteBorder.width",
        "weight",
        "flow_weight",
        "generator_weight",
        "discriminator_weight",
        "r1_weight",
    ),
}
SIGNED = {"time_mean", "margin", "mean"}  # the fields that may be negative
LEARNED = {f"AdapterGuidance.{name}" for name in ("guidance_range", "sampling_guidance_scale")}  # one holds the other
EFFECTIVE = {  # with these every number of the class has an effect
    "Consistency": {"end": "any", "segments": [2, 1], "stage_steps": 10},
    "Regression": {"loss_type": "huber"},
    "Gan": {"r1_weight": 1.0},
    "RewardTerm": {"mean": 0.0, "std": 1.0, "slope": 1.0},
}
BEYOND = {  # above the largest value of a field
    **dict.fromkeys(("ema_decay", "ema", "weak"), 1.0),
    **dict.fromkeys(("eta", "proportion_empty_prompts", "threshold", "dropout", "kappa", "decode_timestep"), 1.01),
    **dict.fromkeys(("seed", "validation_seed"), 2**32),
    **dict.fromkeys(("Flux.max_sequence_length", "StableDiffusion3.max_sequence_length"), 513),
    "count": VALIDATION + 1,
}


@pytest.mark.parametrize("cls", config_classes())
def test_every_number_of_a_config_has_a_range(cls) -> None:
    node = yaml.safe_load(template(cls, {})) if fields(cls) else {}
    node |= EFFECTIVE.get(cls.__name__, {})
    read_node(cls, node, "config")  # nothing else is wrong
    for name, hint in fields(cls).items():
        full = f"{cls.__name__}.{name}"
        zero = bool({name, full} & (ZERO | SIGNED)) and full not in LEARNED
        negative = [] if name in SIGNED else [-1.0]
        beyond = [BEYOND[key] for key in (name, full) if key in BEYOND] + [0] * (not zero)
        for good in shaped(hint, [0], [0.0]) if zero else ():
            read_node(cls, node | {name: good}, "config")
        for bad in shaped(hint, (-1, 10**30, 1.5, *beyond), (*negative, *map(float, ("nan", "inf", "-inf")), *beyond)):
            with pytest.raises(ConfigError, match=rf"\b{name}\b") as caught:
                read_node(cls, node | {name: bad}, "config")
                pytest.fail(f"{full} takes {bad}")
            assert "has an effect only" not in str(caught.value)


ANY = {
    "--guidance-scale",
    "--strength",
    "--lora-strengths",
    "--negative-scale",
}  # the arguments that take negative numbers
NONE = ANY | {"--seed", "--reference-seed", "--base-steps", "--latency", "--timesteps", "--sigmas", "--eta"}
NONE |= {"--tolerance", "--controlnet-conditioning-scale", "--teacher-steps"}  # those that take 0
REAL = ANY | {"--controlnet-conditioning-scale", "--timesteps", "--sigmas", "--tolerance", "--teacher-guidance-scale"}
REAL |= {"--frame-rate"}


def takes(action: argparse.Action, text: str) -> bool:
    try:
        action.type(text)  # pyright: ignore[reportCallIssue, reportOptionalCall]
    except argparse.ArgumentTypeError as error:
        assert re.fullmatch(r"got '.*', expected .*", str(error))
        return False
    return True


def test_every_number_of_a_command_has_a_range() -> None:
    typed = [action for action in arguments(_parser()) if callable(action.type) and not takes(action, "x")]
    numbers = [action for action in typed if not takes(action, "8x8")]  # sizes have a test of their own
    assert len(numbers) > 25

    def taking(text: str) -> set[str]:
        return {action.option_strings[-1] for action in numbers if takes(action, text)}

    for bad in ("nan", "inf", "-1e999", "", "1,nan", "1,1"):
        assert not taking(bad)
    assert taking("-1") == ANY and taking("0") == NONE and taking("1.5") == REAL
    every = {action.option_strings[-1] for action in numbers}
    assert taking("1") == every and every - taking(str(2**32)) == {
        "--seed",
        "--reference-seed",
        "--eta",
        "--frame-rate",
    }


@pytest.mark.parametrize(
    "words",
    [
        *(["generate", "folder", "rose", *more] for more in (["--batch", "0"], ["--seed", "-1"], ["--eta", "2"])),
        *(["generate", "folder", "rose", *more] for more in (["--num-images-per-prompt", "0"], ["--width", "-8"])),
        ["generate", "folder", "rose", "--timesteps", "999,999"],
        *(["view", "folder", "rose", "-o", "a.png", *more] for more in (["--columns", "1"], ["--teacher-steps", "0"])),
        *(["eval", "run", "tiny-sd", "-o", "a", *more] for more in (["--num-images", "0"], ["--seed", str(2**32)])),
        ["verify", "folder", "--tolerance", "nan"],
    ],
)
def test_a_number_out_of_range_is_one_line(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and re.search(r"error: argument .*: got '.*', expected", last)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(name, tmp_path, capsys) -> None:
    assert usable_device("cpu").type == "cpu" == usable_device(None, "cpu").type
    with pytest.raises(ConfigError, match=f"got device {name}, expected a device that is there"):
        usable_device(name)
    images = str(tmp_path / "b")
    (tmp_path / "b").mkdir()
    for i in range(40):
        noise(8, 8, i).save(tmp_path / "b" / f"{i}.png")
    for words in (
        ["generate", "nowhere", "rose", "-o", str(tmp_path / "a")],
        ["view", "nowhere", "rose", "-o", str(tmp_path / "a.png")],
        ["eval", "score", images, "--ref", images, "-o", str(tmp_path / "a")],
        ["eval", "ref", images, "-o", str(tmp_path / "a.npz")],
        ["eval", "run", "nowhere", "-o", str(tmp_path / "a")],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, "--device", name])
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.startswith(f"stepdistill: got device {name}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported asynchronously"),
    ],
)
def test_what_other_builds_of_torch_say_is_one_line(error, monkeypatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.zeros", absent)
    with pytest.raises(ConfigError) as caught:
        usable_device("cuda:1")
    said = str(caught.value)
    assert said.startswith("got device cuda:1, expected") and str(error).splitlines()[0] in said and "\n" not in said


@pytest.mark.parametrize("scale", [None, 8])  # that of the small autoencoders, and of real ones
@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_that_the_pipeline_refuses_are_told_before(name, scale, monkeypatch) -> None:
    """Diffusers' own check of each pipeline is the oracle: whatever it refuses or makes smaller, we refuse."""
    pipe: Any = pipeline(name)
    family = FAMILIES[name]
    factors = {"wan": "vae_scale_factor_spatial", "ltx": "vae_spatial_compression_ratio"}
    factor = factors.get(name, "vae_scale_factor")
    monkeypatch.setattr(pipe, factor, scale or vars(pipe)[factor])
    taken = 0
    for height, width in [(32, 32), (64, 32), (36, 32), (32, 40), (30, 32), (32, 1), (48, 48), (96, 64)]:
        try:
            shape = family.latent_shape(pipe, height, width)
        except ConfigError as error:
            assert "sides that are multiples of" in str(error)
        else:
            taken += 1
            drawn = pipe(
                prompt="rose",
                height=height,
                width=width,
                num_inference_steps=2,
                output_type="latent",
                **family.arguments(),
                **family.guidance(1.0),
            )
            assert family.latents_of(pipe, drawn[0], *shape[-2:]).shape == (1, *shape)
    assert taken >= 1


def test_the_size_of_a_run_and_of_images_is_checked(tmp_path) -> None:
    run = Run(
        family=StableDiffusion(pretrained_teacher_model="tiny-sd"),
        method=Regression(num_inference_steps=1),
        data=Prompts(prompts=("rose",)),
        train=TrainSpec(output_dir=str(tmp_path / "out"), report_to="none", resolution=36),
    )
    with pytest.raises(ConfigError, match="images of 36 x 36 pixels, expected sides that are multiples of 8"):
        check_loaded(prepare(run))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_steps_that_the_teacher_does_not_take_are_told_before(name, tmp_path) -> None:
    """They were tracebacks: in the first samples, after training, in `view` and in evaluations."""
    family, pipe = FAMILIES[name], pipeline(name)
    prompts = Prompts(prompts=("rose",))
    train = TrainSpec(output_dir=str(tmp_path / "out"), report_to="none")
    for steps in (30, 5000):
        data = TeacherSamples(source=prompts, folder=str(tmp_path / "x"), count=8, num_inference_steps=steps)
        run = Run(family=family, method=Regression(num_inference_steps=1), data=data, train=train)
        if name == "sd3":  # a flow takes any number
            check_noise_process(run, family.schedule(pipe.scheduler))
            continue
        with pytest.raises(ConfigError, match=f"num_inference_steps of TeacherSamples: a grid of {steps} steps"):
            check_noise_process(run, family.schedule(pipe.scheduler))
    if name == "sd3":
        teacher_call(family, pipe, 5000, 1.0, "teacher")
        return
    teacher_call(family, pipe, 1000, 1.0, "teacher")
    with pytest.raises(ConfigError, match="got 5000 steps of the teacher, expected at most 1000"):
        teacher_call(family, pipe, 5000, 1.0, "teacher")
    teacher = StableDiffusion(pretrained_teacher_model="tiny-sd")
    for given in ({"validation_prompts": ("rose",)}, {"eval_samples": 40}, {}):
        spec = replace(train, teacher_steps=5000, **given)
        session = prepare(Run(family=teacher, method=Regression(num_inference_steps=1), data=prompts, train=spec))
        if not given:  # no such image is drawn
            check_loaded(session)
            continue
        with pytest.raises(ConfigError, match="got 5000 steps of the teacher"):
            check_loaded(session)


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG"])
def test_a_full_disk_is_one_line(number, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(getattr(errno, number), "of the disk", "out/00000.png")

    def defect(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr("stepdistill.students.contract.kind_of", full)
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", "folder"])
    said = capsys.readouterr().err
    expected = f"stepdistill: [Errno {getattr(errno, number)}] of the disk: 'out/00000.png'\n"
    assert caught.value.code == 2 and said == expected
    monkeypatch.setattr("stepdistill.students.contract.kind_of", defect)
    with pytest.raises(FileNotFoundError):
        cli.main(["verify", "folder"])
