"""Metrics of a report, from features and scores of images, for training runs, tables and commands.

The teacher and its students are drawn from the same prompts and noises, so that the interval of a difference does not
hold what they share.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.evaluation.metrics.diversity import diversity_replicates, fewest_outside
from stepdistill.evaluation.metrics.frechet import feature_diversity, paired
from stepdistill.evaluation.metrics.jackknife import (
    Interval,
    block_sizes,
    difference_of_means,
    interval,
    mean_interval,
    noise_floor,
    ratio_of_means,
    replicates,
)
from stepdistill.evaluation.metrics.kernel import cmmd, kid
from stepdistill.evaluation.metrics.motion import replicates_by_group
from stepdistill.evaluation.metrics.neighbours import prdc
from stepdistill.evaluation.metrics.stats import Stats, all_alike
from stepdistill.evaluation.metrics.vendi import vendi
from stepdistill.evaluation.spec import PICKED

BLOCKS = 20
ENOUGH = 4  # images a dimension, from which on the jackknife's bias correction is of use
CLIP_SCORES = ("motion", "consistency", "consistency_first", "image_distance")  # of clips alone
MEANS = {"clip": "clip_score", "log_likelihood": "log_likelihood"}  # scores of any image, and the names of their means
SUBSET = 1000  # images of one of KID's subsets, or half of them where there are fewer


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What is known of the images of one row.

    Args:
        name, role: as the report shows them; the row of role `teacher` that comes first is what others differ from.
        features: (N, D), in the order of prompts and noises that all rows have; of clips those of one frame each.
        motion: (N, D), of the motion of clips; None of images.
        scores: one number an image, (N,), by name: clip, psnr, ssim, lpips; of clips motion and consistency, too; of
            tokens log_likelihood.
        clip: what CLIP scores depend on, where there are any.
        cost: as the report shows it; `seconds_per_image` among it.
        facts: what else the report says of the row.
        reasons: why its figures are no more than a hint.
    """

    name: str
    role: str
    features: Tensor
    motion: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    clip: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the rows are compared with.

    Args:
        stats: the Gaussian of its features.
        features: (M, D), or None where only the Gaussian is known.
        motion: (M, D), of the motion of clips; None of images, and where only the Gaussian of frames is known.
        paired: whether image i is of the rows' prompt i; a block then leaves both sides.
        facts: kind, path, sha256, n, as the report shows them.
    """

    stats: Stats
    features: Tensor | None
    motion: Tensor | None = None
    paired: bool
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises EvaluationError for a reference that varies in nothing."""
        alike = self.stats.is_point if self.features is None else all_alike(self.features)
        check_images_differ(alike, f"reference {self.facts.get('path', '')}".strip())


def check_images_differ(alike: bool, place: str) -> None:
    """Raise EvaluationError for a reference, named by `place`, whose images are all alike."""
    if alike:
        why = "every set of that one image would be perfect"
        todo = "look at the images: half precision or a safety checker may have made them black"
        raise EvaluationError(problem(f"{place}, whose images are all alike", "images that differ", why, todo))


