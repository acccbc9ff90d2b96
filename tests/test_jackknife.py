"""Intervals: block updates beside brute force, closed forms, and what they cover where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.excess import excess
from scipy.stats import t as student_t
from torch import Tensor

from stepdistill.evaluation.metrics.diversity import diversity_replicates, fewest_outside
from stepdistill.evaluation.metrics.frechet import (
    feature_diversity,
    frechet,
    frechet_terms,
)
from stepdistill.evaluation.metrics.jackknife import (
    block_sizes,
    difference_of_means,
    interval,
    mean_interval,
    noise_floor,
    replicates,
)
from stepdistill.evaluation.metrics.stats import Stats


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(seed: int, n: int, dim: int) -> Tensor:
    """Correlated features about a mean of their own."""
    return normal(seed, n, dim) @ (torch.eye(dim) + 0.3 * normal(99, dim, dim) / dim**0.5).double() + 0.1 * seed


def fixed(x: Tensor) -> Stats:
    """The Gaussian of features as a file has it: mean and covariance alone."""
    found = Stats.of(x)
    return Stats(found.mean, found.cov, found.n)


def sampled(x: Tensor) -> Stats:
    """The Gaussian of features with their rows at N = D too, where the covariance has lost one direction."""
    found = Stats.of(x)
    return Stats(found.mean, found.cov, found.n, x - found.mean) if len(x) <= x.shape[1] else found


def brute(rows: list[Tensor], ref: Tensor | Stats, blocks: int) -> Tensor:
    """Replicates with everything made anew from the kept rows."""
    parts = [torch.arange(0), *torch.arange(len(rows[0])).tensor_split(blocks)]
    values = torch.empty(len(rows), len(parts), dtype=torch.float64)
    for k, block in enumerate(parts):
        kept = torch.ones(len(rows[0]), dtype=torch.bool).index_fill(0, block, False)
        rest = ref if isinstance(ref, Stats) else Stats.of(ref[kept])
        values[:, k] = torch.tensor([frechet(sampled(row[kept]), rest) for row in rows], dtype=torch.float64)
    return values


# replicates


@pytest.mark.parametrize(
    ("n", "dim", "blocks"),
    [(30, 50, 6), (31, 50, 7), (50, 50, 8), (53, 50, 5), (61, 50, 9), (200, 50, 20), (203, 16, 20)],
)
def test_replicates_equal_recomputation_from_the_kept_rows(n, dim, blocks):
    """Equal and unequal blocks; N below, at and above D, and below it only without a block."""
    rows, ref = [features(1, n, dim), features(2, n, dim) * 1.1], fixed(features(3, 400, dim))
    got = replicates(rows, ref, blocks)
    assert got.shape == (2, 1 + blocks) and got.dtype == torch.float64
    torch.testing.assert_close(got, brute(rows, ref, blocks), rtol=1e-9, atol=0)


@pytest.mark.parametrize("few", [12, 30])
def test_a_fixed_reference_may_have_fewer_samples_than_dimensions(few):
    rows, ref = [features(1, 40, 60)], Stats.of(features(3, few, 60))
    assert ref.root.shape == (few, 60)
    torch.testing.assert_close(replicates(rows, ref, 6), brute(rows, ref, 6), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("n", "dim"), [(40, 60), (40, 40), (90, 40)])
def test_a_reference_of_the_same_prompts_loses_the_block_too(n, dim):
    rows, ref = [features(1, n, dim), features(2, n, dim) * 1.1], features(3, n, dim)
    torch.testing.assert_close(replicates(rows, ref, 7), brute(rows, ref, 7), rtol=1e-7, atol=0)


@pytest.mark.parametrize("n", [20, 60])
def test_translation_scaling_and_identity(n):
    x, t = features(1, n, 32), normal(2, 32)
    rows = [x + t, 1.5 * x - 0.5 * x.mean(0), x]
    for ref in (fixed(x), x):  # of a fixed one the first column alone has a closed form
        moved, grown, same = replicates(rows, ref, 5)
        trace = x.var(0).sum().item()
        assert moved[0].item() == pytest.approx((t @ t).item(), rel=1e-7)
        assert grown[0].item() == pytest.approx(0.25 * trace, rel=1e-7)
        assert abs(same[0].item()) < 1e-6 * trace
    assert moved.tolist() == pytest.approx([(t @ t).item()] * 6, rel=1e-7)
    assert same.abs().max() < 1e-6 * trace


@pytest.mark.parametrize("n", [10, 50])
def test_duplicated_samples_show_ddof_one(n):
    x = features(1, n, 16)
    r = 2 * (n - 1) / (2 * n - 1)
    want = (1 - math.sqrt(r)) ** 2 * x.var(0).sum().item()
    got = replicates([torch.cat([x, x])], Stats.of(x), 5)[0, 0].item()
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("n", [20, 200])
def test_rotation_a_common_shift_and_a_common_scale(n):
    x, y = features(1, n, 32), features(2, 300, 32)
    q, t = torch.linalg.qr(normal(3, 32, 32))[0], normal(4, 32)
    want = replicates([x], fixed(y), 5)
    torch.testing.assert_close(replicates([x @ q + t], fixed(y @ q + t), 5), want, rtol=1e-9, atol=0)
    torch.testing.assert_close(replicates([3 * x], fixed(3 * y), 5), 9 * want, rtol=1e-9, atol=0)
    torch.testing.assert_close(replicates([x + 1e6], fixed(y + 1e6), 5), want, rtol=1e-7, atol=0)


# intervals


def test_the_mean_of_scores_has_its_standard_error():
    """Blocks of two: the t-interval of their means."""
    x = normal(0, 40)
    got, blocks = mean_interval(x), x.view(20, 2).mean(1)
    half = student_t.ppf(0.975, 19) * blocks.std().item() / math.sqrt(20)
    want = x.mean().item()
    assert (got.value, got.low, got.high) == pytest.approx((want, want - half, want + half), rel=1e-5)
    assert got.corrected == pytest.approx(want, rel=1e-9)  # a mean has no bias


def test_equal_seeds_tighten_the_difference_of_means():
    shared = normal(0, 200)
    a, b = 30 + shared + 0.1 * normal(1, 200), 29 + shared + 0.1 * normal(2, 200)
    got = difference_of_means(a.float(), b.float())
    assert got.value == pytest.approx((a - b).mean().item(), abs=1e-5)
    assert got.low < 1 < got.high
    alone = mean_interval(a)
    assert got.high - got.low < 0.3 * (alone.high - alone.low)


def test_intervals_are_linear_in_the_replicates():
    """A difference's value and centre are differences; a row less itself is zero, without spread."""
    rows, ref = [features(1, 60, 8), features(2, 60, 8)], fixed(features(3, 90, 8))
    found, sizes = replicates(rows, ref, 7), block_sizes(60, 7)
    assert sizes == [9, 9, 9, 9, 8, 8, 8]
    one, other, both = interval(found[0], sizes), interval(found[1], sizes), interval(found[0] - found[1], sizes)
    assert both.value == pytest.approx(one.value - other.value, rel=1e-12)
    assert both.corrected == pytest.approx(one.corrected - other.corrected, rel=1e-9)
    assert both.value == pytest.approx(frechet(Stats.of(rows[0]), ref) - frechet(Stats.of(rows[1]), ref), rel=1e-9)
    nothing = interval(found[0] - found[0], sizes)
    assert (nothing.value, nothing.low, nothing.high, nothing.corrected) == (0, 0, 0, 0)
    assert excess(rows[0], rows[1], rows[1], 7).value == pytest.approx(
        frechet(Stats.of(rows[0]), Stats.of(rows[1])), rel=1e-7
    )


