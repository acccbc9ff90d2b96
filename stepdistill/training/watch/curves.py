"""Reference curves: metrics of a good training run of a recipe, in a small JSON file beside the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.core.errors import CheckpointError, problem

STRETCHES = 40  # rows of training in a curve
NEAR = 3  # settings in which a recipe may differ and still be named as the nearest
# keys of `train` that bear on what is learned; the rest say where it is kept, how often it is looked at, and how fast
TRAIN = (
    *("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler"),
    *("lr_warmup_steps", "optimizer", "optimizers", "max_grad_norm", "mixed_precision", "resolution"),
)


@dataclass(frozen=True)
class Curve:
    """One run, in few numbers.

    Args:
        course: the settings that bear on it, by path.
        training: losses and gradient norms, averaged over stretches of steps; `step` is a stretch's last.
        watch: the rows of the watch.
        facts: what the watch's ratios depend on.
    """

    course: Mapping[str, Any]
    training: Sequence[Mapping[str, float]]
    watch: Sequence[Mapping[str, float]]
    facts: Mapping[str, Any]

    def save(self, file: Path) -> None:
        """Write it as JSON, one row a line."""
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for key, value in asdict(self).items():
            rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else None
            parts.append(f' "{key}": ' + (json.dumps(value) if rows is None else f"[\n  {rows}\n ]"))
        file.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def read(cls, file: Path) -> Curve:
        """Raises CheckpointError where it is no curve."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            got = f"no readable curve in {file} ({error})"
            expected = "a file written by `stepdistill doctor RUN --save-curve FILE`"
            why = "there is nothing to compare with"
            todo = "write it again from a good run, or remove --reference"
            raise CheckpointError(problem(got, expected, why, todo)) from error


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's `config.yaml` that bear on what is learned, by dotted path."""
    parts = {key: value for key, value in config.items() if key != "train"}
    settings = _flat(parts | {"train": {key: config["train"].get(key) for key in TRAIN}})
    return {key: value for key, value in settings.items() if key != "lora.arithmetic"}  # which bears on rounding alone


def _flat(node: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{head}{key}.") if isinstance(value, Mapping) else {f"{head}{key}": value}
    return flat


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In words, the settings in which a run differs from a curve's."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return [f"{key} is {ours.get(key)} here and {theirs.get(key)} there" for key in keys]


def matching(wanted: Mapping[str, Any], folder: Path) -> tuple[Path | None, list[str]]:
    """The curve under `folder` of the most similar recipe and how it differs; None where more than a little."""
    candidates = [
        (differences(wanted, Curve.read(file).course), file) for file in sorted(folder.rglob("curves/*.json"))
    ]
    odd, file = min(candidates, key=lambda pair: len(pair[0]), default=([], None))
    return (file, odd) if len(odd) <= NEAR else (None, [])


def averages(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Losses and gradient norms, averaged over at most `STRETCHES` stretches of equal length."""
    trained = [row for row in rows if any(key.startswith(("loss", "grad_norm/")) for key in row)]
    length = -(-len(trained) // STRETCHES) or 1
    return [_mean(trained[i : i + length]) for i in range(0, len(trained), length)]


def _mean(part: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = sorted({key for row in part for key in row if key.startswith(("loss", "grad_norm/"))})
    values = {key: [row[key] for row in part if key in row] for key in keys}
    means = {key: float(f"{sum(value) / len(value):.4g}") for key, value in values.items()}
    return {"step": part[-1]["step"], **means}
