"""A decoder's folder is opened whole or not at all, and by no code of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPTS, small_janus, untrained_student
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from stepdistill.core.errors import StudentError
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.load import load_decoder
from stepdistill.students import load
from stepdistill.students.contract import read_contract

HEADS = "heads/diffusion_pytorch_model.safetensors"
NETWORK = "language_model/model.safetensors"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("decoder")
    return untrained_student(small_janus(place / "janus"), place / "student")


@pytest.fixture
def broken(student, tmp_path) -> Path:
    shutil.copytree(student, tmp_path / "broken")
    return tmp_path / "broken"


def edited(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewritten(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def tokens(pipe: Any, calls: int) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(3)
    return pipe(PROMPTS, num_inference_steps=calls, generator=seeded, output_type="tokens").images


def test_the_loaded_student_is_that_of_plain_diffusers_bit_for_bit(student):
    (pipe, contract), drawn = load_decoder(student), []
    assert contract == read_decoder(student)
    plain = DiffusionPipeline.from_pretrained(student, trust_remote_code=True)
    assert type(plain) is not type(pipe) and type(plain).__name__ == type(pipe).__name__
    for calls in (1, 2, 3):
        drawn.append(tokens(pipe, calls))
        assert torch.equal(drawn[-1], tokens(plain, calls))
    assert all((drawn[k] != drawn[k + 1]).any() for k in range(2)) and len(drawn[0].unique()) > 4


def test_no_code_of_the_folder_runs(broken):
    """Neither its two files, nor any that the configs of its parts name."""
    student = tokens(load_decoder(broken)[0], 3)
    code = "raise SystemExit('the code ran')"
    for place in ("pipeline.py", "heads/heads.py", "processor/mine.py", "language_model/mine.py", "vqmodel/mine.py"):
        (broken / place).write_text(code)
    mine = {"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"}
    for part in ("language_model", "vqmodel"):
        edited(broken / part / "config.json", auto_map=mine, attn_implementation="someone/kernels")
    edited(broken / "processor" / "processor_config.json", auto_map={"AutoProcessor": "mine.Mine"})
    edited(broken / "processor" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    assert torch.equal(tokens(load_decoder(broken)[0], 3), student)


def test_a_hub_id_is_fetched_whole_and_without_code(student, tmp_path, monkeypatch):
    """The patterns, as huggingface_hub reads them, take every file that is loaded, and no other large one."""
    from huggingface_hub.utils import filter_repo_objects

    names = [str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()]
    names += ["checkpoint-4/ema_heads.safetensors", "samples/00000.png"]

    def fetched(place: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        taken = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert not [name for name in taken if name.endswith(".py") or name.startswith(("checkpoint", "samples"))]
        for name in taken:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(student / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(load, "snapshot_download", fetched)
    assert torch.equal(tokens(load_decoder("someone/decoder")[0], 2), tokens(load_decoder(student)[0], 2))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda at: rewritten(at / HEADS, lambda t: t.pop("value.bias")), "heads has 1 missing tensors, such as value"),
        (lambda at: rewritten(at / NETWORK, lambda t: t.pop("norm.weight")), "1 missing tensors, such as norm.weight"),
        (lambda at: rewritten(at / NETWORK, lambda t: t.update(more=torch.ones(1))), "1 unexpected tensors, such as m"),
        (lambda at: rewritten(at / HEADS, lambda t: t.update({"value.bias": torch.ones(3)})), "value.bias"),
        (lambda at: rewritten(at / NETWORK, lambda t: t.update({"norm.weight": torch.ones(3)})), "mismatch"),
        (lambda at: (at / "vqmodel/model.safetensors").write_bytes(b"cut"), "header too small"),
        (lambda at: (at / HEADS).unlink(), "no file named diffusion_pytorch_model.safetensors"),
        (lambda at: (at / "model_index.json").unlink(), "No such file"),
        (lambda at: (at / "model_index.json").write_text("[]"), "list indices"),
        (lambda at: edited(at / "model_index.json", keeps=[0, 5]), r"keeps \(0, 5\) in .*, expected \(0, 21, 42\)"),
        (lambda at: edited(at / "model_index.json", split=9), "split 9 in .*, expected None"),
        (
            lambda at: edited(at / "model_index.json", max_sequence_length=9),
            "max_sequence_length 9 in .*, expected 256",
        ),
        (
            lambda at: edited(at / "distill_config.json", codes=33),
            r"codes of the heads \(32, 4\) in .*expected \(33, 4\)",
        ),
        (lambda at: edited(at / "distill_config.json", tokens=60), r"noise of the shape \(64, 4\) in"),
        (
            lambda at: edited(at / "distill_config.json", kind="lora"),
            "of kind 'lora', expected a",
        ),
        (lambda at: (at / "distill_config.json").unlink(), "no readable"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_clear_line(broken, break_it, message):
    break_it(broken)
    with pytest.raises(StudentError, match=message) as caught:
        load_decoder(broken)
    assert "\n" not in str(caught.value)


def test_it_is_no_student_of_a_pipeline(student):
    with pytest.raises(StudentError, match="a student of an autoregressive image model, expected a student of a diff"):
        read_contract(student)
