"""The one training loop: it pulls a method's updates and does, for each, backward, sync, clip, step, zero."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.core import distributed
from stepdistill.core.errors import NonFiniteLoss, StepdistillError, problem
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.training import checkpoint
from stepdistill.training.logs import Logs
from stepdistill.training.optimizers import Team
from stepdistill.training.recipe import TrainSpec

logger = logging.getLogger(__name__)


class Stop:
    """Whether a signal asked to stop: the first lets the step finish, the second ends the program at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step, then saving; once more to leave at once")

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


@dataclass
class Loop:
    """One run's training. `context(step)` and `batches` come from `stepdistill.training.distill`.

    Args:
        batches: the micro-batches of each step from `start` on.
        validate: called with a step count where validation is due; True asks to stop.
        keep: the checkpoint that the run went on from.
    """

    method: Method
    team: Team
    spec: TrainSpec
    context: Callable[[int], StepContext]
    batches: Iterator[list[Batch]]
    logs: Logs
    validate: Callable[[int], bool]
    scaler: torch.amp.GradScaler
    facts: dict[str, object]
    device: torch.device
    start: int = 0
    keep: Path | None = None

    def fit(self) -> bool:
        """Train to `max_train_steps`; False where a signal or `validate` ended it before, after a checkpoint."""
        spec, rank = self.spec, distributed.world()[0]
        bar = tqdm(total=spec.max_train_steps, initial=self.start, desc="Steps", disable=rank > 0, dynamic_ncols=True)
        before, stepped = self.team.fingerprint(), dict.fromkeys(self.team.optimizers, 0)
        with Stop().listening() as stop, bar:
            for step in range(self.start, spec.max_train_steps):
                began = time.perf_counter()
                values = self.one_step(step, next(self.batches), stepped)
                if step - self.start < 50:
                    before = self._moved(before, stepped)
                values["seconds"] = time.perf_counter() - began
                self.logs.write(step + 1, values)
                bar.set_postfix({k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "lr")}, refresh=False)
                bar.update()
                done = step + 1 == spec.max_train_steps
                ending = distributed.agree(stop.asked, self.device)
                if ending or done or (spec.checkpointing_steps and (step + 1) % spec.checkpointing_steps == 0):
                    self.save(step + 1)
                if ending and not done:
                    return False
                due = done or (spec.validation_steps and (step + 1) % spec.validation_steps == 0)
                if due and distributed.agree(self.validate(step + 1), self.device) and not done:
                    self.save(step + 1)
                    return False
        return True

    def one_step(self, step: int, micro_batches: Sequence[Batch], stepped: dict[str, int]) -> dict[str, float]:
        """All updates of one step; micro-batches advance in lockstep. Returns the values to log."""
        context = self.context(step)
        turns = [self.method.updates(context, batch, step) for batch in micro_batches]
        values: dict[str, float] = {}
        number = 0
        while True:
            roles: tuple[str, ...] = ()
            logs: dict[str, Tensor] = {}
            total = torch.zeros((), device=self.device)
            for turn in turns:
                update = next(turn, None)
                if update is None:
                    continue
                self.scaler.scale(update.loss / len(turns)).backward()
                roles, total = update.roles, total + update.loss.detach().float() / len(turns)
                for key, value in update.logs.items():
                    logs[key] = logs.get(key, 0) + value.float() / len(turns)
                del update  # with it goes the graph, before the next micro-batch builds one
            if not roles:
                break
            distributed.average([total, *logs.values()])
            if not torch.isfinite(total):
                self._dump(step, number, roles, micro_batches, total)
            self._apply(step, roles, values)
            for role in roles:
                stepped[role] += values[f"grad_norm/{role}"] > 0  # the first scores of VSD are equal, exactly
            values |= {key: value.item() for key, value in logs.items()}
            number += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of")  # rates follow steps; a role may wait for its first
            for scheduler in self.team.schedulers.values():
                scheduler.step()
        return values

    def _apply(self, step: int, roles: Sequence[str], values: dict[str, float]) -> None:
        """Sync, clip, step, average, zero."""
        for role in roles:
            params = self.team.params(role)
            missing = [key for key, p in params.items() if p.grad is None]
            if missing:
                raise StepdistillError(
                    problem(
                        f"no gradient for {len(missing)} of {len(params)} tensors of role {role!r}, as {missing[0]}",
                        "one for each",
                        "the loss does not reach them, so they would never learn",
                        "exclude layers whose output is not used, or look for a no_grad around the role's call",
                    )
                )
            optimizer = self.team.optimizers[role]
            distributed.average([p.grad for p in params.values() if p.grad is not None])
            self.scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(list(params.values()), self.spec.max_grad_norm or float("inf"))
            self.scaler.step(optimizer)
            values[f"grad_norm/{role}"] = norm.item()
            values["lr"] = float(self.team.schedulers[role].get_last_lr()[0])
        self.scaler.update()
        self.team.backbone.average(roles, step)
        self.team.zero()

    def _moved(self, before: dict[str, Tensor], stepped: dict[str, int]) -> dict[str, Tensor]:
        """After two updates of a role each of its tensors has moved, and no frozen one has: else an error."""
        ready = [role for role, count in stepped.items() if count >= 2]
        if not before or len(ready) < len(stepped):
            return before
        now = self.team.fingerprint()
        still = [k for k in now if k.split("/")[0] in ready and bool(now[k] == before[k])]
        leaked = [k for k in now if k.startswith("base/") and not bool(now[k] == before[k])]
        learning = any(group["lr"] > 0 for opt in self.team.optimizers.values() for group in opt.param_groups)
        if (still and learning and self.start == 0 and self.spec.lr_warmup_steps == 0) or leaked:
            raise StepdistillError(
                problem(
                    f"{len(still)} trainable tensors that did not move and {len(leaked)} frozen ones that did, "
                    f"as {(still + leaked)[0]}",
                    "every trainable tensor moved and no other",
                    "a run that learns nothing, or changes its teacher, would otherwise look healthy",
                    "check the learning rate, and that the loss is not zero",
                )
            )
        return {}

    def _dump(self, step: int, number: int, roles: Sequence[str], batches: Sequence[Batch], loss: Tensor) -> None:
        """Save what is good, and stop with what is known of a loss that is not finite."""
        if number == 0:  # nothing of this step has been applied yet
            self.save(step)
        term = f"update {number} (roles {', '.join(roles)})"
        file = Path(self.spec.output_dir) / "non_finite.pt"
        if distributed.world()[0] == 0:
            torch.save({"step": step, "term": term, "index": [b.index for b in batches], "loss": loss.cpu()}, file)
        raise NonFiniteLoss(
            problem(
                f"a loss of {loss.item()} at step {step + 1} in {term}, samples {batches[0].index[0]} and on",
                "a finite one",
                "going on would destroy the weights; those before this step are saved",
                f"look at {file}; lower train.learning_rate, or use bf16 instead of fp16",
            )
        )

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>` and rotate; rank 0 writes, all wait."""
        if distributed.world()[0] == 0:
            out = Path(self.spec.output_dir)
            backbone = self.team.backbone
            roles = {name: backbone.state(name) for name in backbone.declared}
            facts = {**self.facts, "step": step, "scaler": self.scaler.state_dict()}
            if checkpoint.save(out / f"checkpoint-{step}", roles, self.team.state(), facts):
                checkpoint.rotate(out, self.spec.checkpoints_total_limit, self.keep)
        distributed.barrier()
