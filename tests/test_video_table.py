"""The table of videos: its rows are those of the metrics, and the page says them."""

from __future__ import annotations

import pytest
import torch
from oracles.clips import moving, slowed
from oracles.excess import excess
from tables import video
from tables.render_video import DISTANCES, video_page

from stepdistill.core.cost import Cost
from stepdistill.evaluation.metrics.encoders import pixel_features
from stepdistill.evaluation.metrics.jackknife import ratio_of_means
from stepdistill.evaluation.metrics.motion import motion
from stepdistill.evaluation.stored_features import StoredFeatures

N = 320  # ten of each prompt, and forty of each motion


@pytest.fixture
def row(monkeypatch):
    """Of slow clips, beside the same at full speed."""
    monkeypatch.setattr(video, "extractor", pixel_features)
    best = moving(N, 2)
    seen = {name: video.seen_in(clips) for name, clips in (("reference", moving(N, 1)), ("floor", best))}
    features = {f"{key}_{what}": value for key, all_of_it in seen.items() for what, value in all_of_it.items()}
    ref = StoredFeatures(features, video.prompts_and_motions(N)[0], {})
    slow = video.seen_in(slowed(best))
    found = video.judged_clips(slow, Cost(seconds=32.0, calls=8, batches=2, rows=8 * N), ref)
    expected = excess(slow["motion"], features["reference_motion"], features["floor_motion"])
    assert [found["motion"], *found["motion_ci95"]] == pytest.approx([expected.value, expected.low, expected.high])
    ratio = ratio_of_means(motion(slowed(best)), motion(best))
    assert [found["ratio"], *found["ratio_ci95"]] == pytest.approx([ratio.value, ratio.low, ratio.high], rel=1e-4)
    return found


def test_a_row_says_what_it_took_and_how_far_it_is(row):
    assert (row["calls"], row["nfe"], row["n"]) == (4, 8, N) and row["seconds_per_clip"] == pytest.approx(0.1)
    assert row["motion_ci95"][0] > 0 and row["by_motion_ci95"][0] > 0
    assert all(row[f"{name}_floor"] > 0 for name in DISTANCES)


def test_every_prompt_has_its_motion():
    prompts, motions = video.prompts_and_motions()
    assert len(prompts) == len(motions) == 512
    assert all(prompt.endswith(name) for prompt, name in zip(prompts, motions, strict=True))
    counts = {name: motions.count(name) for name in set(motions)}
    assert len(counts) == 8 and min(counts.values()) == 64


def test_the_page_has_a_line_for_each_row(row):
    rows = {
        "tiny-wan/teacher/4": row | {"steps": 4},
        "tiny-wan/dmd2/4": row | {"steps": 4, "frames": -0.2, "train_steps": 300, "train_seconds": 90},
    }
    lines = video_page(rows).splitlines()
    assert len(lines) == 6 and "| tiny-wan: teacher | 4 |" in lines[2] and lines[2].endswith("| 8 | none |")
    assert "| tiny-wan: dmd2 | 4 | 0 [" in lines[3] and lines[3].endswith("| 300 steps, 1.5 min |")
    assert f"{row['ratio']:.2f} [" in lines[2] and f"N {N}" in lines[5]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert torch.is_tensor(video.seen_in(moving(1, 0))["moves"])
