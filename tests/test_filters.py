"""Safety checkers and watermarkers touch no figure; a set of one image many times is never a good result."""

from __future__ import annotations

import json
import logging
import math
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from images import noise
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from stepdistill.cli import main as cli
from stepdistill.core.errors import EvaluationError
from stepdistill.evaluation.measure import Reference, Sampled, measured
from stepdistill.evaluation.metrics.features import efficientnet_lite0
from stepdistill.evaluation.metrics.frechet import frechet, paired
from stepdistill.evaluation.metrics.kernel import cmmd, kid
from stepdistill.evaluation.metrics.neighbours import prdc
from stepdistill.evaluation.metrics.stats import FeatureStats, Stats, all_alike
from stepdistill.evaluation.metrics.straightness import Paths
from stepdistill.evaluation.run import evaluate, score_images, write_statistics
from stepdistill.evaluation.spec import EvalRun, EvalSpec
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import Lora
from stepdistill.students.draw import filters
from stepdistill.students.draw.call import generate, teacher_call
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.several import Students
from stepdistill.students.write import write_student

PROMPTS = ["red apple", "cat face", "rose", "octopus"]
SIDE = 16


@pytest.fixture(autouse=True)
def _unsaid():
    filters._say_unfiltered.cache_clear()


def checker(pipe):
    """Give a pipeline a checker that flags every image."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = tower | {"image_size": SIDE, "patch_size": SIDE}
    net = StableDiffusionSafetyChecker(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8))
    net.concept_embeds_weights.data.fill_(-2)  # a cosine is above it
    size = {"height": SIDE, "width": SIDE}
    pipe.register_modules(
        safety_checker=net, feature_extractor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    )
    return pipe


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> StableDiffusion:
    folder = tmp_path_factory.mktemp("teacher")
    checker(tiny.pipeline("sd")).save_pretrained(folder)
    return StableDiffusion(pretrained_teacher_model=str(folder))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> Path:
    pipe = teacher.load()
    bone = tiny.backbone("sd", pipe)
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.2)
    folder = tmp_path_factory.mktemp("student") / "student"
    method = Regression(num_inference_steps=1, ema_decay=None)
    given = {"role": "student", "resolution": (32, 32), "method": method}
    write_student(folder, family=teacher, pipe=pipe, backbone=bone, **given)
    return folder


def test_a_safety_checker_touches_no_figure_and_this_is_said_once(teacher, caplog):
    pipe = teacher.load()
    call = teacher_call(teacher, pipe, 2, 1.0, "teacher")
    assert not pipe(PROMPTS[:1], output_type="np", **call.arguments).images.any()  # as Diffusers has it, black
    config = dict(pipe.config)
    with caplog.at_level(logging.WARNING, "stepdistill"):
        seen = [generate(pipe, call, PROMPTS, 3)[0] for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("stepdistill")] == [
        "safety_checker of StableDiffusionPipeline is left out: samples and figures show what the networks generate"
    ]
    assert pipe.safety_checker is not None and dict(pipe.config) == config
    plain = tiny.pipeline("sd")
    want = generate(plain, teacher_call(teacher, plain, 2, 1.0, "teacher"), PROMPTS, 3)[0]
    assert want.float().std() > 5
    assert torch.equal(seen[0], want) and torch.equal(seen[1], want)


def test_a_watermark_is_in_no_figure(caplog):
    family = tiny.FAMILIES["sdxl"]
    pipe: Any = tiny.pipeline("sdxl")
    call = teacher_call(family, pipe, 1, 1.0, "teacher")
    pipe.watermark = None
    want = generate(pipe, call, PROMPTS[:1], 3)[0]
    pipe.watermark = types.SimpleNamespace(apply_watermark=torch.zeros_like)
    marked = pipe(PROMPTS[0], output_type="pt", **call.arguments).images
    assert marked.std() == 0 and want.float().std() > 5
    assert torch.equal(generate(pipe, call, PROMPTS[:1], 3)[0], want)
    assert pipe.watermark is not None and "watermark of StableDiffusionXLPipeline is left out" in caplog.text


def test_an_evaluation_of_a_teacher_with_a_checker_is_of_its_images(teacher, student, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked = EvalRun(
        teacher=teacher.pretrained_teacher_model,
        students=(str(student),),
        output_dir=tmp_path / "out",
        prompts=prompts,
        num=40,
        teacher_steps=2,
        teacher_guidance=1.0,
        batch=40,
        features="pixels",
        feature_batch=40,
    )
    rows = evaluate(asked)["rows"]
    assert rows[-1]["name"] == "student, 1 step"
    assert all(row["metrics"]["fd"]["value"] > 1 and not row["comparable_reasons"][1:] for row in rows)
    assert rows[-1]["metrics"]["paired"]["features"] > 0.1
    assert np.asarray(Image.open(next((tmp_path / "out" / "grids").glob("*.png")))).std() > 5


def flag_the_bright(monkeypatch, level: float) -> None:
    def forward(self, clip_input, images):
        flags = [bool(image.clamp(-1, 1).mean() / 2 + 0.5 > level) for image in images]
        return torch.stack([image * (not flag) for image, flag in zip(images, flags, strict=True)]), flags

    monkeypatch.setattr(StableDiffusionSafetyChecker, "forward", forward)


def test_generate_names_what_was_flagged(student, tmp_path, capsys, monkeypatch):
    flag_the_bright(monkeypatch, 2.0)  # none
    asked = ["generate", str(student), *PROMPTS, "--batch", "3", "-o"]
    cli.main([*asked, str(tmp_path / "plain")])
    assert "flagged" not in capsys.readouterr().out
    files = [f"{n:05d}.png" for n in range(len(PROMPTS))]
    bright = [np.asarray(Image.open(tmp_path / "plain" / file)).mean() / 255 for file in files]
    level = float(np.mean(sorted(bright)[1:3]))
    flagged = [file for file, mean in zip(files, bright, strict=True) if mean > level]
    flag_the_bright(monkeypatch, level)
    cli.main([*asked, str(tmp_path / "out")])
    said = f"2 of them were flagged by the base's safety checker and are black: {', '.join(flagged)}"
    assert said in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines if line.get("flagged")] == flagged
    assert [file for file in files if not np.asarray(Image.open(tmp_path / "out" / file)).any()] == flagged


def test_flags_follow_the_prompts_of_several_students(student, monkeypatch):
    """Student 0 draws the second and fourth prompt, and is called first."""
    single = StudentPipeline.load(student)
    plain = single.draw(PROMPTS, range(4), single.call(DrawOptions()).plus(output_type="np"))
    flag_the_bright(monkeypatch, 2.0)
    bright = [float(image.mean()) for image, _ in plain]
    flag_the_bright(monkeypatch, float(np.mean(sorted(bright)[1:3])))
    route = {0: [1, 3], 1: [0, 2]}

    def routed(prompts, **call):
        rows = {}
        for places in route.values():
            part = {name: [value[i] for i in places] for name, value in call.items() if name == "generator"}
            images = single.drawer([prompts[i] for i in places], **{**call, **part}).images
            rows |= dict(zip(places, images, strict=True))
        return [rows[i] for i in range(len(prompts))]

    class Several(Students):
        def __init__(self):
            pass

        def route(self, prompts):
            return route

        def __call__(self, prompts, **call):
            return routed(prompts, **call)

    several = replace(single, loaded=Several())
    drawn = list(several.draw(PROMPTS, range(4), single.call(DrawOptions()).plus(output_type="np")))
    assert [not image.any() for image, _ in drawn] == [flagged for _, flagged in drawn]
    assert sum(flagged for _, flagged in drawn) == 2


# sets of one image


def features(n: int, seed: int = 0, dim: int = 4) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + 3


ONE = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(40, 1)
ROUNDED = ONE * (1 + 1e-6 * (torch.arange(40) > 32)[:, None])  # the last batch is smaller, and rounds otherwise


@pytest.mark.parametrize("same", [ONE, ROUNDED, torch.zeros(40, 4)])
def test_two_sets_of_one_image_have_no_distance(same):
    streamed = FeatureStats(4)
    streamed.update(same)
    for scored in (
        lambda: frechet(Stats.of(same), Stats.of(same)),
        lambda: frechet(streamed.stats(), Stats.of(same)),
        lambda: kid(same, same, 1, 20),
        lambda: cmmd(same, same),
        lambda: paired(same, same),
    ):
        with pytest.raises(ValueError, match="two sets of .* equal rows"):
            scored()
    real = features(40)
    assert math.isnan(prdc(same, same).precision) and math.isnan(prdc(same, same).density)
    assert prdc(same, same).recall == prdc(same, same).coverage == 0
    assert math.isnan(prdc(real, real[:1].repeat(40, 1)).precision)  # a single image inside the manifold
    assert frechet(Stats.of(same), Stats.of(real)) > 1 and kid(same, real, 1, 20).value > 1  # bad, and so measured


def test_sets_that_hardly_vary_are_still_measured():
    x = ONE * (1 + 1e-4 * (torch.arange(40) == 7)[:, None])
    assert frechet(Stats.of(x), Stats.of(x)) == pytest.approx(0, abs=1e-8) == kid(x, x, 1, 20).value


def reference(x: torch.Tensor, known: bool = True) -> Reference:
    return Reference(stats=Stats.of(x), features=x if known else None, paired=False, facts={"path": "coco"})


@pytest.mark.parametrize("known", [True, False])
def test_a_reference_of_one_image_is_refused(known):
    with pytest.raises(EvaluationError, match="got reference coco, whose images are all alike"):
        reference(ONE, known)


def test_a_teacher_of_one_image_is_refused_and_a_student_of_one_is_no_good():
    rows = [Sampled(name=name, role=name, features=features(60, n)) for n, name in enumerate(("teacher", "student"))]
    metrics = ("kid", "paired", "prdc", "vendi", "diversity")
    index = torch.arange(60) % 20
    with pytest.raises(EvaluationError, match="got teacher .teacher., whose images are all alike"):
        measured([replace(rows[0], features=ONE), replace(rows[1], features=ONE)], reference(features(60)), "fd")
    black = replace(rows[1], features=torch.zeros(60, 4), reasons=["too few"])
    good, bad = measured([rows[0], black], reference(features(60, 5)), "fd", metrics, index)
    assert good["comparable"] is True and good["metrics"]["prdc"]["precision"] > 0.5
    assert bad["comparable_reasons"] == ["too few", "all 60 images are alike"] and not bad["comparable"]
    assert bad["metrics"]["prdc"] == {"precision": None, "recall": 0, "density": None, "coverage": 0, "k": 5}
    assert bad["metrics"]["vendi"] == 1 and bad["metrics"]["diversity_vs_teacher"]["value"] == 0
    assert bad["metrics"]["fd"]["value"] > 9 and bad["metrics"]["delta_vs_teacher"]["fd"]["value"] > 9
    alike = features(20, 8).repeat(3, 1)  # of each prompt one image
    _, row = measured([replace(rows[0], features=alike), rows[1]], reference(features(60)), "fd", metrics, index)
    told = row["metrics"]["diversity_vs_teacher"]
    assert told["value"] is None and told["ci95"] == [None, None]


def folder(place: Path, images: list[Image.Image]) -> Path:
    place.mkdir()
    for i, image in enumerate(images):
        image.save(place / f"{i:02d}.png")
    return place


def test_commands_never_score_black_images(tmp_path):
    black = folder(tmp_path / "black", [Image.new("RGB", (16, 16))] * 45)
    other = folder(tmp_path / "other", [noise(16, 16, seed) for seed in range(45)])
    spec = EvalSpec(output_dir=tmp_path / "out", features="pixels", reference=str(black), feature_batch=16)
    with pytest.raises(EvaluationError, match="black, whose images are all alike"):
        score_images([black], spec)
    with pytest.raises(EvaluationError, match="black, whose images are all alike"):
        write_statistics(black, replace(spec, output_dir=tmp_path / "work"), tmp_path / "black.npz")
    assert not (tmp_path / "black.npz").exists()
    (row,) = score_images([black], replace(spec, output_dir=tmp_path / "bad", reference=str(other)))["rows"]
    assert row["comparable_reasons"][-1] == "all 45 images are alike" and row["metrics"]["fd"]["value"] > 1
    assert "all 45 images are alike" in (tmp_path / "bad" / "rows.csv").read_text()


def test_equal_images_have_features_that_are_alike():
    """65 images: the second batch has one, and its rounding is another."""
    extractor, image = efficientnet_lite0(), torch.from_numpy(np.array(noise(32, 32))).permute(2, 0, 1)
    images = image.repeat(65, 1, 1, 1)
    assert all_alike(extractor(images)) and Stats.of(extractor(images)).is_point
    images[3, 0, 0, 0] += 1  # one grey level of one value
    assert not all_alike(extractor(images))


def test_a_student_that_moves_nothing_has_no_straightness():
    assert math.isnan(Paths(torch.ones(4), torch.zeros(4), 0.0).relative)
