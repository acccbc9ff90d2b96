"""One distillation from config to student folder: `distill(run)`, whoever calls it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stepdistill.core import distributed
from stepdistill.data import inside
from stepdistill.data.made import TeacherMade
from stepdistill.students.load import start_from
from stepdistill.training.checks import check_loaded, check_run
from stepdistill.training.finish import finish_run
from stepdistill.training.loop import training_loop
from stepdistill.training.memory.predict import predict
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run
from stepdistill.training.resume import check_same, find_source
from stepdistill.training.setup import Session, prepare
from stepdistill.training.teacher import TeacherSampler


def distill(run: Run) -> Path:
    """Train, write the student folder, verify that plain Diffusers loads it, and report. Returns the folder."""
    run = run.resolved()
    source = find_source(run)
    check_run(run)
    session = prepare(run)
    check_loaded(session)
    check_same(session, source)
    optimizers = Optimizers(session.backbone, run.train, session.scaler).declare(run.method).build()
    for role, place in run.lora.starts().items() if source is None else ():
        # it may not fit: before the teacher works for hours. The rounding of a quantized base is in its hashes.
        base = session.base.hashes if run.family.quantization is None else None
        start_from(session.backbone, place, run.family, role, base)
    make_data(session)
    finished = training_loop(session, optimizers, source)
    session.batches.save()

    if session.shards is None:
        session.accelerator.end_training()
    if finished:
        with session.leading() as leader:  # of a sharded base while there still is a process group
            if leader:
                finish_run(session)
    if session.shards is not None:
        session.accelerator.end_training()
    return Path(run.train.output_dir)


def make_data(session: Session) -> None:
    """Generate the teacher samples that the data sources lack.

    All processes share the work, but for a sharded teacher, whose every call takes all of them.
    """
    accelerator, teacher = session.accelerator, TeacherSampler(session)
    for source in inside(session.run.data):
        if isinstance(source, TeacherMade):
            if session.shards is None:
                source.fill(teacher, accelerator.process_index, accelerator.num_processes)
            else:
                with session.leading() as leader:
                    if leader:
                        source.fill(teacher)
            distributed.barrier()


def dry_run(run: Run) -> str:
    """Predicted memory by role."""
    run = run.resolved()
    resumed = find_source(run) is not None
    check_run(run)
    return str(predict(replace(run, lora=run.lora.without_starts()) if resumed else run))
