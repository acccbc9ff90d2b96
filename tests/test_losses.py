"""Distances, by their definitions."""

from __future__ import annotations

import pytest
import torch
from oracles import close

from stepdistill.core.losses import distance

A = torch.tensor([[0.0, 3.0], [-1.0, 2.0]])
B = torch.tensor([[0.0, 0.0], [1.0, 2.5]])


def test_squared():
    close(distance("l2", A, B), (9 + 4 + 0.25) / 4)


def test_huber_is_squared_when_small_and_absolute_when_large():
    c = 1e-3
    close(distance("huber", A, B, c), sum((d * d + c * c) ** 0.5 - c for d in (0, 3, 2, 0.5)) / 4, 1e-6)
    close(distance("huber", A, B, c), (A - B).abs().mean(), c)
    close(distance("huber", A.double(), B.double(), 1e3) * 2e3, distance("l2", A, B), 1e-4)  # d^2 / 2c


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_equal_is_zero_with_a_zero_gradient(kind):
    a = A.clone().requires_grad_()
    loss = distance(kind, a, A)
    loss.backward()
    assert loss.item() == 0 and a.grad.abs().max() == 0


def test_half_precision_is_compared_in_float32_and_double_is_kept():
    a, b = (v.to(torch.bfloat16) for v in (A * 100, A * 100 - 0.25))
    assert distance("l2", a, b).dtype == torch.float32
    close(distance("l2", a, b), (a.double() - b.double()).square().mean(), 1e-6)
    assert distance("l2", A.double(), B.double()).dtype == torch.float64


def test_an_unknown_distance_is_named():
    with pytest.raises(ValueError, match="'l1': expected l2 or huber"):
        distance("l1", A, B)
