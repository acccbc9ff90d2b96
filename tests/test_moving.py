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


def covered(clip: Tensor) -> Tensor:
    """Where each frame is not its ground, (F, 32, 32) of 0 and 1; the ground is the clip's most frequent colour."""
    colours, counts = clip.permute(0, 2, 3, 1).flatten(0, 2).unique(dim=0, return_counts=True)
    return ((clip.float() - colours[counts.argmax()].float().view(3, 1, 1)).abs().mean(1) > 20).float()


@pytest.mark.parametrize("motion", moving.HEADINGS)
def test_a_clip_moves_where_its_caption_says_also_mirrored(motion):
    dx, dy = moving.HEADINGS[motion]
    for seed in range(12):
        mask = covered(made(motion, seed))
        grid = torch.arange(32.0)
        x, y = ((mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (grid, grid[:, None]))
        for way, moved in ((dx, x[-1] - x[0]), (dy, y[-1] - y[0])):
            if way:
                assert min(abs(way * moved.item() - distance) for distance in (6, 12)) < 0.3
            else:
                assert abs(moved.item()) < 0.3


def test_drawings_grow_shrink_spin_and_stay():
    for seed in range(8):
        clips = {motion: made(motion, seed) for motion in moving.MOTIONS[4:]}
        areas = {motion: covered(clip).sum((1, 2)) for motion, clip in clips.items()}
        assert areas["growing"][-1] > 2 * areas["growing"][0] and areas["shrinking"][0] > 2 * areas["shrinking"][-1]
        assert (clips["still"] == clips["still"][:1]).all()
        assert (clips["spinning"][1:] != clips["spinning"][:1]).flatten(1).any(1).all()
        assert 0.6 < areas["spinning"][-1] / areas["spinning"][0] < 1.6


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
