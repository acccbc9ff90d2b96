"""One distillation from config to student folder: `distill(run)`, whoever calls it."""

from __future__ import annotations

import shutil
from pathlib import Path

from stepdistill.config.load import to_yaml
from stepdistill.core import distributed
from stepdistill.data import inside
from stepdistill.data.made import TeacherMade
from stepdistill.students import single as student
from stepdistill.training import checkpoint
from stepdistill.training import finish as report
from stepdistill.training.checks import check, check_method, check_scales
from stepdistill.training.loop import train
from stepdistill.training.memory.predict import predict
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run
from stepdistill.training.setup import Session, prepare
from stepdistill.training.teacher import Teacher


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
        (out / "config.yaml").write_text(to_yaml(run))
    distributed.barrier()
    make_data(session)

    optimizers = Optimizers(session.backbone, spec, session.scaler).declare(run.method).build()
    if run.lora.init_from:
        student.start_from(session.backbone, run.lora.init_from, run.family)
    finished = train(session, optimizers)
    session.batches.save()
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
        if isinstance(source, TeacherMade):
            if session.shards is None:
                source.fill(teacher, rank, processes)
            else:
                with session.leading() as leader:
                    if leader:
                        source.fill(teacher)
            distributed.barrier()


def dry_run(run: Run) -> str:
    """Predicted memory by role."""
    check(run)
    return str(predict(run))
