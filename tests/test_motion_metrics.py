"""Metrics of clips: by hand, in closed form, and on moving drawings that are broken on purpose."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracles.clips import MOTIONS, frozen, moving, slowed
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.evaluation.metrics import motion as metrics
from stepdistill.evaluation.metrics.encoders import pixel_features
from stepdistill.evaluation.metrics.features import efficientnet_lite0
from stepdistill.evaluation.metrics.jackknife import interval, ratio_of_means, replicates
from stepdistill.evaluation.metrics.motion import (
    frame_consistency,
    frame_features,
    image_distance,
    motion,
    motion_features,
    replicates_by_group,
    seam_bend,
)

N = 60


def plain(*levels: int, side: int = 8) -> Tensor:
    """One clip (1, F, 3, side, side) of plain frames."""
    return torch.tensor(levels, dtype=torch.uint8).reshape(1, -1, 1, 1, 1).expand(-1, -1, 3, side, side).contiguous()


# by hand


def by_hand() -> None:
    """Mean differences have no sign and do not wrap around; the first frame and its image."""
    clips = torch.cat([plain(0, 255, 250), plain(7, 7, 7)])
    assert motion(clips).tolist() == [130.0, 0.0]
    assert ratio_of_means(motion(clips.repeat(10, 1, 1, 1, 1)), torch.full((20,), 65.0), 5).value == 1.0
    images = torch.cat([plain(5), plain(9)])[:, 0]
    assert image_distance(clips, images).tolist() == [250.0, 2.0]
    assert image_distance(clips, images, 0).tolist() == [5.0, 2.0]


def grey_differences() -> None:
    """`127 + d / 2` of both ends of the range, mean over the clip; reversed it is mirrored about 127."""
    pixels = pixel_features()  # the first 192 are colours of an 8 x 8 grid, of 255
    clips = torch.cat([plain(0, 255, 255), plain(255, 0, 0), plain(10, 13, 20)])
    grey = 255 * motion_features(pixels, clips)[:, 0]
    torch.testing.assert_close(grey, torch.tensor([(254 + 127) / 2, (0 + 127) / 2, (128 + 130) / 2]))
    there = 255 * motion_features(pixels, moving(8, 1))[:, :192] - 127
    back = 255 * motion_features(pixels, moving(8, 1).flip(1))[:, :192] - 127
    torch.testing.assert_close(there, -back, atol=1e-3, rtol=0)
    assert there.abs().max() > 1


def one_frame_a_clip() -> None:
    """Every frame is drawn, equally often, by the clip's number alone."""
    levels = (
        255 * frame_features(pixel_features(), plain(0, 50, 100, 150).expand(400, -1, -1, -1, -1), range(400))[:, 0]
    )
    counts = [(levels.round() == level).sum().item() for level in (0, 50, 100, 150)]
    assert sum(counts) == 400 and min(counts) > 70
    later = frame_features(pixel_features(), plain(0, 50, 100, 150).expand(7, -1, -1, -1, -1), range(100, 107))
    torch.testing.assert_close(255 * later[:, 0], levels[100:107])


def consistency() -> None:
    """Of directions at 0, 60 and 120 degrees: adjacent cosines are 1/2, those with the first 1/2 and -1/2."""
    turn = torch.tensor([0.0, 60.0, 120.0]).deg2rad()
    features = torch.stack([turn.cos(), turn.sin()], 1)[None] * torch.tensor([[[1.0], [5.0], [2.0]]])
    adjacent, first = frame_consistency(features)
    torch.testing.assert_close(adjacent, torch.tensor([0.5]))
    torch.testing.assert_close(first, torch.tensor([0.0]))


