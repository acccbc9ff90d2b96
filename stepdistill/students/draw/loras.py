"""The LoRAs of a plain pipeline: load a further one, weigh them; by Diffusers where it has a loader."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.core.errors import StudentError, problem
from stepdistill.families.base import Family
from stepdistill.networks.pipeline_loras import weigh_active


def load_style(family: Family, pipe: DiffusionPipeline, source: str, name: str) -> str:
    """Load a further LoRA of a folder, hub id or file, and give its name. StudentError where it does not fit."""
    loader: Any = pipe
    if not family.loads_lora:
        got, todo = f"a further LoRA {source} for a {type(pipe).__name__}", "leave it out"
        raise StudentError(problem(got, "none", "Diffusers has no LoRA loader for it", todo))
    try:
        loader.load_lora_weights(source, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        todo = "check the path, and that it was trained on this family"
        raise StudentError(problem(f"LoRA {source}", "one that Diffusers loads", str(error), todo)) from error
    if not any(name in names for names in loader.get_list_adapters().values()):  # of which Diffusers only warns
        got, why = f"LoRA {source}", "none of its names is a layer's of this pipeline"
        raise StudentError(problem(got, f"one of a {type(pipe).__name__}", why, "check what it was trained on"))
    return name


def weigh_loras(family: Family, pipe: DiffusionPipeline, weights: dict[str, float]) -> None:
    """Let these LoRAs be on, each at its strength, and no others."""
    if family.loads_lora:
        loader: Any = pipe
        loader.set_adapters(list(weights), list(weights.values()))
    else:
        weigh_active(family.network(pipe), weights)
