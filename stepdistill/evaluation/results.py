"""The files of an evaluation folder: `eval.json`, tables, page, per-image scores, image grids and statistics."""

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
from torch import Tensor

from stepdistill.core.files import write_text
from stepdistill.evaluation.draw import LATENCY
from stepdistill.evaluation.inputs import labels
from stepdistill.evaluation.measure import CLIP_SCORES, Reference, Sampled
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.evaluation.metrics.image_scores import PromptLikeness
from stepdistill.evaluation.plan import SamplingPlan, slug
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.report.page import page
from stepdistill.evaluation.report.table import SCHEMA, flat_rows, read_evaluation, write_csv
from stepdistill.evaluation.spec import EvalRun
from stepdistill.evaluation.store import Store
from stepdistill.students.draw.animation import animated_grid, clip_sheet, save_animation
from stepdistill.students.draw.sheet import image_grid

SHEET_RATE = 8  # frames a second of the animations in a report
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
SCORES = ("clip", "log_likelihood", "psnr", "ssim", "lpips", *CLIP_SCORES)  # what a unit tells of single images


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
        "host": host_facts(device),
        "teacher": None,
        "prompts": None,
        **more,
        "features": {"id": identity.id, "key": identity.key, **vars(identity)},
        "reference": dict(reference),
        "protocol": dict(protocol),
        "rows": [dict(row) for row in rows],
        "exit_reason": "ok",
    }


def host_facts(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "world_size": PartialState().num_processes,
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else False,
    }


