"""Check that plain Diffusers draws with a decoder's folder what this package draws with its weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stepdistill.core.errors import StudentError, problem
from stepdistill.core.random import noise_of
from stepdistill.decoding.load import load_decoder
from stepdistill.decoding.write import sample_prompts

OPEN = """
import sys
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(int(sys.argv[1]))
pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)
asked = torch.load(sys.argv[3])
torch.save([pipe(**one).images for one in asked], sys.argv[4])
"""


@dataclass(frozen=True)
class DecoderCheck:
    """What is equal.

    Args:
        shares: of equal tokens, by the number of calls.
        images: largest difference of the images in [0, 1] that all calls make.
    """

    shares: dict[int, float]
    images: float


@torch.no_grad()
def verify_decoder(folder: Path, seed: int = 0) -> DecoderCheck:
    """Compare a folder that plain Diffusers opens with `load_decoder`, at equal noise.

    Diffusers runs the code of the folder, `trust_remote_code=True`. It runs in a process of its own with an empty cache
    of such code: Diffusers keeps one copy of a file's name for all folders, and Python one module for a process.

    Raises:
        StudentError: the folder is not a whole decoder, or its code fails.
    """
    loaded, contract = load_decoder(folder)
    prompts = sample_prompts(loaded)
    noise = torch.stack([noise_of(seed, i, loaded.shape) for i in range(len(prompts))])
    trained = range(1, len(contract.keeps) + 1)
    shared: dict[str, Any] = {"prompt": prompts, "noise": noise}
    asked = [shared | {"num_inference_steps": calls, "output_type": "tokens"} for calls in trained]
    asked.append(shared | {"num_inference_steps": trained[-1], "output_type": "pt"})
    pipe: Any = loaded
    own, plain = [pipe(**one).images for one in asked], _opened(folder, asked)
    for ours, theirs in zip(own, plain, strict=True):
        if ours.shape != theirs.shape:
            got, expected = f"{folder}, whose code draws {tuple(theirs.shape)}", f"{tuple(ours.shape)}"
            raise StudentError(problem(got, expected, "it is not the code that was written", "write the folder again"))
    shares = [(ours == theirs).double().mean().item() for ours, theirs in zip(own, plain, strict=True)]
    return DecoderCheck(dict(zip(trained, shares, strict=False)), (own[-1] - plain[-1]).abs().max().item())


def _opened(folder: Path, asked: list[dict[str, Any]]) -> list[torch.Tensor]:
    """What plain Diffusers draws with the folder."""
    with TemporaryDirectory() as place:
        given, drawn = Path(place) / "asked.pt", Path(place) / "drawn.pt"
        torch.save(asked, given)
        words = [str(torch.get_num_threads()), str(folder.resolve()), str(given), str(drawn)]
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(place) / "modules")}
        ended = subprocess.run(
            [sys.executable, "-c", OPEN, *words], env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode or not drawn.exists():
            why = (ended.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            todo = "write the folder again, or get all of its files again"
            raise StudentError(problem(f"{folder}, whose code fails", "a pipeline that draws", why, todo))
        return torch.load(drawn)
