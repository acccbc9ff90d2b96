"""A run that is killed at any moment, and resumed, ends as if nothing had happened.

Each run is a process of its own. It kills itself by SIGKILL when it is about to change a file, or is killed after a
random time, which may be in the middle of such a change.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from runs import LCM, make, saved_teacher

from stepdistill.training.distill import distill
from stepdistill.training.watch.rules import read_metrics

# a fork of this process would fail where another test has run autograd in it
FORK = multiprocessing.get_context("forkserver")
# not `runs`: the server does not search tests/, and would take the folder runs/ that training writes to
FORK.set_forkserver_preload(["stepdistill.training.distill"])
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}
pytestmark = pytest.mark.slow


def run_in(place: Path, teacher: Path, moment: int | str | None, moments: Path | None = None) -> None:
    """Train in this process, which dies before its change of a file number `moment`, or in the middle of writing a text
    file of that name; the number of changes goes to a file."""
    number = count(1)

    def watch(event: str, args: tuple) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and str(args[0]).startswith(str(place)):
            changes = next(number)
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def half(file: Path, text: str, *args: str, **kwargs: str) -> int:
        if file.name.removesuffix(".part").removesuffix(".stepdistill") != moment:
            return write(file, text, *args, **kwargs)
        write(file, text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    changes, write = 0, Path.write_text
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    Path.write_text = half  # pyright: ignore[reportAttributeAccessIssue]
    train = {
        "resume_from_checkpoint": "latest",
        "checkpoints_total_limit": 2,
        "validation_prompts": ("rose",),
        "validation_steps": 2,
        "watch_samples": 2,
        "teacher_steps": 2,
    }
    distill(make(teacher, place / "samples", place / "out", LCM, **train))
    if moments:
        moments.write_text(str(changes))


def process(*args: object) -> BaseProcess:
    started = FORK.Process(target=run_in, args=args)
    started.start()
    return started


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return saved_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> tuple[dict[str, object], int, float]:
    """What a run leaves that nobody killed, the number of its moments, and its seconds."""
    place, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    whole = process(place, teacher, None, place / "moments")
    whole.join()
    assert whole.exitcode == 0
    return left(place), int((place / "moments").read_text()), time.monotonic() - began


def left(place: Path) -> dict[str, object]:
    """What must be equal: weights, averages, what the teacher made, the best student, and what was logged."""
    out = place / "out"
    assert not [file for file in place.rglob("*") if ".part" in file.name]
    names = ["pytorch_lora_weights.safetensors", "best/pytorch_lora_weights.safetensors", "best/watch.json"]
    names += [f"checkpoint-{step}/{role}.safetensors" for step in (3, 4) for role in ("student", "ema")]
    files = [*(out / name for name in names), *sorted((place / "samples").iterdir())]
    rows = [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(out / "metrics.jsonl")
    ]
    folders = sorted(file.name for file in out.iterdir() if not file.name.startswith("checkpoint"))  # sources are kept
    return {"rows": rows, "folders": folders, **{str(file.relative_to(place)): file.read_bytes() for file in files}}


@pytest.mark.parametrize("trial", range(14))
def test_a_run_that_dies_before_a_change_of_a_file(teacher, whole, tmp_path, trial):
    """Twice, where the second run has as many changes to make."""
    expected, moments, _ = whole
    # moments of the first process are spread over the whole run
    rng = random.Random(trial)
    for moment in (1 + (trial * moments + rng.randrange(moments)) // 14, rng.randrange(1, moments + 1), None):
        run = process(tmp_path, teacher, moment)
        run.join()
        assert run.exitcode in (0, -signal.SIGKILL)
    assert run.exitcode == 0
    assert left(tmp_path) == expected


@pytest.mark.parametrize("name", ["metrics.jsonl", "watch.json", "state.json"])
def test_a_run_that_dies_in_the_middle_of_a_file(teacher, whole, tmp_path, name):
    for moment in (name, None):
        run = process(tmp_path, teacher, moment)
        run.join()
        assert run.exitcode == (-signal.SIGKILL if moment else 0)
    assert left(tmp_path) == whole[0]


@pytest.mark.parametrize("trial", range(4))
def test_a_run_that_is_killed_after_a_random_time(teacher, whole, tmp_path, trial):
    expected, _, seconds = whole
    rng = random.Random(trial)
    for _ in range(2):
        run = process(tmp_path, teacher, None)
        run.join(rng.uniform(0, seconds))
        run.kill()
        run.join()
    run = process(tmp_path, teacher, None)
    run.join()
    assert run.exitcode == 0
    assert left(tmp_path) == expected