def test_known_population():
    """O14: coverage of the expected and of the population's distance, the bias that goes, the gain of shared seeds."""
    n, dim, reps = 256, 8, 120
    ref = Stats(torch.zeros(dim).double(), torch.eye(dim).double(), 0)
    scale = {"student": torch.linspace(0.7, 1.2, dim).double(), "teacher": torch.linspace(0.75, 1.2, dim).double()}
    truth = {name: (each - 1).square().sum().item() for name, each in scale.items()}
    truth = {"student": truth["student"] + 0.04 * dim, "teacher": truth["teacher"]}
    sizes, found, shared, apart = block_sizes(n), [], [], []
    for i in range(reps):
        noise, other = normal(2 * i, n, dim), normal(2 * i + 1, n, dim)
        drawn = [noise * scale["student"] + 0.2, noise * scale["teacher"], other * scale["teacher"]]
        student, teacher, unpaired = replicates(drawn, ref)
        found.append(interval(student, sizes))
        shared.append(interval(student - teacher, sizes))
        apart.append(interval(student - unpaired, sizes))

    def mean(values):
        return torch.tensor(list(values), dtype=torch.float64).mean().item()

    raw, corrected = mean(each.value for each in found), mean(each.corrected for each in found)
    assert abs(corrected - truth["student"]) < 0.2 * abs(raw - truth["student"])
    assert mean(each.low <= raw <= each.high for each in found) >= 0.9
    at_truth = mean(abs(each.corrected - truth["student"]) <= each.high - each.value for each in found)
    assert at_truth >= 0.9
    delta = truth["student"] - truth["teacher"]
    assert mean(abs(each.corrected - delta) <= each.high - each.value for each in shared) >= 0.9
    spread = [torch.tensor([each.value for each in many]).std().item() for many in (shared, apart)]
    widths = [mean(each.high - each.low for each in many) for many in (shared, apart)]
    assert spread[0] < 0.8 * spread[1] and widths[0] < 0.8 * widths[1]


# the terms


def test_terms_are_those_of_mean_and_covariance():
    a = Stats(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4, 9])).double(), 9)
    b = Stats(torch.tensor([1.0, 2, 2]).double(), torch.diag(torch.tensor([4.0, 4, 1])).double(), 9)
    assert frechet_terms(a, b) == (9, 5)
    x, y = features(1, 20, 32), features(2, 70, 32)
    for row in (Stats.of(x), fixed(x)):
        mean, cov = frechet_terms(row, fixed(y))
        assert mean == pytest.approx((x.mean(0) - y.mean(0)).square().sum().item(), rel=1e-12)
        assert mean + cov == frechet(row, fixed(y))


