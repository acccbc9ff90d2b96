"""Checkpoints: atomic writes with file hashes, rotation, and resume from the last complete one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.core.errors import CheckpointError, problem
from stepdistill.core.files import file_digest, written_whole

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoint folders, oldest first."""
    finished = [f for f in output_dir.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(finished, key=step_of)


def save_checkpoint(
    folder: Path, roles: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, object], state: Mapping[str, Any]
) -> bool:
    """Write a checkpoint: each role's tensors, the optimizers' states, and plain facts.

    It appears under its name only when it is whole. Where the disk refuses, the part is removed, the older
    checkpoints stay, and the answer is False.
    """
    try:
        with written_whole(folder) as part:
            part.mkdir()
            for name, tensors in roles.items():
                plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(plain, part / f"{name}.safetensors")
            torch.save(optimizers, part / "optimizers.pt")
            (part / "state.json").write_text(json.dumps(dict(state), indent=1))
            listed = {file.name: file_digest(file) for file in sorted(part.iterdir())}
            (part / MANIFEST).write_text(json.dumps(listed, indent=1))
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as RuntimeError
        logger.error("cannot write %s (%s): the last complete checkpoint is kept", folder, error)
        return False
    return True


def broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None where every file is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, sha256 in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file_digest(file) != sha256:
            return f"{name} has changed since it was written"
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], Any, dict[str, Any]]:
    """(roles, optimizers, state) of a whole checkpoint, on the cpu."""
    roles = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    optimizers = torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)
    return roles, optimizers, read_facts(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """The plain facts of a whole checkpoint."""
    return json.loads((folder / "state.json").read_text())


def named_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder that `resume_from_checkpoint` names: a path, or a name in the run's folder."""
    return Path(name) if Path(name).is_dir() else output_dir / name


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: a path, or `latest`, which skips broken ones with a warning.

    None where `latest` finds no checkpoint at all: the run then starts from the beginning.
    """
    if wanted != "latest":
        folder = named_checkpoint(output_dir, wanted)
        reason = broken(folder) if folder.is_dir() else "there is no such folder"
        if reason:
            have = ", ".join(f.name for f in checkpoints(output_dir)) or "none"
            got = f"checkpoint {wanted!r}: {reason}"
            why = "a run can resume only from a complete checkpoint"
            todo = f"use `latest` or one of the checkpoints in {output_dir}: {have}"
            raise CheckpointError(problem(got, "a complete checkpoint folder", why, todo))
        return folder
    folders = checkpoints(output_dir)
    for folder in reversed(folders):
        reason = broken(folder)
        if reason is None:
            return folder
        logger.warning("skipping checkpoint %s: %s; trying the one before it", folder, reason)
    if folders:
        got = f"{len(folders)} checkpoints in {output_dir}, none of them complete"
        why = "there is nothing to resume from"
        todo = "start again with another train.output_dir"
        raise CheckpointError(problem(got, "at least one", why, todo))
    return None


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; never the one that this run went on from."""
    if limit is None:
        return
    old = [folder for folder in checkpoints(output_dir) if folder != keep]
    for folder in old[: max(0, len(old) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)


def put_aside(folder: Path) -> None:
    """Rename a checkpoint, so that `latest` does not find it."""
    aside = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    logger.warning("%s is of later steps, which are trained again: renamed to %s", folder, aside.name)
