"""`stepdistill eval run` of one-step decoders: rows, tokens, likelihoods and costs, resuming, and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import PROMPTS, small_janus, untrained_student
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from stepdistill.cli import main as cli
from stepdistill.core.errors import StepdistillError
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of
from stepdistill.decoding.evaluation import draws_decoders, evaluate_decoders, is_janus
from stepdistill.decoding.janus import Janus, TokenTeacher
from stepdistill.decoding.rows import TokenDrawer
from stepdistill.evaluation.draw import fingerprint
from stepdistill.evaluation.metrics.jackknife import difference_of_means, mean_interval
from stepdistill.evaluation.spec import SEED_A, SEED_B, EvalRun
from stepdistill.students.contract import CONTRACT

N = 40  # images


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return small_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def student(janus, tmp_path_factory) -> Path:
    return untrained_student(janus, tmp_path_factory.mktemp("students") / "near")


@pytest.fixture(scope="module")
def asked(janus, student, tmp_path_factory) -> EvalRun:
    folder = tmp_path_factory.mktemp("asked")
    records = [{"prompt": prompt, "tag": "single_object", "include": []} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return EvalRun(
        teacher=str(janus),
        students=(str(student),),
        output_dir=folder / "out",
        prompts=folder / "prompts.jsonl",
        num=N,
        batch=20,
        features="pixels",
        feature_batch=20,
        metrics=("paired", "pixels"),
        save_images=True,
        export="geneval",
    )


@pytest.fixture(scope="module")
def found(asked) -> dict[str, Any]:
    """One command."""
    words = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in ("batch", "features", "feature_batch")]
    words += [f"--num-images={N}", "--metrics=paired,pixels", "--save-images", "--export=geneval", "--latency=1"]
    given = [asked.teacher, *asked.students, "-o", str(asked.output_dir), "--prompts-file", str(asked.prompts)]
    cli.main(["eval", "run", *given, *words])
    return json.loads((asked.output_dir / "eval.json").read_text())


@pytest.fixture(scope="module")
def teacher(janus) -> TokenTeacher:
    return Janus(pretrained_teacher_model=str(janus), guidance_scale=3.0).load()


def prompts(numbers: range = range(N)) -> list[str]:
    return [PROMPTS[i % len(PROMPTS)] for i in numbers]


def noise(teacher: TokenTeacher, seed: int) -> Tensor:
    return torch.stack([noise_of(seed, i, teacher.shape) for i in range(N)])


def saved(folder: Path, row: str) -> Tensor:
    files = [folder / "images" / row / f"{i:06d}.png" for i in range(N)]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)


def samples(folder: Path, row: str, score: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "per_sample.jsonl").read_text().splitlines()]
    return [line[score] for line in lines if line["row"] == row]


def test_the_rows_are_the_teacher_and_every_trained_number_of_calls(asked, found):
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["teacher, 64 steps", "near, 3 steps", "near, 2 steps", "near, 1 step"]
    costs = {name: (row["cost"]["calls"], row["cost"]["nfe"], row["guidance"]) for name, row in rows.items()}
    assert costs["teacher, 64 steps"] == (64, 128, 3.0)  # two rows a call with guidance
    assert [costs[f"near, {n} step{'s' * (n > 1)}"] for n in (1, 2, 3)] == [(n, n, 1.0) for n in (1, 2, 3)]
    assert all(row["cost"]["latency_ms"]["p50"] > 0 for row in rows.values())
    taught = found["teacher"]
    assert (taught["steps"], taught["guidance"], taught["temperature"], taught["top_k"]) == (64, 3.0, 1.0, None)
    assert taught["sha256"] == json.loads((Path(asked.students[0]) / CONTRACT).read_text())["base_hash"]
    out = asked.output_dir
    columns = list(csv.DictReader((out / "rows.csv").open()))
    for row, line in zip(found["rows"], columns, strict=True):
        assert float(line["log_likelihood"]) == row["metrics"]["log_likelihood"]["value"]
    page = (out / "report.html").read_text()
    assert "Log-likelihood per token" in page and "temperature 1.0" in page
    assert [file.name for file in (out / "grids").iterdir()] == ["near.png"]
    assert len(list((out / "geneval" / "near_1-step").glob("*/samples/*.png"))) == N


def test_images_are_those_of_the_noise_of_their_number(asked, found, teacher):
    """The teacher's by its own loop, the students' by the pipeline that a user opens, the reference of another seed."""
    pipe: Any = DiffusionPipeline.from_pretrained(asked.students[0], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    halves = range(20), range(20, N)  # as they were drawn
    eps = noise(teacher, SEED_B)
    for steps, row in ((3, "near_3-steps"), (1, "near_1-step")):
        given: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
        drawn = [pipe(prompts(part), noise=eps[part.start : part.stop], **given).images for part in halves]
        assert torch.equal(saved(asked.output_dir, row), to_uint8(torch.cat(drawn)))
    tokens = [teacher.draw(prompts(part), eps[part.start : part.stop]) for part in halves]
    pixels = [(teacher.pixels(teacher.codes[part]) / 2 + 0.5).clamp(0, 1) for part in tokens]
    assert torch.equal(saved(asked.output_dir, "teacher_64-steps"), to_uint8(torch.cat(pixels)))
    kept = np.load(asked.output_dir / "work" / "reference" / "images.npy")
    other = teacher.draw(prompts(range(2)), noise(teacher, SEED_A)[:2])
    expected = to_uint8((teacher.pixels(teacher.codes[other]) / 2 + 0.5).clamp(0, 1))
    assert np.abs(kept[:2].astype(int) - expected.numpy()).max() <= 1  # a batch of another size


def test_the_likelihood_is_that_of_each_image_under_the_teacher(asked, found, teacher):
    pipe: Any = DiffusionPipeline.from_pretrained(asked.students[0], trust_remote_code=True)
    eps, values = noise(teacher, SEED_B), {}
    for name, tokens in (
        ("teacher, 64 steps", teacher.draw(prompts(), eps)),
        ("near, 2 steps", pipe(prompts(), noise=eps, num_inference_steps=2, output_type="tokens").images),
    ):
        p = teacher.logits(prompts(), tokens).double().softmax(-1)
        values[name] = p.gather(2, tokens[..., None])[..., 0].log().mean(1)
        assert samples(asked.output_dir, name, "log_likelihood") == pytest.approx(values[name].tolist(), rel=1e-4)
    rows = {row["name"]: row["metrics"] for row in found["rows"]}
    own, few = values.values()
    assert own.mean() > few.mean() + 1
    for told, expected in (
        (rows["teacher, 64 steps"]["log_likelihood"], mean_interval(own)),
        (rows["near, 2 steps"]["log_likelihood"], mean_interval(few)),
        (rows["near, 2 steps"]["delta_vs_teacher"]["log_likelihood"], difference_of_means(few, own)),
    ):
        assert [told["value"], *told["ci95"]] == pytest.approx([expected.value, expected.low, expected.high], rel=1e-4)
    assert "log_likelihood" not in rows["teacher, 64 steps"].get("delta_vs_teacher", {})


def copied(asked: EvalRun, place: Path) -> EvalRun:
    shutil.copytree(asked.output_dir, place)
    return replace(asked, output_dir=place)


def test_a_run_that_is_cut_goes_on_to_the_same(asked, found, tmp_path, monkeypatch):
    spec, drawn, real = copied(asked, tmp_path / "out"), [], TokenDrawer._generate
    for unit in ("near_1-step/unit-00001", "near_3-steps/unit-00000"):
        (spec.output_dir / "work" / f"{unit}.json").unlink()

    def draws(self, network, draw, seed, texts, batch, numbers):
        drawn.append((len(drawn), tuple(numbers)))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return real(self, network, draw, seed, texts, batch, numbers)

    monkeypatch.setattr(TokenDrawer, "_generate", draws)
    with pytest.raises(KeyboardInterrupt):
        evaluate_decoders(spec)
    again = evaluate_decoders(spec)
    assert [numbers for _, numbers in drawn] == [tuple(range(20)), tuple(range(20, N)), tuple(range(20, N))]
    for one, two in zip(found["rows"], again["rows"], strict=True):
        assert one["metrics"] == two["metrics"]
    for row in ("near_1-step", "near_3-steps"):
        assert torch.equal(saved(asked.output_dir, row), saved(spec.output_dir, row))


def test_a_teacher_alone_is_drawn_by_its_defaults(asked, janus, tmp_path):
    alone = replace(asked, students=(), output_dir=tmp_path / "out", export=None, metrics=(), batch=40)
    assert draws_decoders(alone) and draws_decoders(asked)
    found = evaluate_decoders(alone)
    assert [row["name"] for row in found["rows"]] == ["teacher, 64 steps"] and found["teacher"]["guidance"] == 5.0
    assert (tmp_path / "out" / "grids" / "teacher.png").exists()


def test_likelihood_counts_tokens_outside_of_the_top_k(asked, janus, tmp_path):
    """A student may write tokens that its teacher never draws: they have the probability that the logits give them."""
    place = untrained_student(janus, tmp_path / "cut", top_k=2)
    spec = replace(asked, students=(str(place),), output_dir=tmp_path / "out", steps=(1, 4), metrics=(), export=None)
    found = evaluate_decoders(replace(spec, batch=40, feature_batch=40))
    assert [row["name"] for row in found["rows"]] == ["teacher, 64 steps", "cut, 1 step"]
    assert found["left_out"][0].startswith("cut, 4 steps: got 4 calls, expected 1 to 3")
    cut = Janus(pretrained_teacher_model=str(janus), guidance_scale=3.0, top_k=2).load()
    tokens = cut.draw(prompts(), noise(cut, SEED_B))
    whole = torch.log_softmax(cut.logits(prompts(), tokens), -1).gather(2, tokens[..., None])[..., 0].mean(1)
    told = samples(spec.output_dir, "teacher, 64 steps", "log_likelihood")
    assert told == pytest.approx(whole.tolist(), rel=1e-4)
    values = samples(spec.output_dir, "cut, 1 step", "log_likelihood")
    assert np.isfinite(values).all() and found["teacher"]["top_k"] == 2


def unreachable(*args: object, **kwargs: object) -> None:
    raise AssertionError("it was loaded")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": (2.0,)}, "got --guidance-scale for an autoregressive image model, expected none"),
        ({"teacher_steps": 50}, "--teacher-steps"),
        ({"teacher_guidance": 7.5}, "--teacher-guidance-scale"),
        ({"steps": (1,), "students": ()}, "--steps"),
        ({"lora": ("ink.safetensors", 1.0)}, "--lora"),
        ({"family": "sd"}, "--family"),
        ({"features": "vae"}, "--features vae"),
        ({"dtype": "bf16"}, "--dtype bf16"),
        ({"export": "vbench"}, "export vbench of images"),
        ({"prompts": None}, "no prompts"),
        ({"teacher": "nowhere"}, "'nowhere', which does not exist"),
        ({"students": ("near", "near/.")}, "each once"),
    ],
)
def test_what_has_no_effect_is_refused_before_anything_is_loaded(asked, student, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(student.parent)
    monkeypatch.setattr("stepdistill.decoding.janus.JanusForConditionalGeneration.from_pretrained", unreachable)
    with pytest.raises(StepdistillError, match=words) as caught:
        evaluate_decoders(replace(asked, output_dir=tmp_path / "out", **{"export": None, **change}))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_refused_command_leaves_the_earlier_evaluation(asked, found, capsys):
    before = sorted(asked.output_dir.rglob("*"))
    given = [asked.teacher, *asked.students, "-o", str(asked.output_dir), "--prompts-file", str(asked.prompts)]
    with pytest.raises(SystemExit):
        cli.main(["eval", "run", *given, f"--num-images={N}", "--guidance-scale=2", "--overwrite"])
    assert "--guidance-scale" in capsys.readouterr().err
    assert found and sorted(asked.output_dir.rglob("*")) == before


def test_students_that_one_teacher_cannot_be_the_reference_of(asked, janus, student, tmp_path):
    other = untrained_student(janus, tmp_path / "other", guidance_scale=2.0, temperature=1.5)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / CONTRACT).write_text('{"kind": "lora"}')
    fresh = replace(asked, output_dir=tmp_path / "out")
    with pytest.raises(StepdistillError, match="near with guidance_scale 3.0, sha256 .*, temperature 1.0; .*other"):
        evaluate_decoders(replace(fresh, students=(*asked.students, str(other))))
    with pytest.raises(StepdistillError, match="decoders .*near.* and students of pipelines .*pipeline.*one kind"):
        draws_decoders(replace(fresh, students=(*asked.students, str(pipeline))))
    assert not draws_decoders(replace(fresh, students=(str(pipeline),)))
    fields = json.loads((student / CONTRACT).read_text())
    shutil.copytree(student, tmp_path / "moved")
    (tmp_path / "moved" / CONTRACT).write_text(json.dumps(fields | {"base_hash": "0" * 64}))
    with pytest.raises(StepdistillError, match="the teacher .*, whose hash is .*, expected 000000000000"):
        evaluate_decoders(replace(fresh, students=(str(tmp_path / "moved"),)))
    with pytest.raises(StepdistillError, match="students of teachers that differ: .*moved with sha256 000000000000"):
        evaluate_decoders(replace(fresh, students=(str(student), str(tmp_path / "moved"))))
    (tmp_path / "long.txt").write_text("\n".join(["rose", "red apple " * 150]))
    with pytest.raises(StepdistillError, match="a prompt of .* tokens, 'red apple red .*at most 256"):
        evaluate_decoders(replace(fresh, students=(), prompts=tmp_path / "long.txt", export=None))
    assert not list(tmp_path.glob("out/work/*"))


@pytest.mark.parametrize("part", ["heads", "language_model", "vqmodel"])
def test_a_student_is_known_by_all_of_its_weights(student, tmp_path, part):
    """A folder that another training wrote in its place is not taken for it."""
    before = fingerprint(str(student))
    shutil.copytree(student, tmp_path / "again")
    assert fingerprint(str(tmp_path / "again")) == before
    (weights,) = (tmp_path / "again" / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert fingerprint(str(tmp_path / "again")) != before


def test_a_janus_is_known_by_its_config(janus, tmp_path, monkeypatch):
    assert is_janus(str(janus)) and not is_janus("tiny-sd") and not is_janus(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_janus(str(tmp_path)) and not is_janus(str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda name: ({"model_type": "janus"}, {}))
    assert is_janus("deepseek-community/Janus-Pro-1B") and not is_janus("no id")
