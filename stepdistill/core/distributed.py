"""Multi-process training without DDP: role weights are broadcast once, role gradients averaged at every update.

No network is wrapped: DDP around a network that switches roles leaves a role's gradients unaveraged without an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from stepdistill.core.errors import ConfigError, problem

PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
BUCKET = 32 * 1024 * 1024  # elements reduced in one call


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where no process group is up."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def check_plugins() -> None:
    """Raise ConfigError where a plugin is set in Accelerate's launcher."""
    for variable, name in PLUGINS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            got = f"{name}, which is set in the launcher ({variable})"
            why = "the launcher only starts the processes, and its plugins would be ignored"
            todo = "use a file of configs/accelerate, with train.shard_base for a base that is too large for one device"
            raise ConfigError(problem(got, "a launcher without plugins", why, todo))


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give every process rank 0's values, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over the processes, in place and in few calls."""
    processes = world()[1]
    if processes == 1 or not tensors:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET or tensor is tensors[-1]:
            flat = torch.cat([t.reshape(-1).float() for t in bucket])
            dist.all_reduce(flat)
            parts = (flat / processes).split([t.numel() for t in bucket])
            for old, new in zip(bucket, parts, strict=True):
                old.copy_(new.view_as(old))
            bucket = []


def agree(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process; a signal may reach only one of them."""
    if world()[1] == 1:
        return flag
    answer = torch.tensor(float(flag), device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def barrier() -> None:
    """Wait for every process."""
    if world()[1] > 1:
        dist.barrier()
