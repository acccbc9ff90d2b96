"""The pipeline of a family's teacher from its files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.files import is_single_file
from stepdistill.families.location import download
from stepdistill.families.parts import check_marks, is_part, whole_network
from stepdistill.networks import quantize
from stepdistill.networks.lora.names import PIPELINES
from stepdistill.networks.lora.read import check_plain, lora_path
from stepdistill.networks.lora.tensors import Lora
from stepdistill.networks.meta import shell
from stepdistill.networks.pipeline_loras import fuse_loras, load_lora


def load_pipeline(family: Any, without: Collection[str]) -> DiffusionPipeline:  # noqa: ANN401
    """A `Family`'s whole pipeline in float32, with its LoRAs fused in; see `Family.load`."""
    where, single = family.location(), is_single_file(family.location())
    quantize.check_quantization(family.quantization, single, bool(family.teacher_loras))
    loras = read_teacher_loras(family)
    family.check_files()
    with family.reached():
        pipe = _read_pipeline(family, without)
    family.check_scheduler(pipe.scheduler)  # that of a single file is only known now
    if single:
        check_marks(where, pipe.scheduler)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
            if name != family.network_name or family.quantization is None:
                part.float()  # transformers loads a file of halves in half
    for source, lora in loras.items():
        load_lora(pipe, lora, "teacher", source)
        fuse_loras(pipe)
        pipe.unload_lora_weights()
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and family.part_of(name) in without:
            part.to("meta")
    return pipe


def read_teacher_loras(family: Any) -> dict[str, Lora]:  # noqa: ANN401
    """The teacher's LoRAs by where they come from. Raises ConfigError for a pipeline that takes none."""
    if family.teacher_loras and not family.loads_lora:
        got, expected = f"family.teacher_loras for a {family.pipeline_class.__name__}", "none"
        todo = "fuse them with `stepdistill convert --to fused`, and use the fused network as the teacher"
        raise ConfigError(problem(got, expected, "Diffusers has no LoRA loader for it", todo))
    loras = {source: family.read_lora(source) for source in family.teacher_loras}
    for source, lora in loras.items():
        check_plain(lora_path(source), lora, PIPELINES.get(family.pipeline_class.__name__))
        family.warn_of_lora(source, lora)
    return loras


def _read_pipeline(family: Any, without: Collection[str]) -> DiffusionPipeline:  # noqa: ANN401
    """A `Family`'s pipeline as its files have it, with the parts in `without` on the meta device where possible."""
    where, pipeline = family.location(), cast("Any", family.pipeline_class)
    if is_single_file(where):
        return pipeline.from_single_file(where, config=family.single_file_config, **_beside(family, where))
    index = pipeline.load_config(where, revision=family.revision)
    # Diffusers drops the parts a folder goes without, such as SD3's T5, and then asks for them
    given: dict[str, Any] = {n: None for n, part in index.items() if isinstance(part, list) and part[0] is None}
    parts = sorted(n for n in index.keys() - given.keys() if is_part(index[n]) and family.part_of(n))
    left = [] if family.teacher_loras else [name for name in parts if family.part_of(name) in without]
    given |= {name: shell(where, name, ".".join(index[name]), family.revision) for name in left}
    where = download(where, pipeline, revision=family.revision, variant=family.variant, **given)
    done = given.keys() | ({family.network_name} if family.quantization else set())
    given |= {name: whole_network(where, family.variant, name, index[name]) for name in parts if name not in done}
    if family.quantization is not None and "denoiser" not in without:
        given["quantization_config"] = quantize.quantized(family.quantization, family.network_name)
        given["torch_dtype"] = torch.float32  # of what is not quantised; else torchao takes bfloat16
    return pipeline.from_pretrained(where, variant=family.variant, **given)


def _beside(family: Any, file: str) -> dict[str, nn.Module]:  # noqa: ANN401
    """The networks that Diffusers does not read out of a single file, from where the file's configs lie."""
    names, place = family.needs.beside_file, family.single_file_config
    if names and place is None:
        got, expected = f"the single file {file} alone", f"family.single_file_config with a {names[0]}"
        why = f"Diffusers reads no {names[0]} out of a file of a {family.pipeline_class.__name__}"
        raise ConfigError(problem(got, expected, why, "set it to the pipeline folder or hub id of the same model"))
    index = family.pipeline_class.load_config(place) if names else {}
    return {name: whole_network(place, None, name, index[name]) for name in names}
