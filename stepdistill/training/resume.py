"""Resuming from a checkpoint: which values of the config may differ from the stored ones, and which may not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from os.path import exists, samefile
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from stepdistill.config.dump import to_node
from stepdistill.core import distributed
from stepdistill.core.errors import CheckpointError, ConfigError, problem
from stepdistill.data import Source
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Ema, LoraSpec, Role
from stepdistill.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    named_checkpoint,
    read_facts,
    rotate,
    save_checkpoint,
)
from stepdistill.training.optimizers import OPTIONS, Optimizers
from stepdistill.training.recipe import TrainSpec

logger = logging.getLogger(__name__)
KEPT = (
    "family",
    "teacher",
    "start_from",
    "method",
    "data",
    "lora",
    "train.seed",
    "train.resolution",
    "train.resolution_weights",
    "train.cache_latents",
    "train.optimizers",
    "train.assistant",
)
SAME = {
    "global_batch": (
        "a global batch of {} (batch x accumulation x processes)",
        "the steps would see other data than before",
    ),
    "teacher": ("a teacher whose network has the digest {}", "a student has one teacher"),
    "samples": ("a data source of {}", "the earlier steps saw other samples"),
}


class AnyRun(Protocol):
    """What of a run is compared."""

    @property
    def train(self) -> TrainSpec: ...
    @property
    def method(self) -> Any: ...  # noqa: ANN401
    @property
    def data(self) -> Source: ...
    @property
    def lora(self) -> LoraSpec: ...
    @property
    def inputs(self) -> list[str]: ...
    def resolved(self) -> AnyRun: ...


class AnySession(Protocol):
    """What of a session is saved, or compared."""

    @property
    def run(self) -> AnyRun: ...
    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def backbone(self) -> Backbone: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def samples(self) -> object: ...
    @property
    def digest(self) -> object: ...


UNSAID = ("train.resume_from_checkpoint", "train.overwrite_output_dir")
Changes = dict[str, tuple[object, object]]


def is_resumed(run: AnyRun) -> bool:
    """Whether the run resumes the one in its own `train.output_dir`."""
    wanted, out = run.train.resume_from_checkpoint, Path(run.train.output_dir)
    return wanted == "latest" or bool(wanted) and named_checkpoint(out, wanted).resolve().parent == out.resolve()


def find_source(run: AnyRun) -> Path | None:
    """The checkpoint that the run resumes from; None where it starts at the beginning.

    Raises:
        CheckpointError: it is incomplete, or an earlier version wrote it.
        ConfigError: values of `KEPT` differ, or it has more steps than the run.
    """
    spec = run.train
    if not spec.resume_from_checkpoint:
        return None
    folder = find_checkpoint(Path(spec.output_dir), spec.resume_from_checkpoint)
    if folder is None:
        return None
    facts = read_facts(folder)
    if not isinstance(facts["config"], Mapping):
        got, why = f"{folder}, which holds no config", "an earlier version of stepdistill wrote it"
        todo = "start a new run in another train.output_dir"
        raise CheckpointError(problem(got, "a checkpoint with its config", why, todo))
    changed = {path: both for path, both in changes(run, facts["config"]).items() if is_kept(path)}
    if changed:
        got, before = (", ".join(f"{path}={_shown(both[k])}" for path, both in changed.items()) for k in (1, 0))
        why = "a resumed run keeps its method, teacher, data, LoRAs, optimizers and seed"
        todo = "set them back, or start a new run in another train.output_dir"
        raise ConfigError(problem(got, f"{before}, as in {folder}", why, todo))
    if facts["step"] > spec.max_train_steps:
        got, why = f"train.max_train_steps={spec.max_train_steps}", "the checkpoint has more steps than that"
        todo = "raise train.max_train_steps, or resume from an earlier checkpoint"
        raise ConfigError(problem(got, f"{facts['step']} or more, the steps of {folder}", why, todo))
    return folder


def check_same(session: AnySession, source: Path | None) -> None:
    """Raise ConfigError where the loaded teacher, the data or the global batch is another than the checkpoint's."""
    if source is None:
        return
    before, now = read_facts(source), session_facts(session)
    for key, (words, why) in SAME.items():
        if before[key] != now[key]:
            todo = "set it back, or start a new run in another train.output_dir"
            raise ConfigError(problem(words.format(now[key]), f"{before[key]}, as in {source}", why, todo))


def session_facts(session: AnySession) -> dict[str, object]:
    """What a checkpoint stores to compare a resumed run with."""
    return {
        "config": to_node(session.run, type(session.run)),
        "global_batch": session.global_batch,
        "samples": session.samples,
        "teacher": session.digest,
    }


def restore(session: AnySession, optimizers: Optimizers, source: Path | None) -> int:
    """Load a checkpoint, and report the values of the config that differ. Returns its step, or 0 without one."""
    if source is None:
        return 0
    roles, states, facts = load_checkpoint(source)
    optimizers.restore(roles, states, facts["scaler"], facts["step"])
    changed = {path: both for path, both in changes(session.run, facts["config"]).items() if path not in UNSAID}
    lines = [f"{path}: {_shown(before)} -> {_shown(now)}" for path, (before, now) in changed.items()]
    logger.warning("resuming from %s", "\n  ".join([str(source), *lines]))
    return facts["step"]


def save_session(session: AnySession, optimizers: Optimizers, step: int, source: Path | None) -> None:
    """Write `checkpoint-<step>` and rotate; rank 0 writes, all wait.

    Args:
        source: the checkpoint that the run resumed from.
    """
    if session.accelerator.is_main_process:
        spec, backbone = session.run.train, session.backbone
        out, roles = Path(spec.output_dir), {name: backbone.state(name) for name in backbone.declared}
        facts = session_facts(session) | {"step": step, "scaler": optimizers.scaler.state_dict()}
        if save_checkpoint(out / f"checkpoint-{step}", roles, optimizers.state(), facts):
            rotate(out, spec.checkpoints_total_limit, source)
    distributed.barrier()


def changes(run: AnyRun, stored: Mapping[str, Any]) -> Changes:
    """(stored, new) of every value that differs, by path; None stands for a missing one. Of an instance of another
    class only its `type` is listed."""
    before, now = (settings(config, run.method.roles()) for config in (stored, to_node(run.resolved(), type(run))))
    changed = {key: (before.get(key), now.get(key)) for key in before | now if not _same(before.get(key), now.get(key))}
    other = tuple(key.removesuffix("type") for key in changed if key.endswith(".type"))
    return {key: both for key, both in changed.items() if key.endswith(".type") or not key.startswith(other)}


def _same(before: object, now: object) -> bool:
    """Whether two values of a config are equal, or two names of one file or folder."""
    if isinstance(before, str) and isinstance(now, str) and exists(before) and exists(now):
        return samefile(before, now)
    return before == now


def settings(config: Mapping[str, Any], roles: Mapping[str, Role]) -> dict[str, object]:
    """The values of a config by path, with an optimizer for each trained role."""
    train = dict(config["train"])
    default, own = train.pop("optimizer"), train.pop("optimizers") or {}
    trained = [name for name, role in roles.items() if not isinstance(role, Ema)]
    return dict(_flat({**config, "train": train | {"optimizers": {name: own.get(name, default) for name in trained}}}))


def is_kept(path: str) -> bool:
    """Whether a resumed run must have the stored value."""
    parent, _, name = path.rpartition(".")
    if path == "lora.arithmetic" or (parent.startswith("train.optimizers.") and name in OPTIONS):
        return False
    return path.startswith(tuple(f"{key}." for key in KEPT)) or path in KEPT


def _flat(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, node


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
