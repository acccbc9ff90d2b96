"""The README's table of negative prompts: how much of a named concept is left in few-step students, and at what cost.

Which words are taken off is a rule about the captions, so that no pair was chosen by its result: every word that is in
at least four names of a subgroup of the tables, and in no more than half of them. What a picture shows is said by the
drawing that is nearest to it in features, and so is how clean it is.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill import config, student
from stepdistill.evaluate import SEED_B, Row, generate, grid, student_row
from stepdistill.families.base import Family
from stepdistill.guidance import negative
from stepdistill.metrics.cost import Cost
from stepdistill.run import Run
from stepdistill.tiny import emoji
from stepdistill.tiny.benchmark import Results, extractor
from stepdistill.tiny.recipes import recipes, trained

N = 256  # seeds of a cell
VERSIONS = 12  # pictures of each drawing that others are compared with
LEAST = 4  # names with the word
EMPTY = {"with", "of", "in", "without", "behind", "on"}  # words that name nothing
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{scale:g}": {"scale": scale} for scale in (0.0, 0.1, 0.2, 0.5, 1.0)},
    "nag 5": {"scale": 5.0, "mode": "nag"},
}
STUDENTS = {  # name: table, config, steps
    "tiny-sd": {"dmd2": ("distribution", "dmd2", 1), "lcm": ("consistency", "lcm", 4)},
    "tiny-sd3": {"regression": ("consistency", "regression", 4)},
}
SHOWN = ("0", "0.2", "0.5", "1", "nag 5")  # lines of the picture
REDNESS = 64  # of 255, by which red exceeds green and blue


def pairs() -> list[tuple[str, str]]:
    """(prompt, word) of the rule, most frequent first."""
    found = []
    for group in emoji.prompts():
        names = [drawing.name for drawing in emoji.subjects() if drawing.subgroup == group]
        count = Counter(word for name in names for word in set(name.split()) - EMPTY)
        found += [(n, group, word) for word, n in count.items() if LEAST <= n <= len(names) / 2]
    return [(group, word) for _, group, word in sorted(found, key=lambda each: (-each[0], *each[1:]))]


def control_of(prompt: str, word: str) -> str:
    """The next word of the list that no name of the prompt has: what any negative prompt does."""
    words, at = [each for _, each in pairs()], pairs().index((prompt, word))
    own = {each for drawing in emoji.subjects() if drawing.subgroup == prompt for each in drawing.name.split()}
    return next(other for other in (*words[at:], *words) if other not in own)


@cache
def gallery(prompt: str, seed: int) -> tuple[Tensor, list[str]]:
    """Features (n, D) and names of `VERSIONS` pictures of each drawing of a prompt."""
    rng, source = random.Random(seed), emoji.sheet()
    drawn = [each for each in emoji.subjects() if each.subgroup == prompt for _ in range(VERSIONS)]
    made = emoji.pixels([emoji.picture(source, each, rng) for each in drawn])
    return extractor()((made * 127.5 + 127.5).round().to(torch.uint8)), [each.name for each in drawn]


def shows(features: Tensor, prompt: str, word: str) -> tuple[Tensor, Tensor]:
    """Whether the drawing nearest to each picture (n, D) has the word in its name, and its distance, (n,) both."""
    known, names = gallery(prompt, 0)
    distance, nearest = torch.cdist(features, known).min(1)
    return torch.tensor([word in names[i].split() for i in nearest.tolist()]), distance


def redness(images: Tensor) -> float:
    """Share of red pixels of pictures (n, 3, H, W) uint8."""
    red, green, blue = images.int().unbind(1)
    return (red - torch.maximum(green, blue) > REDNESS).float().mean().item()


def measure_negative(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Draw each student's pictures of a prompt with a word of its drawings, or one of others, as negative prompt."""
    for label, (table, method, steps) in STUDENTS[name].items():
        if rows and label not in rows:
            continue
        file = recipes(name, table)[method]
        run, out = config.load(Run, file, []), trained(file)
        pipe = run.family.load()
        row = student_row(run.family, run.method, pipe, steps)
        student.load_student(pipe, out)
        pipe.fuse_lora()  # pyright: ignore[reportAttributeAccessIssue]
        facts = {"teacher": name, "student": label, "config": config.digest(run), "steps": steps, "n": N}
        for prompt, word in pairs():
            own = {**facts, "prompt": prompt, "negative": word, "control": control_of(prompt, word)}
            made = partial(suppressed, run.family, pipe, row, prompt, word)
            results.once(f"{name}/{label}/{prompt}: {word}", made, **own)
        results.once(f"{name}/{label}/heart: red", partial(reddened, run.family, pipe, row), **facts)
        if label == "dmd2":
            show(run.family, pipe, row, results.file.with_suffix(".png"))


