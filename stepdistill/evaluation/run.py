"""The commands: draw and measure, measure what is there, make statistics, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor

from stepdistill.errors import EvaluationError, problem
from stepdistill.evaluate import grid
from stepdistill.evaluation.draw import LATENCY, Painter, labels, plan, slug
from stepdistill.evaluation.fill import Score
from stepdistill.evaluation.measure import Sampled, measured
from stepdistill.evaluation.page import page
from stepdistill.evaluation.pictures import Pictures
from stepdistill.evaluation.prompts import prompt_of, read_records, sha256_of
from stepdistill.evaluation.read import read_into
from stepdistill.evaluation.reference import TEACHER, Referent, check
from stepdistill.evaluation.results import SCORES, document, finish, samples, under
from stepdistill.evaluation.scores import against_prompts
from stepdistill.evaluation.spec import Draws, Measures
from stepdistill.evaluation.store import Store, write
from stepdistill.evaluation.subjects import Way, contract_of, family_of
from stepdistill.evaluation.table import alike, flat, read, write_csv
from stepdistill.families.base import BUNDLED_NAMES
from stepdistill.metrics.extractors import extractor
from stepdistill.metrics.features import FeatureExtractor
from stepdistill.metrics.perceptual import lpips
from stepdistill.tiny import emoji

LEAST = 40  # pictures: 20 blocks of two


def run(spec: Draws) -> dict[str, Any]:
    """Draw the teacher and every student, measure them, and write the report; started again it goes on.

    Returns:
        The contents of `eval.json`; of the first process alone, of the others an empty mapping.

    Raises:
        StepdistillError: before anything is drawn, for whatever can be known by then.
    """
    state = joined(spec)
    family = family_of(spec.teacher, spec.family, [contract_of(place) for place in spec.students])
    check(spec.reference)
    records = records_of(spec)
    n = spec.num or spec.under.n or len(records)
    enough(n, "a row")
    vae = family.load().components["vae"] if spec.features == "vae" else None
    painter = Painter(spec, family, records, n, extracted(spec, state, vae), (), state)
    if "lpips" in spec.metrics:
        lpips("alex", painter.device)  # or it would be missed after the teacher was drawn
    if spec.clip:
        score = against_prompts(spec.clip, painter.prompts, spec.under.prefix, painter.device)
        painter = replace(painter, scores=(score,))
    ways = plan(spec)
    stores, left_out = painter.draw(ways)
    referent = Referent(spec, painter.extractor, state)
    others = {way: store for way, store in stores.items() if way.role != "reference"}
    if spec.reference != TEACHER:
        reference = referent.of_file(Path(spec.reference))
    if not state.is_main_process:
        return {}
    if spec.reference == TEACHER:
        reference = referent.of_teacher(stores[ways[0]], spec.teacher)
    identity = painter.extractor.identity
    protocol, reasons = under(spec.under, identity, n, spec.side, str(reference.facts["kind"]), spec.clip)
    rows = [sampled(way, store, reasons) for way, store in others.items()]
    index = torch.arange(n) % len(records) if n >= 2 * len(records) else None
    first = next(iter(others.values()))
    found = document(
        identity,
        reference.facts,
        measured(rows, reference, identity.key, spec.metrics, index),
        protocol,
        teacher={"id": spec.teacher, "steps": spec.teacher_steps, "guidance": spec.teacher_guidance}
        | {"sha256": (first.noted("facts.json") or {})["teacher"], "dtype": spec.dtype},
        prompts={"source": str(spec.prompts or "bundled"), "n": len(records), "sha256": sha256_of(painter.prompts)},
        left_out=left_out,
    )
    sheets(spec, others, painter.prompts)
    named = {way.name: store for way, store in others.items()}
    samples(named, painter.prompts, spec.seed, spec.output_dir / "per_sample.jsonl")
    finish(spec.output_dir, found, named, reference)
    return found


def score(places: Sequence[Path], spec: Measures, prompts: Path | None = None) -> dict[str, Any]:
    """Measure pictures that are there: the rows are folders, zips or arrays. Returns and raises as `run` does.

    Args:
        prompts: of the pictures in the order of their names, in turn, for the CLIP score.
    """
    state = joined(spec)
    if spec.reference == TEACHER:
        why, todo = "there is no teacher here to draw", "name statistics or pictures by --ref"
        raise EvaluationError(problem("no reference", "--ref", why, todo))
    if spec.clip and prompts is None:
        raise EvaluationError(problem("a CLIP without prompts", "both", "it scores pairs", "name them by --prompts"))
    check(spec.reference)
    sources = [Pictures(place, spec.side) for place in places]
    for pictures in sources:
        enough(len(pictures), f"in {pictures.source}")
    made = extracted(spec, state, None)
    stores = {}
    for at, (name, pictures) in enumerate(zip(labels([str(place) for place in places]), sources, strict=True)):
        scores: list[Score] = []
        if spec.clip and prompts is not None:
            records = read_records(prompts)
            each = [prompt_of(records[i % len(records)]) for i in range(len(pictures))]
            scores.append(against_prompts(spec.clip, each, spec.under.prefix, made_on(state)))
        folder = spec.output_dir / "work" / f"{at:02d}-{slug(name)}"
        stores[name] = read_into(folder, pictures, spec, made, state, scores, kept=8)
    reference = Referent(spec, made, state).of_file(Path(spec.reference))
    if not state.is_main_process:
        return {}
    rows, protocol, kind = [], {}, str(reference.facts["kind"])
    for name, store in stores.items():
        features = store.features()
        protocol, reasons = under(spec.under, made.identity, len(features), spec.side, kind, spec.clip)
        own = Sampled(
            name=name,
            role="images",
            features=features,
            scores=scores_of(store),
            facts={"n_skipped": store.n - len(features)},
            reasons=reasons,
        )
        rows += measured([own], reference, made.identity.key, spec.metrics)
    found = document(made.identity, reference.facts, rows, protocol)
    samples(stores, None, None, spec.output_dir / "per_sample.jsonl")
    finish(spec.output_dir, found, stores, reference)
    return found


def statistics(place: Path, spec: Measures, out: Path) -> None:
    """Write the Gaussian of pictures' features to an npz, which pytorch-fid and clean-fid can read."""
    state = joined(spec)
    pictures = Pictures(place, spec.side)
    made = extracted(spec, state, None)
    store = read_into(spec.output_dir, pictures, spec, made, state)
    if state.is_main_process:
        facts = {"features_id": made.identity.id, "source": str(place), "sha256": pictures.sha256()}
        store.stats().save(out, facts | {"eval_res": spec.side})


