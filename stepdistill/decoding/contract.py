"""`distill_config.json` of a one-step decoder: what it was trained for, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub import ModelCardData
from pydantic import ConfigDict, TypeAdapter

from stepdistill.config.dump import to_node
from stepdistill.core.errors import StudentError, problem
from stepdistill.decoding.janus import Janus, TokenTeacher
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.students.base_model import absolute_path
from stepdistill.students.contract import CONTRACT, DECODER, SCHEMA, kind_of, read_as
from stepdistill.students.licence import licence_of
from stepdistill.students.write import LIBRARIES


@dataclass(frozen=True, kw_only=True)
class TokenProof:
    """How many tokens of the folder's pipeline, opened by plain Diffusers, equal those of the student in memory."""

    equal: int
    tokens: int
    calls: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class DecoderContract:
    """How a one-step decoder is sampled, and where it comes from.

    Args:
        schema_version: of this format; a folder with another version is refused.
        method: class and hyper-parameters.
        base_model: hub id, absolute path, or name of the bundled teacher.
        base_hash: of the teacher and its settings, see `TokenTeacher.digest`.
        teacher: class and arguments: its guidance, temperature and top-k are in the student.
        tokens, codes, dim: n, V and d.
        keeps: how many tokens are known in the calls that it was trained for, from 0.
        split: places that are decoded from codes; the values of those after them that the last call does not keep are
            decoded as they are. None of codes alone.
        taus: the grid of the map from noise to tokens, which was DPM-Solver++(2M)'s.
        noise: how that of pair i, and of image i of `eval run`, is drawn with their seed.
        dtype: of the language model in training, and of the weights of its base. Its teacher, the map and the weights
            that are written are in float32.
        licence: of the base; None if it is unknown.
        versions: of the libraries that wrote the folder.
        proof: None if the folder was never compared with the trained student.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    kind: Literal["decoder"] = "decoder"
    method: dict[str, Any]
    base_model: str
    base_hash: str
    teacher: dict[str, Any]
    tokens: int
    codes: int
    dim: int
    keeps: tuple[int, ...]
    split: int | None = None
    taus: tuple[float, ...]
    noise: str = "torch.randn((n, d), generator=torch.Generator().manual_seed(1_000_003 * seed + i))"
    dtype: str
    licence: str | None
    versions: dict[str, str]
    proof: TokenProof | None = None


FORMAT = TypeAdapter(DecoderContract)


def decoder_contract(teacher: TokenTeacher, method: DistilledDecoding, dtype: torch.dtype) -> DecoderContract:
    """The contract of a student whose language model was trained in `dtype`, without its proof."""
    place = absolute_path(teacher.settings.pretrained_teacher_model)
    settings = replace(teacher.settings, pretrained_teacher_model=place)
    return DecoderContract(
        method=to_node(method, DistilledDecoding),
        base_model=place,
        base_hash=teacher.digest,
        teacher=to_node(settings, Janus),
        tokens=teacher.places,
        codes=len(teacher.codes),
        dim=teacher.codes.shape[1],
        keeps=method.trained_keeps(teacher.places),
        split=method.split,
        taus=teacher.map.taus,
        dtype=str(dtype).removeprefix("torch."),
        licence=licence_of(settings.location()),
        versions={name: version(name) for name in ("stepdistill", *LIBRARIES)},
    )


def read_decoder(folder: Path | str) -> DecoderContract:
    """The contract of a folder. Raises StudentError if it is missing, invalid, of another version or another kind."""
    if (kind := kind_of(folder)) != DECODER:
        why, todo = "only that one draws tokens", "load other students by `stepdistill.load_student`"
        raise StudentError(problem(f"{folder}, of kind {kind!r}", f"a student of kind {DECODER!r}", why, todo))
    return read_as(folder, FORMAT)


def write_decoder(folder: Path, contract: DecoderContract) -> None:
    """Write contract and model card."""
    (folder / CONTRACT).write_bytes(FORMAT.dump_json(contract, indent=1) + b"\n")
    (folder / "README.md").write_text(card(folder, contract), encoding="utf-8")


def card(folder: Path, contract: DecoderContract) -> str:
    """The model card, whose code runs as pasted."""
    proof = "It has not been compared with the trained student."
    if contract.proof:
        equal, of, calls = contract.proof.equal, contract.proof.tokens, contract.proof.calls
        proof = f"Plain Diffusers drew {equal} of {of} tokens as the student in memory did, in {calls} calls."
    keeps = ", ".join(map(str, contract.keeps))
    data = ModelCardData(
        library_name="diffusers",
        license=contract.licence,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stepdistill", "distilled-decoding"],
    )
    return f"""---
{data.to_yaml()}
---

# {Path(contract.base_model).name} in {len(contract.keeps)} calls or fewer

A student of the autoregressive image model `{contract.base_model}`, which draws {contract.tokens} tokens one by one. It
draws them in one to {len(contract.keeps)} calls. It was made with stepdistill by [Distilled
Decoding](https://arxiv.org/abs/2412.17153), which is experimental here.

**The folder holds code**, `pipeline.py` and `heads/heads.py`, and `trust_remote_code=True` runs it. Read it first.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({str(folder.resolve())!r}, trust_remote_code=True)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
generator = torch.Generator().manual_seed(0)
image = pipe("red apple", num_inference_steps={len(contract.keeps)}, generator=generator).images[0]
image.save("image.png")
```

The calls know {keeps} tokens of those before them. Guidance ({contract.teacher["guidance_scale"]:g}) is in the weights.
{proof}
"""
