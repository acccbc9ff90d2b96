"""Prompts and latents: what a file holds is what a run gets, and what cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepdistill.core.errors import DataError
from stepdistill.core.random import sample_rng
from stepdistill.data import Latents, Prompts, check_source

# prompts


def test_prompts_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\r\n  a d\u00f6g \n".encode())
    (tmp_path / "p.csv").write_text('id,text\n1,"a cat, sitting"\n2,\n3,a dog\n')
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n\n{"text": ["a dog", "a hound"]}\n')
    read = {
        name: [list(source.captions(i)) for i in range(len(source))]
        for name in ("p.txt", "p.csv", "p.jsonl")
        for source in [Prompts(prompts_file=str(tmp_path / name))]
    }
    assert read == {
        "p.txt": [["a cat"], ["a d\u00f6g"]],
        "p.csv": [["a cat, sitting"], ["a dog"]],
        "p.jsonl": [["a cat"], ["a dog", "a hound"]],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "no prompt in"),
        ("p.txt", None, "No such file"),
        ("p.txt", b"a caf\xe9", "byte 0xe9 at offset 5"),
        ("p.csv", "id,caption\n1,x\n", r"columns \['id', 'caption'\], expected the columns \['text'\]"),
        ("p.csv", "text\na cat, sitting\n", "line 2 with more cells"),
        ("p.jsonl", '{"text": "a"}\n{"text"\n', "line 2"),
        ("p.jsonl", '"a"\n', "one JSON object"),
        ("p.pdf", "x", "a .txt, .csv or .jsonl file"),
    ],
)
def test_prompt_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        len(Prompts(prompts_file=str(tmp_path / name)))


def test_one_list_of_prompts() -> None:
    for source in (Prompts(), Prompts(prompts_file="x.txt", prompts=("a",))):
        with pytest.raises(DataError, match="one of the two"):
            len(source)


# latents


def test_latents_are_read_as_written(tmp_path: Path) -> None:
    latents = torch.randn(3, 4, 2, 2)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    (tmp_path / "prompts.txt").write_text("a\n\nc\n")
    source = Latents(folder=str(tmp_path))
    samples = [source.sample(i, sample_rng(0, i)) for i in range(len(source))]
    assert [s.prompt for s in samples] == ["a", "", "c"]
    assert all(torch.equal(s.latents, latents[s.item]) for s in samples if s.latents is not None)
    assert "shapes (C x h x w): 4x2x2: 3" in check_source(source)
    (tmp_path / "captions.json").write_text('["x", ["y", "z"], "w"]')
    listed = Latents(folder=str(tmp_path))
    assert {listed.prompt(1, sample_rng(0, p)) for p in range(20)} == {"y", "z"}
    assert listed.digest() != source.digest()


def test_latents_that_cannot_be_used(tmp_path: Path) -> None:
    source = Latents(folder=str(tmp_path))
    with pytest.raises(DataError, match=r"no .*latents\.safetensors"):
        len(source)
    save_file({"z": torch.zeros(2, 4, 2, 2)}, tmp_path / "latents.safetensors")
    with pytest.raises(DataError, match=r"with keys \['z'\]"):
        len(source)
    latents = torch.zeros(2, 4, 2, 2)
    latents[1, 0, 0, 0] = float("nan")
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(DataError, match="1 captions for 2 latents"):
        len(Latents(folder=str(tmp_path)))
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    assert "latent 1: the latent holds NaN" in check_source(Latents(folder=str(tmp_path)))
    (tmp_path / "latents.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="incomplete"):
        len(Latents(folder=str(tmp_path)))
