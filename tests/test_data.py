"""Order, draws and errors of the data: the same samples for every process count, from any step."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stepdistill.data import (
    BadSample,
    ImageFolder,
    Latents,
    Prompts,
    PromptsOf,
    Sample,
    Source,
    Stream,
    check,
    loader,
    sample_rng,
)
from stepdistill.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Numbers(Source):
    """Items that say who they are; those in `broken` are bad."""

    provides: ClassVar[frozenset[str]] = frozenset({"latents"})
    ids: tuple[int, ...]
    broken: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    def buckets(self) -> Sequence[int]:
        return self.ids

    def captions(self, i: int) -> Sequence[str]:
        return [f"a {i}", f"b {i}"]

    def sample(self, i: int, rng: random.Random) -> Sample:
        if i in self.broken:
            raise BadSample(self.name(i), "broken")
        prompt = self.prompt(i, rng)
        return Sample(prompt=prompt, latents=torch.tensor([[[i + rng.random()]]]), item=i)

    def name(self, i: int) -> str:
        return f"item {i}"

    def stamp(self, i: int) -> str:
        return str(i)


def picture(folder: Path, name: str, size: tuple[int, int] = (8, 8), caption: str | None = "a thing") -> Path:
    """A picture (H, W) whose columns all differ, with its caption beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(len(name)).randint(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def take(steps: int, batches: Iterator[list[Sample]]) -> list[list[Sample]]:
    return list(itertools.islice(batches, steps))


def told(samples: Sequence[Sample]) -> list[tuple[int, str, float]]:
    return [(s.item, s.prompt, s.latents.item()) for s in samples if s.latents is not None]


# order


def test_each_item_comes_once_an_epoch() -> None:
    stream = Stream(Numbers(ids=(0,) * 12), 4, seed=3)
    assert stream.steps_per_epoch == 3
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in stream.items(step)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch is another permutation"


def test_items_depend_on_seed_and_step_alone() -> None:
    source = Numbers(ids=(0, 1) * 11)
    forward = [Stream(source, 4, seed=5).items(step) for step in range(20)]
    stream = Stream(source, 4, seed=5)
    assert [stream.items(step) for step in reversed(range(20))] == forward[::-1]
    assert [Stream(source, 4, seed=6).items(step) for step in range(20)] != forward


def test_order_is_the_same_in_every_release() -> None:
    """A resumed run must not jump because a library changed its generator."""
    assert Stream(Numbers(ids=(0,) * 10), 5, seed=0).items(0) == [7, 4, 9, 2, 8]
    assert sample_rng(0, 0).random() == 0.9233583075859613


def test_a_batch_is_of_one_bucket_and_the_last_wraps_around() -> None:
    ids = (0,) * 10 + (1,) * 3 + (2,) * 8
    stream = Stream(Numbers(ids=ids), 4, seed=1)
    assert stream.steps_per_epoch == 3 + 1 + 2
    batches = [stream.items(step) for step in range(6)]
    assert all(len(batch) == 4 and len({ids[i] for i in batch}) == 1 for batch in batches)
    seen = Counter(i for batch in batches for i in batch)
    assert set(seen) == set(range(21))
    assert sorted(seen[i] for i in range(10)) == [1] * 8 + [2] * 2
    assert sorted(seen[i] for i in range(10, 13)) == [1, 1, 2]
    assert all(seen[i] == 1 for i in range(13, 21))
    orders = [[ids[b[0]] for b in (stream.items(6 * e + k) for k in range(6))] for e in range(5)]
    assert len({tuple(order) for order in orders}) > 1, "the batches are shuffled across buckets"


def test_a_source_smaller_than_a_batch_repeats() -> None:
    stream = Stream(Numbers(ids=(0,) * 3), 8, seed=1)
    assert sorted(Counter(stream.items(0)).values()) == [2, 3, 3]
    with pytest.raises(DataError, match="at least 1"):
        Stream(Numbers(ids=(0,)), 0, seed=1)


# split and resume


def test_four_micro_batches_equal_four_processes_and_one_big_batch() -> None:
    stream = Stream(Numbers(ids=(0,) * 21, proportion_empty_prompts=0.3), 8, seed=2)
    whole = take(5, loader(stream, 0, [range(8)], 0, seed=7))
    micro = take(20, loader(stream, 0, [[0, 1], [2, 3], [4, 5], [6, 7]], 0, seed=7))
    ranks = [take(5, loader(stream, 0, [[2 * r, 2 * r + 1]], 0, seed=7)) for r in range(4)]
    for step in range(5):
        expected = told(whole[step])
        assert told([s for batch in micro[4 * step : 4 * step + 4] for s in batch]) == expected
        assert told([s for rank in ranks for s in rank[step]]) == expected


def test_a_run_can_start_at_any_step_and_with_any_number_of_workers() -> None:
    stream = Stream(Numbers(ids=(0,) * 10), 4, seed=2)
    whole = take(9, loader(stream, 0, [range(4)], 0, seed=7))
    resumed = take(4, loader(Stream(Numbers(ids=(0,) * 10), 4, seed=2), 5, [range(4)], 2, seed=7))
    assert [told(batch) for batch in resumed] == [told(batch) for batch in whole[5:]]


def test_the_loader_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(3, loader(Stream(Numbers(ids=(0,) * 6), 2, seed=0), 0, [range(2)], 1, seed=0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_workers_outlive_an_interrupt() -> None:
    """Ctrl-C reaches the workers too, and the run still has to finish its step."""
    batches = loader(Stream(Numbers(ids=(0,) * 60), 2, seed=0), 0, [range(2)], 1, seed=0)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(take(20, batches)) == 20
    batches.close()
    worker.join(10)
    assert not worker.is_alive()


# bad samples


def test_a_bad_sample_is_replaced_within_its_bucket_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Numbers(ids=(0, 1, 0, 1, 0, 1), broken=frozenset({4}))
    good = take(6, loader(Stream(replace(source, broken=frozenset()), 3, seed=0), 0, [range(3)], 0, seed=0))
    with caplog.at_level(logging.WARNING):
        mended = take(6, loader(Stream(source, 3, seed=0), 0, [range(3)], 2, seed=0))
    for before, after in zip(good, mended, strict=True):
        assert [0 if s.item == 4 else s.item for s in before] == [s.item for s in after]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped item 4: broken; the next good sample stands in (1 skipped so far)"
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_good_left_is_an_error(workers: int) -> None:
    source = Numbers(ids=(0, 1, 0), broken=frozenset({0, 2}))
    with pytest.raises(DataError, match="^got 2 unusable samples in a row, from item [02]: broken"):
        take(4, loader(Stream(source, 2, seed=0), 0, [range(2)], workers, seed=0))


def test_a_broken_picture_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(5):
        picture(tmp_path, f"{n}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:-60])
    (tmp_path / "1.png").write_text("no picture")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    with caplog.at_level(logging.WARNING):
        batches = take(5, loader(Stream(source, 2, seed=0), 0, [range(2)], 0, seed=0))
    assert {s.item for batch in batches for s in batch} == {0, 2, 4}
    assert sorted(record.args[0].args[0] for record in caplog.records) == [
        str(tmp_path / "1.png"),
        str(tmp_path / "3.png"),
    ]
    report = check(source)
    assert report.startswith("ImageFolder: 5 samples, 3 usable\n")
    assert "unusable: 2" in report and "1.png: UnidentifiedImageError" in report and "3.png" in report
    with pytest.raises(DataError, match=r"2 of 5 samples unusable, first .*1\.png"):
        check(source, strict=True)


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
        ("p.csv", "id,caption\n1,x\n", r"columns \['id', 'caption'\], expected \['text'\]"),
        ("p.csv", "text\na cat, sitting\n", "line 2 with more cells"),
        ("p.jsonl", '{"text": "a"}\n{"text"\n', "line 2"),
        ("p.jsonl", '"a"\n', "one JSON object"),
        ("p.pdf", "x", "a .txt, .csv or .jsonl file"),
    ],
)
def test_prompt_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        len(Prompts(prompts_file=str(tmp_path / name)))


def test_one_list_of_prompts() -> None:
    for source in (Prompts(), Prompts(prompts_file="x.txt", prompts=("a",))):
        with pytest.raises(DataError, match="one of the two"):
            len(source)


def test_proportion_of_empty_prompts_and_choice_of_captions() -> None:
    source = Numbers(ids=(0,), proportion_empty_prompts=0.25)
    prompts = Counter(source.prompt(0, sample_rng(0, position)) for position in range(4000))
    assert prompts[""] / 4000 == pytest.approx(0.25, abs=0.02)
    assert prompts["a 0"] / 4000 == pytest.approx(0.375, abs=0.025)


def test_prompts_of_pictures_read_no_picture(tmp_path: Path) -> None:
    picture(tmp_path, "a.png", caption="an apple").write_text("broken")
    source = PromptsOf(source=ImageFolder(train_data_dir=str(tmp_path), resolution=8))
    assert source.sample(0, sample_rng(0, 0)) == Sample(prompt="an apple", item=0)
    assert check(source).startswith("PromptsOf: 1 samples, 1 usable")


# latents


def test_latents_are_read_as_written(tmp_path: Path) -> None:
    latents = torch.randn(3, 4, 2, 2)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    (tmp_path / "prompts.txt").write_text("a\n\nc\n")
    source = Latents(folder=str(tmp_path))
    samples = [source.sample(i, sample_rng(0, i)) for i in range(len(source))]
    assert [s.prompt for s in samples] == ["a", "", "c"]
    assert all(torch.equal(s.latents, latents[s.item]) for s in samples if s.latents is not None)
    assert "shapes (C x h x w): 4x2x2: 3" in check(source)
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
    assert "latent 1: the latent holds NaN" in check(Latents(folder=str(tmp_path)))
    (tmp_path / "latents.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cut short"):
        len(Latents(folder=str(tmp_path)))


def test_a_source_travels_to_a_worker_that_does_not_fork(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8, aspect_buckets=True, bucket_step=4)
    before = source.sample(0, sample_rng(0, 0)).pixels
    after = pickle.loads(pickle.dumps(source)).sample(0, sample_rng(0, 0)).pixels
    assert before is not None and after is not None and torch.equal(before, after)
