"""The text of a report: what was measured, the best student, and notes on reading the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepdistill.evaluation.report.fields import TITLES, UNKNOWN, ComparisonKey
from stepdistill.evaluation.report.table import Evaluation, Row, digits, key_differences, number

SHARED = {
    "teacher": "The teachers differ: excess and speed-up are relative to the teacher of each row's own evaluation.",
    "prompts": "The prompts differ: part of any difference between the rows is due to the prompts.",
    "host": "The evaluations ran on different hosts: their times are not comparable.",
}
READING = {
    "excess": "Excess is the distance of a row minus the distance of the teacher with the same prompts and seeds. Its "
    "interval is a 20-block jackknife of the difference, in which errors that both share cancel: compare excess rather "
    "than distances.",
    "diversity_vs_teacher": "Diversity / teacher's is the mean distance between features of images of one prompt, over "
    "the teacher's. 1 is the teacher's variety among images of one prompt. Below it they are more alike. Without "
    "brackets some prompt has too few images for an interval.",
    "distance_low": "Brackets are 95 % intervals.",
    "motion": "The fd of motion is on the differences of adjacent frames, averaged over a clip; that of frames is on "
    "one frame a clip, and cannot see a clip that is frozen, slow or shuffled.",
    "by_motion_excess": "Excess by motion compares the clips of each motion alone and averages over motions: only it "
    "sees clips that run backwards.",
    "motion_ratio": "Motion / teacher's is the mean change from frame to frame over the teacher's. Below 0.5 the clips "
    "are nearly static.",
    "consistency": "Frame consistency is the mean cosine of CLIP's embeddings of adjacent frames. It is 1 for a "
    "frozen clip.",
    "image_distance": "Distance of frame 1 is the mean absolute difference, in grey levels, of the first new frame "
    "from the image that the clip continues.",
    "kid_std": "The ± below KID is the standard deviation over its subsets.",
    "clip_stderr": "The ± below a CLIP score is its standard error. The plot shows 1.96 standard errors.",
    "log_likelihood": "Log-likelihood per token is the mean of log p in nats over an image's tokens, each given the "
    "prompt and the tokens before it, with the teacher's guidance and temperature. A student aims at the teacher's. "
    "A higher one is a sign of samples that vary less.",
    "nfe": "NFE is the number of network evaluations per image. A step with guidance takes two.",
    "speedup_vs_teacher": "Speed-up is the teacher's seconds per image divided by the row's.",
}
TEACHER = ("{id}", "{steps} steps", "guidance {guidance}", "temperature {temperature}", "top-k {top_k}", "{scheduler}")


def about(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """What was measured: labels, each with a text for every evaluation."""
    each = [_facts(one.facts) for one in evaluations]
    return [(label, [facts[label] for facts in each]) for label in each[0]]


def summary(key: ComparisonKey, rows: Iterable[Row]) -> str:
    """A few sentences on the best student of a comparison key's rows, and how far it is from its teacher."""
    title = TITLES[key.key]
    measured = [row for row in rows if row and row["distance"] is not None]
    students = [row for row in measured if row["role"] == "student"]
    if not measured:
        return ""
    best = min(students or measured, key=lambda row: row["distance"])
    kind = "student" if students else "row"
    among = f"Lowest {title} of {len(students or measured)} {kind}{'s' * (len(students or measured) > 1)}"
    text = f"{among} (N {key.n}, features {key.features_id}): {best['name']}, {_with_interval(best, 'distance')}"
    if best["nfe"] is not None:
        text += f" in {best['nfe']:g} network evaluation{'s' * (best['nfe'] != 1)} per image"
    parts = [text, *([_excess(best), _variety(best), _speed(best)] if students else [])]
    if best["comparable"] is False:
        parts.append("It is not comparable with published values; see the notes")
    return ". ".join(filter(None, parts)) + "."


