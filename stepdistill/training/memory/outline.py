"""A teacher's pipeline on the meta device, built from its configs without reading weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open
from torch import nn

from stepdistill.config.schema import locate
from stepdistill.core.files import is_single_file
from stepdistill.families.base import Family
from stepdistill.families.parts import is_part
from stepdistill.networks.meta import shell

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # which no single file holds


def outline(family: Family) -> DiffusionPipeline:
    """The pipeline that `family.load` gives, with its networks on the meta device; of a hub id only configs and
    tokenizers are fetched."""
    where, single = family.location(), is_single_file(family.location())
    if single:
        where = family.single_file_config or configs_of(where)
    pipeline: Any = family.pipeline_class
    index: Any = pipeline.load_config(where, revision=family.revision)
    given: dict[str, Any] = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, value in given.items():
        if is_part(value):
            library, kind = value
            unheld = single and name in OPTIONAL
            given[name] = None if library is None or unheld else _component(where, name, library, kind, family.revision)
    return pipeline(**given)


def configs_of(file: str) -> str:
    """The hub id whose configs Diffusers takes for a single file, by the names and shapes in its header."""
    with safe_open(file, "pt") as stored:
        shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118 - it is no dict
    header = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return fetch_diffusers_config(header)["pretrained_model_name_or_path"]


def networks_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline by the names of its components."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _component(where: str, name: str, library: str, kind: str, revision: str | None) -> Any:  # noqa: ANN401
    # a pipeline's own classes, as its safety checker, stand under the pipeline's name
    foreign = library not in ("diffusers", "transformers")
    cls: Any = locate(f"diffusers.pipelines.{library}.{kind}" if foreign else f"{library}.{kind}")
    if issubclass(cls, nn.Module):
        return shell(where, name, f"{cls.__module__}.{cls.__name__}", revision).float()
    return cls.from_pretrained(where, subfolder=name, revision=revision)
