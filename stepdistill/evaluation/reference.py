"""The reference of an evaluation: the teacher's images, statistics in a file, or existing images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from accelerate import PartialState

from stepdistill.core.errors import EvaluationError, problem
from stepdistill.core.files import file_digest
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.inputs import FACTS, TEACHER, is_stats
from stepdistill.evaluation.measure import Reference
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.read import read_into
from stepdistill.evaluation.spec import EvalSpec
from stepdistill.evaluation.store import Store

UNKNOWN_FEATURES = "unknown"  # of statistics that another tool wrote
DRAWN = ("teacher", "steps", "guidance", "seed", "n", "prompts", "size", "dtype", "device", "eval_res", "features")


@dataclass(frozen=True)
class ReferenceBuilder:
    """Makes the reference of an evaluation.

    Args:
        spec: what is asked for.
        extractor: of the features.
        state: this process among the others.
    """

    spec: EvalSpec
    extractor: Extractor
    state: PartialState

    def of_teacher(self, store: Store, name: str) -> Reference:
        """The teacher's images under other noises."""
        features, known = store.features(), store.noted(FACTS) or {}
        # what the images and their features depend on, and not what else was measured beside them
        drawn = {key: known[key] for key in (*DRAWN, "lora") if key in known}  # a LoRA only where there is one
        digest = sha256(json.dumps(drawn).encode()).hexdigest()
        facts = {"kind": TEACHER, "path": name, "sha256": digest, "n": len(features)}
        return Reference(stats=store.stats(), features=features, motion=store.motion(), paired=True, facts=facts)

    def of_file(self, place: Path) -> Reference:
        """Statistics, or the features of images; each process makes its share of these.

        Raises EvaluationError, DataError where there are none, or of other features or another size.
        """
        if is_stats(place, self.extractor.identity.clips):
            return self._of_stats(place)
        images = Images(place, self.spec.side, self.extractor.identity.clips)
        folder = self.spec.output_dir / "work" / "reference-images"
        store = read_into(folder, images, self.spec, self.extractor, self.state)
        features, known = store.features(), store.noted(FACTS) or {}
        facts = {"kind": "images", "path": str(place), "sha256": known["images"], "n": len(features)}
        facts |= {"features_id": self.extractor.identity.id, "eval_res": self.spec.side}
        return Reference(stats=store.stats(), features=features, motion=store.motion(), paired=False, facts=facts)

    def _of_stats(self, place: Path) -> Reference:
        try:
            stats, meta = Stats.load(place)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        identity, unlike = self.extractor.identity, "features of different extractors have no distance"
        if stats.mean.numel() != identity.dim:
            got = f"{place} with {stats.mean.numel()} features, and {identity.id}"
            raise EvaluationError(problem(got, f"{identity.dim}", unlike, "choose the extractor that made the file"))
        features_id, eval_res = meta.get("features_id", UNKNOWN_FEATURES), meta.get("eval_res")
        if features_id not in (UNKNOWN_FEATURES, identity.id):
            got = f"{place}, made with {features_id}"
            raise EvaluationError(problem(got, identity.id, unlike, "make it again with this extractor"))
        if features_id != UNKNOWN_FEATURES and eval_res != self.spec.side:
            got, why = f"{place}, of images at eval_res {eval_res}", "both sides must be resized equally"
            raise EvaluationError(problem(got, f"eval_res {self.spec.side}", why, "set --eval-res to the same value"))
        facts = {"kind": "npz", "path": str(place), "sha256": file_digest(place)}
        facts |= {"n": stats.n or None, "features_id": features_id, "eval_res": eval_res}
        return Reference(stats=stats, features=None, paired=False, facts=facts)
