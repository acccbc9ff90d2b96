"""The table of videos: its rows are those of the metrics, and the page says them."""

from __future__ import annotations

import random

import pytest
import torch
from oracles.clips import moving, slowed
from oracles.excess import excess
from tables import video
from tables.render_video import DISTANCES, video_page

from stepdistill.core.cost import Cost
from stepdistill.data import ImageFolder
from stepdistill.data.bundled.first_frames import first_frames, write_first_frames
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


def test_the_page_has_a_table_of_each_kind_and_a_line_for_each_row(row):
    rows = {
        "tiny-wan, video/Euler/4": row | {"steps": 4},
        "tiny-wan, video/dmd2/4": row | {"steps": 4, "frames": -0.2, "train_steps": 300, "train_seconds": 90},
        "tiny-wan, image_to_video/Euler/4": row | {"steps": 4, "image_distance": 1.25},
    }
    lines = video_page(rows).splitlines()
    table, other = lines[2:6], lines[11:14]
    assert "| Euler | 4 |" in table[2] and table[2].endswith("| 8 | none |")
    assert "| dmd2 | 4 | 0 [" in table[3] and table[3].endswith("| 300 steps, 1.5 min |")
    assert f"{row['ratio']:.2f} [" in table[2] and f"N {N}" in lines[7]
    assert other[2].endswith("| 1.2 | 8 | none |") and "| from the image | nfe |" in other[0]
    assert len({line.count("|") for line in table}) == len({line.count("|") for line in other}) == 1
    assert torch.is_tensor(video.seen_in(moving(1, 0))["moves"])


def test_first_frames_are_those_of_their_captions_and_new_ones_for_the_table(tmp_path):
    write_first_frames(tmp_path, 33)
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=32)
    images, captions = first_frames(33)
    assert [source.captions(i)[0] for i in range(33)] == captions and captions[0] == captions[32]
    pixels = source.sample(5, random.Random(0)).pixels
    assert pixels is not None and torch.equal(((pixels + 1) * 127.5).round(), images[5].float())
    unseen = first_frames(33, video.UNSEEN)[0]
    assert (unseen != images).flatten(1).any(1).all()
    right = [i for i, caption in enumerate(captions) if caption.endswith("moving right")]
    ground = images[right][:, :, 0, -1, None, None]  # a drawing that moves to the right begins at the left
    assert torch.equal(images[right][..., -8:], ground.expand(-1, -1, 32, 8))


def test_the_page_says_how_windows_are_joined():
    row = {"ratio": 1.234, "ratio_ci95": [1.1, 1.4], "means": [100.0, 101.4], "spreads": [60.0, 61.6]}
    lines = video_page({"tiny-wan, windows/dmd2/5": row | {"overlap": 5}}).splitlines()
    assert lines[-1] == "| dmd2 | 5 | 1.23 [1.10, 1.40] | 100, 101 | 60, 62 |" and lines[0].startswith("4 windows")
