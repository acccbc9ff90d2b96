"""The rules of the collapse monitor: how far a student's statistics may be from its teacher's, and the warnings.

A ratio student / teacher is read on a logarithmic scale in units of the teacher's own seed-to-seed spread, so that
half and double are equally far: `z = log(ratio) / spread`. This module needs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BAND = 5.0  # spreads of the teacher
RUNNING = 2  # validations in a row
FLOOR = 0.01  # smallest relative spread: a teacher that always draws the same is no reason to ask for the impossible
PREFIX, SCORE = "watch/", "watch/score"
TRAINED, HELD_OUT = "watch/trained/", "watch/held_out/"  # mean scores by rewards, before their names
FALLS = 3  # validations in a row at which a held-out reward falls, and training has gone too far
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the schedule at which the score gap is measured
IMAGE = ("saturation", "luminance", "contrast", "high_frequency", "diversity")
MOTION, STATIC = "motion", 0.5  # of videos alone; the share of the teacher's motion below which a student is static
GAPS = tuple(f"gap_{level:g}" for level in LEVELS)
STATISTICS = (*IMAGE, *GAPS)

# statistic: what too low usually means and what to do, and the same for too high
MEANING = {
    "saturation": (
        "colours are washed out: the student averages over several targets; train longer, or on less random targets",
        "colours are oversaturated: guidance is too strong or applied twice, or the critic lags behind; lower "
        "guidance_scale, train the critic more often, or lower the learning rate",
    ),
    "luminance": (
        "images darken: the student drifts uncorrected; lower the learning rate, train the critic more often",
        "images brighten: the student drifts uncorrected; lower the learning rate, train the critic more often",
    ),
    "contrast": (
        "images lose contrast: the student averages over several targets; train longer, or on less random targets",
        "shadows and highlights clip: guidance is too strong, or the learning rate too high; lower them",
    ),
    "high_frequency": (
        "images blur: the student averages over several targets, or is undertrained; train longer, with more "
        "steps, or with an adversarial term",
        "noise or hard edges: the learning rate is too high, guidance too strong, or the last step leaves noise; "
        "lower them, or compare the sampler with the contract",
    ),
    "diversity": (
        "all seeds give nearly the same image (collapse): the critic lags or is off, or guidance is too strong; "
        "train the critic more often, lower guidance_scale, and go back to best/",
        "images of one prompt have less in common than the teacher's: the prompt has too little effect, or the "
        "learning rate is too high; lower it, or raise guidance_scale",
    ),
    "motion": (
        "videos are nearly static: few-step Euler sampling loses motion before it loses sharpness, and distribution "
        "matching can lose it, too; train longer, train the critic more often, lower guidance_scale, and judge "
        "students by motion, not by smoothness",
        "videos move or flicker more than the teacher's: the learning rate is too high, or the last step leaves noise; "
        "lower it, or compare the sampler with the contract",
    ),
    "gap": (
        "the teacher finds the student's images easier than its own: they are smoother and more alike, as before a "
        "collapse; train the critic more often, lower guidance_scale",
        "the teacher denoises the student's images worse than its own at this noise level (high: layout, low: "
        "texture); lower the learning rate or guidance_scale, or train longer",
    ),
}


def meaning(name: str, high: bool) -> str:
    """What it usually means that a statistic is too low or too high, and what to do."""
    return MEANING["gap" if name in GAPS else name][high]


def title(name: str) -> str:
    """A statistic's name in a sentence."""
    if name in GAPS:
        return f"score gap at {float(name.removeprefix('gap_')):.0%} of the schedule"
    return name.replace("_", "-") + (" energy" if name == "high_frequency" else "")


@dataclass(frozen=True)
class Yardstick:
    """The teacher's own statistics.

    Args:
        mean: of each statistic.
        spread: relative standard deviation of each from one set of seeds to another of the student's size.
        facts: what they depend on: teacher, prompts, seeds, steps, guidance.
    """

    mean: Mapping[str, float]
    spread: Mapping[str, float]
    facts: Mapping[str, Any]

    def save(self, file: Path) -> None:
        """Write it as JSON, every digit of it."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Yardstick | None:
        """What `save` wrote; None where there is none or where it is broken."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def deviation(ratio: float, spread: float) -> float:
    """`log(ratio) / spread`, a ratio below 1/1000 counting as that; nan for nan."""
    return math.log(ratio if math.isnan(ratio) else max(ratio, 1e-3)) / spread


