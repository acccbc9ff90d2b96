"""Load a student's folder with the classes of this package: no code of the folder runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import JanusProcessor, JanusVQVAE, LlamaModel

from stepdistill.core.errors import StudentError, problem
from stepdistill.decoding.contract import DecoderContract, read_decoder
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import ATTENTION
from stepdistill.decoding.write import INDEX
from stepdistill.families.parts import UNREADABLE
from stepdistill.students.load import folder_of


def load_decoder(
    folder_or_hub_id: str | Path, device: torch.device | str = "cpu"
) -> tuple[OneStepPipeline, DecoderContract]:
    """The student of a folder as a pipeline in float32, and its contract.

    Plain Diffusers opens the same folder by `trust_remote_code=True`, which runs the code in it. This function reads
    its weights alone.

    Raises:
        StudentError: the folder holds no decoder; weights are missing, of another shape, or not the network's; or the
            parts are not those of the contract.
    """
    folder = folder_of(folder_or_hub_id)
    contract = read_decoder(folder)
    try:
        pipe = _assembled(folder)
    except (*UNREADABLE, RuntimeError) as error:  # the last one is of weights that do not fit
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        todo = "get all of its files again, as the run wrote them"
        raise StudentError(problem(f"unreadable {folder}", "the whole folder of a decoder", why, todo)) from error
    _check(folder, pipe, contract)
    return pipe.to(device), contract


def _assembled(folder: Path) -> OneStepPipeline:
    index = json.loads((folder / INDEX).read_text())
    parts = {
        "language_model": _whole(LlamaModel, folder / "language_model", dtype=torch.float32, **ATTENTION),
        "heads": _whole(Heads, folder / "heads"),
        "vqmodel": _whole(JanusVQVAE, folder / "vqmodel", dtype=torch.float32, **ATTENTION),
        "processor": JanusProcessor.from_pretrained(folder / "processor", trust_remote_code=False),
    }
    settings = {name: index[name] for name in ("keeps", "split", "max_sequence_length")}
    return OneStepPipeline(**parts, **settings)


def _whole(kind: Any, place: Path, **settings: Any) -> Any:  # noqa: ANN401
    """The network of a folder. Raises ValueError for tensors that are missing or not its own, of which others warn."""
    net, report = kind.from_pretrained(place, output_loading_info=True, use_safetensors=True, **settings)
    for fault in ("missing", "mismatched", "unexpected"):
        if odd := sorted(map(str, report[f"{fault}_keys"])):
            raise ValueError(f"{place.name} has {len(odd)} {fault} tensors, such as {odd[0]}")
    return net.eval().requires_grad_(False)


def _check(folder: Path, pipe: OneStepPipeline, contract: DecoderContract) -> None:
    """Raise StudentError where the parts are not those of the contract, or do not fit each other."""
    book, settings = (contract.codes, contract.dim), pipe.config
    for what, got, expected in (
        ("noise of the shape", pipe.shape, (contract.tokens, contract.dim)),
        ("codes of the heads", tuple(pipe.heads.codebook.shape), book),
        ("codes of the vqmodel", tuple(pipe.vqmodel.quantize.embedding.weight.shape), book),
        ("width of the heads", pipe.heads.config["width"], pipe.language_model.config.hidden_size),
        ("keeps", tuple(settings["keeps"]), contract.keeps),
        ("max_sequence_length", settings["max_sequence_length"], contract.teacher.get("max_sequence_length")),
        ("split", settings["split"], contract.split),
    ):
        if got != expected:
            why, todo = "its files are not of one student", "get all of them again, as the run wrote them"
            raise StudentError(problem(f"{what} {got} in {folder}", expected, why, todo))
