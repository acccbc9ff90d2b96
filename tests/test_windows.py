"""Windows of a long video: their arithmetic, and the distribution of the whole against closed forms."""

from __future__ import annotations

import pytest
import torch
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core.errors import ConfigError
from stepdistill.students.draw import latent_drift
from stepdistill.students.draw.latent_drift import Ends, matched_to_first
from stepdistill.students.draw.windows import stitched


def smooth(frames: int, length: float, jitter: float = 1e-3) -> Tensor:
    i = torch.arange(frames, dtype=torch.float64)
    return torch.exp(-0.5 * ((i[:, None] - i) / length) ** 2) + jitter * torch.eye(frames, dtype=torch.float64)


def autoregressive(frames: int, rho: float) -> Tensor:
    i = torch.arange(frames, dtype=torch.float64)
    return rho ** (i[:, None] - i).abs()


def whole(
    covariance: Tensor, frames: int, overlap: int, windows: int, bias: float = 0.0, spread_share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the sequence of exact windows, from the linear maps that the stitcher applies.

    Each window is given to it as a map of the noises of all windows: a sample is a row for each number of noise.
    """
    total = frames + (windows - 1) * (frames - overlap)
    noises = torch.eye(total, dtype=torch.float64)
    used = 0

    def draw(given: Tensor, number: int) -> Tensor:
        nonlocal used
        o = given.shape[2]
        fresh = frames - o
        before, x = covariance[:o, :o], given[:, 0, :, 0, 0]
        gain = covariance[o:frames, :o] @ torch.linalg.inv(before)
        spread = torch.linalg.cholesky(covariance[o:frames, o:frames] - gain @ covariance[:o, o:frames])
        spread = spread * (spread_share if number else 1.0)
        own = noises[used : used + fresh]
        used += fresh
        # rows are the constant and the noises: what multiplies each of them
        new = x @ gain.T + torch.cat([torch.full((1, fresh), bias if number else 0.0).double(), own.T @ spread.T])
        return torch.cat([x, new], 1)[:, None, :, None, None]

    first = torch.zeros(total + 1, 1, dtype=torch.float64)
    first[1, 0] = covariance[0, 0].sqrt()
    used = 1
    rows = stitched(draw, first[:, None, :, None, None], windows, overlap)[:, 0, :, 0, 0]
    return rows[0], rows[1:].T @ rows[1:]


def reference(covariance: Tensor, frames: int, overlap: int, windows: int) -> Tensor:
    """The covariance by the recursion of conditional distributions."""
    total, n = frames + (windows - 1) * (frames - overlap), frames - overlap
    made = torch.zeros(total, total, dtype=torch.float64)
    made[:frames, :frames] = covariance[:frames, :frames]
    gain = covariance[overlap:frames, :overlap] @ torch.linalg.inv(covariance[:overlap, :overlap])
    own = covariance[overlap:frames, overlap:frames] - gain @ covariance[:overlap, overlap:frames]
    for end in range(frames, total, n):
        made[end : end + n, :end] = gain @ made[end - overlap : end, :end]
        made[:end, end : end + n] = made[end : end + n, :end].T
        made[end : end + n, end : end + n] = gain @ made[end - overlap : end, end - overlap : end] @ gain.T + own
    return made


def bend(covariance: Tensor, at: int) -> Tensor:
    """The variance of the second difference around a frame."""
    second = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    return second @ covariance[at - 1 : at + 2, at - 1 : at + 2] @ second


def the_whole_has_the_covariance_of_exact_windows() -> None:
    frames, windows = 9, 4
    for overlap in (1, 2, 3):
        covariance = smooth(frames + (windows - 1) * (frames - overlap), 3.0)
        made = whole(covariance, frames, overlap, windows)[1]
        assert torch.allclose(made, reference(covariance, frames, overlap, windows), atol=1e-8)
        for start in range(0, len(made) - frames + 1, frames - overlap):  # every window is right
            inside = made[start : start + frames, start : start + frames]
            assert torch.allclose(inside, covariance[:frames, :frames], atol=1e-6)


def test_the_whole_has_the_covariance_of_exact_windows():
    """V4."""
    the_whole_has_the_covariance_of_exact_windows()


@pytest.mark.parametrize(("overlap", "expected"), [(1, 5.68), (2, 1.0), (3, 1.0)])
def test_one_frame_carries_no_velocity(overlap, expected):
    """V4: the bend at the seam over that inside; the step there is right for any overlap."""
    covariance = smooth(9 + 3 * (9 - overlap), 3.0)
    made = whole(covariance, 9, overlap, 4)[1]
    assert (bend(made, 8) / bend(covariance, 8)).item() == pytest.approx(expected, abs=0.01)
    step = made[9, 9] - 2 * made[9, 8] + made[8, 8]
    assert step.item() == pytest.approx((2 * covariance[0, 0] - 2 * covariance[0, 1]).item(), abs=1e-6)


def test_a_process_without_memory_beyond_one_frame_is_exact():
    covariance = autoregressive(30, 0.9)
    for overlap in (1, 2):
        made = whole(covariance, 9, overlap, 3)[1]
        assert torch.allclose(made, covariance[: len(made), : len(made)], atol=1e-8)


@pytest.mark.parametrize("rho", [0.85, 0.95])
def test_a_bias_of_each_window_adds_up_to_its_limit(rho):
    """Drift: with a carry-over M a bias b tends to b / (1 - M)."""
    frames, bias = 2, 0.05
    mean = whole(autoregressive(frames + 200, rho), frames, 1, 150, bias)[0]
    carried = [bias * (1 - rho**k) / (1 - rho) for k in (1, 4, 149)]
    assert [mean[1 + k].item() for k in (1, 4, 149)] == pytest.approx(carried, rel=1e-6)
    assert mean[-1].item() == pytest.approx(bias / (1 - rho), rel=1e-3)


@pytest.mark.parametrize("rho", [0.85, 0.95])
def test_a_spread_that_is_too_small_shrinks_the_variance_to_its_square(rho):
    """Drift: what is new in each window has .9 of its spread, and the variance tends to .81, by a geometric series."""
    covariance = whole(autoregressive(202, rho), 2, 1, 150, spread_share=0.9)[1]
    for k in (0, 1, 4, 149):
        expected = rho ** (2 * k) + 0.81 * (1 - rho ** (2 * k))
        assert covariance[1 + k, 1 + k].item() == pytest.approx(expected, rel=1e-6)
    assert covariance[-1, -1].item() == pytest.approx(0.81, rel=1e-3)


RHO, BIAS, SHARE, PLACES, WINDOWS = 0.85, 0.05, 0.9, 20_000, 25


def drifting(held: int, new: int) -> tuple[Tensor, Ends]:
    """The first window (1, 2, held + new, PLACES, 1) of an autoregressive process at many places, and the later ones.

    Each later window adds a bias to the first channel, and has too small a spread in the second. Their means differ.
    """
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, -1.0]).double().view(1, 2, 1, 1, 1)

    def following(given: Tensor, count: int, bias: float, share: float) -> Tensor:
        frames = [given - mean]
        for _ in range(count):
            fresh = torch.randn(1, 2, 1, PLACES, 1, generator=generator).double() * (1 - RHO**2) ** 0.5
            fresh[:, 1] *= share
            frames.append(RHO * frames[-1][:, :, -1:] + fresh)
            frames[-1][:, 0] += bias
        return torch.cat(frames, 2) + mean

    begin = mean + torch.randn(1, 2, 1, PLACES, 1, generator=generator).double()
    return following(begin, held + new - 1, 0.0, 1.0), lambda given, number: following(given, new, BIAS, SHARE)


def stitched_drift(held: int, new: int, *, match: bool) -> Tensor:
    """The whole of it, through an autoencoder that changes nothing."""
    first, ends = drifting(held, new)
    made = matched_to_first(ends, first, held) if match else ends
    return stitched(lambda given, number: made(given, number) if number else first, torch.empty(0), WINDOWS, held)


def a_planted_drift_is_there_and_vanishes() -> None:
    free, bound = (stitched_drift(1, 1, match=match) for match in (False, True))
    assert torch.equal(free[:, :, :2], bound[:, :, :2])
    means, held_means = (video[0, ..., 0].mean(2).T for video in (free, bound))  # (frames, 2)
    spreads, held_spreads = (video[0, ..., 0].std(2, correction=0).T for video in (free, bound))
    for k in (1, 4, WINDOWS - 1):  # frame 1 + k is the k-th that a later window adds
        left = RHO ** (2 * k)
        assert means[1 + k].tolist() == pytest.approx([3 + BIAS * (1 - RHO**k) / (1 - RHO), -1], abs=0.03)
        assert spreads[1 + k].square().tolist() == pytest.approx([1, left + SHARE**2 * (1 - left)], abs=0.03)
    assert torch.allclose(held_means[1:], held_means[1].expand(WINDOWS, 2), rtol=0, atol=1e-9)
    assert torch.allclose(held_spreads[1:], held_spreads[1].expand(WINDOWS, 2), rtol=0, atol=1e-9)
    # what a window knows of the one before is carried on
    across = torch.stack([torch.corrcoef(bound[0, c, 20:22, :, 0])[0, 1] for c in (0, 1)])
    slack = (RHO**2 + SHARE**2 * (1 - RHO**2)) ** 0.5
    assert across.tolist() == pytest.approx([RHO, RHO / slack], abs=0.01)


def test_a_planted_drift_is_there_and_vanishes_where_windows_are_matched():
    """Drift: a bias adds up to b / (1 - M) and a spread shrinks to its share, but not where windows are matched."""
    a_planted_drift_is_there_and_vanishes()


def the_overlap_stays_and_each_sample_has_its_own() -> None:
    first, ends = drifting(2, 3)
    both = torch.cat([first, 10 - 2 * first])
    latents = ends(first[:, :, -2:], 1)
    latents = torch.cat([latents, latents + 1])
    made = matched_to_first(lambda given, number: latents, both, 2)(both, 1)
    assert torch.equal(made[:, :, :2], latents[:, :, :2])
    (means, spreads), (expected, unit) = (
        (part.mean((2, 3, 4)), part.std((2, 3, 4), correction=0)) for part in (made[:, :, 2:], both[:, :, 2:])
    )
    assert torch.allclose(means, expected, rtol=0, atol=1e-9)
    assert torch.allclose(spreads, unit, rtol=0, atol=1e-9)
    level = matched_to_first(lambda given, number: torch.full_like(both, 7.0), both, 2)(both, 1)[:, :, 2:]
    assert torch.allclose(level, expected[:, :, None, None, None].expand_as(level), rtol=0, atol=1e-9)


def test_the_overlap_stays_and_each_sample_has_its_own_statistics():
    the_overlap_stays_and_each_sample_has_its_own()


def test_frames_are_neither_lost_nor_doubled():
    def draw(given: Tensor, number: int) -> Tensor:
        start = given[0, 0, 0].item()
        assert torch.equal(given, torch.arange(start, start + given.shape[2])[None, None].float())
        return torch.arange(start, start + 9)[None, None].float()

    for overlap, windows in ((1, 4), (3, 3), (8, 2), (5, 1)):
        video = stitched(draw, torch.zeros(1, 1, 1), windows, overlap)
        assert video[0, 0].tolist() == list(range(9 + (windows - 1) * (9 - overlap)))
    for overlap in (0, 9, 12):
        with pytest.raises(ConfigError, match=f"an overlap of {overlap} frames, expected 1 to 8"):
            stitched(draw, torch.zeros(1, 1, 1), 2, overlap)


BUGS = {
    "the overlap is kept twice": Bug(
        stitched, "[:, :, overlap:]], 2)", "], 2)", test_frames_are_neither_lost_nor_doubled
    ),
    "the first frames are given": Bug(
        stitched, "video[:, :, -overlap:]", "video[:, :, :overlap]", test_frames_are_neither_lost_nor_doubled
    ),
    "means alone are matched": Bug(
        matched_to_first,
        "spreads / own.spreads.clamp_min(LEAST_SPREAD)",
        "torch.ones_like(spreads)",
        a_planted_drift_is_there_and_vanishes,
    ),
    "spreads alone are matched": Bug(
        matched_to_first, "means - own.means * scale", "own.means * (1 - scale)", a_planted_drift_is_there_and_vanishes
    ),
    "a mean that is not scaled": Bug(
        matched_to_first, "means - own.means * scale", "means - own.means", a_planted_drift_is_there_and_vanishes
    ),
    "the image is among the statistics": Bug(
        matched_to_first, "first[:, :, held:]", "first", the_overlap_stays_and_each_sample_has_its_own
    ),
    "the overlap is moved, too": Bug(
        matched_to_first,
        "tensor_split([held], 2)",
        "tensor_split([0], 2)",
        the_overlap_stays_and_each_sample_has_its_own,
    ),
    "channels are matched together": Bug(
        latent_drift.channel_statistics,
        "latents.flatten(2)",
        "latents.flatten(1)[:, None].expand(-1, latents.shape[1], -1)",
        a_planted_drift_is_there_and_vanishes,
    ),
    "samples are matched together": Bug(
        latent_drift.channel_statistics,
        "latents.flatten(2)",
        "latents.transpose(0, 1).flatten(1)[None].expand(len(latents), -1, -1)",
        the_overlap_stays_and_each_sample_has_its_own,
    ),
    "one frame is given": Bug(
        stitched, "video[:, :, -overlap:]", "video[:, :, -1:]", the_whole_has_the_covariance_of_exact_windows
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError, IndexError)