def band(earlier: Sequence[float]) -> tuple[float, float]:
    """Between which deviations a statistic may lie, after the earlier ones of the run, the first from before training.

    Five spreads to both sides of the teacher. A student starts elsewhere, though: an untrained one is blurred and
    pale by rights, and a good one may stay a little so. So on each side the band reaches from the nearest that the
    student has been to the teacher on that side, and it closes behind a student that comes nearer: what is reported
    is moving away by five spreads, not the distance that is still to go. A student that was inside once has the plain
    band of five. The sides are separate, so passing the teacher by and ending far beyond is not excused by having
    started far before it.
    """
    low = min((max(0.0, -z) for z in earlier), default=math.inf)
    high = min((max(0.0, z) for z in earlier), default=math.inf)
    return -BAND - low, BAND + high


def outside(deviations: Sequence[float]) -> list[bool]:
    """For each validation whether the statistic is out of its band; nan is."""
    bands = [band(deviations[:i]) for i in range(len(deviations))]
    return [not low <= z <= high for z, (low, high) in zip(deviations, bands, strict=True)]


def alarmed(deviations: Sequence[float]) -> bool:
    """Whether it is out of its band at the last two validations."""
    return len(deviations) >= RUNNING and all(outside(deviations)[-RUNNING:])


def static(ratios: Sequence[float]) -> bool:
    """Whether a trained student moves less than half as much as its teacher at the last two validations, and does not
    recover. An untrained one may."""
    return len(ratios) > RUNNING and max(ratios[-RUNNING:]) < STATIC and ratios[-1] <= 1.1 * ratios[-2]


def alarming(name: str, deviations: Sequence[float], spread: float) -> bool:
    """Whether a statistic is to be reported: it is `alarmed`, or is the motion of a student that is `static`."""
    return alarmed(deviations) or (name == MOTION and static([math.exp(z * spread) for z in deviations]))


def worth_reporting(names: Sequence[str], past: Mapping[str, Sequence[float]]) -> list[str]:
    """Of these statistics those to speak of: of the gaps, which move together, only the one that is farthest off."""
    gaps = [name for name in names if name in GAPS]
    worst = max(gaps, key=lambda name: abs(past[name][-1]), default=None)
    return [name for name in names if name not in GAPS or name == worst]


def drift_score(deviations: Mapping[str, float]) -> float:
    """The mean distance from the teacher, in spreads; about 0.8 for the teacher itself under other seeds."""
    return sum(abs(z) for z in deviations.values()) / len(deviations)


def deceived(rows: Sequence[Mapping[str, float]]) -> bool:
    """Whether the held-out reward has fallen three validations in a row while one that is trained on has risen.

    The student then climbs what is wrong with the trained reward.
    """
    looks = [row for row in rows if SCORE in row][-FALLS - 1 :]
    falls = [all(a[key] > b[key] for a, b in pairwise(looks)) for key in looks[-1] if key.startswith(HELD_OUT)]
    rises = [looks[-1][key] > looks[0][key] for key in looks[-1] if key.startswith(TRAINED)]
    return len(looks) > FALLS and any(falls) and any(rises)


def reward_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """The first and the last mean score by each reward, by key."""
    looks = [row for row in rows if SCORE in row]
    keys = [key for key in (looks[-1] if looks else {}) if key.startswith((TRAINED, HELD_OUT))]
    return {key: (next(row[key] for row in looks if key in row), looks[-1][key]) for key in keys}


def reward_sentence(key: str, scores: tuple[float, float]) -> str:
    """How a mean score went."""
    name = key.removeprefix(TRAINED).removeprefix(HELD_OUT)
    kind = "trained" if key.startswith(TRAINED) else "held-out"
    return f"the {kind} reward {name} went from {scores[0]:.4g} to {scores[1]:.4g}"


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, those of one step merged, in order; a last line cut short is left out."""
    merged: dict[int, dict[str, float]] = {}
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        if line.endswith("}"):
            row = json.loads(line)
            merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def history(rows: Sequence[Mapping[str, float]], spread: Mapping[str, float]) -> dict[str, list[float]]:
    """Deviations of every statistic, one for each row that has them."""
    looks = [row for row in rows if SCORE in row]
    return {name: [deviation(row[PREFIX + name], spread[name]) for row in looks] for name in spread}


def sentence(name: str, deviations: Sequence[float], spread: float) -> str:
    """What is off, how far, what usually causes it, what to do."""
    z = deviations[-1]
    low, high = (math.exp(limit * spread) for limit in band(deviations[:-1]))
    low = max(low, STATIC) if name == MOTION else low
    return (
        f"the {title(name)} is {math.exp(z * spread):.3g} times the teacher's, expected {low:.3g} to {high:.3g}: "
        f"{meaning(name, not z < 0)}"
    )
