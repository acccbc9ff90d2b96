"""Checks of the LoRAs that a run reads: parts of the teacher, of the student's start, and the training assistant."""

from __future__ import annotations

import logging
from pathlib import Path

from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.read import read_teacher_loras
from stepdistill.methods.base import Tuning
from stepdistill.networks.roles import Adapters, Lora
from stepdistill.students.chain import read_assistant, start_lora
from stepdistill.students.contract import CONTRACT, DECODER, kind_of, read_contract
from stepdistill.training.recipe import Run

logger = logging.getLogger(__name__)


def check_loras(run: Run) -> None:
    """The LoRAs that a run starts from are complete files of its family. A resumed run reads them later."""
    if run.train.resume_from_checkpoint:
        return
    read_teacher_loras(run.family)
    for source in (run.start_from, *run.lora.starts().values()):
        if source and (Path(source) / CONTRACT).is_file() and kind_of(source) == DECODER:
            read_contract(source)  # it says what the folder is, which holds no LoRA
    if run.start_from:
        start_lora(run.start_from, run.family)
    for role, source in run.lora.starts().items():
        if isinstance(run.method.roles().get(role), Lora):
            run.family.read_lora(source)


def check_start_from(run: Run) -> None:
    """What is trained on top of `start_from` adds up with it, and is asked only what a few-step model knows."""
    if run.start_from is None:
        return
    if isinstance(run.method.roles()["student"], Adapters):
        got, why = f"start_from with {type(run.method).__name__}", "guidance adapters fit the weights of the base alone"
        raise ConfigError(problem(got, "a method whose student is a LoRA", why, "remove start_from"))
    if run.family.quantization is not None:
        got, why = "start_from with family.quantization", "a LoRA cannot be added to quantized weights"
        todo = "remove one of them, or write the fused network with `stepdistill convert --to fused` first"
        raise ConfigError(problem(got, "one of the two", why, todo))
    if not isinstance(run.method, Tuning):
        logger.warning(
            "start_from makes the few-step student the teacher of %s, which asks its teacher for many steps or for all "
            "noise levels: the student was trained at its few ones. To go on training from the student, with the base "
            "as the teacher, use lora.init_from",
            type(run.method).__name__,
        )


def check_assistant(run: Run) -> None:
    """A training assistant fits the method, and can be read; a warning is logged where the method needs one."""
    if run.train.assistant is None:
        if run.method.takes_assistant:
            logger.warning(
                "%s without train.assistant undoes the few steps of the model before it has learnt the images. Train "
                "an assistant first; of a student that is a LoRA, train the new LoRA on the base, and load both",
                type(run.method).__name__,
            )
        return
    if not run.method.takes_assistant:
        got = f"train.assistant with {type(run.method).__name__}"
        why = "with it the model's few steps are blurred, and any other method samples or compares in training"
        todo = "remove train.assistant"
        raise ConfigError(problem(got, "a method that only denoises the images of the data", why, todo))
    read_assistant(run.train.assistant, run.family, run.start_from)
