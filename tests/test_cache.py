"""Nothing is encoded twice, and nothing of another model is taken up."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from oracles.planted import planted
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.core.errors import StepdistillError
from stepdistill.training.cache import rows as module
from stepdistill.training.cache.rows import LatentCache, PromptCache, RowStore


class Encoder:
    """A pretend text encoder that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        self.calls.append(prompts)
        rows = torch.tensor([[float(len(p)), float(sum(map(ord, p)))] for p in prompts], requires_grad=True)
        return {"embeds": rows * 1, "mask": torch.tensor([[len(p)] for p in prompts])}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_each_prompt_is_encoded_once_and_comes_back_in_order() -> None:
    encode = Encoder()
    cache = PromptCache(encode, None, "k", batch_size=2)
    prompts = ["a", "bb", "a", "", "ccc"]
    found = cache(prompts)
    assert encode.calls == [["a", "bb"], ["", "ccc"]]
    assert same(found, {k: v.detach() for k, v in Encoder()(prompts).items()})
    assert not found["embeds"].requires_grad
    cache(["ccc", "new", "a"])
    assert encode.calls[2:] == [["new"]]


def test_a_second_run_encodes_nothing(tmp_path: Path) -> None:
    first = PromptCache(Encoder(), tmp_path / "c", "k")
    before = first(["a", "bb"])
    first.save()
    first(["ccc"])
    first.save()
    first.save()
    assert len(list((tmp_path / "c").iterdir())) == 2
    encode = Encoder()
    second = PromptCache(encode, tmp_path / "c", "k")
    assert same(second(["a", "bb"]), before)
    second(["ccc", "dddd"])
    assert encode.calls == [["dddd"]]


def test_files_are_written_as_rows_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH", 3)
    cache = PromptCache(Encoder(), tmp_path, "k")
    cache(["a", "b"])
    assert not list(tmp_path.iterdir())
    cache(["a", "c"])
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ids"]) == ["a", "b", "c"]


def test_another_key_is_ignored_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = PromptCache(Encoder(), tmp_path, "old model")
    old(["a"])
    old.save()
    encode = Encoder()
    with caplog.at_level(logging.WARNING):
        PromptCache(encode, tmp_path, "new model")(["a"])
    assert encode.calls == [["a"]]
    assert "ignoring 1 cache files" in caplog.text
    encode = Encoder()
    PromptCache(encode, tmp_path, "old model")(["a"])
    assert encode.calls == []


def test_a_cut_file_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PromptCache(Encoder(), tmp_path, "k")
    cache(["a"])
    cache.save()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    encode = Encoder()
    PromptCache(encode, tmp_path, "k")(["a"])
    assert encode.calls == [["a"]] and "cannot read cache file" in caplog.text


def test_a_full_disk_costs_nothing_but_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "c").write_text("a file where the folder should go")
    encode = Encoder()
    cache = PromptCache(encode, tmp_path / "c", "k")
    cache(["a"])
    cache.save()
    assert "cannot write the cache" in caplog.text
    cache(["a"])
    cache.save()
    assert encode.calls == [["a"]]


def test_encoders_that_break_the_rules() -> None:
    short = PromptCache(lambda prompts: {"embeds": torch.zeros(1, 2)}, None, "k")
    with pytest.raises(ValueError, match="1 rows of 'embeds' for 2 inputs"):
        short(["a", "b"])
    ragged = PromptCache(lambda prompts: {"embeds": torch.zeros(1, len(prompts[0]))}, None, "k", batch_size=1)
    with pytest.raises(StepdistillError, match="pad prompts to one length"):
        ragged(["a", "bb"])


def test_latents_by_item(tmp_path: Path) -> None:
    calls: list[list[int]] = []

    def encode(items: list[int]) -> dict[str, Tensor]:
        calls.append(items)
        return {"latents": torch.stack([torch.full((4, 2, 2), float(item)) for item in items])}

    cache = LatentCache(tmp_path, "k")
    assert cache([7, 3, 7], encode)["latents"][:, 0, 0, 0].tolist() == [7, 3, 7]
    cache.save()
    again = LatentCache(tmp_path, "k")
    assert again([3, 5], encode)["latents"].shape == (2, 4, 2, 2)
    assert calls == [[7, 3], [5]]


