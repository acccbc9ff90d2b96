"""Reading: images that are already there into stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.evaluation.fill import Unit, fill
from stepdistill.evaluation.images import SKIPPED, Images
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.prompts import sha256_of
from stepdistill.evaluation.scores import ClipScore
from stepdistill.evaluation.spec import Measures
from stepdistill.evaluation.store import Store


def read_into(
    folder: Path,
    images: Images,
    spec: Measures,
    extractor: Extractor,
    state: PartialState,
    clip: ClipScore | None = None,
) -> Store:
    """Features of images, each process its share; what is in `folder` already is not read again.

    Returns:
        The store, whole.

    Raises:
        DataError: of `Images`, for what is seen in one pass.
        EvaluationError: the images of all passes together have several sizes, or too many were skipped.
    """
    store = Store(folder, len(images), spec.feature_batch, extractor.identity.dim)
    if state.is_main_process:
        store.open(
            {
                "images": images.sha256(),
                "n": len(images),
                "eval_res": spec.side,
                "features": extractor.identity.id,
                "feature_batch": spec.feature_batch,
                "clip": clip.facts | {"prompts": sha256_of(clip.prompts)} if clip else None,
            }
        )
    state.wait_for_everyone()
    mine = store.missing(state.process_index, state.num_processes)
    title = images.source.name if state.is_main_process and mine else ""
    total = sum(len(store.rows(k)) for k in mine)
    fill(store, _units(store, images, mine), extractor, [clip] if clip else [], title, total)
    state.wait_for_everyone()
    _check(store, images)
    return store


def _units(store: Store, images: Images, mine: Sequence[int]) -> Iterator[Unit]:
    for batch in images.batches(store.unit, set(mine)) if mine else ():
        size = list(batch.images.shape[2:]) if batch.numbers else None
        yield Unit(batch.k, batch.numbers, batch.images, {"size": size})


def _check(store: Store, images: Images) -> None:
    """What one pass cannot see: it may be over a process's share, or over what an earlier one left."""
    units = list(store.told())
    sizes = {tuple(unit["size"]) for unit in units if unit["size"]}
    if len(sizes) > 1:
        got, todo = f"images of {sorted(sizes)} in {images.source}", "choose an --eval-res, such as 256"
        raise EvaluationError(problem(got, "one size", "how they are made equal changes the distance", todo))
    skipped = sum(len(unit["skipped"]) for unit in units)
    if skipped > SKIPPED * store.n:
        got, todo = f"{skipped} unreadable of {store.n} images in {images.source}", "make those again"
        raise EvaluationError(problem(got, f"{SKIPPED:.0%} at most", "the rest are no longer the same set", todo))
