"""An evaluation's folder: `eval.json`, `rows.csv`, `report.html`, `per_sample.jsonl`, sheets and statistics."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from stepdistill.core.files import write_text
from stepdistill.evaluation.measure import Reference
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.report.page import page
from stepdistill.evaluation.report.table import SCHEMA, flat, read, write_csv
from stepdistill.evaluation.store import Store

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
SCORES = ("clip", "psnr", "ssim", "lpips")  # what a unit tells of single images


def document(
    identity: Identity,
    reference: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    device: torch.device,
    **more: object,
) -> dict[str, Any]:
    """The contents of `eval.json`.

    Args:
        rows: as `stepdistill.evaluation.measure.measured` makes them.
        device: that it ran on.
        more: teacher, prompts, sheets, what was left out.
    """
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tool": {name: version(name) for name in ("stepdistill", *LIBRARIES)},
        "host": host(device),
        "teacher": None,
        "prompts": None,
        **more,
        "features": {"id": identity.id, "key": identity.key, **vars(identity)},
        "reference": dict(reference),
        "protocol": dict(protocol),
        "rows": [dict(row) for row in rows],
        "exit_reason": "ok",
    }


def host(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "world_size": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else False,
    }


def under(
    protocol: Protocol,
    identity: Identity,
    n: int,
    side: int | None,
    reference: Mapping[str, Any],
    clip: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The protocol as the report shows it, and why figures are no more than a hint; see `Protocol.deviations`."""
    deviations = protocol.deviations(n, identity, side, reference, clip)
    told = {"name": protocol.name, "met": not deviations, "deviations": deviations}
    return told | {"trusted": protocol.trusted(reference)}, deviations + identity.reasons()


def samples(stores: Mapping[str, Store], prompts: Sequence[str] | None, seed: int | None, file: Path) -> None:
    """Write `per_sample.jsonl`: a line an image, with every score that it has."""
    lines = []
    for name, store in stores.items():
        for k, unit in enumerate(store.told()):
            kept = [i for i in store.rows(k) if i not in unit["skipped"]]
            scores = {key: unit[key] for key in SCORES if key in unit}
            for at, i in enumerate(kept):
                line: dict[str, Any] = {"row": name, "index": i}
                line |= {"prompt": prompts[i], "seed": seed} if prompts else {}
                lines.append(json.dumps(line | {key: value[at] for key, value in scores.items()}))
    write_text(file, "\n".join(lines))


def finish(folder: Path, found: Mapping[str, Any], stores: Mapping[str, Store], reference: Reference) -> None:
    """Write what depends on all rows; statistics of an earlier evaluation in the folder go."""
    write_text(folder / "eval.json", json.dumps(found, indent=1))
    evaluation = read(folder)
    write_csv(flat([evaluation]), folder / "rows.csv")
    write_text(folder / "report.html", page([evaluation], folder.resolve().name))
    shutil.rmtree(folder / "stats", ignore_errors=True)
    (folder / "stats").mkdir()
    facts = {"features_id": found["features"]["id"], "eval_res": found["eval_res"]}
    for name, store in stores.items():
        store.stats().save(folder / "stats" / f"{store.folder.name}.npz", facts | {"row": name})
    if reference.facts["kind"] != "npz":  # which has a file, and says itself what it is of
        reference.stats.save(folder / "stats" / "reference.npz", facts)


def lines(found: Mapping[str, Any]) -> list[str]:
    """The rows of `eval.json` for a terminal."""
    width = max(len(row["name"]) for row in found["rows"])
    texts = [f"left out: {text}" for text in found.get("left_out", [])]
    texts.append(f"{found['features']['key']} on {found['features']['id']}, reference: {found['reference']['path']}")
    for row in found["rows"]:
        metrics, cost = row["metrics"], row["cost"]
        key = found["features"]["key"]
        parts = [f"{row['name']:<{width}}", f"n {row['n']}", f"{key} {_brief(metrics[key])}"]
        if "delta_vs_teacher" in metrics:
            parts.append(f"excess {_brief(metrics['delta_vs_teacher'][key])}")
        if "clip_score" in metrics:
            parts.append(f"clip {_brief(metrics['clip_score'])}")
        if cost:
            parts.append(
                f"calls {cost['calls']:g}  nfe {cost['nfe']:g}  {1000 * cost['seconds_per_image']:.2f} ms an image"
            )
        texts.append("  ".join(parts))
    return texts


def _brief(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['value']:.4g} [{low:.4g}, {high:.4g}]"
