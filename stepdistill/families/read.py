"""The pipeline of a family's teacher from its files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from stepdistill.core.files import is_single_file
from stepdistill.families.location import download
from stepdistill.families.parts import whole_network
from stepdistill.networks import quantize
from stepdistill.networks.meta import shell


def read_pipeline(family: Any, without: Collection[str]) -> DiffusionPipeline:  # noqa: ANN401
    """A `Family`'s pipeline as its files have it, with the parts in `without` on the meta device where possible."""
    where, pipeline = family.location(), cast("Any", family.pipeline_class)
    if is_single_file(where):
        return pipeline.from_single_file(where, config=family.single_file_config)
    index = pipeline.load_config(where, revision=family.revision)
    # Diffusers drops the parts a folder goes without, such as SD3's T5, and then asks for them
    given: dict[str, Any] = {n: None for n, part in index.items() if isinstance(part, list) and part[0] is None}
    parts = sorted(filter(family.part_of, index.keys() - given.keys()))
    left = [] if family.teacher_loras else [name for name in parts if family.part_of(name) in without]
    given |= {name: shell(where, name, ".".join(index[name]), family.revision) for name in left}
    where = download(where, pipeline, revision=family.revision, variant=family.variant, **given)
    done = given.keys() | ({family.network_name} if family.quantization else set())
    given |= {name: whole_network(where, family.variant, name, index[name]) for name in parts if name not in done}
    if family.quantization is not None and "denoiser" not in without:
        given["quantization_config"] = quantize.quantized(family.quantization, family.network_name)
        given["torch_dtype"] = torch.float32  # of what is not quantised; else torchao takes bfloat16
    return pipeline.from_pretrained(where, variant=family.variant, **given)
