"""Closed forms that the methods must reach, and a way to run a method's own updates against them."""

import torch
from torch import Tensor


def close(actual, expected, atol: float = 1e-9) -> None:
    """Assert that two numbers, lists or tensors differ by `atol` at most, anywhere."""
    a, b = (v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (actual, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)
