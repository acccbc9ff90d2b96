"""Features of a teacher's images, kept in a file: what the summary of a run and the tables compare students with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class StoredFeatures:
    """Features of a teacher's images under fixed prompts and seeds.

    Args:
        features: by name, each (N, D): `reference` (full steps, seeds A), `floor` (full steps, seeds B), and any
            stock few-step rows at seeds B.
        prompts: N prompts.
        facts: what the features depend on: extractor, teacher, steps, guidance.
    """

    features: dict[str, Tensor]
    prompts: list[str]
    facts: dict[str, str]

    def save(self, file: Path) -> None:
        """Write one safetensors file, features in half precision."""
        tensors = {key: value.half().contiguous() for key, value in self.features.items()}
        save_file(tensors, file, {**self.facts, "prompts": "\n".join(self.prompts)})

    @classmethod
    def load(cls, file: Path) -> StoredFeatures:
        """Read what `save` wrote."""
        with safe_open(file, "pt") as stored:
            facts = dict(stored.metadata())
            features = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118
        return cls(features, facts.pop("prompts").split("\n"), facts)
