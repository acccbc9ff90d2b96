"""Reading: pictures that are already there into stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState

from stepdistill.evaluation.fill import Score, Unit, fill
from stepdistill.evaluation.pictures import Pictures
from stepdistill.evaluation.spec import Measures
from stepdistill.evaluation.store import Store
from stepdistill.metrics.features import FeatureExtractor


def read_into(
    folder: Path,
    pictures: Pictures,
    spec: Measures,
    extractor: FeatureExtractor,
    state: PartialState,
    scores: Sequence[Score] = (),
    kept: int = 0,
) -> Store:
    """Features of pictures, each process its share; what is in `folder` already is not read again.

    Args:
        kept: of how many pictures the pixels are kept.

    Returns:
        The store, whole.
    """
    store = Store(folder, len(pictures), spec.feature_batch, extractor.identity.dim, kept)
    if state.is_main_process:
        store.open(
            {
                "pictures": pictures.sha256(),
                "n": len(pictures),
                "eval_res": spec.side,
                "features": extractor.identity.id,
                "feature_batch": spec.feature_batch,
                "clip": spec.clip if scores else None,
            }
        )
    state.wait_for_everyone()
    mine = store.missing(state.process_index, state.num_processes)
    title = pictures.source.name if state.is_main_process and mine else ""
    total = sum(len(store.rows(k)) for k in mine)
    fill(store, _units(store, pictures, mine), extractor, scores, title, total)
    state.wait_for_everyone()
    return store


def _units(store: Store, pictures: Pictures, mine: Sequence[int]) -> Iterator[Unit]:
    for batch in pictures.batches(store.unit, set(mine)) if mine else ():
        yield Unit(batch.k, batch.numbers, batch.pictures, {})
