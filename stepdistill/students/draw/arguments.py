"""Arguments of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def each(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments of a pipeline's call for `count` prompts: the negative prompt is repeated for each."""
    arguments = dict(call)
    if isinstance(arguments.get("negative_prompt"), str):  # Flux takes no single one for several prompts
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * count
    return arguments
