"""The LoRAs of a plain pipeline: load a further one, weigh them; by Diffusers where it has a loader."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.networks.pipeline_loras import load_lora, weigh_active


def load_style(family: Family, pipe: DiffusionPipeline, source: str, name: str) -> str:
    """Load a further LoRA of a folder, hub id or file, and give its name. StudentError where it does not fit."""
    if not family.loads_lora:
        got, todo = f"a further LoRA {source} for a {type(pipe).__name__}", "leave it out"
        raise StudentError(problem(got, "none", "Diffusers has no LoRA loader for it", todo))
    load_lora(pipe, family.read_lora(source), name, source)
    return name


def weigh_loras(family: Family, pipe: DiffusionPipeline, weights: dict[str, float]) -> None:
    """Let these LoRAs be on, each at its strength, and no others."""
    if family.loads_lora:
        loader: Any = pipe
        loader.set_adapters(list(weights), list(weights.values()))
    else:
        weigh_active(family.network(pipe), weights)