def protocol_facts(
    protocol: Protocol,
    identity: Identity,
    n: int,
    side: int | None,
    reference: Mapping[str, Any],
    clip: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The protocol as the report shows it, and why figures are no more than a hint; see `Protocol.deviations`."""
    deviations = protocol.deviations(n, identity, side, reference, clip)
    facts = {"name": protocol.name, "met": not deviations, "deviations": deviations}
    return facts | {"trusted": protocol.trusted(reference)}, deviations + identity.reasons()


def sampled(
    plan: SamplingPlan,
    store: Store,
    settings: tuple[int | None, float | None],
    reasons: Sequence[str],
    clip: PromptLikeness | None,
) -> Sampled:
    """What is known of a plan's images; its steps and guidance scale are `settings`."""
    units, (steps, guidance) = list(store.unit_facts()), settings
    calls, batches, rows, seconds = (
        sum(unit[key] for unit in units) for key in ("calls", "batches", "rows", "seconds")
    )
    cost = {
        "calls": calls / batches,
        "nfe": rows / store.n,
        "seconds_per_image": seconds / store.n,
        "latency_ms": store.noted(LATENCY),
        "peak_mem_mib": max((unit["peak_mem_mib"] for unit in units if unit["peak_mem_mib"]), default=None),
    }
    height, width = units[0]["size"]
    beside = {} if plan.lora_strength is None else {"lora": plan.lora_strength}
    facts = {"student": plan.student, "steps": steps, "guidance": guidance, "seed": plan.seed, "n_skipped": 0}
    image = {"height": height, "width": width, "uint8": "round"}
    return Sampled(
        name=plan.name,
        role=plan.role,
        features=store.features(),
        motion=store.motion(),
        scores=scores_of(store),
        clip=clip.facts if clip else {},
        cost=cost,
        facts=facts | beside | {"image": image},
        reasons=reasons,
    )


def scores_of(store: Store) -> dict[str, Tensor]:
    """The scores of single images, by name."""
    units = list(store.unit_facts())
    known = [key for key in SCORES if any(key in unit for unit in units)]  # a unit of skipped images has none
    return {key: torch.tensor([x for unit in units for x in unit.get(key, [])]) for key in known}


def write_sheets(spec: EvalRun, stores: Mapping[SamplingPlan, Store], prompts: Sequence[str]) -> list[str]:
    """Draw `grids/WHO.png`: the teacher's rows and each student's, the same prompts and noises below each caption. Of
    clips that is an animation, `WHO.webp`, and `WHO.png` shows their frames beside one another.

    Returns:
        Their names; those of an earlier evaluation in the folder go.
    """
    folder = spec.output_dir / "grids"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    taught = [plan for plan in stores if plan.role == "teacher"]
    names = []
    for place, who in zip(spec.students or ("",), labels(spec.students) or ["teacher"], strict=True):
        shown = range(min(spec.columns, len(prompts)))
        rows = [
            (plan.name.replace(", ", "\n"), stores[plan].images(shown))
            for plan in [*taught, *(plan for plan in stores if place and plan.student == place)]
        ]
        scale, captions = max(1, 96 // rows[0][1].shape[-1]), [prompts[i] for i in shown]
        if rows[0][1].ndim == 5:
            names.append(f"{slug(who)}.webp")
            save_animation(animated_grid(rows, captions, scale), folder / names[-1], SHEET_RATE)
            sheet = clip_sheet(rows, captions, spec.columns, scale)
        else:
            sheet = image_grid(rows, captions, scale)
        names.append(f"{slug(who)}.png")
        sheet.save(folder / names[-1])
    return names


def write_samples(stores: Mapping[str, Store], prompts: Sequence[str] | None, seed: int | None, file: Path) -> None:
    """Write `per_sample.jsonl`: a line an image, with every score that it has."""
    lines = []
    for name, store in stores.items():
        for k, unit in enumerate(store.unit_facts()):
            kept = [i for i in store.rows(k) if i not in unit["skipped"]]
            scores = {key: unit[key] for key in SCORES if key in unit}
            for at, i in enumerate(kept):
                line: dict[str, Any] = {"row": name, "index": i}
                line |= {"prompt": prompts[i], "seed": seed} if prompts else {}
                lines.append(json.dumps(line | {key: value[at] for key, value in scores.items()}))
    write_text(file, "\n".join(lines))


def write_results(folder: Path, contents: Mapping[str, Any], stores: Mapping[str, Store], reference: Reference) -> None:
    """Write what depends on all rows; statistics of an earlier evaluation in the folder go."""
    write_text(folder / "eval.json", json.dumps(contents, indent=1))
    evaluation = read_evaluation(folder)
    write_csv(flat_rows([evaluation]), folder / "rows.csv")
    write_text(folder / "report.html", page([evaluation], folder.resolve().name))
    shutil.rmtree(folder / "stats", ignore_errors=True)
    (folder / "stats").mkdir()
    facts = {"features_id": contents["features"]["id"], "eval_res": contents["eval_res"]}
    for name, store in stores.items():
        store.stats().save(folder / "stats" / f"{store.folder.name}.npz", facts | {"row": name})
    if reference.facts["kind"] != "npz":  # which has a file, and says itself what it is of
        reference.stats.save(folder / "stats" / "reference.npz", facts)


def summary_lines(contents: Mapping[str, Any]) -> list[str]:
    """The rows of `eval.json` for a terminal."""
    width = max(len(row["name"]) for row in contents["rows"])
    texts = [f"left out: {text}" for text in contents.get("left_out", [])]
    key = contents["features"]["key"]
    texts.append(f"{key} on {contents['features']['id']}, reference: {contents['reference']['path']}")
    for row in contents["rows"]:
        metrics, cost = row["metrics"], row["cost"]
        parts = [f"{row['name']:<{width}}", f"n {row['n']}"]
        for name in (key, "fd_motion", "fd_by_motion"):
            if name in metrics:
                parts.append(f"{name} {_brief(metrics[name])}")
            if name in metrics.get("delta_vs_teacher", {}):
                parts.append(f"excess {_brief(metrics['delta_vs_teacher'][name])}")
        for label, name in (("motion ratio", "motion_ratio"), ("diversity / teacher's", "diversity_vs_teacher")):
            if metrics.get(name, {}).get("value") is not None:
                parts.append(f"{label} {_brief(metrics[name])}")
        for label, name in (("clip", "clip_score"), ("log p", "log_likelihood")):
            if name in metrics:
                parts.append(f"{label} {_brief(metrics[name])}")
        if cost:
            milliseconds = 1000 * cost["seconds_per_image"]
            parts.append(f"calls {cost['calls']:g}  nfe {cost['nfe']:g}  {milliseconds:.2f} ms per image")
        texts.append("  ".join(parts))
    return texts


def _brief(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"] or (None, None)
    return f"{value['value']:.4g}" + ("" if None in (low, high) else f" [{low:.4g}, {high:.4g}]")
