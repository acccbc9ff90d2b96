"""Where to compute, and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepdistill.core.errors import ConfigError, problem


def usable_device(name: str | None, default: torch.device | str | None = None) -> torch.device:
    """A device by name.

    Args:
        default: of no name; None is the first GPU, or the CPU.

    Raises:
        ConfigError: the device is unknown, or not there.
    """
    wanted = name or default or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).cpu()  # a tensor on `meta` has nothing to copy
    except (RuntimeError, AssertionError) as error:  # the second is of a torch without CUDA
        why, todo = str(error).splitlines()[0].rstrip("."), "name another, such as cpu, or leave it out"
        raise ConfigError(problem(f"device {wanted}", "a device that is there", why, todo)) from error
    return device


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, no TF32, which rounds to ten bits and is the default of convolutions; and no autocast."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = before
