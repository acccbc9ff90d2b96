"""Diversity distillation: the base takes the first step or steps of an image, and its student the rest.

A student settles the structure of an image in its first step, and its images of one prompt vary less than the
base's. A first step by the base restores the variety at no further cost. Gandikota & Bau 2025,
https://arxiv.org/abs/2503.10637. `stepdistill.core.solvers.relay` does the same with any two denoisers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.networks.layers import time_given
from stepdistill.networks.pipeline_loras import strengths


@contextmanager
def base_first(
    pipe: Any,  # noqa: ANN401
    base_steps: int = 1,
    adapters: Collection[str] = ("student",),
) -> Iterator[None]:
    """In every pipeline call inside the context, the base takes the first `base_steps` steps, and the student the rest.

        call = stepdistill.load_student(pipe, folder)
        with stepdistill.base_first(pipe):
            image = pipe("red apple", **call).images[0]

    The noise levels and the scheduler are those of the call, so a step of the base replaces one of the student's. To
    add a step, increase the number of steps. The base's steps use the guidance of the call. A student's usual
    `guidance_scale` of 1 disables guidance, which the paper found best. Styles keep their strength in both parts.

    Args:
        pipe: a pipeline with a student's LoRA, `adapters`, loaded and not fused. A student that is a whole network has
            replaced the base in the pipeline.
        base_steps: 0 is the student alone; the number of steps of the call, or more, is the base alone.

    Raises:
        StudentError: the pipeline has no such LoRA.
    """
    if base_steps < 0:
        why, todo = "it is the number of first steps by the base", "use 1, as in the paper, or 0 for the student alone"
        raise ConfigError(problem(f"base_steps {base_steps}", "0 or more", why, todo))
    net = pipe.components["unet"] if "unet" in pipe.components else pipe.components["transformer"]
    originals = [(scales, name, scales[name]) for scales, name in strengths(net, adapters)]
    if not originals:
        expected = f"the LoRA {' or '.join(sorted(adapters))}, loaded and not fused"
        why = "only a LoRA can be switched off for some steps; a whole network has replaced the base in the pipeline"
        todo = "load the student with `stepdistill.load_student`, and pass its adapter_name in `adapters`"
        raise StudentError(problem("a pipeline without the student's LoRA", expected, why, todo))
    grid, time, taken = None, None, 0

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal grid, time, taken
        now = torch.as_tensor(time_given(net, args, kwargs)).flatten()[0].item()
        if pipe.scheduler.timesteps is not grid:  # each call of a pipeline sets new timesteps
            grid, time, taken = pipe.scheduler.timesteps, now, 0
        elif now != time:  # some pipelines call the network twice in a step
            time, taken = now, taken + 1
        for scales, name, strength in originals:
            scales[name] = 0.0 if taken < base_steps else strength

    handle = net.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for scales, name, strength in originals:
            scales[name] = strength
