"""`generate` and `verify` of a decoder's folder, and what other commands say of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import PROMPTS, small_janus, untrained_student
from PIL import Image
from test_generate import QUIET, folder_of
from tiny import pipeline

from stepdistill.cli import main as cli
from stepdistill.core.errors import StudentError
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.load import load_decoder
from stepdistill.decoding.with_teacher import contract_teacher, draw_with_teacher
from stepdistill.students.load import load_student

A_DECODER = "a student of an autoregressive image model, expected a student of a diffusion pipeline"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("decoder")
    return untrained_student(small_janus(place / "janus"), place / "student")


def generate(*words: object) -> None:
    cli.main(["generate", *map(str, words)])


def refused(capsys, *words: object) -> str:
    """The one line that a command writes, before anything is loaded."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, words)])
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(said) == 1
    return said[0]


def drawn(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def rounded(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are equal but for grey levels at the edge of rounding: kernels differ with the batch."""
    off = np.abs(one.astype(int) - other)
    return off.max() <= 1 and (off != 0).mean() < 1e-3


def from_seeds(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def test_it_draws_what_the_code_of_the_card_draws(student, tmp_path, capsys):
    """As pasted, but for its prompt and seed; image n is that of seed SEED + n, for any batch."""
    card = (student / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    for old, new in (("red apple", PROMPTS[1]), ("manual_seed(0)", "manual_seed(7)")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    repeated = ["--num-images-per-prompt", 2, "--seed", 5]
    generate(student, *PROMPTS, *repeated, "-o", tmp_path / "many", "--grid", tmp_path / "sheet.png")
    assert "6 images, 6 calls of the student, " in capsys.readouterr().out
    images = drawn(tmp_path / "many")
    alone = np.asarray(Image.open(tmp_path / "image.png"))
    assert len(images) == 6 and rounded(images[2], alone) and not rounded(images[3], alone)
    assert len({image.tobytes() for image in images}) == 6
    lines = [json.loads(line) for line in (tmp_path / "many" / "images.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [*range(5, 11)]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert Image.open(tmp_path / "sheet.png").width > 3 * 32
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    given = [PROMPTS[0], "--prompts-file", tmp_path / "prompts.txt", *repeated, "--batch", 1]
    generate(student, *given, "--dtype", "float32", "-o", tmp_path / "single")
    assert rounded(np.stack(images), np.stack(drawn(tmp_path / "single")))


def test_other_numbers_of_calls_and_the_teacher_are_those_of_the_functions(student, tmp_path, capsys):
    (pipe, contract), noise = load_decoder(student), from_seeds(0, 1, 2)
    call: Any = pipe
    generate(student, *PROMPTS, "--steps", 1, "-o", tmp_path / "one")
    expected = call(PROMPTS, noise=noise, num_inference_steps=1, output_type="np").images
    assert (np.stack(drawn(tmp_path / "one")) == (expected * 255).round()).all()
    options = ["--steps", 2, "--teacher-steps", 5, "--base", contract.base_model, "--batch", 2]
    generate(student, *PROMPTS, *options, "-o", tmp_path / "two")
    assert "3 images, 4 calls of the student, 10 calls of the teacher" in capsys.readouterr().out
    tokens, values = draw_with_teacher(pipe, contract_teacher(contract), PROMPTS, noise, 5, 2)
    assert (np.stack(drawn(tmp_path / "two")) == (pipe.images(tokens, values, "np") * 255).round()).all()
    assert '"teacher_steps": 5' in (tmp_path / "two" / "images.jsonl").read_text()
    said = refused(capsys, "generate", student, "rose", "-o", tmp_path / "two")
    assert "which exists" in said and len(drawn(tmp_path / "two")) == 3
    generate(student, "rose", "-o", tmp_path / "two", "--overwrite")
    assert len(drawn(tmp_path / "two")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance-scale", 1], "--guidance-scale, expected no option of sampling but --steps and --teacher-steps"),
        (["--eta", 0], "--eta"),
        (["--base-steps", 0], "--base-steps"),
        (["--negative-prompt", ""], "--negative-prompt"),
        (["--negative-mode", "nag"], "--negative-mode"),
        (["--height", 32], "--height"),
        (["--timesteps", "9,1"], "--timesteps"),
        (["--sigmas", "9,1"], "--sigmas"),
        (["--strength", 1], "--strength"),
        (["--fuse"], "--fuse"),
        (["--lora", "style"], "--lora"),
        (["--controlnet", "edges"], "--controlnet"),
        (["--image", "cat.png"], "--image"),
        (["--video", "other"], "--video"),
        (["--windows", 2], "--windows"),
        (["--format", "gif"], "--format"),
        (["--frame-rate", 8], "--frame-rate"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 for a decoder, expected float32"),
        (["--steps", 4], "--steps 4, expected at most 3"),
        (["--teacher-steps", 22], "--teacher-steps 22 with --steps 3, expected at most 21"),
        (["--teacher-steps", 1, "--steps", 1], "--teacher-steps 1 with --steps 1, expected at most 0"),
        (["--base", "other"], "--base without --teacher-steps"),
        (["--device", "nowhere"], "device nowhere"),
    ],
)
def test_an_option_without_an_effect_is_one_line(student, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("stepdistill.cli.generate_decoder.load_decoder", None)  # nothing is loaded before
    assert message in refused(capsys, "generate", student, "rose", "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_and_another_teacher_are_one_line(student, tmp_path, capfd):
    def ended(*words: object) -> str:
        with pytest.raises(SystemExit):
            generate(student, *words, "-o", tmp_path / "out")
        return capfd.readouterr().err.strip().splitlines()[-1]

    assert "a prompt of 1034 tokens" in ended("rose", "apple " * 258)
    contract = json.loads((student / "distill_config.json").read_text())
    shutil.copytree(student, tmp_path / "changed")
    contract["base_hash"] = "0" * 64
    (tmp_path / "changed" / "distill_config.json").write_text(json.dumps(contract))
    with pytest.raises(SystemExit):
        generate(tmp_path / "changed", "rose", "--teacher-steps", 1, "-o", tmp_path / "out")
    assert "expected 000000000000, as in the contract" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_compares_plain_diffusers_with_the_library(student, tmp_path, capsys):
    cli.main(["verify", str(student)])
    said = capsys.readouterr().out
    assert said.count("100.00%") == 3 and "2 calls: 100.00%" in said and "from 0 to 1: 0\n" in said


@pytest.mark.slow
def test_verify_fails_for_other_code_or_settings(student, tmp_path, capsys):
    def verified(old: str, new: str, file: str) -> str:
        place = tmp_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(student, place)
        text = (place / file).read_text()
        assert text.count(old) == 1
        (place / file).write_text(text.replace(old, new))
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", str(place)])
        heard = capsys.readouterr()
        return f"{ended.value.code} {heard.out}{heard.err.strip().splitlines()[-1] if ended.value.code == 2 else ''}"

    other = verified(") < keep", ") <= keep", "heads/heads.py")
    assert other.startswith("1 ") and "2 calls: 100.00%" not in other
    darker = verified("output_type=output_type)\n", 'output_type="pt") * 0.5\n', "pipeline.py")
    assert darker.startswith("1 ") and darker.count("100.00%") == 3
    failing = verified("        text, mask = self.read(repeated)", "        raise OSError('mine')", "pipeline.py")
    assert failing.startswith("2 ") and "whose code fails, expected a pipeline that draws: OSError: mine" in failing
    wider = verified('"keeps": [', '"keeps": [\n    0,', "model_index.json")
    assert wider.startswith("2 ") and "keeps (0, 0, 21, 42)" in wider


def test_other_commands_say_what_it_is(student, tmp_path, capsys):
    out = tmp_path / "out"
    todo = f"use `stepdistill generate {student} PROMPT`"
    for words in (
        ("view", student, "rose", "-o", f"{out}.png"),
        ("convert", student, f"{out}.safetensors", "--to", "kohya"),
        ("convert", student, out, "--to", "fused"),
        ("multi", out, student, student),
    ):
        said = refused(capsys, *words)
        assert A_DECODER in said and todo in said
    config = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    for setting in ("start_from", "lora.init_from"):
        words = ("train", config, f"{setting}={student}", f"train.output_dir={out}", "--dry-run")
        assert A_DECODER in refused(capsys, *words)
    with pytest.raises(StudentError, match=A_DECODER):
        load_student(pipeline("sd"), student)
    images = folder_of("sd", tmp_path / "sd", QUIET)
    assert A_DECODER in refused(capsys, "generate", images, "rose", "--video", student, "-o", out)
    assert "expected a student of an autoregressive" in refused(capsys, "generate", images, "a", "--teacher-steps", 0)
    assert not list(tmp_path.glob("out*")) and read_decoder(student).kind == "decoder"
