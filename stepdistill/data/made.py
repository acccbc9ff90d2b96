"""Base of the sources that the teacher generates before training, stored in files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

from annotated_types import Ge, Le
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.config.kinds import Count, Place
from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import written_whole
from stepdistill.core.progress import progress
from stepdistill.core.random import VALIDATION
from stepdistill.core.units import Units, changed_facts, write_facts
from stepdistill.data.base import GuidedState, Source, inside
from stepdistill.data.bundled import bundled

# every sample has a starting noise of its own, and none has that of a validation image
SampleCount: TypeAlias = Annotated[int, Ge(1), Le(VALIDATION)]


class Teacher(Protocol):
    """Of what teacher samples are.

    Attributes:
        digest: of the teacher's weights.
        shape: of a starting noise, (C, h, w) of latents.
        takes_images: whether it continues images.
    """

    @property
    def takes_images(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class TeacherCalls(Teacher, Protocol):
    """What a source asks of a pipeline; in a run it is `stepdistill.training.teacher.TeacherSampler`."""

    def sample(
        self, prompts: list[str], noise: Tensor, steps: int, guidance_scale: float, images: Tensor | None = None
    ) -> Tensor:
        """Latents (B, C, h, w) by deterministic guided steps from `noise`; of videos that begin with images."""
        ...

    def invert(self, prompts: list[str], pixels: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The noise above images (B, 3, H, W), and their latents at the lowest time, with `noise` added there."""
        ...

    def trajectories(self, prompts: list[str], noise: Tensor, scales: Tensor, kept: Tensor, steps: int) -> GuidedState:
        """States (B, K, ...) of trajectories with guidance scales (B,), at the steps `kept` (B, K)."""
        ...


@dataclass(frozen=True, kw_only=True)
class TeacherMade(Source):
    """Samples that the teacher generates from a source's items, once, before training.

    They are stored in files of `chunk` samples. Stored files are reused with the same teacher and settings, and refused
    otherwise. An interrupted generation resumes.

    Args:
        source: items from which the samples are generated, in turn.
        folder: folder in which they are stored.
        count: number of samples; it may change later.
        num_inference_steps: solver steps of the teacher.
    """

    chunk: ClassVar[int]
    title: ClassVar[str]
    stored: ClassVar[str]  # the file of the facts
    source: Source
    folder: Place
    count: SampleCount
    num_inference_steps: Count

    @abstractmethod
    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        """What all of it depends on; not `count`, which may change."""

    @abstractmethod
    def make(self, teacher: Any, ids: Sequence[int]) -> dict[str, Tensor]:  # noqa: ANN401 - what the source calls
        """The tensors of a file, rows in the order of `ids`."""

    def marks(self, ids: Sequence[int]) -> dict[str, str]:
        """What a file's content depends on besides the facts, kept in the file."""
        return {}

    @property
    def path(self) -> Path:
        """The folder; bundled ones go by their names."""
        return bundled(self.folder)

    def fill(self, teacher: Teacher, rank: int = 0, world: int = 1) -> None:
        """Make what is missing; files are shared out among the processes.

        Raises:
            DataError: what lies there is of another teacher, setting or source; or the disk refuses.
        """
        facts, file = self.facts(teacher.digest, teacher.shape), self.path / self.stored
        facts |= {"images": self.source.digest()} if teacher.takes_images else {}
        if changed := changed_facts(file, facts):
            raise DataError(
                problem(
                    f"samples in {self.path} with other {', '.join(changed)}: {[have for have, _ in changed.values()]}",
                    f"{[wanted for _, wanted in changed.values()]}",
                    "those of another teacher or setting would teach the wrong thing",
                    "name another data.folder, or remove this one",
                )
            )
        known = file.exists()  # chunks without their facts are of nobody knows which teacher
        mine = self.units.missing(lambda k: known and self._whole(k), rank, world)
        if mine:
            write_facts(file, facts)
        for k in progress(mine, title=self.title, unit="file", shown=bool(mine) and rank == 0):
            ids = self.units.rows(k)
            tensors = self.make(teacher, ids)
            done = next(j for j in range(k + 1) if not self._chunk(j).exists() or j == k)
            save_chunk(self._chunk(k), tensors, self.marks(ids), done * self.chunk)

    @property
    def files(self) -> list[Path]:
        """The files that hold all of it, there or not."""
        return [self._chunk(k) for k in range(len(self.units))]

    @property
    def units(self) -> Units:
        """The files, and the numbers of the items in each."""
        return Units(self.count, self.chunk)

    def _chunk(self, k: int) -> Path:
        return self.path / f"chunk-{k:05d}.safetensors"

    def _whole(self, k: int) -> bool:
        """Whether a file holds all that it must: a last one, cut short at an earlier `count`, may not.

        Raises DataError where what it holds is of other items.
        """
        if not self._chunk(k).exists():
            return False
        with safe_open(self._chunk(k), "pt") as file:
            rows = file.get_slice(next(iter(file.keys()))).get_shape()[0]
            have = file.metadata() or {}
        wanted = self.marks(self.units.rows(k)[:rows])
        if rows <= len(self.units.rows(k)) and any(have.get(key) != value for key, value in wanted.items()):
            got, why = (
                f"{self._chunk(k)} of other {', '.join(wanted)}",
                "what is stored belongs to those it was made by",
            )
            raise DataError(problem(got, "those of data.source", why, "name another data.folder, or remove this one"))
        return rows >= len(self.units.rows(k))


def prompts_hash(source: Source) -> str:
    """Of all that decides the prompts of a source's samples."""
    content = sha256("".join(repr(each.proportion_empty_prompts) for each in inside(source)).encode())
    for i in range(len(source)):
        content.update("\n".join(source.captions(i)).encode() + b"\0")
    return content.hexdigest()[:16]


def save_chunk(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str], complete: int) -> None:
    """Write tensors with their facts, whole or not at all.

    Raises:
        DataError: the disk refuses. No part stays behind, and the message says that `complete` samples do.
    """
    try:
        with written_whole(file) as part:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part, dict(facts))
    except (OSError, SafetensorError) as error:
        raise DataError(
            problem(
                f"{file}, which cannot be written ({error})",
                "room for it",
                f"the first {complete} samples are complete, and stay usable",
                f"make room and start again, which goes on from there, or set data.count={complete}",
            )
        ) from error
