"""What rows are compared with: the teacher's own pictures, statistics in a file, or pictures."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from accelerate import PartialState

from stepdistill.errors import DataError, EvaluationError, problem
from stepdistill.evaluation.measure import Reference
from stepdistill.evaluation.pictures import Pictures
from stepdistill.evaluation.read import read_into
from stepdistill.evaluation.spec import Measures
from stepdistill.evaluation.store import Store
from stepdistill.metrics.features import FeatureExtractor
from stepdistill.metrics.stats import UNKNOWN, Stats

TEACHER = "teacher"


def check(place: str) -> None:
    """Raise EvaluationError or DataError where there is nothing to compare with, before anything is drawn."""
    if place == TEACHER:
        return
    if not Path(place).exists():
        expected = f"`{TEACHER}`, statistics (.npz), or pictures (a folder, .zip, .npz or .npy)"
        raise EvaluationError(problem(f"reference {place}, which is not there", expected, "rows need it", "check it"))
    if not is_stats(Path(place)):
        Pictures(Path(place))


def is_stats(place: Path) -> bool:
    """Whether a file holds `mu` and `sigma`, and not pictures."""
    if place.suffix.lower() != ".npz":
        return False
    try:
        Stats.load(place)
    except ValueError as error:
        try:
            Pictures(place)
        except DataError:
            raise EvaluationError(str(error)) from error
        return False
    return True


@dataclass(frozen=True)
class Referent:
    """Makes the reference of an evaluation.

    Args:
        spec: what is asked for.
        extractor: of the features.
        state: this process among the others.
    """

    spec: Measures
    extractor: FeatureExtractor
    state: PartialState

    def of_teacher(self, store: Store, name: str) -> Reference:
        """The teacher's pictures under other noises."""
        features = store.features()
        digest = sha256((store.folder / "facts.json").read_bytes()).hexdigest()
        facts = {"kind": TEACHER, "path": name, "sha256": digest, "n": len(features)}
        return Reference(stats=store.stats(), features=features, paired=True, facts=facts)

    def of_file(self, place: Path) -> Reference:
        """Statistics, or the features of pictures; each process makes its share of these."""
        if is_stats(place):
            stats, facts = Stats.load(place)
            if stats.mean.numel() != self.extractor.identity.dim:
                got = f"{place} with {stats.mean.numel()} features, and {self.extractor.identity.id}"
                why, todo = "features of different extractors have no distance", "name the one that made the file"
                raise EvaluationError(problem(got, f"{self.extractor.identity.dim}", why, todo))
            made = facts.get("features_id")
            if made not in (None, self.extractor.identity.id):
                got, why = f"{place}, made with {made}", "features of different extractors have no distance"
                raise EvaluationError(problem(got, self.extractor.identity.id, why, "make it again with this one"))
            digest, n = sha256(place.read_bytes()).hexdigest(), None if stats.n == UNKNOWN else stats.n
            told = {"kind": "npz", "path": str(place), "sha256": digest, "n": n, "features_id": made or "unknown"}
            return Reference(stats=stats, features=None, paired=False, facts=told)
        pictures = Pictures(place, self.spec.side)
        store = read_into(self.spec.output_dir / "work" / "reference", pictures, self.spec, self.extractor, self.state)
        features = store.features()
        told = {"kind": "images", "path": str(place), "sha256": pictures.sha256(), "n": len(features)}
        return Reference(stats=store.stats(), features=features, paired=False, facts=told)
