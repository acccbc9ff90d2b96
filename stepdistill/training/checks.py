"""What can be known wrong of a run before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data import Source, Stream, Trajectories, inside
from stepdistill.networks import sharding
from stepdistill.networks.roles import Copy, Ema, Lora
from stepdistill.students.lora import files as convert
from stepdistill.students.lora.tensors import FAMILIES
from stepdistill.training import checkpoint
from stepdistill.training import finish as report
from stepdistill.training.batches import check_cache, check_needs
from stepdistill.training.recipe import Run


def check(run: Run) -> None:
    """Everything that can be known wrong before anything is loaded."""
    out, spec = Path(run.train.output_dir), run.train
    check_cache(spec)
    scheduler = run.family.load_scheduler()
    if scheduler is not None:
        check_method(run, run.family.schedule(scheduler))
    if spec.shard_base:
        sharding.check_sharding(run.method.roles(), run.family.quantization is not None)
    check_needs(run.data, run.method.needs, type(run.method).__name__)
    for source in inside(run.data):
        len(source)  # reads the index, also of a source that the teacher's samples are wrapped around
    Stream(run.data, 1, spec.seed)
    if spec.eval_samples:
        report.reference_file(spec)
    check_exports(run)
    used = out.exists() and ((out / "metrics.jsonl").exists() or checkpoint.checkpoints(out))
    if used and not spec.resume_from_checkpoint and not spec.overwrite_output_dir:
        raise ConfigError(
            problem(
                f"train.output_dir {out}, which holds another run",
                "an empty or new folder",
                "its student and checkpoints would be overwritten",
                "go on with --resume_from_checkpoint latest, start anew with --overwrite_output_dir, or name another",
            )
        )
    copies = [name for name, role in run.method.roles().items() if isinstance(role, Copy)]
    if run.family.quantization is not None and copies:
        got = f"family.quantization with {type(run.method).__name__}"
        why = f"it trains {copies[0]!r} as a whole network, which few bits cannot learn"
        todo = "leave family.quantization out, or take a method whose roles are LoRAs"
        raise ConfigError(problem(got, "roles that are LoRAs or adapters", why, todo))
    if spec.enable_xformers_memory_efficient_attention and not torch.cuda.is_available():
        raise ConfigError(
            problem(
                "xformers attention without CUDA",
                "a CUDA device",
                "xformers has no kernel here",
                "switch it off",
            )
        )


def check_scales(data: Source, sampler: Sampler) -> None:
    """Raise ConfigError where guidance adapters would promise scales that their data do not have."""
    for source in inside(data):
        promised = sampler.adapter_range
        if isinstance(source, Trajectories) and promised not in (None, source.guidance_range):
            got = f"data.guidance_range {list(source.guidance_range)}"
            why = "the contract names the scales that the adapters were trained for"
            todo = "set data.guidance_range and method.guidance_range alike"
            raise ConfigError(problem(got, f"that of the method, {list(promised)}", why, todo))


def check_method(run: Run, schedule: NoiseSchedule) -> None:
    """Raise ConfigError where the method cannot run on the teacher's noise process."""
    try:
        run.method.check(schedule)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error


def check_exports(run: Run) -> None:
    """Raise ConfigError where a run asks for formats that its student will not have."""
    formats = run.train.export_formats
    if not formats:
        return
    roles, name = run.method.roles(), run.method.student_role()
    while isinstance(role := roles[name], Ema):
        name = role.of
    layout = convert.layout_of(run.family)
    missing = [to for to in formats if layout.family not in FAMILIES[to]]
    if isinstance(role, Lora) and not missing:
        return
    got = f"train.export_formats {list(formats)}"
    why = f"{missing[0]} has no names for {layout.family}" if missing else "only a LoRA has other formats"
    raise ConfigError(problem(got, "formats that the student can be written in", why, "leave them out"))
