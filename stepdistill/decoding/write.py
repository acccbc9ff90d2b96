"""The student's folder: a Diffusers pipeline with two files of code, which opens without this package."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from stepdistill.core.errors import StudentError, problem
from stepdistill.core.files import write_text
from stepdistill.core.random import noise_of
from stepdistill.decoding.contract import DecoderContract, TokenProof, decoder_contract, write_decoder
from stepdistill.decoding.folder import heads as heads_code
from stepdistill.decoding.folder import pipeline as pipeline_code
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import OneStepPipeline, read_prompts
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.students.contract import CONTRACT

INDEX = "model_index.json"
SAMPLE_PROMPTS = ("red apple", "a cat that sleeps on a chair")  # of what compares folders


def write_decoding_student(
    out: Path,
    teacher: TokenTeacher,
    method: DistilledDecoding,
    network: nn.Module,
    heads: Heads,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a student's folder with its contract, open it by Diffusers alone, and compare.

    Args:
        dtype: that the language model was trained in.

    Raises:
        StudentError: the folder's tokens differ from the student's.
    """
    (out / CONTRACT).unlink(missing_ok=True)  # whose proof would be that of other weights
    contract = decoder_contract(teacher, method, dtype)
    pipe = assemble(teacher, network, heads, contract)
    write_folder(out, pipe)
    write_decoder(out, replace(contract, proof=prove_tokens(out, pipe, contract)))


@torch.no_grad()
def prove_tokens(folder: Path, pipe: OneStepPipeline, contract: DecoderContract, seed: int = 0) -> TokenProof:
    """Compare the tokens of a folder that Diffusers opens with a student's, at equal noise."""
    prompts = sample_prompts(pipe)
    noise = torch.stack([noise_of(seed, i, pipe.shape) for i in range(len(prompts))])
    asked: dict[str, Any] = {"noise": noise, "num_inference_steps": len(contract.keeps), "output_type": "tokens"}
    plain = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to(pipe.device)
    drawers: list[Any] = [pipe, plain]
    own, opened = (draw(prompts, **asked).images for draw in drawers)
    equal = int((own == opened).sum())
    if equal < own.numel():
        got = f"{folder}, whose pipeline draws {equal} of {own.numel()} tokens as the student in memory does"
        todo = "report it, with the versions of torch, diffusers and transformers"
        raise StudentError(problem(got, "all of them", "the folder is not the student that was trained", todo))
    return TokenProof(equal=equal, tokens=own.numel(), calls=len(contract.keeps), seed=seed)


def sample_prompts(pipe: OneStepPipeline) -> list[str]:
    """Prompts that a student takes, however short its own have to be; the second one is empty if need be."""
    most, fitting = pipe.config["max_sequence_length"], list[str]()
    for prompt in SAMPLE_PROMPTS:
        ids, _ = read_prompts(pipe.processor, [prompt], most=sys.maxsize)
        fitting.append(prompt if ids.shape[1] <= most else "")
    return fitting


def assemble(
    teacher: TokenTeacher, language_model: nn.Module, heads: Heads, contract: DecoderContract
) -> OneStepPipeline:
    """The student as a pipeline, with the teacher's decoder and processor."""
    vqmodel, longest = teacher.model.model.vqmodel, teacher.settings.max_sequence_length
    parts = (language_model, heads, vqmodel, teacher.processor)
    return OneStepPipeline(*parts, contract.keeps, contract.split, max_sequence_length=longest)


def write_folder(out: Path, pipe: OneStepPipeline) -> None:
    """Write a pipeline that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` opens.

    Diffusers looks for a part's code in the part's own folder, and for that of the pipeline by the name of its class.
    """
    pipe.save_pretrained(out)
    (out / "pipeline.py").write_text(Path(pipeline_code.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copy(heads_code.__file__, out / "heads" / "heads.py")
    index = json.loads((out / INDEX).read_text())
    index |= {"_class_name": ["pipeline", OneStepPipeline.__name__], "heads": ["heads", Heads.__name__]}
    write_text(out / INDEX, json.dumps(index, indent=2))
