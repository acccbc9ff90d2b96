"""The evaluation commands: sample and measure, measure existing images, write statistics, merge."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL

from stepdistill.core.devices import usable_device
from stepdistill.core.distributed import check_plugins
from stepdistill.core.errors import EvaluationError, problem
from stepdistill.data.bundled import emoji
from stepdistill.data.bundled.moving import GROUPS, MOTIONS
from stepdistill.evaluation.draw import RowDrawer
from stepdistill.evaluation.first_frames import first_frame_files
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.inputs import FACTS, TEACHER, check_draws, check_npz, check_score, enough, prompts_of_images
from stepdistill.evaluation.measure import Reference, Sampled, check_images_differ, measured, without_interval
from stepdistill.evaluation.metrics.extractors import extractor_named
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.evaluation.metrics.image_scores import PromptLikeness
from stepdistill.evaluation.metrics.motion import LEAST_OF_GROUP
from stepdistill.evaluation.metrics.stats import all_alike
from stepdistill.evaluation.plan import contract_of, family_of, slug
from stepdistill.evaluation.read import read_into
from stepdistill.evaluation.records import prompt_of, prompts_digest, read_records
from stepdistill.evaluation.reference import ReferenceBuilder
from stepdistill.evaluation.results import (
    document,
    protocol_facts,
    sampled,
    scores_of,
    write_results,
    write_samples,
    write_sheets,
)
from stepdistill.evaluation.rows import PipelineRows, RowSource, frames_of_family
from stepdistill.evaluation.spec import EvalRun, EvalSpec
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.location import BUNDLED_NAMES
from stepdistill.networks.lpips import lpips
from stepdistill.students.draw.animation import require_encoder


def evaluate(spec: EvalRun) -> dict[str, Any]:
    """Draw a pipeline and every student of it, measure them, and write the report; started again it goes on.

    Returns:
        The contents of `eval.json`; of the first process alone, of the others an empty mapping.

    Raises:
        StepdistillError: before anything is drawn, for whatever can be known by then.
    """
    check_draws(spec)
    joined(spec)
    family = family_of(spec.teacher, spec.family, [contract_of(place) for place in spec.students])
    clips = frames_of_family(family) > 1
    check_kind(spec, clips)
    records = records_of(spec, bundled_records(clips) if spec.teacher in BUNDLED_NAMES else [])
    begun = first_frame_files(records, spec.prompts) if isinstance(family, ImageToVideo) else ()
    vae = family.load().components["vae"] if spec.features == "vae" else None
    return evaluate_rows(spec, PipelineRows(spec, family, begun), records, vae)


def evaluate_rows(
    spec: EvalRun, source: RowSource, records: Sequence[dict[str, object]], vae: AutoencoderKL | None = None
) -> dict[str, Any]:
    """As `evaluate`, of any teacher and students.

    Args:
        records: of the prompts, in turn for images.
        vae: of the features `vae`.
    """
    state, device = joined(spec)
    clips = source.frames > 1
    n = spec.num or spec.under.n or len(records)
    enough(n, "a row")
    plans = source.plans()
    extractor = extractor_of(spec, device, vae, clips)
    if "lpips" in spec.metrics:
        lpips("alex", device)
    each = [prompt_of(records[i % len(records)]) for i in range(n)]
    clip = PromptLikeness.load(spec.clip, each, spec.under.prefix, device) if spec.clip else None
    drawer = RowDrawer(spec, source, records, n, extractor, clip, state, device)
    builder = ReferenceBuilder(spec, extractor, state)
    reference = None if spec.reference == TEACHER else builder.of_file(Path(spec.reference))
    index = torch.arange(n) % len(records) if n >= 2 * len(records) else None
    metrics, left_out = possible(spec.metrics, extractor.identity, reference, index is not None)
    motions, without = motions_of([records[i % len(records)] for i in range(n)] if clips else [])
    stores, undrawn = drawer.draw(plans)
    if not state.is_main_process:
        return {}
    reference = reference or builder.of_teacher(stores[plans[0]], spec.teacher)
    others = {plan: store for plan, store in stores.items() if plan.role != "reference"}
    protocol, reasons = protocol_facts(spec.under, extractor.identity, n, spec.side, reference.facts, spec.clip)
    rows = [sampled(plan, store, source.settings(plan), reasons, clip) for plan, store in others.items()]
    known = next(iter(others.values())).noted(FACTS) or {}
    contents = document(
        extractor.identity,
        reference.facts,
        measured(rows, reference, extractor.identity.key, metrics, index, motions),
        protocol,
        device,
        teacher=source.teacher_facts | {"sha256": known["teacher"], "dtype": spec.dtype},
        prompts={"source": str(spec.prompts or "bundled"), "n": len(records), "sha256": prompts_digest(each)},
        eval_res=spec.side,
        grids=write_sheets(spec, others, each),
        left_out=[*left_out, *without_interval(metrics, index), *without, *undrawn],
    )
    named = {plan.name: store for plan, store in others.items()}
    write_samples(named, each, spec.seed, spec.output_dir / "per_sample.jsonl")
    write_results(spec.output_dir, contents, named, reference)
    return contents


def score_images(places: Sequence[Path], spec: EvalSpec, prompts: Path | None = None) -> dict[str, Any]:
    """Measure existing images: the rows are folders, zips or arrays. Returns and raises as `evaluate` does.

    Args:
        prompts: of the images in the order of their names, in turn, for the CLIP score.
    """
    found = check_score(places, spec, prompts)
    sources = {name: Images(place, spec.side, spec.clips) for name, place in found.items()}
    state, device = joined(spec)
    extractor = extractor_of(spec, device, clips=spec.clips)
    clips = {name: clip_score_of(spec, images, prompts, device) for name, images in sources.items()}
    reference = ReferenceBuilder(spec, extractor, state).of_file(Path(spec.reference))
    metrics, left_out = possible(spec.metrics, extractor.identity, reference, several=False, teacher=False)
    stores = {
        name: read_into(spec.output_dir / "work" / slug(f"images, {name}"), images, spec, extractor, state, clips[name])
        for name, images in sources.items()
    }
    if not state.is_main_process:
        return {}
    rows, protocol = [], {}
    for name, store in stores.items():
        features, clip = store.features(), clips[name]
        n, identity = len(features), extractor.identity
        protocol, reasons = protocol_facts(spec.under, identity, n, spec.side, reference.facts, spec.clip)
        row = Sampled(
            name=name,
            role="images",
            features=features,
            motion=store.motion(),
            scores=scores_of(store),
            clip=clip.facts if clip else {},
            facts={"n_skipped": store.n - n},
            reasons=reasons,
        )
        rows += measured([row], reference, identity.key, metrics)
    more = {"eval_res": spec.side, "left_out": left_out}
    contents = document(extractor.identity, reference.facts, rows, protocol, device, **more)
    write_samples(stores, None, None, spec.output_dir / "per_sample.jsonl")
    write_results(spec.output_dir, contents, stores, reference)
    return contents


def write_statistics(place: Path, spec: EvalSpec, out: Path) -> None:
    """Write the Gaussian of images' features to an npz, which pytorch-fid and clean-fid can read.

    What a run that was cut left is in `spec.output_dir`, which goes when all is there.
    """
    check_npz(out)
    state, device = joined(spec)
    images = Images(place, spec.side, spec.clips)
    extractor = extractor_of(spec, device, clips=spec.clips)
    store = read_into(spec.output_dir, images, spec, extractor, state)
    check_images_differ(all_alike(store.features()), str(place))
    if state.is_main_process:
        facts = {"features_id": extractor.identity.id, "source": str(place), "eval_res": spec.side}
        store.stats().save(out, facts | {"sha256": (store.noted(FACTS) or {})["images"]})
        shutil.rmtree(spec.output_dir)


def joined(spec: EvalSpec) -> tuple[PartialState, torch.device]:
    """This process among those that a launcher started, and where it computes.

    One process may have more to draw than another: they wait long. Raises ConfigError.
    """
    check_plugins()
    state = PartialState(cpu=spec.device == "cpu", timeout=timedelta(days=1))
    device = usable_device(spec.device, state.device)
    return state, device


def extractor_of(
    spec: EvalSpec, device: torch.device, vae: AutoencoderKL | None = None, clips: bool = False
) -> Extractor:
    """The extractor, of clips where these are measured.

    Raises MissingWeights, which a command tells before anything is drawn.
    """
    name = spec.features or spec.under.features
    if spec.resize and not name.removeprefix("random-").startswith("inception"):
        got, why = f"resize {spec.resize} with features {name}", "other extractors have a fixed size"
        raise EvaluationError(problem(got, "features inception", why, "remove --resize"))
    extractor = extractor_named(
        name,
        resize=spec.resize or spec.under.resize,
        weights=spec.weights,
        device=device,
        dtype=spec.feature_dtype,
        batch=spec.feature_batch,
        vae=vae,
        allow_unknown_weights=spec.allow_unknown_weights,
    )
    return replace(extractor, identity=replace(extractor.identity, clips=clips))


def check_kind(spec: EvalRun, clips: bool) -> None:
    """Raise EvaluationError for what cannot be measured of clips, or of images, and OutputError without PyAV where
    clips are to be written as videos."""
    kind, other = ("clips", "images") if clips else ("images", "clips")
    if spec.export and (spec.export == "vbench") != clips:
        got, why = f"export {spec.export} of {kind}", f"it is a benchmark of {other}"
        raise EvaluationError(problem(got, f"a teacher that draws {other}", why, "leave --export out"))
    if clips and spec.features == "vae":
        why, todo = "the pipeline's autoencoder codes clips as a whole", "choose other features"
        raise EvaluationError(problem("features vae of clips", "features of images", why, todo))
    if spec.export == "vbench":
        require_encoder()


def motions_of(records: Sequence[Mapping[str, object]]) -> tuple[list[str], list[str]]:
    """The `motion` of each clip's prompt, if all have one, and why clips are not compared within each, in words."""
    names = [str(record["motion"]) for record in records if "motion" in record]
    if not names or len(names) < len(records):
        return [], []
    name, count = min(Counter(names).items(), key=lambda item: item[1])
    if count < LEAST_OF_GROUP:
        return [], [f"fd_by_motion: {count} clips of motion {name!r}, and an interval needs {LEAST_OF_GROUP}"]
    return names, []