def process(n: int, window: int, overlap: int, windows: int) -> Tensor:
    """Draws (n, T) of a smooth Gaussian process (RBF of length 3) by windows, each exact given the overlap before."""
    time = torch.arange(window, dtype=torch.float64)
    cov = (-(time[:, None] - time).square() / 18).exp() + 1e-3 * torch.eye(window, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(n, count, generator=generator, dtype=torch.float64)

    drawn = draw(window) @ torch.linalg.cholesky(cov).T
    known, new = cov[:overlap, :overlap], cov[overlap:, :overlap]
    carry = new @ torch.linalg.inv(known)
    spread = torch.linalg.cholesky(cov[overlap:, overlap:] - carry @ new.T)
    for _ in range(windows - 1):
        drawn = torch.cat([drawn, drawn[:, -overlap:] @ carry.T + draw(window - overlap) @ spread.T], 1)
    return drawn


def bends_of_windows() -> None:
    """One frame of overlap bends 5.68 times as much as the process itself, two and more do not; and by hand."""
    for overlap, expected in ((1, 5.68), (2, 1.0), (4, 1.0)):
        seam, inside = seam_bend(process(4000, 9, overlap, 4), 9, overlap)
        assert seam.mean() / inside.mean() == pytest.approx(expected, rel=0.08)
    kinked = torch.tensor([0.0, 1, 2, 3, 4, 3, 2, 1, 1]).reshape(1, 9, 1, 1)  # windows of 5 with one frame of overlap
    seam, inside = seam_bend(kinked, 5, 1)
    assert seam.tolist() == [4.0] and inside.tolist() == pytest.approx([1 / 6])


def groups_apart() -> None:
    """Replicates of a group are those of its own rows; blocks of the mean hold samples of all groups."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(60, 3, generator=generator) for _ in range(2)]
    ref, groups = torch.randn(60, 3, generator=generator), torch.arange(60) % 3
    values, sizes = replicates_by_group(rows, ref, groups)
    assert sizes == [6] * 10 and sorted(values) == [0, 1, 2]
    for group, value in values.items():
        alone = replicates([row[groups == group] for row in rows], ref[groups == group], 10)
        torch.testing.assert_close(value, alone, rtol=0, atol=0)


METRICS = {
    "differences as bytes": Bug(metrics._differences, "clip[1:].to(torch.int16)", "clip[1:].to(torch.int8)", by_hand),
    "signs kept": Bug(metrics.motion, ".abs()", "", by_hand),
    "the image's own frame": Bug(metrics.image_distance, "clips[:, frame]", "clips[:, 0]", by_hand),
    "halves not taken": Bug(metrics._difference_images, "/ 2", "/ 1", grey_differences),
    "halves rounded up": Bug(metrics._difference_images, "/ 2).round()", "/ 2 + 0.5).floor()", grey_differences),
    "of the last pair": Bug(metrics.motion_features, ".mean(0)", "[-1]", grey_differences),
    "the first frame": Bug(metrics.frame_features, "[f]", "[0]", one_frame_a_clip),
    "by the place in the batch": Bug(
        metrics.frame_features, "in numbers]", "in range(len(numbers))]", one_frame_a_clip
    ),
    "with the frame before": Bug(metrics.frame_consistency, "features[:, :1]", "features[:, :-1]", consistency),
    "adjacent with the first": Bug(metrics.frame_consistency, "features[:, :-1]", "features[:, :1]", consistency),
    "a seam too late": Bug(metrics.seam_bend, "[window - 2 :: new]", "[window - 1 :: new]", bends_of_windows),
    "one seam": Bug(metrics.seam_bend, "[window - 2 :: new]", "[window - 2]", bends_of_windows),
    "a step for a bend": Bug(metrics._bends, "- 2 * x[1:-1] + x[:-2]", "- x[1:-1]", bends_of_windows),
    "all groups alike": Bug(metrics.replicates_by_group, "ref[own]", "ref[: len(own)]", groups_apart),
    "blocks of one group": Bug(metrics.replicates_by_group, "sum(", "max(", groups_apart),
}
test_by_hand_and_in_closed_form, test_planted_bugs_are_noticed = bug_tests(METRICS)


# moving drawings


@cache
def features_of(kind: str) -> tuple[Tensor, Tensor]:
    """Of frames and of motion; the reference has other seeds."""
    clips = moving(N, 1 if kind == "reference" else 2)
    clips = {"frozen": frozen, "half speed": slowed, "reversed": lambda x: x.flip(1)}.get(kind, lambda x: x)(clips)
    extractor = efficientnet_lite0(32)
    return frame_features(extractor, clips, range(N)), motion_features(extractor, clips)


def test_motion_ranks_slow_and_frozen_clips():
    """The floor < half speed < frozen, each difference clear of chance; frames alone cannot tell them apart."""
    kinds = ("clean", "half speed", "frozen")
    distances = replicates([features_of(kind)[1] for kind in kinds], features_of("reference")[1])
    sizes = [3] * 20
    floor = distances[0, 0].item()
    slow, still = (interval(distances[k] - distances[0], sizes) for k in (1, 2))
    assert slow.low > 0 and interval(distances[2] - distances[1], sizes).low > 0
    assert still.value > 2 * floor
    frames = replicates([features_of(kind)[0] for kind in kinds], features_of("reference")[0])[:, 0].tolist()
    assert max(frames) < 1.2 * frames[0]


def test_only_the_split_by_motion_sees_reversal():
    """As many clips move left as right, so that the law of all is its own reverse."""
    clips, pixels = moving(240, 2), pixel_features()
    rows, ref = [motion_features(pixels, x) for x in (clips, clips.flip(1))], motion_features(pixels, moving(240, 1))
    pooled = replicates(rows, ref)
    values, sizes = replicates_by_group(rows, ref, torch.arange(240) % len(MOTIONS))
    split = torch.stack([value[1] - value[0] for value in values.values()]).mean(0)
    floor, whole, apart = pooled[0, 0].item(), interval(pooled[1] - pooled[0], [12] * 20), interval(split, sizes)
    assert abs(whole.value) < 0.2 * floor and apart.low > 5 * floor


def test_motion_ratios_of_slow_and_frozen_clips():
    clips = moving(N, 2, frames=9)
    assert ratio_of_means(motion(slowed(clips)), motion(clips)).value == pytest.approx(0.5, abs=0.05)
    assert ratio_of_means(motion(frozen(clips)), motion(clips)).value == 0
    assert ratio_of_means(motion(clips.flip(1)), motion(clips)).value == pytest.approx(1)


# what is refused


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: motion(plain(0, 1) / 255), TypeError, "expected uint8"),
        (lambda: motion(plain(0, 1)[:, :1]), ValueError, "one frame has no motion"),
        (lambda: motion(plain(0, 1).transpose(1, 2)), ValueError, "frames come before channels"),
        (lambda: motion_features(pixel_features(), plain(0, 1)[0]), ValueError, "N, F, 3, H, W"),
        (lambda: frame_features(pixel_features(), plain(0, 1)[0], [0]), ValueError, "N, F, 3, H, W"),
        (lambda: image_distance(plain(0, 1), plain(0, 1, side=4)[:, 0]), ValueError, "its own image"),
        (lambda: seam_bend(torch.zeros(1, 9), 9, 2), ValueError, "got 9 frames of windows of 9 with overlap 2"),
        (lambda: seam_bend(torch.zeros(1, 17), 9, 2), ValueError, "window \\+ k"),
        (lambda: seam_bend(torch.zeros(1, 17), 9, 0), ValueError, "overlap 0"),
        (
            lambda: replicates_by_group([torch.zeros(12, 2)], torch.zeros(12, 2), torch.arange(12) % 2),
            ValueError,
            "6 samples of group 0, expected 10 or more",
        ),
    ],
)
def test_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
