"""Diagnosis of a run from its files, and by comparison with the reference curve of its recipe.

Reads `metrics.jsonl`, `config.yaml`, `watch.json` and `distill_config.json`; loads no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from stepdistill.core.errors import CheckpointError, problem
from stepdistill.training.watch import rules
from stepdistill.training.watch.curves import Curve, averages, differences, matching, settings_of
from stepdistill.training.watch.rules import HELD_OUT, PREFIX, SCORE, Yardstick

Rows = Sequence[Mapping[str, float]]
ENOUGH = 20  # values, below which a trend is not spoken of
LOSS, NORM = "loss", "grad_norm/"


@dataclass
class Findings:
    """Problems (`off`) and notes, each in one or two sentences."""

    off: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Remains:
    """What a run left in its folder."""

    folder: Path
    rows: Rows
    config: Mapping[str, Any]
    yardstick: Yardstick | None

    @classmethod
    def of(cls, folder: Path) -> Remains:
        """Raises CheckpointError where it is no run's folder, or one without a single step."""
        rows, file = rules.read_metrics(folder / "metrics.jsonl"), folder / "config.yaml"
        if not rows or not file.is_file():
            got = f"{folder}, which lacks config.yaml or a metrics.jsonl with a row"
            why = "they contain the run's settings and metrics"
            todo = "pass the folder of train.output_dir, after the first step"
            raise CheckpointError(problem(got, "the output_dir of a run", why, todo))
        return cls(folder, rows, yaml.safe_load(file.read_text()), Yardstick.read(folder / "watch.json"))


def examine(folder: Path, reference: Path | None = None) -> tuple[str, bool]:
    """A report on a run's folder, and whether nothing is off.

    Args:
        reference: a curve to compare with; None looks for one of the same recipe under `configs/`.
    """
    run, findings = Remains.of(folder), Findings()
    curve, where = _reference(run, reference, findings)
    _ending(run, findings)
    _losses(run.rows, curve, findings)
    _gradients(run.rows, findings)
    _watch(run, findings)
    if curve:
        _compare(run, curve, where, findings)
    total, last = run.config["train"]["max_train_steps"], int(run.rows[-1]["step"])
    lines = [f"{folder}: {last} of {total} steps" + (f", compared with {where}" if curve else "")]
    for heading, sentences in (("off", findings.off), ("worth knowing", findings.notes)):
        lines += [f"\n{heading}:", *(f"  - {sentence}" for sentence in sentences)] if sentences else []
    count = len(findings.off)
    lines.append(f"\n{count} thing{'s are' if count > 1 else ' is'} off" if count else "\nnothing is off")
    return "\n".join(lines), not count


def save_curve(folder: Path, file: Path) -> None:
    """Write a run's curve, for the runs to come of the same recipe."""
    run = Remains.of(folder)
    facts = run.yardstick.facts if run.yardstick else {}
    Curve(settings_of(run.config), averages(run.rows), [dict(row) for row in run.rows if SCORE in row], facts).save(
        file
    )


def _reference(run: Remains, given: Path | None, findings: Findings) -> tuple[Curve | None, Path | None]:
    """The curve to compare with, and where it lies."""
    if given:
        curve = Curve.read(given)
        odd = differences(settings_of(run.config), curve.course)
        if odd:
            findings.notes.append(f"the run differs slightly from the reference: {'; '.join(odd)}")
        return curve, given
    file, odd = matching(settings_of(run.config), Path("configs"))
    if file and not odd:
        return Curve.read(file), file
    hint = "pass one with --reference"
    if file:
        hint = f"the closest is {file}, where {'; '.join(odd)}: pass it with --reference"
    findings.notes.append(f"no reference curve of this recipe under configs/; {hint}")
    return None, None


def _ending(run: Remains, findings: Findings) -> None:
    if (run.folder / "non_finite.pt").exists():
        findings.off.append("a loss was not finite: lower train.learning_rate, or use bf16 instead of fp16")
    contract = run.folder / "distill_config.json"
    if not contract.exists():
        findings.notes.append(
            "no student is written yet: the run is still going, or was stopped; resume_from_checkpoint: latest"
        )
    elif json.loads(contract.read_text()).get("proof") is None:
        findings.off.append("the student was not verified in plain Diffusers: run `stepdistill verify` on the folder")


def _series(rows: Rows, head: str) -> Iterator[tuple[str, list[float]]]:
    """The values of every key that begins so."""
    for key in sorted({key for row in rows for key in row if key.startswith(head)}):
        yield key, [row[key] for row in rows if key in row]


