"""`stepdistill eval`: one command from teacher and students to a report, whatever ends it on the way."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from oracles.excess import excess
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.cli import eval as command
from stepdistill.cli import main as cli
from stepdistill.core.cost import Cost
from stepdistill.core.errors import ConfigError, EvaluationError, MissingWeights, StepdistillError
from stepdistill.data import Partition, Prompts
from stepdistill.data.routing import Routing
from stepdistill.evaluation import run
from stepdistill.evaluation.draw import RowDrawer
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.inputs import labels
from stepdistill.evaluation.metrics import image_scores
from stepdistill.evaluation.metrics.frechet import frechet
from stepdistill.evaluation.metrics.image_scores import clip_scores
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.plan import SamplingPlan, family_of, sampling_plans
from stepdistill.evaluation.read import cropped
from stepdistill.evaluation.results import summary_lines
from stepdistill.evaluation.run import evaluate, extractor_of, score_images, write_statistics
from stepdistill.evaluation.spec import SEED_A, SEED_B, EvalRun, EvalSpec
from stepdistill.evaluation.store import Store
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.clip import Clip, clip
from stepdistill.networks.roles import Adapters, Lora
from stepdistill.students.draw.call import generate, student_call, teacher_call
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.several import join_students
from stepdistill.students.write import write_student

LCM = Consistency(ema_decay=None, num_ddim_timesteps=10)
PROMPTS = ["red apple", "cat face", "rose", "octopus", "green apple", "dog face", "pear", "tiger"]
SMALL = 48  # images


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Family]:
    found: dict[str, Family] = {}
    for name, cls in (("sd", StableDiffusion), ("sd3", StableDiffusion3)):
        folder = tmp_path_factory.mktemp(name)
        tiny.pipeline(name).save_pretrained(folder)
        found[name] = cls(pretrained_teacher_model=str(folder))
    return found


def taught(family: Family, folder: Path, method: Method = LCM, size: float = 0.05, role=None, **options) -> Path:
    """A student folder, which differs from its teacher."""
    pipe = family.load()
    bone = tiny.backbone("sd" if isinstance(family, StableDiffusion) else "sd3", pipe)
    bone.add("student", role or Lora())
    if role is None:
        tiny.awake(bone, "student", size)
    else:
        for p in bone.parameters_of("student").values():
            p.data += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    given = {"role": "student", "resolution": (32, 32), "method": method} | options
    write_student(folder, family=family, pipe=pipe, backbone=bone, **given)
    return folder


@pytest.fixture(scope="module")
def students(teachers, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("students")
    return [str(taught(teachers["sd"], folder / name, size=size)) for name, size in (("near", 0.01), ("far", 0.2))]


@pytest.fixture
def asked(teachers, students, tmp_path) -> EvalRun:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return EvalRun(
        teacher=teachers["sd"].pretrained_teacher_model,
        students=tuple(students),
        output_dir=tmp_path / "out",
        prompts=prompts,
        num=SMALL,
        teacher_steps=2,
        steps=(1,),
        batch=16,
        features="pixels",
        feature_batch=16,
    )


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def values(folder: Path) -> list[dict]:
    """The rows of eval.json without what a clock said."""
    rows = json.loads((folder / "eval.json").read_text())["rows"]
    for row in rows:
        for key in ("seconds_per_image", "speedup_vs_teacher", "latency_ms"):
            row["cost"].pop(key, None)
    return rows


def kept(folder: Path) -> dict[str, bytes]:
    """Every feature and image."""
    files = sorted([*folder.glob("work/*/*.npy"), *folder.glob("images/*/*.png")])
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_one_command_makes_the_report(asked, capsys):
    names = {"teacher_steps": 2, "num_images": SMALL, "batch": 16, "features": "pixels", "feature_batch": 16}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in names.items()]
    cli.main(["eval", "run", asked.teacher, *asked.students, "-o", str(asked.output_dir), "--steps=4,1", *words]
             + ["--prompts-file", str(asked.prompts), "--metrics=kid,paired,prdc,vendi,diversity"])  # fmt: skip
    out = asked.output_dir
    found = json.loads((out / "eval.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        *("teacher, 2 steps", "teacher, 4 steps", "teacher, 1 step"),
        *("near, 4 steps", "near, 1 step", "far, 4 steps", "far, 1 step"),
    ]
    assert found["schema"] == "stepdistill.eval/1" and found["features"]["key"] == "fd"
    for row in found["rows"]:
        assert row["n"] == SMALL and not row["comparable"] and row["comparable_reasons"]
        assert {"fd", "kid", "prdc", "vendi", "diversity"} <= row["metrics"].keys() and "fid" not in row["metrics"]
    costs = {row["name"]: (row["cost"]["calls"], row["cost"]["nfe"]) for row in found["rows"]}
    assert costs["teacher, 2 steps"] == (2, 4) and costs["near, 4 steps"] == (4, 4) and costs["far, 1 step"] == (1, 1)
    assert (out / "report.html").stat().st_size > 10_000
    assert sorted(f.name for f in (out / "grids").iterdir()) == ["far.png", "near.png"]
    lines = [json.loads(line) for line in (out / "per_sample.jsonl").read_text().splitlines()]
    assert len(lines) == 7 * SMALL and lines[9] == {
        "row": "teacher, 2 steps",
        "index": 9,
        "prompt": "cat face",
        "seed": 2,
    }
    with np.load(out / "stats" / "reference.npz") as stats:
        assert stats["mu"].shape == stats["sigma"][0].shape
    printed = capsys.readouterr().out
    assert "near, 4 steps" in printed and "excess" in printed
    told = found["rows"][3]["metrics"]["diversity_vs_teacher"]
    value, low, high = (f"{one:.4g}" for one in (told["value"], *told["ci95"]))
    (line,) = (line for line in printed.splitlines() if line.startswith("near, 4 steps"))
    assert f"  diversity / teacher's {value} [{low}, {high}]  " in line and low < value < high
    assert "left out" not in printed
    words = re.sub(r"data:image/png;base64,[^\"]*", "", (out / "report.html").read_text())
    assert "FID" not in printed + words


def test_the_figures_are_those_of_features_drawn_by_hand(asked, teachers):
    """The reference is the teacher at seed A; rows have seed B; their difference is `excess` of the features."""
    found = evaluate(asked)
    pipe, prompts = teachers["sd"].load(), [PROMPTS[i % 8] for i in range(SMALL)]
    row = teacher_call(teachers["sd"], pipe, 2, 7.5, "")
    pixels = extractor_of(asked, torch.device("cpu"))
    ref, floor = (pixels(generate(pipe, row, prompts, seed, 16)[0]) for seed in (SEED_A, SEED_B))
    few = pixels(generate(pipe, teacher_call(teachers["sd"], pipe, 1, 7.5, ""), prompts, SEED_B, 16)[0])
    own = excess(few, ref, floor)
    told = found["rows"][1]["metrics"]["delta_vs_teacher"]["fd"]
    assert [told["value"], *told["ci95"]] == pytest.approx([own.value, own.low, own.high], rel=1e-9)
    assert found["rows"][0]["metrics"]["fd"]["value"] == pytest.approx(
        frechet(Stats.of(floor), Stats.of(ref)), rel=1e-6
    )
    assert found["rows"][1]["metrics"]["paired"]["features"] == pytest.approx((few - floor).norm(dim=1).mean().item())


class Cut(BaseException):
    pass


def test_a_run_that_is_cut_goes_on_to_the_same(asked, tmp_path, monkeypatch):
    asked = replace(asked, save_images=True, students=asked.students[:1])
    whole = replace(asked, output_dir=tmp_path / "whole")
    evaluate(whole)
    rng, drawn = random.Random(0), []
    real = StudentPipeline.generate

    def draws(self: StudentPipeline, calls, prompts, seed, batch, numbers, **first):
        drawn.append((calls[0].name, tuple(numbers)))
        if rng.random() < 0.4:
            raise Cut
        return real(self, calls, prompts, seed, batch, numbers, **first)

    def writes(self: Store, name: str, start: int, values: Tensor) -> None:
        if rng.random() < 0.2:
            put(self, name, start, values[: len(values) // 2])
            raise Cut
        put(self, name, start, values)

    put = Store._write
    monkeypatch.setattr(StudentPipeline, "generate", draws)
    monkeypatch.setattr(Store, "_write", writes)
    cuts = 0
    while True:
        try:
            evaluate(asked)
            break
        except Cut:
            cuts += 1
    assert cuts >= 3 and len(drawn) == cuts + len(set(drawn))  # what was whole is not drawn again
    assert kept(asked.output_dir) == kept(whole.output_dir) and values(asked.output_dir) == values(whole.output_dir)


def _forked(spec: EvalRun) -> None:
    torch.set_num_threads(1)
    evaluate(spec)
    os._exit(0)


@pytest.mark.slow
def test_a_thousand_images_killed_at_random_moments(asked, tmp_path):
    asked = replace(asked, num=1000, students=asked.students[:1], save_images=True, feature_batch=50, batch=50)
    asked = replace(asked, teacher_steps=1)
    whole = replace(asked, output_dir=tmp_path / "whole")
    start = time.monotonic()
    evaluate(whole)
    seconds, rng, killed = time.monotonic() - start, random.Random(1), 0
    context = multiprocessing.get_context("fork")
    while True:
        process = context.Process(target=_forked, args=(asked,))
        process.start()
        process.join(rng.uniform(0.05, 0.3) * seconds if killed < 4 else None)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            killed += 1
            continue
        assert process.exitcode == 0
        break
    assert killed >= 2
    assert kept(asked.output_dir) == kept(whole.output_dir) and values(asked.output_dir) == values(whole.output_dir)


@pytest.mark.slow
def test_two_processes_give_one_process_s_values(asked, tmp_path):
    evaluate(asked)
    launch = Path(__file__).parent.parent / "configs" / "accelerate" / "two_processes_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    words = [
        "--teacher-steps=2",
        "--steps=1",
        f"--num-images={SMALL}",
        "--batch=16",
        "--features=pixels",
        "--feature-batch=16",
    ]
    done = subprocess.run(
        [*command, "-m", "stepdistill", "eval", "run", asked.teacher, *asked.students, *words, "--device=cpu"]
        + ["-o", str(tmp_path / "two"), "--prompts-file", str(asked.prompts)],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept(tmp_path / "two") == kept(asked.output_dir)
    for one, two in zip(values(asked.output_dir), values(tmp_path / "two"), strict=True):
        assert two["metrics"]["fd"]["value"] == pytest.approx(one["metrics"]["fd"]["value"], rel=1e-9)
        assert two["metrics"] == one["metrics"]
    assert json.loads((tmp_path / "two" / "eval.json").read_text())["host"]["world_size"] == 2


def test_images_hardly_depend_on_the_batch(asked, teachers):
    """One at a time or many: the same noise, and arithmetic that is off by rounding in a few values."""
    family = family_of(asked.teacher, None, [])
    subject = StudentPipeline.of(family, asked.students[0])
    calls = subject.calls()
    one, many = (subject.generate(calls, PROMPTS, 5, batch, list(range(8)))[0] for batch in (1, 8))
    assert (one.int() - many.int()).abs().max() <= 1 and (one != many).double().mean() < 1e-3
    late = subject.generate(calls, PROMPTS[6:], 5, 2, [6, 7])[0]
    assert (late.int() - one[6:].int()).abs().max() <= 1


def test_images_that_are_no_numbers_end_it_and_lose_nothing(asked, teachers, tmp_path):
    pipe = teachers["sd"].load()
    next(pipe.vae.decoder.parameters()).data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "odd")
    with pytest.raises(EvaluationError, match="images 0 to 15 of reference: .*non-finite.*--dtype fp32"):
        evaluate(replace(asked, teacher=str(tmp_path / "odd"), students=()))


def test_another_evaluation_is_not_mixed_in(asked, teachers, tmp_path):
    evaluate(asked)
    with pytest.raises(EvaluationError, match="begun with other seed.*another output folder"):
        evaluate(replace(asked, seed=7))
    own = replace(
        asked, students=(str(taught(teachers["sd"], tmp_path / "mine", size=0.02)),), output_dir=tmp_path / "own"
    )
    evaluate(own)
    taught(teachers["sd"], tmp_path / "mine", size=0.03)  # trained on, in its folder
    with pytest.raises(EvaluationError, match="begun with other student"):
        evaluate(own)


def test_steps_that_a_student_has_not_are_left_out_and_named(asked, teachers, tmp_path):
    """A student of a grid of ten times cannot be drawn in twelve steps, one of fifty can."""
    fine = taught(teachers["sd"], tmp_path / "fine", Consistency(ema_decay=None))
    found = evaluate(replace(asked, students=(asked.students[0], str(fine)), steps=(12, 1)))
    assert [text.split(":")[0] for text in found["left_out"]] == ["near, 12 steps"]
    names = [row["name"] for row in found["rows"] if row["role"] == "student"]
    assert names == ["near, 1 step", "fine, 12 steps", "fine, 1 step"]


def test_a_store_knows_all_that_its_images_depend_on(asked, teachers, tmp_path):
    """Not the denoiser alone: the same folder with another decoder draws other images."""
    place = tmp_path / "teacher"
    shutil.copytree(asked.teacher, place)
    own = replace(asked, teacher=str(place), students=())
    evaluate(own)
    pipe = teachers["sd"].load()
    for p in pipe.vae.decoder.parameters():
        p.data *= 0.9
    pipe.save_pretrained(place)
    with pytest.raises(EvaluationError, match="begun with other teacher"):
        evaluate(own)
    with pytest.raises(EvaluationError, match="begun with other save_images"):
        evaluate(replace(own, teacher=asked.teacher, save_images=True))


def test_a_store_knows_every_setting_of_its_images(tmp_path):
    """A student and what is beside it are above and below."""
    spec, one, two = EvalRun(output_dir=tmp_path, teacher="x"), Mock(), Mock(facts={"model": "x"})
    one.identity.id, two.identity.id = "one", "two"
    drawer = RowDrawer(spec, Mock(), [{"prompt": "rose"}], 4, one, None, Mock(), torch.device("cpu"))
    plan = SamplingPlan(name="x", role="teacher", student=None, steps=2, guidance=7.5, seed=1)
    before = drawer._facts(plan, (32, 48), 4, "hash")
    plans = {"role": "reference", "steps": 3, "guidance": 2.0, "seed": 2}
    specs = {"dtype": "bf16", "eval_res": 16, "batch": 3, "feature_batch": 5, "save_images": True, "export": "geneval"}
    drawers = {"records": [{"prompt": "pear"}], "n": 5, "extractor": two, "clip": two, "device": torch.device("meta")}
    after = {name: drawer._facts(replace(plan, **{name: value}), (32, 48), 4, "hash") for name, value in plans.items()}
    for name, other in [(k, replace(drawer, spec=replace(spec, **{k: v}))) for k, v in specs.items()] + [
        (k, replace(drawer, **{k: v})) for k, v in drawers.items()
    ]:
        after[name] = other._facts(plan, (32, 48), 4, "hash")
    after |= {"size": drawer._facts(plan, (48, 32), 4, "hash"), "kept": drawer._facts(plan, (32, 48), 3, "hash")}
    after["teacher"] = drawer._facts(plan, (32, 48), 4, "other")
    names = {"records": {"prompts"}, "n": {"n", "prompts"}, "extractor": {"features"}}
    for name, facts in after.items():
        assert {key for key in before if before[key] != facts[key]} == names.get(name, {name}), name
    assert set().union(*(names.get(name, {name}) for name in after)) == before.keys() - {"student", "beside"}


def test_prompts_are_drawn_in_turn_by_the_number_of_an_image(tmp_path):
    records = [{"prompt": prompt} for prompt in "abc"]
    one, seen = SamplingPlan(name="x", role="reference", student=None, steps=2, guidance=1.0, seed=1), []

    def generate(prompts, batch, numbers):
        seen.append((prompts, list(numbers)))
        return torch.zeros(len(numbers), 3, 4, 4, dtype=torch.uint8), Cost()

    drawer = RowDrawer(EvalRun(output_dir=tmp_path, teacher="x"), Mock(), records, 8, *[Mock() for _ in range(4)])
    list(drawer._units(one, Mock(rows=lambda k: range(4 * k, 4 * k + 4)), generate, [1, 0]))
    assert seen == [(["b", "c", "a", "b"], [4, 5, 6, 7]), (["a", "b", "c", "a"], [0, 1, 2, 3])]


def test_what_an_earlier_evaluation_left_is_not_shown(asked):
    evaluate(asked)
    evaluate(replace(asked, students=asked.students[:1]))
    assert [file.name for file in (asked.output_dir / "grids").iterdir()] == ["near.png"]
    assert not any("far" in file.name for file in (asked.output_dir / "stats").iterdir())
    assert "far" not in (asked.output_dir / "rows.csv").read_text()


def test_rows_that_are_there_are_not_drawn_again(asked, monkeypatch):
    evaluate(replace(asked, students=asked.students[:1]))
    drawn, real = [], StudentPipeline.generate

    def draws(self, calls, *rest, **options):
        drawn.append(calls[0].name)
        return real(self, calls, *rest, **options)

    monkeypatch.setattr(StudentPipeline, "generate", draws)
    evaluate(asked)
    assert set(drawn) == {"far, 1 step"}


def test_an_evaluation_inside_of_its_student_goes_on(asked, teachers, tmp_path):
    folder = taught(teachers["sd"], tmp_path / "mine")
    own = replace(asked, students=(str(folder),), output_dir=folder / "eval")
    assert evaluate(own)["rows"] == evaluate(own)["rows"]


def test_the_reference_is_known_by_its_images(asked, tmp_path):
    one = evaluate(replace(asked, students=()))
    model = tiny.clip(tmp_path / "clip")
    two = evaluate(replace(asked, students=(), output_dir=tmp_path / "two", clip=str(model), columns=3))
    assert one["reference"]["sha256"] == two["reference"]["sha256"]
    assert evaluate(replace(asked, students=(), output_dir=tmp_path / "three", seed=9))["reference"] == one["reference"]
    other = evaluate(replace(asked, students=(), output_dir=tmp_path / "four", reference_seed=9))
    assert other["reference"]["sha256"] != one["reference"]["sha256"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 1 for rows and reference.*two seeds"),
        ({"steps": (1, 1)}, "steps.*different"),
        ({"steps": (0,)}, "steps.*1 or more"),
        ({"guidance": (float("nan"),)}, "guidance.*finite"),
        ({"guidance": (2.0, 2.0)}, "guidance.*different"),
        ({"batch": 0}, "batch=0"),
        ({"num": 0}, "num=0"),
        ({"columns": 0}, "columns=0"),
        ({"latency": -1}, "latency=-1"),
        ({"eval_res": 0}, "eval_res=0"),
        ({"teacher_steps": 0}, "teacher_steps=0"),
        ({"feature_batch": 0}, "feature_batch=0"),
        ({"metrics": ("fdi",)}, "metrics \\['fdi'\\]"),
        ({"protocol": "coco"}, "protocol 'coco'"),
    ],
)
def test_odd_numbers_are_refused(asked, change, words):
    with pytest.raises(ConfigError, match=words):
        replace(asked, **change)


def test_what_is_wrong_is_said_before_anything_is_drawn(asked, teachers, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "dim.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    other = taught(teachers["sd"], tmp_path / "other", resolution=(64, 64))
    flow = str(taught(teachers["sd3"], tmp_path / "flow"))
    monkeypatch.setattr(StudentPipeline, "generate", _unreachable)
    for change, words in [
        ({"reference": str(tmp_path / "dim.npz")}, "5 features.*no distance"),
        ({"reference": str(tmp_path / "broken.npz")}, "npz"),
        ({"reference": "nowhere"}, "does not exist"),
        ({"students": (asked.students[0], str(other))}, "one size"),
        ({"students": (asked.students[0], asked.students[0] + "/.")}, "each once"),
        ({"students": (flow,)}, "pass the teacher of the students"),
        ({"students": ("nowhere",)}, "does not exist"),
        ({"device": "nonsense:7"}, "device nonsense:7"),
        ({"teacher": "no/body"}, "teacher no/body|does not exist"),
        ({"export": "geneval"}, "evaluation_metadata"),
        ({"resize": "tf1"}, "resize tf1 with features pixels"),
        ({"output_dir": tmp_path / "file"}, "a folder to write to"),
    ]:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(StepdistillError, match=words):
            evaluate(replace(asked, **change))
    assert not asked.output_dir.exists() or not list(asked.output_dir.glob("work/*/unit*"))


def test_a_metric_that_cannot_be_is_named(asked):
    found = evaluate(replace(asked, metrics=("cmmd", "diversity", "kid"), num=40, students=()))
    assert [text.split(":")[0] for text in found["left_out"]] == ["cmmd"]
    assert all({"kid", "diversity"} <= row["metrics"].keys() and "cmmd" not in row["metrics"] for row in found["rows"])
    few = asked.prompts.with_name("many.txt")
    few.write_text("\n".join(f"prompt {i}" for i in range(40)))
    other = replace(asked, metrics=("diversity",), num=40, students=(), prompts=few, output_dir=few.with_name("b"))
    found = evaluate(other)
    assert found["left_out"] == ["diversity: no prompt has two images"]
    few.write_text("\n".join(f"prompt {i}" for i in range(20)))
    found = evaluate(replace(other, output_dir=few.with_name("c"), students=asked.students[:1]))
    (words,) = found["left_out"]
    assert words.startswith("interval of diversity: ") and f"left out: {words}" in summary_lines(found)
    told = found["rows"][-1]["metrics"]["diversity_vs_teacher"]
    assert told["ci95"] is None
    assert f"  diversity / teacher's {told['value']:.4g}  calls" in summary_lines(found)[-1]


def test_guidance_is_swept_by_the_call_and_by_adapters(asked, teachers, tmp_path):
    method = AdapterGuidance(guidance_range=(1.0, 8.0), num_inference_steps=2)
    adapters = taught(teachers["sd"], tmp_path / "agd", method, role=Adapters("cross_attention", 8))
    found = evaluate(replace(asked, students=(asked.students[0], str(adapters)), steps=(), guidance=(1.0, 3.0)))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["near, 4 steps, w = 3"]["cost"]["nfe"] == 8 and rows["near, 4 steps, w = 1"]["cost"]["nfe"] == 4
    assert rows["agd, 2 steps, w = 3"]["cost"]["nfe"] == rows["agd, 2 steps, w = 1"]["cost"]["nfe"] == 2
    assert rows["agd, 2 steps, w = 3"]["guidance"] == 3.0
    for name in ("near", "agd"):
        one, two = (rows[f"{name}, {4 if name == 'near' else 2} steps, w = {w}"]["metrics"]["fd"] for w in (1, 3))
        assert one["value"] != two["value"]


def test_several_students_draw_each_their_prompts(asked, teachers, tmp_path):
    parts = [Partition(students=2, student=k, source=Prompts(prompts=tuple(PROMPTS))) for k in range(2)]
    for k, part in enumerate(parts):
        method = replace(LCM, num_inference_steps=4 - 2 * k)
        folder = taught(teachers["sd"], tmp_path / f"part-{k}", method)
        Routing(k, part.router).save(folder)
    join_students(tmp_path / "all", [tmp_path / f"part-{k}" for k in range(2)])
    found = evaluate(replace(asked, students=(str(tmp_path / "all"),), steps=()))
    four = sum(parts[0].router.route(PROMPTS[i % 8]) == 0 for i in range(SMALL))
    assert found["rows"][-1]["name"] == "all, 4 steps"  # the first one's, as the contract has it
    assert found["rows"][-1]["cost"]["calls"] in (2.5, 3, 3.5)  # of batches of one student each
    assert found["rows"][-1]["cost"]["nfe"] == (4 * four + 2 * (SMALL - four)) / SMALL


def test_a_flow_teacher_is_drawn_too(asked, teachers, tmp_path):
    folder = taught(teachers["sd3"], tmp_path / "flow")
    place = teachers["sd3"].pretrained_teacher_model
    found = evaluate(replace(asked, teacher=place, students=(str(folder),), steps=()))
    assert [row["cost"]["nfe"] for row in found["rows"]] == [4, 8, 4]
    subject = StudentPipeline.of(teachers["sd3"], folder)
    own = student_call(teachers["sd3"], LCM, teachers["sd3"].load(), 2)  # the teacher's shift is 3, the student's 1
    assert subject.calls(DrawOptions(steps=2))[0].arguments["sigmas"] == own.arguments["sigmas"]


def test_a_teacher_alone_and_its_family(asked, teachers):
    found = evaluate(replace(asked, students=(), latency=2))
    assert [row["name"] for row in found["rows"]] == ["teacher, 2 steps", "teacher, 1 step"]
    latency = found["rows"][0]["cost"]["latency_ms"]
    assert latency["p50"] > 0 and latency["repetitions"] == 2
    assert (asked.output_dir / "grids" / "teacher.png").exists()


def test_the_first_images_warm_up_and_are_not_timed():
    drawer, seconds = Mock(prompts=["rose"]), iter([9.0, 8.0, 7.0, 1.0, 3.0])
    drawer.spec.latency = 2
    found = RowDrawer._latency(drawer, lambda prompts, batch, numbers: (None, Cost(seconds=next(seconds))))
    assert (found["p50"], found["p90"], found["warmup"]) == (2000, pytest.approx(2800), 3)


def test_pixels_are_compared_with_the_teacher_s(asked, tmp_path):
    found = evaluate(replace(asked, metrics=("pixels", "paired"), students=asked.students[:1], steps=(2,)))
    (told,) = (row["metrics"]["paired"] for row in found["rows"] if row["role"] == "student")
    made = [np.load(next(asked.output_dir.glob(f"work/*{name}*/images.npy"))) for name in ("teacher", "near")]
    assert len(made[0]) == SMALL  # the teacher's are all kept
    a, b = (torch.from_numpy(x[:8]).double() for x in made)
    lines = (asked.output_dir / "per_sample.jsonl").read_text().splitlines()
    of_student = [json.loads(line) for line in lines if "near" in line][:8]
    by_hand = 10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))
    assert [line["psnr"] for line in of_student] == pytest.approx(by_hand.tolist(), rel=1e-5)
    assert 0 < told["ssim"] < 1 and told["features"] > 0
    own = replace(asked, metrics=("pixels",), students=asked.students[:1], steps=(2,), output_dir=tmp_path / "own")
    own = replace(own, reference=str(drawn(tmp_path / "ref", 50, 0)))
    evaluate(own)
    with pytest.raises(EvaluationError, match="near_2-steps, which was begun with other beside"):
        evaluate(replace(own, teacher_steps=1))


def test_clip_scores_are_those_of_prompts_and_images(asked, tmp_path):
    model = tiny.clip(tmp_path / "clip")
    found = evaluate(replace(asked, clip=str(model), save_images=True, students=asked.students[:1]))
    folder = asked.output_dir / "images" / "near_1-step"
    images = torch.stack([as_tensor(Image.open(folder / f"{i:06d}.png")) for i in range(SMALL)])
    by_hand = clip_scores(Clip(str(model), torch.device("cpu")), images, [PROMPTS[i % 8] for i in range(SMALL)])
    (row,) = (row for row in found["rows"] if row["role"] == "student")
    assert row["metrics"]["clip_score"]["value"] == pytest.approx(by_hand.mean().item(), rel=1e-5)
    lines = [json.loads(line) for line in (asked.output_dir / "per_sample.jsonl").read_text().splitlines()]
    assert [line["clip"] for line in lines if line["row"] == "near, 1 step"] == pytest.approx(
        by_hand.tolist(), rel=1e-4
    )
    assert "clip_score" in row["metrics"]["delta_vs_teacher"]
    scored = replace(asked, clip=str(model), reference="x").__dict__
    names = EvalSpec.__dataclass_fields__.keys()
    measures = EvalSpec(**{name: scored[name] for name in names} | {"output_dir": tmp_path / "score"})
    measures = replace(measures, reference=str(drawn(tmp_path / "ref", 50, 0)))
    again = score_images([folder], measures, asked.prompts)
    value = again["rows"][0]["metrics"]["clip_score"]["value"]
    assert value == pytest.approx(row["metrics"]["clip_score"]["value"], rel=1e-5)
    with pytest.raises(EvaluationError, match="both or neither"):
        score_images([folder], measures)


def test_a_clip_that_is_not_there_is_missed_before_anything_is_drawn(asked, monkeypatch):
    monkeypatch.setattr(StudentPipeline, "of", _unreachable)
    monkeypatch.setattr(image_scores, "clip", _unreachable)
    with pytest.raises(MissingWeights, match="--clip PATH"):
        evaluate(replace(asked, clip="openai/clip-vit-base-patch16"))


def test_lpips_is_between_images_of_one_prompt_and_noise(asked, monkeypatch):
    """A stand-in for the network, whose weights are in no package: the mean absolute difference in [-1, 1]."""

    def network(net, device):
        return lambda a, b: (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(image_scores, "lpips", network)
    monkeypatch.setattr(run, "lpips", network)
    found = evaluate(replace(asked, metrics=("lpips",), students=asked.students[1:], columns=SMALL))
    a, b = (np.load(next(asked.output_dir.glob(f"work/*{name}*/images.npy"))).astype(float) for name in ("r_2-", "far"))
    (row,) = (row for row in found["rows"] if row["role"] == "student")
    assert row["metrics"]["paired"]["lpips"] == pytest.approx(np.abs(a - b).mean() / 127.5, rel=1e-5)


def test_exports_are_laid_out_for_their_scorers(asked, tmp_path):
    records = [{"tag": "single_object", "include": [], "prompt": prompt} for prompt in PROMPTS]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    evaluate(replace(asked, prompts=file, export="geneval", students=asked.students[:1], save_images=True))
    folder = asked.output_dir / "geneval" / "near_1-step"
    assert json.loads((folder / "00003" / "metadata.jsonl").read_text()) == records[3]
    assert len(list(folder.glob("*/samples/*.png"))) == SMALL
    same = asked.output_dir / "images" / "near_1-step" / f"{3 + 2 * 8:06d}.png"
    assert as_tensor(Image.open(folder / "00003" / "samples" / "0002.png")).equal(as_tensor(Image.open(same)))


# images that are there


def drawn(folder: Path, n: int, seed: int, side: int = 32, shift: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = np.clip(rng.normal(128 + shift, 40, (side, side, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture
def scored(tmp_path) -> EvalSpec:
    return EvalSpec(output_dir=tmp_path / "out", reference="", features="pixels", feature_batch=16)


def test_score_and_ref_agree_with_each_other(scored, tmp_path, capsys):
    a, b = drawn(tmp_path / "a", 60, 0), drawn(tmp_path / "b", 70, 1, shift=10)
    by_images = score_images([a], replace(scored, reference=str(b)))
    cli.main(["eval", "ref", str(b), "-o", str(tmp_path / "b.npz"), "--features=pixels"])
    by_stats = score_images([a], replace(scored, reference=str(tmp_path / "b.npz"), output_dir=tmp_path / "again"))
    one, two = (found["rows"][0]["metrics"]["fd"] for found in (by_images, by_stats))
    assert one["value"] == pytest.approx(two["value"], rel=1e-9) and one["noise_floor"] == pytest.approx(
        two["noise_floor"]
    )
    assert one["mean_term"] + one["cov_term"] == pytest.approx(one["value"])
    assert "kid" in by_images["rows"][0]["metrics"] and "kid" not in by_stats["rows"][0]["metrics"]
    pixels = extractor_of(scored, torch.device("cpu"))
    made = [pixels(torch.cat([batch.images for batch in Images(place).batches()])) for place in (a, b)]
    assert one["value"] == pytest.approx(frechet(*map(Stats.of, made)), rel=1e-6)
    with np.load(tmp_path / "b.npz") as stats:
        assert set(stats) == {"mu", "sigma", "n", "meta"} and int(stats["n"]) == 70


def test_skipped_images_are_left_out_of_everything(scored, tmp_path):
    a, b = drawn(tmp_path / "a", 130, 0), drawn(tmp_path / "b", 60, 1)
    whole = score_images([a], replace(scored, reference=str(b)))
    broken = a / "0077.png"
    broken.write_bytes(broken.read_bytes()[:50])
    found = score_images([a], replace(scored, reference=str(b), output_dir=tmp_path / "again"))
    assert (found["rows"][0]["n"], found["rows"][0]["n_skipped"]) == (129, 1)
    assert found["rows"][0]["metrics"]["fd"]["value"] == pytest.approx(
        whole["rows"][0]["metrics"]["fd"]["value"], rel=0.05
    )
    indices = [json.loads(line)["index"] for line in (tmp_path / "again" / "per_sample.jsonl").read_text().splitlines()]
    assert indices == [i for i in range(130) if i != 77]


def test_statistics_of_other_features_are_refused(scored, tmp_path):
    a = drawn(tmp_path / "a", 60, 0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 12))
    np.savez(tmp_path / "other.npz", mu=x.mean(0), sigma=np.cov(x.T))
    with pytest.raises(EvaluationError, match="12 features.*no distance"):
        score_images([a], replace(scored, reference=str(tmp_path / "other.npz")))
    cli.main(["eval", "ref", str(a), "-o", str(tmp_path / "a.npz"), "--features=efficientnet-lite0"])
    with pytest.raises(EvaluationError, match="1280 features"):
        score_images([a], replace(scored, reference=str(tmp_path / "a.npz")))
    cli.main(["eval", "ref", str(a), "-o", str(tmp_path / "own.npz"), "--features=pixels"])
    stats, facts = Stats.load(tmp_path / "own.npz")
    stats.save(tmp_path / "own.npz", facts | {"features_id": "pixels@other/area8"})
    with pytest.raises(EvaluationError, match="made with pixels@other.*no distance"):
        score_images([a], replace(scored, reference=str(tmp_path / "own.npz")))
    with pytest.raises(EvaluationError, match="does not exist"):
        score_images([a], replace(scored, reference=str(tmp_path / "none.npz")))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(EvaluationError, match="mu.*sigma"):
        score_images([a], replace(scored, reference=str(tmp_path / "text.npz")))


def test_sets_that_are_refused_once_are_refused_again(scored, tmp_path):
    """Also where a unit of them was kept before: one pass does not see all."""
    b, mixed = drawn(tmp_path / "b", 60, 1), drawn(tmp_path / "mixed", 32, 0)
    for i in range(32):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(mixed / f"1{i:03d}.png")
    bad = drawn(tmp_path / "bad", 120, 2)
    for i in (3, 60, 100):
        (bad / f"{i:04d}.png").write_bytes(b"")
    for source in (mixed, bad):
        for _ in range(3):
            with pytest.raises(StepdistillError, match="one size|at most 1%"):
                score_images([source], replace(scored, reference=str(b), output_dir=tmp_path / f"out-{source.name}"))


def test_a_unit_without_a_readable_image_has_no_scores(scored, tmp_path):
    a, model = drawn(tmp_path / "a", 100, 0), tiny.clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("cat")
    (a / "0000.png").write_bytes(b"")
    own = replace(scored, reference=str(drawn(tmp_path / "b", 50, 1)), clip=str(model), feature_batch=1)
    found = score_images([a], own, tmp_path / "prompts.txt")
    assert found["rows"][0]["n"] == 99 and "clip_score" in found["rows"][0]["metrics"]


def test_statistics_are_of_images_at_one_size(scored, tmp_path):
    a = drawn(tmp_path / "a", 60, 0)
    small = replace(scored, eval_res=8, output_dir=tmp_path / "work")
    write_statistics(a, small, tmp_path / "small.npz")
    assert not (tmp_path / "work").exists()
    with pytest.raises(EvaluationError, match="eval_res 8.*resized equally"):
        score_images([a], replace(scored, reference=str(tmp_path / "small.npz")))
    found = score_images([a], replace(scored, reference=str(tmp_path / "small.npz"), eval_res=8))
    assert found["rows"][0]["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(EvaluationError, match="ends in .npz"):
        write_statistics(a, small, tmp_path / "small")


def test_statistics_of_unknown_features_stay_so(scored, tmp_path):
    a = drawn(tmp_path / "a", 60, 0)
    np.savez(tmp_path / "theirs.npz", mu=np.full(198, 0.5), sigma=np.eye(198) / 100)
    found = score_images([a], replace(scored, reference=str(tmp_path / "theirs.npz"), metrics=("kid", "paired")))
    assert found["reference"]["features_id"] == "unknown"
    assert not (scored.output_dir / "stats" / "reference.npz").exists()
    assert [text.split(":")[0] for text in found["left_out"]] == ["kid", "paired"]


def test_clip_scores_are_of_their_prompts(scored, tmp_path):
    a, model = drawn(tmp_path / "a", 60, 0), tiny.clip(tmp_path / "clip")
    own = replace(scored, reference=str(a), clip=str(model))
    for name, text in (("one", "cat"), ("two", "dog"), ("many", "\n".join(map(str, range(61))))):
        (tmp_path / f"{name}.txt").write_text(text)
    found = score_images([a], own, tmp_path / "one.txt")
    assert found["rows"][0]["metrics"]["clip_score"]["model"].startswith(f"{model}@")
    with pytest.raises(EvaluationError, match="begun with other clip"):
        score_images([a], own, tmp_path / "two.txt")
    with pytest.raises(EvaluationError, match="61 prompts for 60 images"):
        score_images([a], own, tmp_path / "many.txt")
    state = load_file(model / "model.safetensors")
    save_file({key: value for key, value in state.items() if "vision" not in key}, model / "model.safetensors")
    clip.cache_clear()
    with pytest.raises(StepdistillError, match="random tensors in their place"):
        score_images([a], own, tmp_path / "one.txt")


def test_too_few_images_are_said_before_any_is_drawn(asked, scored, tmp_path):
    with pytest.raises(EvaluationError, match="20 images.*40 or more"):
        evaluate(replace(asked, num=20))
    with pytest.raises(EvaluationError, match="30 images.*40 or more"):
        score_images([drawn(tmp_path / "few", 30, 0)], replace(scored, reference=str(tmp_path / "few")))
    assert not asked.output_dir.exists()


def test_missing_weights_end_it_before_anything_is_drawn(asked, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "download_url_to_file", _unreachable)
    monkeypatch.delenv("STEPDISTILL_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(StudentPipeline, "of", _unreachable)
    with pytest.raises(MissingWeights, match="not found in any of"):
        evaluate(replace(asked, features="inception"))
    words = ["eval", "run", asked.teacher, "-o", str(asked.output_dir), "--features=inception", "--num-images=40"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--prompts-file", str(asked.prompts)])
    assert ended.value.code == 3 and "--inception-weights" in capsys.readouterr().err
    assert not asked.output_dir.exists()


def _unreachable(*args: object, **kwargs: object) -> None:
    raise OSError("Name or service not known")


def test_strict_fails_where_a_row_is_not_comparable(scored, tmp_path, capsys):
    a, b = drawn(tmp_path / "a", 60, 0), drawn(tmp_path / "b", 60, 1)
    words = ["eval", "score", str(a), "--ref", str(b), "--features=pixels", "-o", str(tmp_path / "out")]
    cli.main(words)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--strict"])
    assert ended.value.code == 4


def test_compare_keeps_unlike_rows_apart(scored, tmp_path, capsys):
    a, b = drawn(tmp_path / "a", 60, 0), drawn(tmp_path / "b", 60, 1)
    for name, features in (("one", "pixels"), ("two", "efficientnet-lite0")):
        score_images([a], replace(scored, reference=str(b), features=features, output_dir=tmp_path / name))
    page = tmp_path / "page.html"
    cli.main(
        [
            "eval",
            "compare",
            str(tmp_path / "one"),
            str(tmp_path / "two"),
            "-o",
            str(page),
            "--csv",
            str(tmp_path / "c.csv"),
        ]
    )
    assert "in separate columns, because the rows differ in" in capsys.readouterr().out
    assert "pixels@" in page.read_text() and "efficientnet-lite0@" in page.read_text()
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 3


def test_doctor_says_what_is_there(capsys):
    cli.main(["eval", "doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("efficientnet-lite0") and " ok " in line for line in lines)
    assert any(line.startswith("dinov2-l") and " missing " in line for line in lines)


def _measured(spec: EvalSpec, source: Path, place: Path) -> None:
    torch.set_num_threads(1)
    score_images([source], spec)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    place.write_text(peak.split()[1])
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read as Linux tells it")
def test_memory_does_not_grow_with_the_images(scored, tmp_path):
    """Ten times as many images, 220 MB of pixels and 7 MB of features in float64 more, and the peak stays."""
    peaks = []
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", mu=np.full(198, 0.5), sigma=np.cov(rng.normal(size=(400, 198)).T) / 50)
    for n in (500, 5000):
        source = np.lib.format.open_memmap(tmp_path / f"{n}.npy", mode="w+", dtype=np.uint8, shape=(n, 128, 128, 3))
        for i in range(n):
            source[i] = i % 251
        source.flush()
        spec = replace(scored, reference=str(tmp_path / "ref.npz"), output_dir=tmp_path / str(n), metrics=())
        process = multiprocessing.get_context("fork").Process(
            target=_measured, args=(spec, tmp_path / f"{n}.npy", tmp_path / f"{n}.txt")
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks.append(int((tmp_path / f"{n}.txt").read_text()) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks


def test_each_command_has_its_script():
    group = argparse.ArgumentParser().add_subparsers()
    command.add_eval_commands(group)
    (parts,) = (a for a in group.choices["eval"]._actions if isinstance(a, argparse._SubParsersAction))
    names = list(parts.choices)
    folder = Path(__file__).parent.parent / "eval"
    assert sorted(names) == ["compare", "doctor", "ref", "run", "score"]
    for name in names:
        assert f'main(["eval", "{name}", *sys.argv[1:]])' in (folder / f"{name}.py").read_text()
    done = subprocess.run([sys.executable, str(folder / "doctor.py")], capture_output=True, text=True)
    assert done.returncode == 0 and "efficientnet-lite0" in done.stdout


# parts


def test_a_store_says_what_is_missing(tmp_path):
    kept = Store(tmp_path / "s", n=10, unit=4, dim=3, kept=5)
    kept.open({"a": 1}, (3, 2, 2))
    assert kept.missing() == [0, 1, 2] and kept.missing(1, 2) == [1]
    made = torch.arange(30.0).reshape(10, 3)
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 2, 2)
    for k in (2, 0):
        rows = kept.rows(k)
        kept.put(k, images[rows.start : rows.stop], made[rows.start : rows.stop], {"skipped": []})
    with pytest.raises(EvaluationError, match="1 of 3 units missing"):
        kept.features()
    with pytest.raises(ValueError, match="expected \\(4, 3\\)"):
        kept.put(1, images[:3], made[:3], {"skipped": []})
    kept.put(1, images[4:8], made[4:8], {"skipped": [6]})
    assert kept.features().equal(made[[i for i in range(10) if i != 6]])
    assert kept.images(range(3, 5))[:, 0, 0, 0].tolist() == [3, 4]
    with pytest.raises(EvaluationError, match="other a, b"):
        kept.open({"a": 2, "b": 1})


def test_labels_are_as_short_as_they_can_be():
    assert labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert labels(["one/best", "two/best"]) == ["one/best", "two/best"]
    assert labels([]) == []


def test_a_plan_has_the_teacher_beside_its_students(asked):
    assert [way.name for way in sampling_plans(asked)] == [
        "reference",
        "teacher, 2 steps",
        "teacher, 1 step",
        "near, 1 step",
        "far, 1 step",
    ]
    own = sampling_plans(replace(asked, steps=(), reference="x.npz"))
    assert [way.name for way in own] == ["teacher, 2 steps", "teacher, 4 steps", "near, 4 steps", "far, 4 steps"]
    with pytest.raises(EvaluationError, match="each once"):
        sampling_plans(replace(asked, students=(asked.students[0],) * 2))


def test_cropping_is_pil_s_lanczos():
    image = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (
        Image.fromarray(image[0].permute(1, 2, 0).numpy())
        .crop((10, 0, 50, 40))
        .resize((16, 16), Image.Resampling.LANCZOS)
    )
    assert cropped(image, 16)[0].permute(1, 2, 0).numpy().tolist() == np.asarray(expected).tolist()
    assert cropped(image, None) is image
