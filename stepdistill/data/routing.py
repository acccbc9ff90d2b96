"""Routers that assign each prompt to one of K students, a function of the prompt's words, saved with the student.

Multi-student distillation (Song et al. 2024, https://arxiv.org/abs/2410.23274) divides the prompts among students, in
equal and preferably semantic parts. The same function must divide them in training and pick the student afterwards, so
it is built once, from the training prompts, and stored as `router.json`. The paper takes quadrants of text embeddings;
data are read here before any text encoder is, so a prompt is embedded by its words instead: inverse document
frequencies over the training prompts, at length 1. Plain Python's arithmetic gives every machine the same digits.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias
from zlib import crc32

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from stepdistill.core.errors import StudentError, problem

ROUTER = "router.json"
SCHEMA = 1
WORDS = 4096  # the most frequent words, which is all that a tree of clusters looks at
SEEN = 4096  # prompts that a direction is sought in; thresholds are medians over all of them
TURNS = 20  # of the power iteration: too few for the exact direction, and it need not be
Vector = Mapping[str, float]


def normal(prompt: str) -> str:
    """A prompt with normalised letter case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def words(prompt: str) -> list[str]:
    """The different words of a prompt, sorted."""
    return sorted(set(re.findall(r"\w+", normal(prompt))))


def rarity(prompts: Sequence[str], least: int = 1) -> dict[str, float]:
    """`log(1 + prompts / prompts with the word)` for the most frequent words that `least` prompts have."""
    counts = Counter(word for prompt in prompts for word in words(prompt))
    kept = sorted((word for word in counts if counts[word] >= least), key=lambda word: (-counts[word], word))
    # rounded, since libraries of mathematics differ in a logarithm's last digit
    return {word: round(math.log(1 + len(prompts) / counts[word]), 6) for word in kept}


def embed(prompt: str, rare: Vector) -> dict[str, float]:
    """The known words of a prompt with their rarity, at length 1; nothing where none is known."""
    values = {word: rare[word] for word in words(prompt) if word in rare}
    length = math.sqrt(math.fsum(value * value for value in values.values()))
    return {word: value / length for word, value in values.items()}


def dot(a: Vector, b: Vector) -> float:
    """The inner product of two sparse vectors; `fsum` makes it independent of their order."""
    return math.fsum(value * b[word] for word, value in a.items() if word in b)


@dataclass(frozen=True)
class Table:
    """Students by a list of known prompts or classes each.

    A prompt that is on no list goes where the nearest listed one goes, by the words that they share, rare words
    counting more (of equally near ones the first listed). One that shares no word with any goes to
    `crc32(prompt) % K`.

    Args:
        parts: student k's prompts in `normal` form, in order; no two students share one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    parts: tuple[tuple[str, ...], ...]
    kind: Literal["table"] = "table"

    @property
    def students(self) -> int:
        """K."""
        return len(self.parts)

    @cached_property
    def _known(self) -> dict[str, int]:
        return {prompt: k for k, part in enumerate(self.parts) for prompt in part}

    @cached_property
    def _index(self) -> tuple[dict[str, float], dict[str, list[tuple[str, float]]]]:
        """Rarity by word, and by word the listed prompts that have it, with its weight in them."""
        rare, index = rarity(list(self._known)), defaultdict(list)
        for prompt in self._known:
            for word, value in embed(prompt, rare).items():
                index[word].append((prompt, value))
        return rare, index

    def lists(self, prompt: str) -> bool:
        """Whether the prompt is on a list itself."""
        return normal(prompt) in self._known

    def find(self, prompt: str) -> int | None:
        """The number of the student on whose list the prompt, or the one nearest to it, is; None where none is near."""
        prompt = normal(prompt)
        if prompt in self._known:
            return self._known[prompt]
        rare, index = self._index
        near: dict[str, float] = defaultdict(float)
        for word, value in embed(prompt, rare).items():
            for listed, weight in index[word]:
                near[listed] += value * weight
        if not near:
            return None
        best = max(near.values())
        # sums of the same terms in another order differ in the last digits
        return min(self._known[listed] for listed, value in near.items() if value > best - 1e-9)

    def route(self, prompt: str) -> int:
        """The number of the prompt's student."""
        student = self.find(prompt)
        return crc32(normal(prompt).encode()) % self.students if student is None else student