def _quarters(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last quarter, which single spikes do not move."""
    n = max(1, len(values) // 4)
    return median(values[:n]), median(values[-n:])


def _losses(rows: Rows, curve: Curve | None, findings: Findings) -> None:
    for key, values in _series(rows, LOSS):
        first, last = _quarters(values)
        if not all(map(math.isfinite, values)):
            findings.off.append(f"{key} is not finite at some step: lower train.learning_rate")
        elif len(values) < ENOUGH:
            findings.notes.append(f"{key} has {len(values)} values, too few for a trend")
        elif max(values) - min(values) <= 1e-3 * abs(first):
            findings.off.append(
                f"{key} does not move: {values[0]:.4g} first, {values[-1]:.4g} last. Nothing is learned: check the "
                "learning rate, and that the role's gradients are not zero"
            )
        # a hinge's term has no zero of its own; and a curve says what is usual, also between stages
        elif min(values) > 0 and last > 3 * first and not curve:
            sentence = f"{key} rises from {first:.4g} to {last:.4g} (medians of the first and last quarter)"
            if last > 10 * first:
                findings.off.append(f"{sentence}: lower train.learning_rate")
            else:
                findings.notes.append(
                    f"{sentence}: normal if the method moves on to harder stages, otherwise a bad sign"
                )


def _gradients(rows: Rows, findings: Findings) -> None:
    """Spikes, growth and silence of each role's gradient norm, as it was before clipping."""
    for key, values in _series(rows, NORM):
        role = key.removeprefix(NORM)
        if not all(map(math.isfinite, values)):
            findings.off.append(f"gradients of {role} are not finite at some step: lower train.learning_rate")
            continue
        if len(values) < ENOUGH:
            continue
        first, last = _quarters(values)
        before = [median(values[max(0, i - 50) : i]) for i in range(10, len(values))]
        spikes = sum(value > 10 * usual for value, usual in zip(values[10:], before, strict=True))
        if last < 1e-10:
            findings.off.append(
                f"gradients of {role} have vanished ({last:.2g}): the role no longer learns, and its loss is flat"
            )
        elif last > 10 * first:
            findings.off.append(
                f"gradients of {role} grow: {first:.3g} in the first quarter, {last:.3g} in the last (medians). The "
                "training diverges: lower train.learning_rate"
            )
        if spikes > max(2, 0.02 * len(values)):
            findings.off.append(
                f"gradients of {role} jump: {spikes} of {len(values)} steps are above 10 times the median of the 50 "
                "before. Lower train.learning_rate or train.max_grad_norm, or raise the batch size"
            )


def _watch(run: Remains, findings: Findings) -> None:
    looks = [row for row in run.rows if SCORE in row]
    if "family" not in run.config:  # a decoder is not watched
        return
    if not looks or not run.yardstick:
        findings.notes.append("the collapse monitor was off: set train.validation_steps and train.validation_prompts")
        return
    spread, past = run.yardstick.spread, rules.history(looks, run.yardstick.spread)
    alarms = [name for name in past if rules.alarming(name, past[name], spread[name])]
    findings.off += [rules.sentence(name, past[name], spread[name]) for name in rules.worth_reporting(alarms, past)]
    for name in [name for name in past if name not in alarms]:
        ever = [row["step"] for i, row in enumerate(looks) if rules.alarming(name, past[name][: i + 1], spread[name])]
        if ever:
            findings.notes.append(f"the {rules.title(name)} was off at step {ever[-1]:.0f}, and has recovered")
        ratio = looks[-1][PREFIX + name]
        if rules.outside(past[name])[-1]:
            findings.notes.append(
                f"the {rules.title(name)} is {ratio:.3g} times the teacher's: a second time in a row is off"
            )
        elif abs(past[name][-1]) > rules.BAND:
            findings.notes.append(
                f"the {rules.title(name)} is {ratio:.3g} times the teacher's: still far, but no farther than before"
            )
    findings.notes += [rules.reward_sentence(*pair) for pair in rules.reward_scores(looks).items()]
    if rules.deceived(looks):
        findings.off.append(
            f"the held-out reward fell {rules.FALLS} validations in a row while a trained one rose: the student climbs "
            "what is wrong with it. Use best/, the student that the held-out reward scores highest; hold the "
            "student closer to the few-step model, lower train.learning_rate, or train on several rewards"
        )
    if any(key.startswith(HELD_OUT) for key in looks[-1]):
        return  # best/ is by that
    best = min(looks[1:] or looks, key=lambda row: row[SCORE])
    if looks[-1][SCORE] > best[SCORE] + 1:
        findings.notes.append(
            f"best/, of step {best['step']:.0f}, is {best[SCORE]:.2g} spreads from the teacher on average, the last "
            f"student {looks[-1][SCORE]:.2g}: use best/"
        )


def _compare(run: Remains, curve: Curve, where: Path | None, findings: Findings) -> None:
    """The last quarter of the run beside the same steps of the curve; the last common look at images."""
    end = min(run.rows[-1]["step"], curve.training[-1]["step"])
    for head, factor in ((LOSS, 2.0), (NORM, 4.0)):
        for key, _ in _series(run.rows, head):
            ours, theirs = (
                [row[key] for row in rows if key in row and 0.75 * end < row["step"] <= end]
                for rows in (run.rows, curve.training)
            )
            if not ours or not theirs or min(*ours, *theirs) < 0 or not sum(theirs):
                continue
            ratio = (sum(ours) / len(ours)) / (sum(theirs) / len(theirs))
            if not 1 / factor <= ratio <= factor:
                findings.off.append(
                    f"{key} is {ratio:.2g} times that of {where} at the same steps; another seed differs by less than "
                    f"{factor:g}. Compare the settings with the recipe's"
                )
    facts = run.yardstick.facts if run.yardstick else {}
    keys = ("teacher_sha256", "prompts", "samples", "steps", "guidance_scale")
    if not run.yardstick or any(facts.get(key) != curve.facts.get(key) for key in keys):
        findings.notes.append("images are not compared with the reference's, since prompts or teacher differ")
        return
    theirs = {row["step"]: row for row in curve.watch}
    common = [row for row in run.rows if SCORE in row and row["step"] in theirs]
    for name in run.yardstick.spread if common else ():
        spread = run.yardstick.spread[name]
        row = common[-1]
        mine, usual = row[PREFIX + name], theirs[row["step"]][PREFIX + name]
        if not abs(rules.deviation(mine, spread) - rules.deviation(usual, spread)) <= rules.BAND:
            findings.off.append(
                f"the {rules.title(name)} is {mine:.3g} times the teacher's at step {row['step']:.0f}, and "
                f"{usual:.3g} times in {where}: {rules.meaning(name, mine > usual)}"
            )