def notes(evaluations: Sequence[Evaluation], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Why values are not comparable, and how the numbers are to be read."""
    against = [f"Rows are in separate columns because they differ in {text}." for text in key_differences(evaluations)]
    for key, text in SHARED.items():
        if any(one.facts.get(key) != evaluations[0].facts.get(key) for one in evaluations):
            against.append(text)
    for one in evaluations:
        protocol = one.facts.get("protocol") or {}
        for trusted in protocol.get("trusted") or []:
            against.append(f"{one.name} assumes, without a check, {trusted}.")
        for deviation in protocol.get("deviations") or []:
            against.append(f"{one.name} deviates from the protocol {protocol.get('name')}: {deviation}.")
        if one.facts.get("exit_reason") != "ok":
            against.append(f"{one.name} stopped early ({one.facts.get('exit_reason')}): rows may be missing.")
    reasons: dict[str, list[int]] = {}
    for place, row in enumerate(rows, start=1):
        if row["comparable"] is False:
            for reason in str(row["comparable_reasons"] or "no reason was recorded").split("; "):
                reasons.setdefault(reason, []).append(place)
        if row["n_skipped"]:
            reasons.setdefault(f"{row['n_skipped']} images were skipped", []).append(place)
    against += [f"{_places(places)}: {reason}." for reason, places in reasons.items()]
    return against, [text for key, text in READING.items() if any(row[key] is not None for row in rows)]


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    protocol = facts.get("protocol") or {}
    met = ", met" if protocol.get("met") else ", not met: " + ("; ".join(protocol.get("deviations") or []) or UNKNOWN)
    tools = [f"{name} {version}" for name, version in (facts.get("tool") or {}).items()]
    return {
        "Teacher": _listed(facts, "teacher", *TEACHER),
        "Prompts": _listed(facts, "prompts", "{source}", "N {n}", "sha256 {sha256:.12}"),
        "Reference": _listed(facts, "reference", "{kind}", "{path}", "N {n}", "sha256 {sha256:.12}"),
        "Features": _listed(facts, "features", "{id}", "{dim} dimensions"),
        "Images per row (N)": _values(facts, "n"),
        "Seed": _values(facts, "seed"),
        "Protocol": "none" if protocol.get("name") == "none" else f"{protocol.get('name', UNKNOWN)}{met}",
        "Host": _listed(facts, "host", "{device}", "world size {world_size}"),
        "Created": ", ".join([str(facts.get("created", UNKNOWN)), *tools]),
    }


def _listed(facts: Mapping[str, Any], key: str, *parts: str) -> str:
    """The parts of a fact that are known."""
    known = {name: value for name, value in (facts.get(key) or {}).items() if value is not None}
    texts = []
    for part in parts:
        try:
            texts.append(part.format_map(known))
        except KeyError:
            continue
    return ", ".join(texts) or "none"


def _values(facts: Mapping[str, Any], key: str) -> str:
    return ", ".join(dict.fromkeys(str(row[key]) for row in facts["rows"] if row.get(key) is not None)) or "none"


def _with_interval(row: Row, key: str) -> str:
    values = [row[key], row[f"{key}_low"], row[f"{key}_high"]]
    value, low, high = (number(one, digits(values)) for one in values)
    return value if None in values else f"{value} [{low}, {high}]"


def _excess(row: Row) -> str:
    """Where a student stands beside its teacher; near it only where the interval of the difference says so."""
    if row["excess"] is None:
        return "No teacher was measured in the same evaluation"
    value, low, high = _with_interval(row, "excess"), row["excess_low"], row["excess_high"]
    if low is None or high is None:
        return f"Its excess over the teacher is {value}, without an interval: the difference may be chance"
    if low <= 0 <= high:
        return f"Its excess over the teacher, {value}, is not distinguishable from zero"
    if low > 0:
        return f"Its excess over the teacher is {value}: it is farther from the reference than the teacher"
    return f"Its excess over the teacher is {value}: it is closer to the reference than the teacher"


def _variety(row: Row) -> str:
    if row["diversity_vs_teacher"] is None:
        return ""
    return f"Its images of one prompt vary {_with_interval(row, 'diversity_vs_teacher')} times as much as the teacher's"


def _speed(row: Row) -> str:
    ratio = row["speedup_vs_teacher"]
    return "" if ratio is None else f"Its speed is {number(ratio, digits([ratio]))} times the teacher's"


def _places(places: Sequence[int]) -> str:
    return f"Row{'s' * (len(places) > 1)} {', '.join(map(str, places))}"
