"""Settings of Accelerate's launcher: each is used, refused or reported."""

from __future__ import annotations

import logging
import os

import torch

from stepdistill.core.distributed import check_plugins
from stepdistill.core.errors import ConfigError, problem
from stepdistill.training.recipe import TrainSpec

logger = logging.getLogger(__name__)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launcher(spec: TrainSpec) -> None:
    """Raise ConfigError for settings of the launcher that the run would ignore."""
    check_plugins()
    why = "this setting is read from the config only"
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(spec.gradient_accumulation_steps))
    if steps != str(spec.gradient_accumulation_steps):
        got = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} in the launcher"
        expected = f"train.gradient_accumulation_steps, which is {spec.gradient_accumulation_steps}"
        raise ConfigError(problem(got, expected, why, "set it in the config, and leave it out of the launcher"))
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if compiler != "NO" and not (spec.torch_compile and compiler == "INDUCTOR"):
        got, todo = (
            f"the dynamo backend {compiler} in the launcher",
            "set train.torch_compile, or leave the backend out",
        )
        raise ConfigError(problem(got, "none, or inductor with train.torch_compile", why, todo))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if spec.mixed_precision is None and precision not in DTYPES:
        got, todo = f"mixed precision {precision} in the launcher", "choose one of them, or set train.mixed_precision"
        raise ConfigError(problem(got, ", ".join(DTYPES), "no other precision was tested", todo))
    if spec.mixed_precision not in (None, precision) and precision != "no":
        logger.warning("train.mixed_precision is %s; the launcher's %s is not used", spec.mixed_precision, precision)
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and not any(size in os.environ for size in SIZES):
        logger.warning(
            "the launcher was configured for several processes but started one: MULTI_CPU needs mpirun and a hostfile; "
            "see configs/accelerate/two_processes_cpu.yaml"
        )
