"""From images to a store of features and scores, unit by unit, shared out among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.evaluation.images import fitted
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.store import Store

Score = Callable[[Tensor, Sequence[int]], dict[str, list[float]]]  # of images and their numbers, by name


class Unit(NamedTuple):
    """The images of one unit.

    Args:
        k: its number.
        numbers: of its images; one that could not be read is left out.
        images: (B, 3, H, W) uint8.
        told: what making them cost.
    """

    k: int
    numbers: Sequence[int]
    images: Tensor
    told: dict[str, Any]


def fill(
    store: Store, units: Iterable[Unit], extractor: Extractor, scores: Sequence[Score], title: str, total: int
) -> None:
    """Measure and keep the units that come, with a progress bar over images.

    Args:
        scores: what else is measured of each image.
        title: of the bar; empty for none.
        total: images that will come.
    """
    with tqdm(total=total, desc=title, unit="image", disable=not title) as bar:
        for unit in units:
            rows, told = store.rows(unit.k), dict(unit.told)
            features = torch.zeros(len(rows), store.dim)
            if unit.numbers:
                features[[i - rows.start for i in unit.numbers]] = extractor(unit.images)
                for score in scores:
                    told |= score(unit.images, unit.numbers)
            told["skipped"] = sorted(set(rows) - set(unit.numbers))
            store.put(unit.k, unit.images, features, told)
            bar.update(len(unit.numbers))


def cropped(images: Tensor, side: int | None) -> Tensor:
    """Images (B, 3, H, W) uint8 as `stepdistill.evaluation.images.fitted` leaves them."""
    if side is None:
        return images
    pils = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images)
    made = [torch.from_numpy(np.array(fitted(pil, side))) for pil in pils]
    return torch.stack(made).permute(0, 3, 1, 2).contiguous()