def possible(
    metrics: Sequence[str], identity: Identity, reference: Reference | None, several: bool, teacher: bool = True
) -> tuple[list[str], list[str]]:
    """The metrics that can be measured, and why not the others, in words.

    Args:
        reference: None is the teacher's own images.
        several: whether each prompt has two images or more.
        teacher: whether a teacher is drawn beside.
    """
    left_out: dict[str, str] = {}
    if reference is not None and reference.features is None:
        for name in ("kid", "prdc", "cmmd"):
            left_out[name] = "the reference has statistics but no images"
    if not identity.arch.startswith("clip-"):
        left_out["cmmd"] = f"it is defined on CLIP's embeddings, not on {identity.id}"
    if not several:
        left_out["diversity"] = "no prompt has two images"
    if not teacher:
        left_out |= {name: "no teacher is drawn" for name in ("paired", "pixels", "lpips", "diversity")}
    return (
        [name for name in metrics if name not in left_out],
        [f"{name}: {why}" for name, why in left_out.items() if name in metrics],
    )


def clip_score_of(spec: EvalSpec, images: Images, prompts: Path | None, device: torch.device) -> PromptLikeness | None:
    """The CLIP score of images that are there, if it is asked for."""
    if spec.clip is None or prompts is None:
        return None
    each = prompts_of_images(prompts, len(images))
    return PromptLikeness.load(spec.clip, each, spec.under.prefix, device)


def records_of(spec: EvalRun, own: list[dict[str, object]]) -> list[dict[str, object]]:
    """The prompts, with whatever else their file says of them; without a file the teacher's own.

    Raises EvaluationError, DataError.
    """
    records = read_records(spec.prompts) if spec.prompts else []
    if spec.export == "geneval" and not (records and all("tag" in record for record in records)):
        why, todo = "GenEval scores each image by the metadata of its prompt", "pass it with --prompts-file"
        raise EvaluationError(problem(f"prompts {spec.prompts}", "GenEval's evaluation_metadata.jsonl", why, todo))
    if not records and not own:
        why, todo = f"{spec.teacher} has no prompts of its own", "pass a .txt, .jsonl or .csv file with --prompts-file"
        raise EvaluationError(problem("no prompts", "a prompts file", why, todo))
    return records or own


def bundled_records(clips: bool = False) -> list[dict[str, object]]:
    """The prompts of the bundled teachers."""
    if clips:
        return [{"prompt": f"{group} {motion}", "motion": motion} for group in GROUPS for motion in MOTIONS]
    return [{"prompt": prompt} for prompt in emoji.prompts()]
