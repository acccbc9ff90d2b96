"""From stores to the rows of a report: what is known of each way's images, and sheets of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.evaluation.draw import LATENCY, labels, slug
from stepdistill.evaluation.measure import Sampled
from stepdistill.evaluation.report.results import SCORES
from stepdistill.evaluation.scores import ClipScore
from stepdistill.evaluation.spec import Draws
from stepdistill.evaluation.store import Store
from stepdistill.evaluation.subjects import Way, contract_of
from stepdistill.students.draw.call import grid


def sampled(way: Way, store: Store, reasons: Sequence[str], clip: ClipScore | None) -> Sampled:
    """What is known of a way's images."""
    units, contract = list(store.told()), contract_of(way.student) if way.student else None
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
    steps, guidance = way.steps, way.guidance
    if contract is not None:
        steps = len(contract.timesteps) if steps is None else steps
        own = contract.adapters.guidance_scale if contract.adapters else contract.guidance_scale
        guidance = own if guidance is None else guidance
    height, width = units[0]["size"]
    facts = {"student": way.student, "steps": steps, "guidance": guidance, "seed": way.seed, "n_skipped": 0}
    image = {"height": height, "width": width, "uint8": "round"}
    return Sampled(
        name=way.name,
        role=way.role,
        features=store.features(),
        scores=scores_of(store),
        clip=clip.facts if clip else {},
        cost=cost,
        facts=facts | {"image": image},
        reasons=reasons,
    )


def scores_of(store: Store) -> dict[str, Tensor]:
    """The scores of single images, by name."""
    units = list(store.told())
    told = [key for key in SCORES if any(key in unit for unit in units)]  # a unit of skipped images has none
    return {key: torch.tensor([x for unit in units for x in unit.get(key, [])]) for key in told}


def sheets(spec: Draws, stores: Mapping[Way, Store], prompts: Sequence[str]) -> list[str]:
    """Draw `grids/WHO.png`: the teacher's rows and each student's, the same prompts and noises below each caption.

    Returns:
        Their names; those of an earlier evaluation in the folder go.
    """
    folder = spec.output_dir / "grids"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    taught = [way for way in stores if way.role == "teacher"]
    names = []
    for place, who in zip(spec.students or ("",), labels(spec.students) or ["teacher"], strict=True):
        shown = range(min(spec.columns, len(prompts)))
        rows = [
            (way.name.replace(", ", "\n"), stores[way].images(shown))
            for way in [*taught, *(way for way in stores if place and way.student == place)]
        ]
        scale = max(1, 96 // rows[0][1].shape[-1])
        names.append(f"{slug(who)}.png")
        grid(rows, [prompts[i] for i in shown], scale).save(folder / names[-1])
    return names
