"""Kernel distances, neighbours and the Vendi score: by hand, in closed form, and beside other code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stepdistill.evaluation.metrics import kernel, neighbours
from stepdistill.evaluation.metrics.kernel import cmmd, cubic, kid, mmd
from stepdistill.evaluation.metrics.neighbours import prdc
from stepdistill.evaluation.metrics.vendi import vendi


def normal(n: int, dim: int = 4, seed: int = 0, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# kernels


def test_two_and_two_by_hand():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    own = (2 + 1) ** 3 + (0 + 1) ** 3  # each pair once: its mean over both orders
    across = sum((a * b + 1) ** 3 for a in (1, 2) for b in (0, 3))
    assert mmd(x.double(), y.double(), cubic) == pytest.approx(own - across / 2, abs=1e-12)
    assert kid(x, y, subsets=1, subset_size=2) == (pytest.approx(own - across / 2, abs=1e-12), 0.0)


def test_subsets_of_all_rows_are_the_whole_and_blocks_change_nothing(monkeypatch):
    x, y = normal(50), normal(50, seed=1, mean=0.3)
    whole = mmd(x, y, cubic)
    assert kid(x, y, subsets=3, subset_size=50).value == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(kernel, "BLOCK", 7)
    assert mmd(x, y, cubic) == pytest.approx(whole, rel=1e-12)


def test_it_is_unbiased_and_repeatable():
    """Sets of one law: the mean over many is zero within three standard errors."""
    values = torch.tensor([mmd(normal(20, seed=2 * i), normal(20, seed=2 * i + 1), cubic) for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20
    assert (values < 0).any()
    x, y = normal(60), normal(60, seed=1)
    assert kid(x, y, 5, 20, seed=1) == kid(x, y, 5, 20, seed=1) != kid(x, y, 5, 20, seed=2)


def test_it_is_torchmetrics_kernel():
    from torchmetrics.image.kid import poly_mmd

    x, y = normal(40, 8), normal(40, 8, seed=1, mean=0.2)
    theirs = poly_mmd(x, y)
    assert mmd(x, y, cubic) == pytest.approx(theirs.item(), rel=1e-10)


def test_cmmd_of_two_directions():
    """Two points at a right angle: `2 - 2 exp(-2 / (2 s^2))`, and zero of a set with itself."""
    a, b = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[0.0, 5.0]] * 4)
    assert cmmd(a, b, bandwidth=2.0) == pytest.approx(1000 * (2 - 2 * math.exp(-1 / 4)), rel=1e-12)
    x = normal(30)
    assert abs(cmmd(x, x)) < 1e-9
    assert cmmd(x, normal(30, seed=1, mean=1.0)) > cmmd(x, normal(30, seed=1, mean=0.5)) > 0


# neighbours


def test_far_clusters_have_nothing_in_common():
    assert prdc(normal(30), normal(40, seed=1, mean=100.0)) == (0, 0, 0, 0)


def test_a_set_with_itself_has_all():
    """With the edge inside, density would be (k + 1) / k."""
    x = normal(60, 3)
    found = prdc(x, x, k=5)
    assert found == (1, 1, pytest.approx(1, abs=1e-12), 1)


def test_on_a_line_by_hand():
    """Balls around 0, 1, 3 reach 1, 1, 2; around the samples 0.5, 9, 10 they reach 8.5, 1, 1."""
    real, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0], [10.0]])
    found = prdc(real, samples, k=1)
    assert found == (pytest.approx(1 / 3), 1.0, pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_a_mode_that_is_lost_is_recall_and_not_precision(monkeypatch):
    real = torch.cat([normal(40), normal(40, seed=1, mean=50.0)])
    found = prdc(real, normal(40, seed=2), k=5)
    assert found.precision > 0.8 and found.recall <= 0.5 and found.coverage <= 0.5
    monkeypatch.setattr(neighbours, "BLOCK", 9)
    assert prdc(real, normal(40, seed=2), k=5) == found


# Vendi


def test_as_many_as_there_are_directions():
    assert vendi(torch.eye(5)) == pytest.approx(5, rel=1e-12)
    assert vendi(torch.eye(5).repeat(7, 1)) == pytest.approx(5, rel=1e-9)  # D < N
    assert vendi(torch.tensor([[1.0, 2.0]] * 4)) == pytest.approx(1, rel=1e-9)
    a = torch.tensor([[1.0, 0.0], [math.cos(0.3), math.sin(0.3)]], dtype=torch.float64)
    p = [(1 + math.cos(0.3)) / 2, (1 - math.cos(0.3)) / 2]
    assert vendi(a) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p)), rel=1e-9)


def test_both_ways_agree():
    x = normal(40, 12)
    wide = torch.cat([x, torch.zeros(40, 60, dtype=torch.float64)], dim=1)  # the same cosines, N < D
    assert vendi(x) == pytest.approx(vendi(wide), rel=1e-10)


# what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(normal(20), normal(20)), "expected at least one, of 2 to 20"),
        (lambda: kid(normal(20), normal(20, 5), 1, 10), "got 4 and 5 features a row"),
        (lambda: cmmd(normal(20), normal(20, 5)), "one extractor"),
        (lambda: prdc(normal(5), normal(9)), "choose a smaller k"),
        (lambda: prdc(normal(9, 3), normal(9)), "one extractor"),
        (lambda: vendi(torch.zeros(3, 2)), "3 rows of zeros"),
        (lambda: vendi(torch.tensor([[1.0, math.nan]] * 3)), "NaN or infinity"),
        (lambda: kid(normal(1), normal(20)), "N >= 2"),
    ],
)
def test_odd_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
