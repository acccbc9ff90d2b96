"""Sharding of a base that does not fit on one device: each process keeps a shard, and blocks are gathered one at a
time.

By torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Only the frozen base
is sharded. Roles are whole and plain tensors on every process, as without: `core.distributed` averages their
gradients. A call of a sharded network takes every process, so what one process does alone, such as drawing validation
images, goes through `ShardedNetwork.leading`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import ASSISTANT

PATIENCE = timedelta(days=7)  # how long the others wait for the next call while one process works alone


@dataclass(frozen=True)
class ShardedNetwork:
    """A sharded network, and how one process calls it outside training.

    Args:
        dtype: precision of its arithmetic.
        group: carries messages between processes, on the CPU.
    """

    net: nn.Module
    device: torch.device
    dtype: torch.dtype
    group: dist.ProcessGroup

    @contextmanager
    def leading(self) -> Iterator[bool]:
        """True on the first process, which calls the network alone inside; the others take part in its calls before
        they enter, with False.

        Inside nothing may be differentiated through the network. All processes must come here.
        """
        if distributed.world()[0]:
            self._follow()
            yield False
            return
        handle = self.net.register_forward_pre_hook(self._tell, with_kwargs=True, prepend=True)
        try:
            yield True
        finally:
            handle.remove()
            dist.broadcast_object_list([None], src=0, group=self.group)

    def _tell(self, net: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        dist.broadcast_object_list([send_to_device((args, kwargs), "cpu")], src=0, group=self.group)

    @torch.no_grad()
    def _follow(self) -> None:
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self.group)
            if message[0] is None:
                return
            args, kwargs = send_to_device(message[0], self.device)
            # the same pass, not only the same exchange: `fully_shard` plans backward by the passes that it has seen
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                self.net(*args, **kwargs)


def check_processes(count: int) -> None:
    """Raise ConfigError for one process alone."""
    if count < 2:
        raise ConfigError(
            problem(
                "train.shard_base with one process",
                "two or more",
                "one process would hold the whole base",
                "use configs/accelerate/multi_gpu_sharded.yaml, or set train.shard_base to false",
            )
        )


def shard(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> ShardedNetwork:
    """Spread the base over all processes, in place. Roles may be there already, or be added later.

    The units that are gathered together are those that the network's class names in `_no_split_modules`, as the ones
    that no device map may split, or, where it names none, in `_repeated_blocks`, as the ones to compile by themselves;
    what is left is one unit more. Each goes to the device when its turn comes, so the whole never lies there.
    """
    net: Any = backbone.net
    mesh = init_device_mesh(device.type, (distributed.world()[1],))
    roles = {p for name in (*backbone.declared, ASSISTANT) for p in backbone.parameters_of(name).values()}
    names = net._no_split_modules or net._repeated_blocks  # LTX-Video's has only the second
    blocks = [module for module in net.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            problem(
                f"train.shard_base with {type(net).__name__}, whose class names no blocks",
                "some in `_no_split_modules` or `_repeated_blocks`, to gather one at a time",
                "the whole network would be gathered at once",
                "set train.shard_base to false",
            )
        )
    for module in [*reversed(blocks), net]:  # inner ones first
        # also the last: what stays gathered on one process and not on another would part their exchanges
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=roles)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return ShardedNetwork(net, device, dtype, group)


def is_sharded(net: nn.Module) -> bool:
    """Whether each process holds a share of the network only."""
    return isinstance(net, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stream(pipe: DiffusionPipeline, net: Any, device: torch.device) -> None:  # noqa: ANN401
    """Put a pipeline on the device, but its network `net` only layer by layer, for the time that each takes.

    For a plain pipeline, in a process of its own, of a base that had to be sharded.
    """
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not net:
            part.to(device)
    net.enable_group_offload(device, torch.device("cpu"), "leaf_level")
