"""The training loop: for each update of the method, backward, sync, clip, step and zero."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from stepdistill.core import distributed
from stepdistill.core.errors import NonFiniteLoss, problem
from stepdistill.core.progress import progress
from stepdistill.methods.base import Update
from stepdistill.training.calibrate import calibrate
from stepdistill.training.folder import open_folder
from stepdistill.training.logs import Logs, banner
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.resume import AnySession, restore, save_session
from stepdistill.training.sampling import draw_validation
from stepdistill.training.setup import Session
from stepdistill.training.watch.measure import Watch

logger = logging.getLogger(__name__)


class HasStep(Protocol):
    """What a step must know of its context."""

    @property
    def step(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class HasIndex(Protocol):
    """What a step must know of a micro-batch: its samples' positions."""

    @property
    def index(self) -> tuple[int, ...]: ...


C = TypeVar("C", bound=HasStep)
B = TypeVar("B", bound=HasIndex)


class Training(AnySession, Protocol[C]):
    """A session, as its steps need it."""

    def context(self, step: int, /) -> C: ...


class Updating(Protocol[C, B]):
    """A method, as a step calls it."""

    def updates(self, context: C, batch: B, step: int, /) -> Iterator[Update]: ...


def train_step(
    method: Updating[C, B], optimizers: Optimizers, context: C, micro_batches: Sequence[B]
) -> dict[str, float]:
    """All updates of one step; micro-batches advance in lockstep. Returns the values to log.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite; its update is not applied.
    """
    turns = [method.updates(context, batch, context.step) for batch in micro_batches]
    values: dict[str, float] = {}
    for number in count():
        roles: tuple[str, ...] = ()
        logs: dict[str, Tensor] = {}
        total = torch.zeros((), device=context.device)
        with optimizers.backbone.unchanged():
            for turn in turns:
                update = next(turn, None)
                if update is None:
                    continue
                optimizers.scaler.scale(update.loss / len(turns)).backward()
                roles, total = update.roles, total + update.loss.detach().float() / len(turns)
                for key, value in update.logs.items():
                    logs[key] = logs.get(key, 0) + value.float() / len(turns)
                del update  # with it goes the graph, before the next micro-batch builds one
        if not roles:
            break
        distributed.average([total, *logs.values()])
        numbers = {**optimizers.clip(roles), **logs}
        # one read an update, since each waits for the device; and before the weights are touched
        loss, *read = torch.stack([value.to(total).reshape(()) for value in (total, *numbers.values())]).tolist()
        if not math.isfinite(loss):
            term = f"update {number} (roles {', '.join(roles)}), samples {micro_batches[0].index[0]} and on"
            got = f"a loss of {loss} at step {context.step + 1} in {term}"
            why = "the update would destroy the weights; those before this step are saved"
            todo = "inspect non_finite.pt; lower train.learning_rate, or use bf16 instead of fp16"
            raise NonFiniteLoss(problem(got, "a finite loss", why, todo))
        optimizers.apply(roles, context.step)
        values |= dict(zip(numbers, read, strict=True)) | {"lr": optimizers.rate}
    optimizers.advance_schedules()
    return values


def logged_steps(
    session: Training[C],
    method: Updating[C, B],
    optimizers: Optimizers,
    batches: Iterator[Sequence[B]],
    logs: Logs,
    start: int,
    source: Path | None,
) -> Generator[int]:
    """Train from step `start` to `max_train_steps`.

    Yields the number of steps after each one, which is logged and, where that is due, saved. A signal ends it after a
    checkpoint, and the last step is then not yielded.

    Args:
        batches: the micro-batches of each step.
        source: the checkpoint that the run resumed from.

    Raises:
        NonFiniteLoss: what it saw is in `non_finite.pt`, and the weights before it in a checkpoint.
    """
    spec, accelerator = session.run.train, session.accelerator
    before, updates = optimizers.fingerprint(), Counter(dict.fromkeys(optimizers.by_role, 0))
    bar = progress(
        title="Training", unit="step", total=spec.max_train_steps, done=start, shown=accelerator.is_main_process
    )
    with Stop().listening() as stop, bar:
        for step in range(start, spec.max_train_steps):
            began, micro_batches = time.perf_counter(), next(batches)
            try:
                with session.backbone.assisted():
                    values = train_step(method, optimizers, session.context(step), micro_batches)
            except NonFiniteLoss as error:
                if optimizers.step != step:  # nothing of this step has been applied yet
                    save_session(session, optimizers, step, source)
                if accelerator.is_main_process:
                    state = {"step": step, "error": str(error), "index": [batch.index for batch in micro_batches]}
                    torch.save(state, Path(spec.output_dir) / "non_finite.pt")
                raise
            # the first scores of VSD are equal, exactly
            updates.update(role for role in optimizers.by_role if values.get(f"grad_norm/{role}", 0) > 0)
            if before and min(updates.values()) >= 2 and step - start < 50:
                optimizers.check_moved(before, all_should=start == 0 and spec.lr_warmup_steps == 0)
                before = {}
            values["seconds"] = time.perf_counter() - began
            logs.write(step + 1, values)
            bar.set_postfix({k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "lr")}, refresh=False)
            bar.update()
            done = step + 1 == spec.max_train_steps
            stopped = distributed.agree(stop.asked, accelerator.device) and not done
            if done or stopped or due(step + 1, spec.checkpointing_steps):
                save_session(session, optimizers, step + 1, source)
            if stopped:
                return
            yield step + 1


def training_loop(session: Session, optimizers: Optimizers, source: Path | None = None) -> bool:
    """Train to `max_train_steps`; False where a signal or the watch ended it before, after a checkpoint.

    Args:
        source: the checkpoint to resume from.
    """
    run, spec, accelerator = session.run, session.run.train, session.accelerator
    start = restore(session, optimizers, source)
    if spec.gradient_checkpointing:
        session.backbone.enable_checkpointing()
    if spec.torch_compile:
        session.backbone.net.compile()
    open_folder(session, source)
    calibrate(session)
    logs = Logs(accelerator, Path(spec.output_dir), start)
    accelerator.init_trackers(spec.tracker_project_name, config=None)
    if accelerator.is_main_process:
        print(banner(run, session.backbone, session.global_batch, start), flush=True)
    batches = session.batches.steps(run.data, start, accelerator.process_index, accelerator.num_processes)
    with session.leading() as leader:
        watch = Watch(session, logs, start) if leader and spec.is_watched else None

    last, given = start, (session, session.method, optimizers, batches, logs, start, source)
    with closing(batches), closing(logged_steps(*given)) as steps:  # with the batches go the processes that read
        for last in steps:
            done = last == spec.max_train_steps
            if done or due(last, spec.validation_steps):
                alarm = _validate(session, watch, logs, last)
                if distributed.agree(alarm, accelerator.device) and not done:
                    save_session(session, optimizers, last, source)
                    return False
    return last == spec.max_train_steps


def due(step: int, every: int | None) -> bool:
    """Whether something that comes every so many steps comes after this one."""
    return bool(every) and step % every == 0


def _validate(session: Session, watch: Watch | None, logs: Logs, step: int) -> bool:
    """Draw the validation images, and let the watch look; whether it asks to stop."""
    with session.leading() as leader:
        if leader:
            draw_validation(session, step, logs)
        return watch is not None and watch.look(step)


class Stop:
    """Whether a signal asked to stop: the first lets the step finish, the second ends the program at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step, then saving; press Ctrl-C again to exit immediately")

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle Ctrl-C and SIGTERM while open."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                signal.signal(number, self)
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
