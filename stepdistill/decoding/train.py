"""One run of Distilled Decoding, from config to student folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from stepdistill.core import distributed
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.run import DecodingRun, check_decoding_run, check_settings
from stepdistill.decoding.session import DecodingSession, fresh_heads, longest_prompt, prepare_decoding, roles_of
from stepdistill.decoding.write import write_decoding_student
from stepdistill.networks.merge import merged_network
from stepdistill.training.folder import check_data_folders, open_folder
from stepdistill.training.logs import Logs
from stepdistill.training.loop import logged_steps
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.resume import check_same, find_source, restore


def distill_decoder(run: DecodingRun) -> Path:
    """Draw what pairs are missing, train, and write the student folder. Returns the folder."""
    source = find_source(run)
    check_decoding_run(run)
    session = prepare_decoding(run)
    check_same(session, source)
    longest_prompt(session.teacher, run.data.source)  # before the teacher works for hours
    optimizers = Optimizers(session.backbone, run.train).add(roles_of(session, fresh_heads))
    draw_pairs(session)
    session.lower_precision()
    finished = train_decoder(session, optimizers.build(), source)
    session.accelerator.end_training()
    if finished and session.accelerator.is_main_process:
        finish_decoder(session)
    return Path(run.train.output_dir)


def make_pairs(run: DecodingRun) -> str:
    """Draw what pairs are missing; the processes of a launcher share the work. Returns what is there then."""
    check_settings(run)
    check_data_folders(run)
    session = prepare_decoding(run)
    longest_prompt(session.teacher, run.data.source)
    draw_pairs(session)
    session.accelerator.end_training()
    return f"{run.data.path}: {len(run.data)} pairs of noise and tokens"


def draw_pairs(session: DecodingSession) -> None:
    """Draw this process's share of the pairs that are missing, and wait for the others."""
    session.run.data.fill(session.teacher, session.accelerator.process_index, session.accelerator.num_processes)
    distributed.barrier()


def train_decoder(session: DecodingSession, optimizers: Optimizers, source: Path | None) -> bool:
    """Train to `max_train_steps`; False where a signal ended it before, after a checkpoint."""
    run, spec, accelerator = session.run, session.run.train, session.accelerator
    start = restore(session, optimizers, source)
    if spec.gradient_checkpointing:
        session.backbone.enable_checkpointing()
    open_folder(session, source)
    logs = Logs(accelerator, Path(spec.output_dir), start)
    accelerator.init_trackers(spec.tracker_project_name, config=None)
    with closing(session.steps(start)) as batches:
        steps = logged_steps(session, run.method, optimizers, batches, logs, start, source)
        return max(steps, default=start) == spec.max_train_steps


def finish_decoder(session: DecodingSession) -> None:
    """Write the student's folder, and compare it with the student in memory."""
    method, out = session.run.method, Path(session.run.train.output_dir)
    network, heads = method.exported
    made = session.backbone.others[heads]
    assert isinstance(made, Heads)
    merged: Any = merged_network(session.backbone, network)
    if method.whole:  # see `bare_copy`
        merged.embed_tokens = session.backbone.net.embed_tokens
    write_decoding_student(out, session.teacher, method, merged, made, session.dtype)
