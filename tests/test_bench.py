"""The side-by-side counts what it says, and its two sides compute the same loss. Times are left to the script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import consistency_step as bench

from stepdistill.data import Stream

SMALL = bench.Setup(channels=(32, 32), width=32, vae=(16, 16, 16), rank=4, batch=2, warm=1, steps=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    bench.save_teacher(folder, SMALL)
    return folder


def test_calls_are_the_fewest():
    rows = bench.measure(SMALL)
    mebibytes = {side: [{"peak MiB": 1.0}] for side in bench.SIDES}
    line = json.loads(json.dumps(bench.summary(SMALL, rows, mebibytes)))
    # the student once with a graph, the target once, the teacher twice or once in a batch of both conditions
    assert line["calls"] == {"reference": 4, "uncached": 3, "cached": 3}
    assert line["rows"] == dict.fromkeys(bench.SIDES, 4 * SMALL.batch)
    assert line["name"] == "consistency_step" and {"speedup", "speedup_uncached"} < line.keys()
    for side in bench.SIDES:
        (row,) = rows[side]
        assert sum(row[cause] for cause in bench.CAUSES) == pytest.approx(row[bench.CPU])
        assert all(row[cause] > 0 for cause in (*bench.PASSES, "backward", "clip, optimizer", "rest"))
    assert all(rows[side][0][cause] > 0 for side in ("reference", "uncached") for cause in bench.ENCODING)
    shown = bench.table(rows, bench.CAUSES, 1e3).splitlines()
    assert [text.split("  ")[0] for text in map(str.strip, shown[1:])] == list(bench.CAUSES)


def test_the_cached_side_encodes_nothing(teacher):
    side = bench.make("cached", teacher, SMALL)
    rows = [side.measure() for _ in range(2 * bench.EPOCH)]
    assert all(row["image encoding"] > 0 for row in rows[: bench.EPOCH])
    assert all(row[cause] == 0 for row in rows[bench.EPOCH :] for cause in bench.ENCODING)


def test_both_sides_compute_the_same_loss(teacher):
    reference = bench.Reference(teacher, SMALL)
    stage, loop = bench.production(teacher, SMALL, "uncached")
    (batch,) = next(loop.batches)
    play = stage.play(0)
    data = stage.run.data
    pixels, prompts = zip(*(data[i] for i in Stream(data, SMALL.batch, 0).items(0)), strict=True)
    index = (play.draw(batch, "t") * bench.GRID).long()
    with torch.no_grad():
        loss = reference.loss(torch.stack(pixels), list(prompts), index, play.noise(batch, "eps"))
    (update,) = stage.run.method.updates(play, batch, 0)
    assert update.loss.item() == pytest.approx(loss.item(), rel=1e-4)
