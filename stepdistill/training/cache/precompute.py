"""Precomputation of a run's embeddings and latents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError, DataError, problem
from stepdistill.core.outputs import check_output_folder
from stepdistill.core.progress import progress
from stepdistill.core.random import sample_rng
from stepdistill.data import BadSample, InvertedImages, Sample, Source, inside
from stepdistill.data.base import only
from stepdistill.data.made import TeacherMade
from stepdistill.families.lazy_pipeline import PARTS, LazyPipeline
from stepdistill.training.batches import NULL, Batches
from stepdistill.training.cache.rows import RowStore
from stepdistill.training.recipe import Run
from stepdistill.training.setup import begin, cache_keys

logger = logging.getLogger(__name__)
SLICE = 64  # rows between two looks at whether they can be written


@dataclass(frozen=True)
class Filled:
    """What the caches hold when all processes are through.

    Args:
        prompts, images: how many training may ask for; no images where `train.cache_latents` is off.
        lacking: how many of these are not there: images that do not read.
    """

    folder: Path
    prompts: int
    images: int
    lacking: int

    def __str__(self) -> str:
        lines = [f"{self.folder}: embeddings of {self.prompts} prompts, latents of {self.images} images"]
        if self.lacking:
            lines.append(
                f"{self.lacking} of these are missing: images that cannot be read, which training replaces by others"
            )
        return "\n".join(lines)


def precompute(run: Run) -> Filled:
    """Encode what `train.cache_dir` lacks of all that training may ask for; the processes share the work.

    Started again it goes on. Files appear whole, every `training.cache.rows.FLUSH` rows. What a source of your own
    yields beyond its `captions` cannot be known here: training encodes it when it comes, and says so.

    Raises:
        ConfigError: there is no `train.cache_dir`, or it can be no folder.
        DataError: the disk refuses.
    """
    if not run.train.cache_dir:
        why, todo = "the results are stored in this folder", "set train.cache_dir"
        raise ConfigError(problem("no train.cache_dir", "a folder", why, todo))
    check_output_folder(Path(run.train.cache_dir))
    wanted = prompts_of(run)
    accelerator = begin(run.train)
    rank, processes = accelerator.process_index, accelerator.num_processes
    parts = LazyPipeline(run.family, run.family.load(PARTS), accelerator.device)
    batches = Batches(parts, run.train, cache_keys(run, accelerator), accelerator.device)
    _embed(batches, wanted, rank, processes)
    source = batches.fixed(run.data)
    images = len(source) if batches.latents else 0
    if batches.latents:
        _encode(batches, source, rank, processes)
    elif "images" in source.provides and rank == 0:
        logger.warning("train.cache_latents is false: training will read and encode the images at every step")
    distributed.barrier()
    lacking = len(_lacking(batches.prompts.store, [NULL, *wanted]))
    if batches.latents:
        lacking += len(_lacking(batches.latents.store, [str(item) for item in range(images)]))
    accelerator.end_training()
    return Filled(Path(run.train.cache_dir), len(wanted), images, lacking)


def prompts_of(run: Run) -> list[str]:
    """Every prompt that training may ask for, each once: the captions, the empty prompt, those of validation.

    Among them are those of samples that the teacher is still to make.
    """
    sources = [run.data, *(part for part in inside(run.data) if isinstance(part, TeacherMade) and part is not run.data)]
    prompts = dict.fromkeys(["", *run.train.validation_prompts])
    for source in sources:
        # which images it inverts is only known when it has
        listed = source.source if isinstance(source, InvertedImages) else source
        for i in range(len(listed)):
            try:
                prompts.update(dict.fromkeys(listed.captions(i)))
            except BadSample:  # another item takes its place
                continue
    return list(prompts)


def _embed(batches: Batches, wanted: Sequence[str], rank: int, processes: int) -> None:
    store = batches.prompts.store
    missing = store.missing(wanted)
    mine = _share(missing, rank, processes)
    if mine:
        batches.parts.text(f"{len(missing)} of {len(wanted)} prompts are not in {batches.folder}")
    with progress(title="Embeddings", unit="prompt", total=len(mine), shown=rank == 0) as bar:
        for start in range(0, len(mine), SLICE):
            part = mine[start : start + SLICE]
            batches.prompts.fill(part)
            _check(store, batches)
            bar.update(len(part))
    if rank == 0:
        _ = batches.null  # makes its row, once
    store.save()
    _check(store, batches)


def _encode(batches: Batches, source: Source, rank: int, processes: int) -> None:
    assert batches.latents is not None
    store = batches.latents.store
    mine = [int(item) for item in _share(store.missing([str(item) for item in range(len(source))]), rank, processes)]
    # one image at a time, since their sizes may differ
    read = DataLoader(_Images(source, mine), collate_fn=only, num_workers=batches.spec.dataloader_num_workers)
    for sample in progress(read, title="Latents", unit="image", total=len(mine), shown=rank == 0):
        if isinstance(sample, BadSample):
            logger.warning("skipped %s", sample)
        else:
            batches.encode([sample])
            _check(store, batches)
    store.save()
    _check(store, batches)


def _share(missing: Sequence[str], rank: int, processes: int) -> Sequence[str]:
    """This process's part of what is missing; all have looked before any of them writes."""
    distributed.barrier()
    return missing[rank::processes]


class _Images(Dataset["Sample | BadSample"]):
    """Items of a source of fixed crops; what cannot be used travels as a value."""

    def __init__(self, source: Source, items: Sequence[int]) -> None:
        self.source, self.items = source, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> Sample | BadSample:
        try:
            return self.source.sample(self.items[n], sample_rng(0, self.items[n]))
        except BadSample as error:
            return error


def _lacking(store: RowStore, ids: Sequence[str]) -> list[str]:
    """What is in no file, whichever process was to write it."""
    return RowStore(store.folder, store.key).missing(ids)


def _check(store: RowStore, batches: Batches) -> None:
    """Raise where the store has given up its folder: it has warned of the reason."""
    if store.folder is None:
        got, why = f"a cache that cannot be written to {batches.folder}", "its rows would be lost at the end"
        todo = "free disk space or set another train.cache_dir, then start again; the work resumes"
        raise DataError(problem(got, "disk space for it", why, todo))