def drawn(
    family: Family, pipe: DiffusionPipeline, row: Row, prompt: str, text: str, how: Mapping[str, Any], n: int = N
) -> tuple[Tensor, Cost]:
    """Pictures (n, 3, H, W) uint8 of a prompt by the first n seeds, and their cost; plain where `how` is empty."""
    context = negative(pipe, text, family=family, **how) if how else nullcontext()
    with context:
        return generate(pipe, row, [prompt] * n, SEED_B)


def suppressed(family: Family, pipe: DiffusionPipeline, row: Row, prompt: str, word: str) -> dict[str, Any]:
    """Share of pictures that show the word, by setting, and what becomes of those that do not show it anyway."""
    fresh, names = gallery(prompt, 1)
    truth = torch.tensor([word in name.split() for name in names])
    told = (shows(fresh, prompt, word)[0] == truth).float().mean().item()
    images, cost = drawn(family, pipe, row, prompt, word, {})
    start = extractor()(images)
    rest = ~shows(start, prompt, word)[0]
    found: dict[str, Any] = {"seeds": [SEED_B], "right_on_drawings": told, "rest": int(rest.sum())}
    found |= {"plain_seconds_per_image": cost.seconds / N, "settings": {}}
    for key, how in SETTINGS.items():
        cells = {}
        for kind, text in (("", word), ("control_", control_of(prompt, word))):
            images, cost = drawn(family, pipe, row, prompt, text, how)
            features = extractor()(images)
            has, distance = shows(features, prompt, word)
            cells[f"{kind}share"] = has.float().mean().item()
            cells[f"{kind}to_drawings"] = distance.mean().item()
            cells[f"{kind}moved"] = (features - start)[rest].norm(dim=1).mean().item()
        found["settings"][key] = cells | {"seconds_per_image": cost.seconds / N}
    return found


def reddened(family: Family, pipe: DiffusionPipeline, row: Row) -> dict[str, Any]:
    """Share of red pixels of hearts, with "red" and with "green" as negative prompt."""
    settings = {
        key: {
            f"{kind}share": redness(drawn(family, pipe, row, "heart", text, how)[0])
            for kind, text in (("", "red"), ("control_", "green"))
        }
        for key, how in SETTINGS.items()
    }
    return {"seeds": [SEED_B], "prompt": "heart", "negative": "red", "control": "green", "settings": settings}


def show(family: Family, pipe: DiffusionPipeline, row: Row, file: Path) -> None:
    """A picture: of the first word of each prompt the first two seeds that show it, and the first that does not."""
    firsts = {prompt: word for prompt, word in reversed(pairs())}
    columns: list[str] = []
    lines: dict[str, list[Tensor]] = {key: [] for key in SHOWN}
    for prompt, word in reversed(firsts.items()):
        images = drawn(family, pipe, row, prompt, word, {}, 64)[0]
        has = shows(extractor()(images), prompt, word)[0]
        seeds = [*has.nonzero().flatten()[:2].tolist(), *(~has).nonzero().flatten()[:1].tolist()]
        columns += [f"{prompt}, not {word}"] * len(seeds)
        for key in SHOWN:
            lines[key] += list(drawn(family, pipe, row, prompt, word, SETTINGS[key], 64)[0][seeds])
    labels = {key: key if key.startswith("nag") else f"scale {key}" for key in SHOWN}
    grid([(labels[key], torch.stack(made)) for key, made in lines.items()], columns, 2).save(file)
