"""Gradient checkpointing of a network's blocks, in the dialect of its library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_blocks(net: nn.Module, call: Callable) -> None:
    """Let `call(block, *args)` call each block of a network of Diffusers or transformers."""
    given: Any = net
    if not isinstance(net, PreTrainedModel):
        given.enable_gradient_checkpointing(call)
        return
    for block in net.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.training = True  # or it is not asked; what is in it stays in evaluation mode, without dropout
    given._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=call)