@pytest.mark.parametrize("on_disk", [False, True])
def test_memory_is_bounded_and_a_dropped_row_comes_back(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(module, "LIMIT", 10 * 4 * 3)
    made: list[str] = []

    def encode(prompts):
        made.extend(prompts)
        return {"states": torch.tensor([[float(p)] * 3 for p in prompts])}

    prompts = PromptCache(encode, tmp_path if on_disk else None, "key")
    for n in range(40):
        assert prompts([str(n)])["states"].tolist() == [[n] * 3]
        assert len(prompts.store._rows) <= 10
    assert prompts(["0"])["states"].tolist() == [[0] * 3]
    assert made.count("0") == (1 if on_disk else 2)


def padded(*tokens: int) -> dict[str, Tensor]:
    """States of prompts with so many tokens each, and then zeros; and what has no zeros to leave out."""
    states = torch.randn(len(tokens), 12, 3).bfloat16()
    for row, used in zip(states, tokens, strict=True):
        row[used:] = 0
        row[1 : max(used - 1, 1) : 3] = 0  # zeros elsewhere stay
    return {"states": states, "pooled": torch.zeros(len(tokens), 4), "number": torch.arange(len(tokens))}


def check_padding(tmp_path: Path) -> None:
    columns, ids = padded(5, 12, 0, 1), ["a", "b", "c", "d"]
    store = RowStore(tmp_path, "key")
    store.add(ids, columns)
    assert same(store.rows(ids), columns)
    assert store._bytes == (5 + 12 + 0 + 1) * 3 * 2 + 4 * 4 * 4 + 4 * 8
    store.save()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < columns["states"].nbytes / 2 + 1200
    assert store._bytes == 0 and same(store.rows(ids), columns)
    assert same(RowStore(tmp_path, "key").rows(ids[::-1]), {name: part.flip(0) for name, part in columns.items()})


def test_the_zeros_behind_a_prompt_take_no_place(tmp_path: Path) -> None:
    """Wan's text encoder pads a prompt with zeros up to 512 tokens."""
    check_padding(tmp_path)


def test_files_of_whole_tensors_are_read_on(tmp_path: Path) -> None:
    columns = padded(5, 2)
    rows = {f"{n}.{name}": column[n].clone() for name, column in columns.items() for n in range(2)}
    metadata = {"key": "key", "ids": json.dumps(["a", "b"]), "names": json.dumps(list(columns))}
    save_file(rows, tmp_path / "old.safetensors", metadata)
    assert same(RowStore(tmp_path, "key").rows(["a", "b"]), columns)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (module._cut, "int(used.max()) + 1", "int(used.max())"),
        (module._cut, "int(used.max()) + 1", "len(used)"),
        (module._cut, "int(used.max()) + 1 if len(used) else 0", "len(tensor)"),
        (module._Cut.whole, "[self.tensor, self", "[self.tensor, 1 + self"),
    ],
)
def test_a_bug_of_the_padding_is_noticed(tmp_path: Path, function, old: str, new: str) -> None:
    with planted(function, old, new), pytest.raises((AssertionError, StepdistillError)):
        check_padding(tmp_path)


def chats(prompts: list[str]) -> dict[str, Tensor]:
    """Prompts of as many tokens as letters, filled up with zeros to the longest; the second channel is 0 at times."""
    length = max(map(len, prompts))
    codes = torch.tensor([[float(ord(c)) for c in p.ljust(length, "\0")] for p in prompts])
    return {"states": torch.stack([codes, codes % 2], 2), "mask": codes > 0}


def check_lengths(folder: Path | None) -> None:
    cache = PromptCache(chats, folder, "k", batch_size=3, ragged=True)
    first = cache(["a", "bcdef", "gh"])
    assert same(first, chats(["a", "bcdef", "gh"]))
    cache.save()
    again = PromptCache(chats, folder, "k", batch_size=3, ragged=True)
    assert same(again(["gh", "a"]), chats(["gh", "a"]))  # two tokens, and not the five of where they were encoded
    assert same(again(["a", "ijk"]), chats(["a", "ijk"]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_prompts_of_unequal_length_keep_their_own(tmp_path: Path, on_disk: bool) -> None:
    check_lengths(tmp_path if on_disk else None)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (PromptCache.add, "[n : n + 1, :length]", "[n : n + 1]"),
        (PromptCache.add, "[n : n + 1, :length]", "[n : n + 1, : length - 1]"),
        (RowStore.rows, "if ragged:", "if False:"),
    ],
)
def test_a_bug_of_the_lengths_is_noticed(tmp_path: Path, function, old: str, new: str) -> None:
    with planted(function, old, new), pytest.raises((AssertionError, StepdistillError)):
        check_lengths(tmp_path)
