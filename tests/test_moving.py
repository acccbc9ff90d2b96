"""Captioned drawings that move."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from torch import Tensor

from stepdistill.data.bundled import build, emoji, moving


@cache
def sheet():
    return emoji.packed_sheet()


@cache
def subjects():
    return moving.movers()


def made(motion: str, seed: int, frames: int = moving.FRAMES, start: int = 0) -> Tensor:
    drawings = subjects()
    return moving.moving_clip(sheet(), drawings[seed % len(drawings)], motion, random.Random(seed), frames, start)


@pytest.mark.parametrize("motion", moving.HEADINGS)
def test_a_clip_moves_where_its_caption_says_also_mirrored(motion):
    for start in (0, 5):  # later on it leaves the canvas on one side and enters on the other
        moved = moving.displacement(torch.stack([made(motion, seed, start=start) for seed in range(12)]))
        dx, dy = moving.HEADINGS[motion]
        along, across = dx * moved[:, 0] + dy * moved[:, 1], dy * moved[:, 0] + dx * moved[:, 1]
        assert across.abs().max() < 0.3
        distance = torch.minimum((along - 6).abs(), (along - 12).abs())
        assert distance.max() < 0.3 and along.max() - along.min() > 5  # two speeds
        assert (moved[:, 2] - 1).abs().max() < 0.2


def test_a_clip_from_the_start_stays_on_the_canvas():
    for motion in moving.MOTIONS:
        for seed in range(20):
            way = moving.course(motion, random.Random(seed))
            for frame in range(moving.FRAMES):
                left, top, side, _ = way.at(frame / 8)
                assert min(left, top) >= 0 and max(left, top) + side <= moving.SIZE


def test_drawings_grow_shrink_spin_and_stay():
    clips = {motion: torch.stack([made(motion, seed) for seed in range(8)]) for motion in moving.MOTIONS[4:]}
    area = {motion: moving.displacement(stack)[:, 2] for motion, stack in clips.items()}
    assert area["growing"].min() > 2.5 and area["shrinking"].max() < 0.4
    still, spinning = clips["still"], clips["spinning"]
    assert (still == still[:, :1]).all() and (area["still"] == 1).all()
    assert (spinning[:, 1:] != spinning[:, :1]).flatten(2).any(2).all()
    assert area["spinning"].min() > 0.6 and area["spinning"].max() < 1.6
    assert moving.displacement(spinning)[:, :2].abs().max() < 6


@pytest.mark.parametrize("motion", moving.MOTIONS)
def test_a_motion_goes_on_beyond_its_clip(motion):
    for seed in range(6):
        whole = made(motion, seed, frames=20)
        assert torch.equal(whole[8:17], made(motion, seed, start=8))
        if motion in moving.HEADINGS:  # what leaves on one side enters on the other
            sums = whole.float().mean((1, 2, 3))
            assert (sums - sums[0]).abs().max() < 0.2


def test_what_a_caption_leaves_open_is_a_few_distinct_choices():
    still = {made("still", 48 * seed, frames=1).numpy().tobytes() for seed in range(200)}  # one drawing
    grounds, places, mirrors = len(set(emoji.GROUNDS)), 9, 2
    assert 40 <= len(still) <= grounds * places * mirrors


def test_the_tables_have_a_prompt_for_each_group_and_motion_and_a_caption_says_the_motion():
    assert len(moving.movers()) == len(set(moving.movers())) == 48 and len(set(moving.motion_prompts())) == 32
    drawing, rng = moving.movers()[0], random.Random(0)
    captions = [moving.motion_caption(drawing, "moving up", rng) for _ in range(400)]
    assert {"animal mammal moving up", "rat moving up", "rat"} <= set(captions)
    assert 340 <= sum(text.endswith(" moving up") for text in captions) < 400
    tokens = build.tokenizer(moving.motion_texts(), 800)
    assert (
        max(len(tokens(text).input_ids) for text in [*moving.motion_texts(), *moving.motion_prompts()]) <= build.LENGTH
    )


def test_pixels_are_a_video():
    clips = torch.stack([made("moving up", seed) for seed in range(2)])
    video = moving.clip_pixels(clips)
    assert video.shape == (2, 3, 9, 32, 32) and video.min() >= -1 and video.max() <= 1
    assert torch.equal(((video[1, :, 4] + 1) * 127.5).round().byte(), clips[1, 4])