# the noise floor


def test_floor_of_an_isotropic_reference():
    """O13 with one sampled side: d / n + d (d + 1) / (4 (n - 1)), times the variance."""
    ref = Stats(normal(0, 32), 2 * torch.eye(32).double(), 0)
    assert noise_floor(ref, 200) == pytest.approx(2 * (32 / 200 + 32 * 33 / (4 * 199)), rel=1e-12)


@pytest.mark.parametrize(("n", "rel"), [(10, 0.03), (16, 0.03), (31, 0.03), (32, 0.06), (200, 0.02)])
def test_floor_is_the_mean_distance_of_drawn_samples(n, rel):
    """By draws below two samples a dimension (n < 32), by the formula from there."""
    spread, mean = normal(99, 16, 16), normal(98, 16)
    ref = Stats(mean, spread.T @ spread, 0)
    drawn = [frechet(Stats.of(normal(i, n, 16) @ spread + mean), ref) for i in range(400)]
    assert noise_floor(ref, n) == pytest.approx(sum(drawn) / 400, rel=rel)


def test_floor_counts_no_dimension_without_variance():
    few = Stats.of(features(1, 12, 40))
    wide = Stats(few.mean, few.cov, 12)
    assert noise_floor(few, 100) == pytest.approx(noise_floor(wide, 100), rel=1e-9)
    assert noise_floor(few, 6) == pytest.approx(noise_floor(wide, 6), rel=0.05)
    assert noise_floor(few, 6) == noise_floor(few, 6)


# what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: replicates([normal(0, 40, 4), normal(0, 39, 4)], fixed(normal(1, 9, 4))), ValueError, "equal N"),
        (lambda: replicates([normal(0, 40, 4)], normal(1, 39, 4)), ValueError, "draw the same prompts"),
        (lambda: replicates([normal(0, 40, 4)], fixed(normal(1, 9, 5))), ValueError, "one extractor"),
        (lambda: replicates([], fixed(normal(1, 9, 5))), ValueError, "got features of shapes \\[\\]"),
        (lambda: replicates([normal(0, 30, 4)], fixed(normal(1, 9, 4))), ValueError, "blocks=20 for N=30"),
        (lambda: replicates([normal(0, 30, 4)], fixed(normal(1, 9, 4)), 4), ValueError, "blocks=4 for N=30"),
        (lambda: block_sizes(30), ValueError, "blocks=20 for N=30"),
        (lambda: interval(normal(0, 20), [2] * 20), ValueError, "shape \\(20,\\) for 20 blocks"),
        (lambda: interval(normal(0, 5), [2] * 4), ValueError, "five blocks or more"),
        (lambda: mean_interval(torch.arange(40)), TypeError, "torch.int64"),
        (lambda: mean_interval(normal(0, 40, 1)), ValueError, "expected \\(N,\\)"),
        (lambda: mean_interval(torch.tensor([1.0, math.nan] * 20)), ValueError, "20 NaN"),
        (lambda: difference_of_means(normal(0, 40), normal(0, 41)), ValueError, "one prompt and seed"),
        (lambda: noise_floor(fixed(normal(1, 9, 4)), 1), ValueError, "n=1"),
    ],
)
def test_odd_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# diversity


def test_diversity_without_each_block_is_made_anew():
    x, index = features(3, 61, 5), torch.arange(61) % 7
    for blocks in (5, 20):
        found = diversity_replicates(x, index, blocks)
        parts = [torch.arange(0), *torch.arange(61).tensor_split(blocks)]
        kept = [torch.ones(61, dtype=torch.bool).index_fill(0, part, False) for part in parts]
        brute = [feature_diversity(x[k], index[k]) for k in kept]
        torch.testing.assert_close(found, torch.tensor(brute, dtype=torch.float64), rtol=1e-10, atol=0)
    same = diversity_replicates(torch.ones(40, 3), torch.arange(40) % 2)
    assert same.abs().max() == 0  # equal images
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(0))[index]  # other numbers for the prompts
    torch.testing.assert_close(diversity_replicates(x, shuffled, 5), diversity_replicates(x, index, 5))
    for blocks in (5, 20):
        parts = torch.arange(61).tensor_split(blocks)
        outside = [((index == p).sum() - (index[part] == p).sum()).item() for p in range(7) for part in parts]
        assert fewest_outside(index, blocks) == min(outside)
    with pytest.raises(ValueError, match="1 samples of prompt 3 outside of block 1"):
        diversity_replicates(x, torch.tensor([3, *[0] * 59, 3]), 5)


def test_the_interval_of_diversity_covers_its_law():
    """Pairwise distances of normals of one dimension: E|a - b| = 2 / sqrt(pi)."""
    index, covered = torch.arange(200) % 4, 0
    for seed in range(200):
        found = interval(diversity_replicates(normal(seed, 200, 1), index), block_sizes(200))
        covered += found.low <= 2 / math.sqrt(math.pi) <= found.high
    assert 0.9 <= covered / 200 <= 0.99
