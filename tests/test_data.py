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

from stepdistill.core.errors import DataError
from stepdistill.core.random import sample_rng
from stepdistill.data import BadSample, ImageFolder, PromptsOf, Sample, Source, Stream, check_source, loader


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


def image(folder: Path, name: str, size: tuple[int, int] = (8, 8), caption: str | None = "a thing") -> Path:
    """An image (H, W) whose columns all differ, with its caption beside it."""
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
        alone = [stream.source.sample(i, sample_rng(7, 8 * step + j)) for j, i in enumerate(stream.items(step))]
        expected = told(alone)
        assert told(whole[step]) == expected
        assert told([s for batch in micro[4 * step : 4 * step + 4] for s in batch]) == expected
        assert told([s for rank in ranks for s in rank[step]]) == expected


def test_a_run_can_start_at_any_step_and_with_any_number_of_workers() -> None:
    stream = Stream(Numbers(ids=(0,) * 10), 4, seed=2)
    whole = take(9, loader(stream, 0, [range(4)], 0, seed=7))
    resumed = take(4, loader(Stream(Numbers(ids=(0,) * 10), 4, seed=2), 5, [range(4)], 2, seed=7))
    assert [told(batch) for batch in resumed] == [told(batch) for batch in whole[5:]]


def test_the_loader_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    take(3, loader(Stream(Numbers(ids=(0,) * 6), 2, seed=0), 0, [range(2)], 1, seed=0))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert str(before[2]) == str(np.random.get_state(legacy=False))


def test_workers_outlive_an_interrupt() -> None:
    """Ctrl-C reaches the workers too, and the run still has to finish its step."""
    batches = loader(Stream(Numbers(ids=(0,) * 60), 2, seed=0), 0, [range(2)], 1, seed=0)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        assert worker.pid is not None
        os.kill(worker.pid, number)
    assert len(take(20, batches)) == 20
    del batches
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
        "skipped item 4: broken; the next usable sample takes its place (1 skipped so far)"
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_good_left_is_an_error(workers: int) -> None:
    source = Numbers(ids=(0, 1, 0), broken=frozenset({0, 2}))
    with pytest.raises(DataError, match="^got 2 unusable samples in a row, from item [02]: broken"):
        take(4, loader(Stream(source, 2, seed=0), 0, [range(2)], workers, seed=0))


def test_a_broken_image_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(5):
        image(tmp_path, f"{n}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:-60])
    (tmp_path / "1.png").write_text("no image")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    with caplog.at_level(logging.WARNING):
        batches = take(5, loader(Stream(source, 2, seed=0), 0, [range(2)], 0, seed=0))
    assert {s.item for batch in batches for s in batch} == {0, 2, 4}
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        f"skipped {tmp_path / '1.png'}",
        f"skipped {tmp_path / '3.png'}",
    ]
    report = check_source(source)
    assert report.startswith("ImageFolder: 5 samples, 3 usable\n")
    assert "unusable: 2" in report and "1.png: UnidentifiedImageError" in report and "3.png" in report
    with pytest.raises(DataError, match=r"2 of 5 samples unusable, the first .*1\.png"):
        check_source(source, strict=True)


def test_a_source_travels_to_a_worker_that_does_not_fork(tmp_path: Path) -> None:
    image(tmp_path, "a.png")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8, aspect_buckets=True, bucket_step=4)
    before = source.sample(0, sample_rng(0, 0)).pixels
    after = pickle.loads(pickle.dumps(source)).sample(0, sample_rng(0, 0)).pixels
    assert before is not None and after is not None and torch.equal(before, after)


# captions


def test_proportion_of_empty_prompts_and_choice_of_captions() -> None:
    source = Numbers(ids=(0,), proportion_empty_prompts=0.25)
    prompts = Counter(source.prompt(0, sample_rng(0, position)) for position in range(4000))
    assert prompts[""] / 4000 == pytest.approx(0.25, abs=0.02)
    assert prompts["a 0"] / 4000 == pytest.approx(0.375, abs=0.025)


def test_prompts_of_images_read_no_image(tmp_path: Path) -> None:
    image(tmp_path, "a.png", caption="an apple").write_text("broken")
    source = PromptsOf(source=ImageFolder(train_data_dir=str(tmp_path), resolution=8))
    assert source.sample(0, sample_rng(0, 0)) == Sample(prompt="an apple", item=0)
    assert replace(source, proportion_empty_prompts=1.0).sample(0, sample_rng(0, 0)).prompt == ""
    assert check_source(source).startswith("PromptsOf: 1 samples, 1 usable")