def compare(folders: Sequence[Path], out: Path, csv: Path | None) -> list[str]:
    """Merge evaluations on one page, unlike ones in columns of their own. Returns what they differ in, in words."""
    evaluations = [read(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, page(evaluations, "Evaluations compared"))
    if csv is not None:
        write_csv(flat(evaluations), csv)
    return alike(evaluations)


def enough(n: int, where: str) -> None:
    """Raise EvaluationError for too few pictures."""
    if n < LEAST:
        why = "the intervals leave out 20 blocks of two or more"
        raise EvaluationError(problem(f"{n} pictures {where}", f"{LEAST} or more", why, "draw more"))


def joined(spec: Measures) -> PartialState:
    """This process among those that a launcher started. One may have more to draw than another: they wait long."""
    return PartialState(cpu=spec.device == "cpu", timeout=timedelta(days=1))


def made_on(state: PartialState) -> torch.device:
    """Where this process computes."""
    assert state.device is not None
    return state.device


def extracted(spec: Measures, state: PartialState, vae: AutoencoderKL | None) -> FeatureExtractor:
    """The extractor. Raises MissingWeights, which a command tells before anything is drawn."""
    return extractor(
        spec.features or spec.under.features,
        resize=spec.resize or spec.under.resize,
        weights=spec.weights,
        device=made_on(state),
        dtype=spec.feature_dtype,
        batch=spec.feature_batch,
        vae=vae,
        allow_unknown_weights=spec.allow_unknown_weights,
    )


def records_of(spec: Draws) -> list[dict[str, object]]:
    """The prompts, with whatever else their file says of them."""
    if spec.prompts is not None:
        return read_records(spec.prompts)
    if spec.teacher not in BUNDLED_NAMES:
        why, todo = f"{spec.teacher} draws what it is told to", "name a .txt, .jsonl or .csv file by --prompts"
        raise EvaluationError(problem("no prompts", "a file of them", why, todo))
    return [{"prompt": prompt} for prompt in emoji.prompts()]


def sampled(way: Way, store: Store, reasons: Sequence[str]) -> Sampled:
    """What is known of a way's pictures."""
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
        cost=cost,
        facts=facts | {"image": image},
        reasons=reasons,
    )


def scores_of(store: Store) -> dict[str, Tensor]:
    """The scores of single pictures, by name."""
    units = list(store.told())
    return {key: torch.tensor([x for unit in units for x in unit[key]]) for key in SCORES if key in units[0]}


def sheets(spec: Draws, stores: Mapping[Way, Store], prompts: Sequence[str]) -> None:
    """`grids/WHO.png`: the teacher's rows and each student's, the same prompts and noises below each caption."""
    (spec.output_dir / "grids").mkdir(parents=True, exist_ok=True)
    taught = [way for way in stores if way.role == "teacher"]
    for place, who in zip(spec.students or ("",), labels(spec.students) or ["teacher"], strict=True):
        shown = range(min(spec.columns, len(prompts)))
        rows = [
            (way.name.replace(", ", "\n"), stores[way].pictures(shown))
            for way in [*taught, *(way for way in stores if place and way.student == place)]
        ]
        scale = max(1, 96 // rows[0][1].shape[-1])
        grid(rows, [prompts[i] for i in shown], scale).save(spec.output_dir / "grids" / f"{slug(who)}.png")
