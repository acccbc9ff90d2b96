"""The cost of sampling: forward calls, network evaluations and seconds, counted by a forward hook."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Cost:
    """Counts of one `count_calls` block; `rows` / images is the nfe per image.

    calls: forward invocations. rows: batch rows summed over the calls, so that a guided step counts twice.
    seconds: wall-clock time of the whole block, whatever ran in it, set when the block ends.
    batches: number of image batches, counted by the caller; `calls` / `batches` is the number of calls for one image.
    """

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0
    batches: int = 0


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Cost]:
    """Count the calls of `module(...)` within the block by a forward hook, removed at its end.

    A call's rows are the length of its first argument that is a list, or a tensor with at least two dimensions, which
    passes over timesteps. Raises ValueError from within a call that has no such argument.
    """
    cost = Cost()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        cost.calls += 1
        cost.rows += _batch_rows(module, args, kwargs)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    _synchronise()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        handle.remove()
        _synchronise()
        cost.seconds = time.perf_counter() - start


def _batch_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim >= 2):
            return len(value)
    raise ValueError(
        f"count_calls saw {type(module).__name__} called without a list or a tensor of two or more dimensions, "
        "expected a batch: nfe is counted in batch rows; hook the denoiser, not a module around it"
    )


def _synchronise() -> None:
    # queued kernels would otherwise be timed by whoever waits for them next
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