@dataclass(frozen=True)
class Split:
    """A node of a tree: prompts to either side of a level of one direction.

    Args:
        direction: by word.
        level, prompt: the first prompt above, by inner product and, among equal ones, in alphabetical order. So any
            two different prompts have an order, and a part has the size that is asked for.
        below, above: what comes next: a node, or the number of a student.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    direction: dict[str, float]
    level: float
    prompt: str
    below: Split | int
    above: Split | int


@dataclass(frozen=True)
class Tree:
    """Students by cluster of prompts: halved at the median of a direction in which they differ most, and so on.

    Every prompt has its place, also one of unknown words only, which counts as zero in every direction.

    Args:
        students: K.
        rare: weight by word.
        root: the first node; the number 0 for one student.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    students: int
    rare: dict[str, float]
    root: Split | int
    kind: Literal["tree"] = "tree"

    def route(self, prompt: str) -> int:
        """The number of the prompt's student."""
        prompt, node = normal(prompt), self.root
        vector = embed(prompt, self.rare)
        while isinstance(node, Split):
            place = (dot(vector, node.direction), prompt)
            node = node.below if place < (node.level, node.prompt) else node.above
        return node


Router: TypeAlias = Table | Tree


def shares(count: int, students: int) -> list[int]:
    """`count` in parts that differ by at most one, the larger ones first."""
    return [count // students + (k < count % students) for k in range(students)]


def consecutive(prompts: Iterable[str], students: int) -> Table:
    """The prompts in their order, the first n/K to the first student, and so on, as the paper divides classes."""
    names = list(dict.fromkeys(map(normal, prompts)))
    ends = [sum(shares(len(names), students)[:k]) for k in range(students + 1)]
    return Table(tuple(tuple(names[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)))


def cluster(prompts: Iterable[str], students: int) -> Tree:
    """A tree whose parts of the different prompts differ in size by at most one; a function of the set of prompts."""
    names = sorted(set(map(normal, prompts)))
    rare = rarity(names, least=2)  # a word of one prompt likens it to no other
    rare = dict(list(rare.items())[:WORDS])
    return Tree(students, rare, _grow([(name, embed(name, rare)) for name in names], shares(len(names), students), 0))


def _grow(rows: list[tuple[str, dict[str, float]]], sizes: Sequence[int], first: int) -> Split | int:
    """The tree over `rows` of prompt and vector, for students from `first` on with `sizes` prompts each."""
    if len(sizes) == 1:
        return first
    half = len(sizes) // 2
    direction = _direction([vector for _, vector in rows[:: -(-len(rows) // SEEN)]])
    ranked = sorted((dot(vector, direction), name, vector) for name, vector in rows)
    cut = sum(sizes[:half])
    level, prompt, _ = ranked[cut]
    lower, upper = (sorted((name, vector) for _, name, vector in part) for part in (ranked[:cut], ranked[cut:]))
    below, above = _grow(lower, sizes[:half], first), _grow(upper, sizes[half:], first + half)
    return Split(direction, level, prompt, below, above)


def _direction(vectors: Sequence[Vector]) -> dict[str, float]:
    """Roughly the first principal component, by power iteration from fixed signs; rounded for the file."""
    names = sorted({word for vector in vectors for word in vector})
    mean = dict.fromkeys(names, 0.0)
    for vector in vectors:
        for name, value in vector.items():
            mean[name] += value / len(vectors)
    direction = {name: 1.0 - 2.0 * (crc32(name.encode()) & 1) for name in names}
    for _ in range(TURNS):
        middle = dot(mean, direction)
        moved = dict.fromkeys(names, 0.0)
        for vector in vectors:
            along = dot(vector, direction) - middle
            for name, value in vector.items():
                moved[name] += along * value
        length = math.sqrt(math.fsum(value * value for value in moved.values()))
        if length < 1e-12:  # vectors that do not differ; the alphabet will part them
            return {}
        direction = {name: value / length for name, value in moved.items()}
    return {name: round(value, 6) for name, value in direction.items() if round(value, 6)}


@dataclass(frozen=True)
class Routing:
    """`router.json`.

    Args:
        student: whose folder this is; None for a folder of all students.
        router: what divided the training prompts.
        schema_version: of this format; another one is refused.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    student: int | None
    router: Annotated[Router, Field(discriminator="kind")]
    schema_version: Literal[1] = SCHEMA

    def save(self, folder: Path) -> None:
        """Write it into a student folder."""
        (folder / ROUTER).write_bytes(FORMAT.dump_json(self, indent=1) + b"\n")


FORMAT = TypeAdapter(Routing)


def read_routing(folder: Path) -> Routing:
    """What `Routing.save` wrote. Raises StudentError where there is none, or it is broken."""
    path = folder / ROUTER
    todo = "use a student that was trained on stepdistill.data.Partition"
    try:
        return FORMAT.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        why = f"it assigns prompts to students ({' '.join(str(error).split())[:200]})"
        raise StudentError(problem(f"no readable {path}", "a router", why, todo)) from error
