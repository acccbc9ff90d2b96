"""The prompts of one of K students, for multi-student distillation."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from stepdistill.config.kinds import Place
from stepdistill.core.captions import read_text
from stepdistill.core.errors import ConfigError, DataError, problem
from stepdistill.data.base import BadSample, Sample, Wrapper
from stepdistill.data.prompts import Prompts
from stepdistill.data.routing import Router, Table, cluster, consecutive, normal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Partition(Wrapper):
    """The items whose prompts belong to student k of K; K runs with `student` 0 to K - 1 cover all of them.

    Multi-student distillation (Song et al. 2024, https://arxiv.org/abs/2410.23274). Each run writes `router.json`
    beside its student; `stepdistill multi` joins the K folders. Prompts that differ in case or white space only
    are one prompt, and belong to one student. The parts of `class` and `cluster` differ by at most one in the
    number of different prompts; items such as images may have any number for each prompt.

    Around prompts or images only the student's own are used. Around `TeacherSamples` the K runs share one
    folder of samples; inside it, each student has samples of its own prompts, and needs a folder of its own.
    The paper's students share the paired set of their regression loss unfiltered, since pairs of one part alone
    make a student collapse. As a batch here has one source, that is a run of its own: regress once on
    `TeacherSamples` without a partition, and start all K from that student by `lora.init_from`.

    Args:
        source: the same for all K runs, with all prompts. With `by: file` it may also be the student's own prompts. Set
            `proportion_empty_prompts` here, so that every student sees the empty prompt.
        students: K, number of students, at least 1.
        student: k, number of this run's student, from 0 to K - 1.
        by: `class` gives each student consecutive prompts of the list; `cluster` gives it prompts with words in common;
            `file` reads the assignment from files.
        classes: with `by: class`, the ordered list of classes; none takes the source's prompts, in order of first
            appearance. A prompt that is not a class itself goes to the class whose words it shares.
        files: with `by: file`, one file of prompts per student, in order, or one `.json` of `{prompt: k}`. They must
            list every prompt of the source.
    """

    students: int
    student: int = 0
    by: Literal["class", "cluster", "file"] = "cluster"
    classes: tuple[str, ...] = ()
    files: tuple[Place, ...] = ()

    def __post_init__(self) -> None:
        count, k, files = self.students, self.student, len(self.files)
        if count < 1:
            raise ConfigError(
                problem(f"{count} students", "at least 1", "each prompt needs a student", "set data.students")
            )
        if not 0 <= k < count:
            why, todo = "students are counted from 0", "set data.student"
            raise ConfigError(problem(f"student {k} of {count}", f"0 to {count - 1}", why, todo))
        if (self.by == "file") != bool(files) or (self.classes and self.by != "class"):
            got = f"by {self.by!r} with {files} files and {len(self.classes)} classes"
            expected = "files only with by: file, and classes only with by: class"
            raise ConfigError(problem(got, expected, "they would be ignored, or are missing", "set data.by"))
        if files and files != count and not self._mapped:
            got = f"{files} files for {count} students"
            todo = "change data.files or data.students"
            raise ConfigError(
                problem(got, "one file per student, or one .json", "file k lists the prompts of student k", todo)
            )

    @property
    def _mapped(self) -> bool:
        return len(self.files) == 1 and self.files[0].endswith(".json")

    @cached_property
    def _captions(self) -> list[tuple[int, Sequence[str]]]:
        """Item and captions of everything in the source that has any."""
        kept, bad = [], []
        for i in range(len(self.source)):
            try:
                kept.append((i, self.source.captions(i)))
            except BadSample as error:
                bad.append(error)
        if bad:
            logger.warning(
                "%d items belong to no student, since they have no caption; the first is %s", len(bad), bad[0]
            )
        return kept

    @cached_property
    def router(self) -> Router:
        """What says whose a prompt is, here and when the students are used."""
        if self.by == "file":
            return self._listed()
        listed = self.classes or [caption for _, captions in self._captions for caption in captions]
        count = len(set(map(normal, listed)))
        if count < self.students:
            got = f"{count} different {'classes' if self.classes else 'prompts'} for {self.students} students"
            why = "a student would have no prompts (case and white space are ignored)"
            todo = "add prompts, or lower data.students"
            raise DataError(problem(got, f"at least {self.students}", why, todo))
        return (consecutive if self.by == "class" else cluster)(listed, self.students)

    def _listed(self) -> Table:
        """The router of the files; raises DataError where they overlap, or leave a student without prompts."""
        parts: list[dict[str, None]] = [{} for _ in range(self.students)]
        owner: dict[str, int] = {}
        for prompt, k in self._mapping() if self._mapped else self._lines():
            prompt = normal(prompt)
            if owner.setdefault(prompt, k) != k:
                got = f"the prompt {prompt[:60]!r} for the students {owner[prompt]} and {k} in {list(self.files)}"
                why = "a prompt can belong to one student only (case and white space are ignored)"
                raise DataError(problem(got, "every prompt once", why, "list it for one of them"))
            parts[k][prompt] = None
        empty = [k for k, part in enumerate(parts) if not part]
        if empty:
            got = f"no prompt for student {empty[0]} in {list(self.files)}"
            why = "a student without prompts cannot be trained"
            raise DataError(problem(got, "at least one per student", why, "add some, or lower data.students"))
        return Table(tuple(map(tuple, parts)))

    def _lines(self) -> Iterator[tuple[str, int]]:
        for k, file in enumerate(self.files):
            source = Prompts(prompts_file=file)
            try:
                yield from ((caption, k) for i in range(len(source)) for caption in source.captions(i))
            except DataError as error:
                raise DataError(f"the prompts of student {k}: {error}") from error

    def _mapping(self) -> Iterator[tuple[str, int]]:
        path = Path(self.files[0])
        try:
            table = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise DataError(problem(f"{path}: {error}", "JSON", "it does not parse", "correct it")) from None
        for prompt, k in table.items() if isinstance(table, dict) else [("", table)]:
            if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < self.students:
                got = f"{str(k)[:60]!r} for {prompt[:60]!r} in {path}"
                expected = f"an object of prompts, each with a student from 0 to {self.students - 1}"
                raise DataError(problem(got, expected, "the file assigns prompts to students", "correct it"))
            yield prompt, k

    def _stray(self, caption: str) -> bool:
        """Whether a caption is no one's by the lists that were given. The empty prompt never is."""
        if not caption.strip() or not isinstance(self.router, Table):
            return False
        return not self.router.lists(caption) if self.by == "file" else self.router.find(caption) is None

    @cached_property
    def _items(self) -> list[tuple[int, tuple[str, ...]]]:
        """Item of the source and those of its captions that are this student's, where there are any."""
        items = []
        for i, captions in self._captions:
            for caption in filter(self._stray, captions):
                got = f"{caption[:60]!r} in {self.source.name(i)}, but not in {list(self.files or self.classes)}"
                why = "this prompt belongs to no student"
                raise DataError(problem(got, "every prompt of the source there", why, "add it, or remove it"))
            mine = tuple(caption for caption in captions if self.router.route(caption) == self.student)
            if mine:
                items.append((i, mine))
        if not items:
            got = f"no prompt of student {self.student} of {self.students} among {len(self._captions)} items"
            why = "a student without prompts cannot be trained"
            raise DataError(problem(got, "at least one", why, "check data.source, data.classes and data.files"))
        return items

    def __len__(self) -> int:
        return len(self._items)

    def inner(self, i: int) -> int:
        return self._items[i][0]

    def captions(self, i: int) -> Sequence[str]:
        return self._items[i][1]

    def prompt(self, i: int, rng: random.Random) -> str:
        # the source's draw decides on dropping only: of several captions it may take another student's
        dropped = not self.source.prompt(self.inner(i), rng)
        choice, dropped_here = rng.random(), rng.random() < self.proportion_empty_prompts
        captions = self.captions(i)
        return "" if dropped or dropped_here else captions[int(choice * len(captions))]

    def sample(self, i: int, rng: random.Random) -> Sample:
        return replace(self.source.sample(self.inner(i), rng), prompt=self.prompt(i, rng), item=i)

    def buckets(self) -> Sequence[int]:
        buckets = self.source.buckets()
        return [buckets[j] for j, _ in self._items]

    def size(self, i: int) -> tuple[int, int] | None:
        return self.source.size(self.inner(i))
