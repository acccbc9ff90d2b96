"""Sampling with the teacher between the student's calls.

Distilled Decoding, https://arxiv.org/abs/2412.17153, whose authors trade calls for quality in this way. A later call of
the student keeps t tokens of the call before it. It has learnt to go on from the teacher's own tokens, and the last
ones of the t are those that the student is least sure of. So the teacher draws the last few again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.decoding.contract import DecoderContract
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import Janus, TokenTeacher


def most_teacher_steps(keeps: Sequence[int]) -> int:
    """The most tokens that the teacher can draw again before each later call: the smallest gap of `keeps`.

    With more it would draw tokens that it has drawn before an earlier call. It is 0 of one call.
    """
    return min((t - s for s, t in zip(keeps, keeps[1:], strict=False)), default=0)


@torch.no_grad()
def draw_with_teacher(
    pipe: OneStepPipeline, teacher: TokenTeacher, prompts: Sequence[str], noise: Tensor, teacher_steps: int, calls: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, n) and values (B, n, d) of noise (B, n, d), by calls of the student and of its teacher.

    Before each later call of the student, which keeps the first t tokens, the teacher draws tokens t - M to t - 1
    again, one after another, by its map from the same noise, given the student's tokens before them. These are `calls`
    calls of the student and M (calls - 1) of the teacher.

    Args:
        teacher: the one that the student was distilled from, on the pipeline's device.
        teacher_steps: M, from 0, which is the student's own sampling, to `most_teacher_steps`.
        calls: of the student, from 1 to those that it was trained for.

    Raises:
        ValueError: M or `calls` is outside of its range.
    """
    trained = pipe.config["keeps"]
    keeps, most = trained[:calls], most_teacher_steps(trained[:calls])
    if not 1 <= calls <= len(trained):
        raise ValueError(f"calls is {calls}: expected 1 to {len(trained)}, those that the student was trained for")
    if not 0 <= teacher_steps <= most:
        raise ValueError(f"teacher_steps is {teacher_steps}: expected 0 to {most}, the smallest gap of {keeps}")
    text, mask = pipe.read(prompts)
    noise = noise.to(pipe.device, torch.float32)
    tokens, values = torch.zeros(noise.shape[:2], dtype=torch.long, device=noise.device), noise
    for keep in keeps:
        if keep and teacher_steps:
            tokens = tokens.clone()
            tokens[:, :keep] = teacher.draw(prompts, noise, tokens[:, : keep - teacher_steps], keep)
        tokens, values = pipe.heads.next_call(pipe.language_model, text, mask, noise, tokens, keep)
    return tokens, values


def contract_teacher(
    contract: DecoderContract, place: str | None = None, device: torch.device | str = "cpu"
) -> TokenTeacher:
    """The teacher of a student's contract, loaded.

    Args:
        place: another place of the same.

    Raises:
        ConfigError: it cannot be loaded, or its weights or settings are others.
        StudentError: the contract's settings are none.
    """
    try:
        settings = TypeAdapter(Janus).validate_python(contract.teacher)
    except ValidationError as error:
        got, why = f"the teacher {contract.teacher} in a contract", "; ".join(one["msg"] for one in error.errors())
        raise StudentError(problem(got, "the settings of a Janus", why, "get the contract again")) from error
    if place is not None:
        settings = replace(settings, pretrained_teacher_model=place, revision=None)
    teacher = settings.load()
    if teacher.digest != contract.base_hash:
        got = f"the teacher {settings.pretrained_teacher_model}, whose hash is {teacher.digest[:12]}"
        why, todo = "its tokens would not be those that the student has learnt", "name the place of the student's own"
        raise ConfigError(problem(got, f"{contract.base_hash[:12]}, as in the contract", why, todo))
    return teacher.to(device)
