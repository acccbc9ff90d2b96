"""Where to compute: a device that is there."""

from __future__ import annotations

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
