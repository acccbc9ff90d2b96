"""One distillation from config to student folder: `distill(run)`, whoever calls it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from stepdistill.config import load as config
from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError, problem
from stepdistill.data import inside
from stepdistill.data.made import Made
from stepdistill.students import single as student
from stepdistill.training import checkpoint
from stepdistill.training import finish as report
from stepdistill.training.checks import check, check_method, check_scales
from stepdistill.training.logs import Logs
from stepdistill.training.loop import Loop
from stepdistill.training.memory.predict import predict
from stepdistill.training.optimizers import Team
from stepdistill.training.recipe import Run
from stepdistill.training.sampling import draw_validation
from stepdistill.training.setup import Session, prepare
from stepdistill.training.teacher import Teacher
from stepdistill.training.watch.measure import Watch

logger = logging.getLogger(__name__)


def distill(run: Run) -> Path:
    """Train, write the student folder, prove that plain Diffusers loads it, and report. Returns the folder."""
    check(run)
    session = prepare(run)
    spec, accelerator = run.train, session.accelerator
    out = Path(spec.output_dir)
    schedule = run.family.schedule(session.pipe.scheduler)
    check_method(run, schedule)
    sampler = run.method.sampler(schedule)
    run.family.scheduler(session.pipe, sampler)  # the student must have one, so ask now
    check_scales(run.data, sampler)
    if spec.eval_samples:
        report.reference(run, session.digest)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        if not spec.resume_from_checkpoint:  # `check` let only an overwritten folder pass
            for old in checkpoint.checkpoints(out):
                shutil.rmtree(old)
        (out / "config.yaml").write_text(config.to_yaml(run))
    distributed.barrier()
    make_data(session)

    team = Team.assemble(session.backbone, run.method, spec)
    if run.lora.init_from:
        student.start_from(session.backbone, run.lora.init_from, run.family)
    loop = assemble(session, team)
    finished = loop.fit()
    session.feed.save()
    if session.shards is None:
        accelerator.end_training()
    if finished:
        with session.leading() as leader:  # of a sharded base while there still is a process group
            if leader:
                report.finish(session)
    if session.shards is not None:
        accelerator.end_training()
    return out


def make_data(session: Session) -> None:
    """Let the teacher make what the data sources lack of its samples.

    All processes share the work, but for a sharded teacher, whose every call takes all of them.
    """
    rank, processes, teacher = session.accelerator.process_index, session.accelerator.num_processes, Teacher(session)
    for source in inside(session.run.data):
        if isinstance(source, Made):
            if session.shards is None:
                source.fill(teacher, rank, processes)
            else:
                with session.leading() as leader:
                    if leader:
                        source.fill(teacher)
            distributed.barrier()


def assemble(session: Session, team: Team) -> Loop:
    """The training loop, taken up from a checkpoint where the config says so."""
    run, accelerator = session.run, session.accelerator
    spec, out = run.train, Path(run.train.output_dir)
    parts = spec.train_batch_size * spec.gradient_accumulation_steps * accelerator.num_processes
    facts: dict[str, object] = {"config": config.digest(run), "global_batch": parts, "seed": spec.seed}
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=session.dtype == torch.float16)
    start, keep = 0, None
    if spec.resume_from_checkpoint:
        keep = checkpoint.find(out, spec.resume_from_checkpoint)
    if keep:
        roles, optimizers, state = checkpoint.load(keep)
        if state["global_batch"] != parts:
            raise ConfigError(
                problem(
                    f"a global batch of {parts} (batch x accumulation x processes)",
                    f"{state['global_batch']}, as in {keep}",
                    "a step would see other data than the run it goes on from",
                    "change train_batch_size or gradient_accumulation_steps to match",
                )
            )
        team.load(roles, optimizers)
        scaler.load_state_dict(state["scaler"])
        start = state["step"]
        logger.warning("going on from %s", keep)
    if spec.gradient_checkpointing:
        session.backbone.enable_checkpointing()
    if spec.torch_compile:
        session.backbone.net.compile()
    logs = Logs(accelerator, out, start)
    accelerator.init_trackers(spec.tracker_project_name, config=None)
    _announce(run, team, parts, start)
    batches = session.feed.batches(run.data, start, accelerator.process_index, accelerator.num_processes)
    with session.leading() as leader:
        watch = Watch.begin(session, logs, start) if leader else None

    def validate(step: int) -> bool:
        with session.leading() as leader:
            if leader:
                draw_validation(session, step, logs)
                return watch is not None and watch.look(step)
        return False

    return Loop(
        method=run.method,
        team=team,
        spec=spec,
        context=session.context,
        batches=batches,
        logs=logs,
        validate=validate,
        scaler=scaler,
        facts=facts,
        device=accelerator.device,
        start=start,
        keep=keep,
    )


def _announce(run: Run, team: Team, global_batch: int, start: int) -> None:
    if distributed.world()[0]:
        return
    sizes = {name: sum(p.numel() for p in team.params(name).values()) for name in team.backbone.declared}
    print("***** Running training *****")
    print(f"  samples = {len(run.data)}, global batch = {global_batch}, steps = {start} to {run.train.max_train_steps}")
    print("  " + ", ".join(f"{name}: {count / 1e6:.2f}M parameters" for name, count in sizes.items()))
    scale = report.guidance_of(run.method)
    if scale is not None:
        print(f"  guidance: uncond + {scale} (cond - uncond); in the form cond + w (cond - uncond), w is one less")


def dry_run(run: Run) -> str:
    """Predicted memory by role."""
    check(run)
    return str(predict(run))
