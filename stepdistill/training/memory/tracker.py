"""A counter of live tensor memory, by a dispatch mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VALUE = torch.ops.aten._local_scalar_dense.default  # what `item`, `bool` and `float` of a tensor come down to
DEVICE = torch.ops.prim.device.default  # asked at every other line, and no memory


class Tracker(TorchDispatchMode):
    """Bytes of the storages that live on a device, while it is open as a context.

    A storage counts from the operator that returns it until nothing refers to it, a view counts nothing. A network that
    was read from files, which other threads do, counts from its first use. Fake tensors, which have shapes and no
    content, count as real ones would. What a kernel takes and gives back before it returns is not seen.

    A fake tensor that is asked for its value says 1: a norm of 1, and yes to whether a loss is finite.

    Args:
        device: tensors elsewhere do not count.

    Attributes:
        total: bytes that live now.
        peak: the largest `total` since the last `reset`.
        gradients_at_peak: bytes of `peak` that were marked as gradients.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device.type
        self.total = self.peak = self.gradients = self.gradients_at_peak = 0
        self._live: dict[int, tuple[weakref.ref, int]] = {}
        self._marked: set[int] = set()

    def reset(self) -> None:
        """Look for the peak anew."""
        self.peak, self.gradients_at_peak = self.total, self.gradients

    def bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages of some tensors, each once, as far as they count."""
        keys = {id(tensor.untyped_storage()) for tensor in tensors}
        return sum(self._live[key][1] for key in keys if key in self._live)

    def mark(self, gradient: Tensor) -> None:
        """Call a tensor's storage a gradient for as long as it lives."""
        key = id(gradient.untyped_storage())
        if key in self._live and key not in self._marked:
            self._marked.add(key)
            self.gradients += self._live[key][1]

    def __torch_dispatch__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is VALUE and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        for given in args:
            if isinstance(given, nn.Parameter):
                self._see(given)
        out = func(*args, **(kwargs or {}))
        if func is not DEVICE:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one Python object for a storage as long as that lives
        # a fake one would send `device` through the dispatcher
        place = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if key in self._live or place.type != self.device:
            return

        def gone(_: object) -> None:
            _, size = self._live.pop(key)
            self.total -= size
            if key in self._marked:
                self._marked.remove(key)
                self.gradients -= size

        size = storage.nbytes()
        self._live[key] = weakref.ref(storage, gone), size
        self.total += size
        if self.total > self.peak:
            self.reset()
