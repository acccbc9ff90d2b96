"""What a teacher made keeps the caption that it was made from, of items with several captions, some of them dropped."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import FakeTeacher

from stepdistill.data import (
    ImageFolder,
    InvertedImages,
    Partition,
    Prompts,
    PromptsOf,
    Source,
    TeacherSamples,
    Trajectories,
)
from stepdistill.data.base import GuidedState, Sample
from stepdistill.data.made import TeacherMade

SHAPE = (1, 2, 3)
ITEMS = [[f"{letter}{n}" for letter in "abcd"] for n in range(5)]
CODES = {"": 0.0} | {caption: 1.0 + k for k, caption in enumerate(sum(ITEMS, []))}
COUNT = 40  # each item in turn, eight times


def coded(prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
    """Latents that say which prompt they were made from."""
    return torch.tensor([CODES[prompt] for prompt in prompts]).reshape(-1, 1, 1, 1).expand_as(noise).clone()


def states(prompts: list[str], noise: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor) -> GuidedState:
    outputs = coded(prompts, noise)[:, None].expand(-1, kept.shape[1], -1, -1, -1)
    return GuidedState(outputs, kept.float(), scales[:, None].expand(-1, kept.shape[1]), outputs)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prompts and images of other sides than square ones, each item with four captions."""
    folder = tmp_path_factory.mktemp("captions")
    rows = [{"file_name": f"{n}.png", "text": captions} for n, captions in enumerate(ITEMS)]
    for name in ("prompts.jsonl", "metadata.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        Image.new("RGB", (8, 12)).save(folder / row["file_name"])
    return folder


def made(name: str, place: Path, folder: Path, dropped: float) -> TeacherMade:
    prompts = Prompts(prompts_file=str(place / "prompts.jsonl"), proportion_empty_prompts=dropped)
    kept = {"folder": str(folder / name), "count": COUNT}
    match name:
        case "samples":
            source, teacher = TeacherSamples(source=prompts, **kept), FakeTeacher(coded, SHAPE)
        case "inverted":
            images = ImageFolder(train_data_dir=str(place), resolution=8, proportion_empty_prompts=dropped)
            source = InvertedImages(source=images, **kept)
            teacher = FakeTeacher(lambda words, pixels, noise: (noise, coded(words, noise)), SHAPE)
        case _:
            source = Trajectories(source=prompts, kept_steps=2, num_inference_steps=5, **kept)
            teacher = FakeTeacher(states, SHAPE)
    source.fill(teacher)
    return source


def code(sample: Sample) -> float:
    """Of the prompt that the sample was made from."""
    held = sample.latents if sample.state is None else sample.state.output
    assert held is not None
    return held.unique().item()


def samples(source: Source, seed: int) -> list[Sample]:
    return [source.sample(i, random.Random(seed * 1000 + i)) for i in range(len(source))]


@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("name", ["samples", "inverted", "trajectories"])
def test_a_sample_has_the_caption_that_it_was_made_from(place, tmp_path, name, dropped):
    """However often it is read: its caption and the drop were drawn when it was made."""
    source = made(name, place, tmp_path, dropped)
    drawn = {sample.prompt for sample in samples(source, 0)}
    assert len(drawn) > len(ITEMS) + 3 and ("" in drawn) == bool(dropped)  # so that another draw would show
    for seed in range(3):
        for i, sample in enumerate(samples(source, seed)):
            assert code(sample) == CODES[sample.prompt]
            assert (
                list(source.captions(i))
                == [sample.prompt]
                == [PromptsOf(source=source).sample(i, random.Random(9)).prompt]
            )


def test_a_sample_has_the_noise_that_it_was_made_from(tmp_path):
    source = TeacherSamples(source=Prompts(prompts=("rose", "pear")), folder=str(tmp_path / "made"), count=3, seed=5)
    source.fill(FakeTeacher(lambda prompts, noise: 2 * noise, SHAPE))
    for sample in samples(source, 0):
        assert torch.equal(sample.latents, (2 * sample.noise).half().float())


@pytest.mark.parametrize("name", ["samples", "inverted"])
def test_captions_that_are_dropped_in_training_are_the_sample_s_or_empty(place, tmp_path, name):
    source = replace(made(name, place, tmp_path, 0.0), proportion_empty_prompts=0.5)
    seen = [(code(sample), CODES[sample.prompt]) for seed in range(3) for sample in samples(source, seed)]
    assert all(told in (was, 0.0) for was, told in seen)
    assert 0.35 < sum(told == 0.0 for _, told in seen) / len(seen) < 0.65


def test_a_student_s_part_of_the_samples_keeps_their_captions(place, tmp_path):
    source = made("samples", place, tmp_path, 0.0)
    parts = [Partition(source=source, students=2, student=k, by="class") for k in range(2)]
    seen = [sample for part in parts for sample in samples(part, 1)]
    assert len(seen) == COUNT and all(code(sample) == CODES[sample.prompt] for sample in seen)