def measured(
    rows: Sequence[Sampled],
    reference: Reference,
    key: str,
    metrics: Collection[str] = PICKED,
    prompt_index: Tensor | None = None,
    motions: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of `eval.json`, in their order.

    Args:
        key: `fid`, `fd` or `fd_frames`, as the features' identity says.
        metrics: of `METRICS`; the distance is always there.
        prompt_index: (N,) which prompt an image is of, for `diversity`.
        motions: (N,) names of the motions that clips are to show; none leaves out the distances within each.

    Raises EvaluationError where the images of the teacher at its best are all alike.
    """
    sizes = block_sizes(len(rows[0].features), BLOCKS)
    ref = reference.features if reference.paired else reference.stats
    assert ref is not None
    distances = _distances([row.features for row in rows], ref)
    first = next((i for i, row in enumerate(rows) if row.role == "teacher"), None)
    moved = _of_motion(rows, reference, first, motions)
    varied = _within_prompts(rows, first, metrics, prompt_index)
    if not reference.paired:
        floor = noise_floor(reference.stats, len(rows[0].features))
    else:  # what the teacher has by chance
        floor = None if first is None else distances[first, 0].item()
    if first is not None:
        check_images_differ(all_alike(rows[first].features), f"teacher {rows[first].name!r}")
    values = []
    for i, row in enumerate(rows):
        n, dim = row.features.shape
        distance = interval(distances[i], sizes)
        shift = (row.features.mean(0, dtype=torch.float64) - reference.stats.mean).square().sum().item()
        value: dict[str, Any] = {
            **interval_facts(distance),
            "bias_corrected": distance.corrected if n >= ENOUGH * dim else None,
            "mean_term": shift,
            "cov_term": distance.value - shift,
            "noise_floor": floor,
        }
        figures = {key: value} | _of_features(row, reference, metrics) | varied[i] | _of_scores(row)
        if first is not None and i != first:
            figures |= _beside(row, rows[first], metrics)
            excess = interval(distances[i] - distances[first], sizes)
            figures["delta_vs_teacher"] = {key: interval_facts(excess)} | moved[i].pop("delta_vs_teacher")
            for score in MEANS.keys() & row.scores.keys():
                gap = difference_of_means(row.scores[score], rows[first].scores[score], BLOCKS)
                figures["delta_vs_teacher"][MEANS[score]] = interval_facts(gap)
        figures |= moved[i]
        cost = dict(row.cost)
        if first is not None and cost.get("seconds_per_image"):
            cost["speedup_vs_teacher"] = rows[first].cost["seconds_per_image"] / cost["seconds_per_image"]
        reasons = [*row.reasons, *([f"all {n} images are alike"] if all_alike(row.features) else [])]
        values.append(
            {"name": row.name, "role": row.role, **row.facts, "n": n, "metrics": figures, "cost": cost}
            | {"comparable": not reasons, "comparable_reasons": reasons}
        )
    return _finite(values)


def interval_facts(value: Interval, blocks: int = BLOCKS) -> dict[str, Any]:
    """An interval as `eval.json` has it."""
    return {"value": value.value, "ci95": [value.low, value.high], "ci_method": f"jackknife-{blocks}"}


def _distances(rows: Sequence[Tensor], ref: Tensor | Stats) -> Tensor:
    if isinstance(ref, Tensor):
        return replicates(rows, ref, BLOCKS)
    return torch.cat([replicates([row], ref, BLOCKS) for row in rows])  # each is in memory, in double precision


def _of_motion(
    rows: Sequence[Sampled], reference: Reference, first: int | None, motions: Sequence[str]
) -> list[dict[str, Any]]:
    """How clips move: their distance from the reference, over all and within each motion, and beside the teacher.

    Nothing for images.
    """
    figures: list[dict[str, Any]] = [{} for _ in rows]
    moved, names = [row.motion for row in rows if row.motion is not None], sorted(set(motions))
    tables, each = dict[str, tuple[Tensor, list[int]]](), dict[int, Tensor]()
    if moved and reference.motion is not None:
        ref = reference.motion if reference.paired else Stats.of(reference.motion)
        tables["fd_motion"] = _distances(moved, ref), block_sizes(len(moved[0]), BLOCKS)
        if names and isinstance(ref, Tensor):
            each, sizes = replicates_by_group(moved, ref, torch.tensor([names.index(name) for name in motions]), BLOCKS)
            tables["fd_by_motion"] = torch.stack([*each.values()]).mean(0), sizes
    for i, (row, known) in enumerate(zip(rows, figures, strict=True)):
        teacher = None if i == first else first
        known |= {} if teacher is None else {"delta_vs_teacher": {}}
        for name, (table, sizes) in tables.items():
            known[name] = interval_facts(interval(table[i], sizes), len(sizes))
            if teacher is not None:
                excess = interval(table[i] - table[teacher], sizes)
                known["delta_vs_teacher"][name] = interval_facts(excess, len(sizes))
        if each:
            known["by_motion"] = {names[k]: {"fd_motion": value[i, 0].item()} for k, value in each.items()}
        for name in CLIP_SCORES:
            if name in row.scores:
                known[name] = interval_facts(mean_interval(row.scores[name], BLOCKS))
        if teacher is not None and "motion" in row.scores:
            ratio = ratio_of_means(row.scores["motion"], rows[teacher].scores["motion"], BLOCKS)
            known["motion_ratio"] = interval_facts(ratio)
    return figures


def _within_prompts(
    rows: Sequence[Sampled], first: int | None, metrics: Collection[str], prompt_index: Tensor | None
) -> list[dict[str, Any]]:
    """How much the images of one prompt vary, and that over the teacher's, with an interval where there is one."""
    if prompt_index is None or "diversity" not in metrics:
        return [{} for _ in rows]
    sizes = block_sizes(len(prompt_index), BLOCKS)
    if sure := not without_interval(metrics, prompt_index):
        table = torch.stack([diversity_replicates(row.features, prompt_index, BLOCKS) for row in rows])
    else:
        table = torch.tensor([[feature_diversity(row.features, prompt_index)] for row in rows], dtype=torch.float64)
    figures: list[dict[str, Any]] = [{"diversity": row[0].item()} for row in table]
    for i, known in enumerate(figures):
        if first is not None and i != first:
            ratio = table[i] / table[first]
            facts = interval_facts(interval(ratio, sizes)) if sure else {"value": ratio[0].item(), "ci95": None}
            known["diversity_vs_teacher"] = facts
    return figures


def without_interval(metrics: Collection[str], prompt_index: Tensor | None) -> list[str]:
    """Why `diversity_vs_teacher` has no interval, in words; empty where it has one, or is not measured."""
    if prompt_index is None or "diversity" not in metrics:
        return []
    fewest = fewest_outside(prompt_index, BLOCKS)
    kept = f"without one of its {BLOCKS} blocks a prompt keeps {fewest} image{'s' * (fewest != 1)}, and needs two"
    return [] if fewest >= 2 else [f"interval of diversity: {kept}"]


def _of_features(row: Sampled, reference: Reference, metrics: Collection[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if reference.features is not None and "kid" in metrics:
        size = min(SUBSET, len(row.features) // 2, len(reference.features) // 2)
        value, std = kid(row.features, reference.features, subset_size=size)
        figures["kid"] = {"value": value, "std": std, "subsets": 100, "subset_size": size, "seed": 0}
    if reference.features is not None and "prdc" in metrics:
        figures["prdc"] = prdc(reference.features, row.features)._asdict() | {"k": 5}
    if reference.features is not None and "cmmd" in metrics:
        figures["cmmd"] = cmmd(row.features, reference.features)
    if "vendi" in metrics:
        figures["vendi"] = 1.0 if all_alike(row.features) else vendi(row.features)  # black pixels have no direction
    return figures


def _of_scores(row: Sampled) -> dict[str, Any]:
    known = [score for score in MEANS if score in row.scores]
    figures = {MEANS[score]: interval_facts(mean_interval(row.scores[score], BLOCKS)) for score in known}
    if "clip" in known:
        stderr = row.scores["clip"].double().std().item() / math.sqrt(len(row.features))
        figures["clip_score"] |= {"stderr": stderr, "scale": 100} | dict(row.clip)
    return figures


def _beside(row: Sampled, teacher: Sampled, metrics: Collection[str]) -> dict[str, Any]:
    """What compares each image with the teacher's."""
    pairs = {name: row.scores[name].mean().item() for name in ("psnr", "ssim", "lpips") if name in row.scores}
    if "paired" in metrics:
        pairs["features"] = paired(row.features, teacher.features)
    return {"paired": pairs} if pairs else {}


def _finite(value: Any) -> Any:  # noqa: ANN401
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
