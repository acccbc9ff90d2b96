"""A check of a data source: reads every sample once and reports what it contains."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stepdistill.core.errors import DataError, problem
from stepdistill.core.image_files import NAMED, left_out_lines
from stepdistill.data.base import BadSample, PromptsOf, Source, inside, only
from stepdistill.data.made import TeacherMade


class _Facts(NamedTuple):
    shape: tuple[int, ...]
    size: tuple[int, int] | None
    length: tuple[int, float] | None
    words: list[int]
    bad: BadSample | None
    error: DataError | None


class _Examiner(Dataset[_Facts]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> _Facts:
        try:
            words = [len(caption.split()) for caption in self.source.captions(i)]
            sample = self.source.sample(i, random.Random(0))
        except BadSample as error:
            return _Facts((), None, None, [], error, None)
        except DataError as error:
            return _Facts((), None, None, [], None, error)
        tensor = sample.latents if sample.pixels is None else sample.pixels
        shape = () if tensor is None else tuple(tensor.shape)
        return _Facts(shape, self.source.size(i), self.source.length(i), words, None, None)


class _Tally:
    """Running sums over the facts of all samples."""

    def __init__(self) -> None:
        self.bad: list[BadSample] = []
        self.words: list[int] = []
        self.sides: list[int] = []
        self.enlarged = 0
        self.lengths: list[int] = []
        self.rates: list[float] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def add(self, facts: _Facts) -> None:
        if facts.bad is not None:
            self.bad.append(facts.bad)
            return
        self.words += facts.words
        self.shapes[facts.shape] += 1
        if facts.size is not None:
            self.sides.append(min(facts.size))
            self.enlarged += any(have < want for have, want in zip(facts.size, facts.shape[-2:], strict=True))

        if facts.length is not None:
            self.lengths.append(facts.length[0])
            self.rates += [round(facts.length[1], 2)] * (facts.length[1] > 0)

    def lines(self) -> Iterator[str]:
        usable = self.shapes.total()
        if self.sides:
            yield f"  images: shorter side {_spread(self.sides)} px; {self.enlarged} smaller than the crop"
        if self.lengths:
            rates = f", {_spread(self.rates)} a second" if self.rates else ""
            yield f"  clips: {_spread(self.lengths)} frames{rates}"
        shapes = [f"{'x'.join(map(str, shape))}: {count}" for shape, count in self.shapes.most_common() if shape]
        if shapes:
            axes = "H x W" if self.sides else "h x w"
            frames = "F x " * (max(map(len, self.shapes)) == 4)
            yield f"  shapes ({'3' if self.sides else 'C'} x {frames}{axes}): {', '.join(shapes)}"
        spread, empty = _spread(self.words), self.words.count(0)
        yield f"  captions: {len(self.words)} for {usable} samples, {spread} words, {empty} empty"
        if self.bad:
            yield f"  unusable: {len(self.bad)}; training takes the next usable sample instead"
            yield from (f"    {error}" for error in self.bad[:NAMED])
            if len(self.bad) > NAMED:
                yield f"    ... and {len(self.bad) - NAMED} more"


def _spread(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:g} to {ordered[-1]:g} (median {ordered[len(ordered) // 2]:g})"


def check_source(source: Source, strict: bool = False, workers: int = 0) -> str:
    """Decode every sample as training would, and report counts, sizes, buckets, captions and what is broken.

    Args:
        source: the source.
        strict: whether one unusable sample is an error.
        workers: reading processes; 0 reads in this one.

    Returns:
        the report, a few lines of text.

    Raises:
        DataError: nothing usable is there, columns or captions are wrong; the first bad sample is named.
    """
    if isinstance(source, TeacherMade):  # the rest the teacher draws when training starts
        source = source.source
    elif any(isinstance(part, TeacherMade) for part in inside(source)):
        source = PromptsOf(source=source)
    total = len(source)
    source.buckets()  # before the workers start, so that they find it done
    tally = _Tally()
    facts: _Facts
    read = DataLoader(_Examiner(source), num_workers=workers, collate_fn=only)
    for facts in tqdm(read, "samples", total=total):
        if facts.error is not None:
            raise facts.error
        tally.add(facts)
    if tally.bad and (strict or len(tally.bad) == total):
        got = f"{len(tally.bad)} of {total} samples unusable, the first {tally.bad[0]}"
        expected = "every sample usable (strict)" if strict else "usable samples"
        raise DataError(problem(got, expected, "they cannot be used in training", "repair or remove them"))
    left_out = source.left_out()
    lines = [f"  left out: {len(left_out)}", *(f"    {line}" for line in left_out_lines(left_out).values())]
    head = f"{type(source).__name__}: {total} samples, {total - len(tally.bad)} usable"
    return "\n".join([head, *tally.lines(), *(lines if left_out else [])])
