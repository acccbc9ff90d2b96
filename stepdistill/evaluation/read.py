"""Features and scores of images, measured unit by unit on all processes, into a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.evaluation.images import SKIPPED, Images, fitted
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.metrics.image_scores import ImageScore, PromptLikeness, motion_score
from stepdistill.evaluation.metrics.motion import frame_features, motion_features
from stepdistill.evaluation.records import prompts_digest
from stepdistill.evaluation.spec import EvalSpec
from stepdistill.evaluation.store import Store


class Unit(NamedTuple):
    """The images of one unit.

    Args:
        k: its number.
        numbers: of its images; one that could not be read is left out.
        images: (B, 3, H, W) uint8, or clips (B, F, 3, H, W).
        facts: what making them cost.
    """

    k: int
    numbers: Sequence[int]
    images: Tensor
    facts: dict[str, Any]


def fill_store(
    store: Store,
    units: Callable[[Sequence[int]], Iterable[Unit]],
    extractor: Extractor,
    scores: Sequence[ImageScore],
    title: str,
    state: PartialState,
) -> None:
    """Measure and keep the units that are missing, each process its share, and wait for all processes.

    Args:
        units: those of these numbers.
        scores: what else is measured of each image.
        title: of the main process's progress bar over images.
    """
    mine = store.missing(state.process_index, state.num_processes)
    total, quiet = sum(len(store.rows(k)) for k in mine), not (state.is_main_process and mine)
    with tqdm(total=total, desc=title, unit="image", disable=quiet) as bar:
        for unit in units(mine):
            rows, facts = store.rows(unit.k), dict(unit.facts)
            features = torch.zeros(len(rows), store.views * store.dim)
            if unit.numbers:
                features[[i - rows.start for i in unit.numbers]] = _features(extractor, unit.images, unit.numbers)
                for score in scores:
                    facts |= score(unit.images, unit.numbers)
            facts["skipped"] = sorted(set(rows) - set(unit.numbers))
            store.put(unit.k, unit.images, features, facts)
            bar.update(len(unit.numbers))
    state.wait_for_everyone()


def cropped(images: Tensor, side: int | None) -> Tensor:
    """Images (B, 3, H, W) or clips (B, F, 3, H, W) uint8 as `stepdistill.evaluation.images.fitted` leaves them."""
    if side is None:
        return images
    pils = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.flatten(0, -4))
    squares = [torch.from_numpy(np.array(fitted(pil, side))) for pil in pils]
    return torch.stack(squares).permute(0, 3, 1, 2).reshape(*images.shape[:-2], side, side).contiguous()


def _features(extractor: Extractor, images: Tensor, numbers: Sequence[int]) -> Tensor:
    """Of images (B, dim); of clips, of one frame each and of their motion, (B, 2 dim)."""
    if images.ndim == 4:
        return extractor(images)
    return torch.cat([frame_features(extractor, images, numbers), motion_features(extractor, images)], 1)


def read_into(
    folder: Path,
    images: Images,
    spec: EvalSpec,
    extractor: Extractor,
    state: PartialState,
    clip: PromptLikeness | None = None,
) -> Store:
    """Features of images, each process its share; what is in `folder` already is not read again.

    Returns:
        The store, whole.

    Raises:
        DataError: of `Images`, for what is seen in one pass.
        EvaluationError: the images of all passes together have several sizes, or too many were skipped.
    """
    clips = extractor.identity.clips
    store = Store(folder, len(images), spec.feature_batch, extractor.identity.dim, views=1 + clips)
    if state.is_main_process:
        store.open(
            {
                "images": images.sha256(),
                "n": len(images),
                "eval_res": spec.side,
                "features": extractor.identity.id,
                "feature_batch": spec.feature_batch,
                "clip": clip.facts | {"prompts": prompts_digest(clip.prompts)} if clip else None,
            }
        )
    state.wait_for_everyone()
    scores = [*([clip] if clip else []), *([motion_score] if clips else [])]
    fill_store(store, partial(_units, store, images), extractor, scores, images.source.name, state)
    _check(store, images)
    return store


def _units(store: Store, images: Images, mine: Sequence[int]) -> Iterator[Unit]:
    for batch in images.batches(store.unit, set(mine)) if mine else ():
        shape = batch.images.shape
        size = [*shape[1:-3], *shape[-2:]] if batch.numbers else None  # of clips with the number of frames
        yield Unit(batch.k, batch.numbers, batch.images, {"size": size})


def _check(store: Store, images: Images) -> None:
    """What one pass cannot see: it may be over a process's share, or over what an earlier one left."""
    units = list(store.unit_facts())
    sizes = {tuple(unit["size"]) for unit in units if unit["size"]}
    if len(sizes) > 1:
        got, todo = f"images of {sorted(sizes)} in {images.source}", "choose an --eval-res, such as 256"
        raise EvaluationError(problem(got, "one size", "the resizing affects the distance", todo))
    skipped = sum(len(unit["skipped"]) for unit in units)
    if skipped > SKIPPED * store.n:
        got, todo = f"{skipped} unreadable of {store.n} images in {images.source}", "regenerate these images"
        raise EvaluationError(problem(got, f"at most {SKIPPED:.0%}", "the set of images would change", todo))
