"""Parts of a pipeline that change a finished image: safety checkers, which black it out, and watermarkers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from stepdistill.families.base import Family

logger = logging.getLogger(__name__)


class DrawnImage(NamedTuple):
    """An image, and whether the pipeline's safety checker flagged it: what is there then is black.

    Args:
        image: of the type that the call's `output_type` says.
    """

    image: Any
    flagged: bool


@contextmanager
def unfiltered(pipe: DiffusionPipeline, family: Family) -> Iterator[None]:
    """The pipeline changes no finished image inside: no safety checker and no watermark. It is said once."""
    there = {name: part for name in family.filters if (part := getattr(pipe, name)) is not None}
    if there:
        _say_unfiltered(type(pipe).__name__, " and ".join(there))
    vars(pipe).update(dict.fromkeys(there))  # the pipeline's own setter would change its config, too
    try:
        yield
    finally:
        vars(pipe).update(there)


@cache
def _say_unfiltered(pipeline: str, names: str) -> None:
    why = "samples and figures show what the networks generate"
    logger.warning("%s of %s is left out: %s", names, pipeline, why)


@contextmanager
def safety_flags(pipe: DiffusionPipeline) -> Iterator[list[bool]]:
    """What the safety checker says of the images drawn inside, in the order of drawing; empty without one."""
    flags: list[bool] = []
    checker = pipe.components.get("safety_checker")
    hooks = [checker.register_forward_hook(lambda *call: flags.extend(call[-1][1]))] if checker is not None else []
    try:
        yield flags
    finally:
        for hook in hooks:
            hook.remove()
