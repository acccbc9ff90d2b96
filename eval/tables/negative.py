"""The README's table of negative prompts: how much of a named concept is left in few-step students, and at what cost.

What is taken off from what is a rule about the captions, so that no pair was chosen by its result:

- words: every word that is in at least four names of a subgroup of the tables, and in no more than half of them, with
  the subgroup for a prompt. An image shows the word if the drawing nearest to it in features has it in its name.
- colours: of each heart that is strongly of one hue, its colour, and red of "heart". Shown is the share of pixels that
  are strongly of it.

Beside each stands what another word of the list does, which has nothing to do with the prompt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.data.bundled import emoji
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.families.base import Family
from stepdistill.students.draw.call import PipelineCall, generate, student_call, teacher_call
from stepdistill.students.draw.negative_prompt import negative_prompt
from stepdistill.students.draw.sheet import image_grid
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor
from tables.recipes import recipes, trained

N = 128  # seeds of a cell
TAUGHT = 64  # the teacher's images of a concept
VERSIONS = 12  # images of each drawing that others are compared with
LEAST = 4  # names with the word
EMPTY = {"with", "of", "in", "without", "behind", "on"}  # words that name nothing
HUES = {"red": 355, "yellow": 42, "blue": 205}  # degrees, of the hearts; others are as pale as the grounds, or between
NEAR, CHROMA = 25, 110  # degrees, and of 255: more than the pastel grounds have
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{scale:g}": {"scale": scale} for scale in (0.1, 0.2, 0.5, 1.0)},
    "nag 5": {"scale": 5.0, "mode": "nag"},
}
CONTROLLED = ("0.2", "0.5", "nag 5")
STUDENTS = {  # name: table, config, steps
    "tiny-sd": {"dmd2": ("distribution", "dmd2", 1)},
    "tiny-sd3": {"regression": ("consistency", "regression", 4)},
}
SHOWN = ("0.2", "0.5", "1", "nag 5")  # lines of the image, below the plain one
Shown = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """What is drawn, what is taken off, another word in its place, the concept in full, and the measure of it.

    Args:
        shown: how much of it is in images (n, 3, H, W) uint8 with features (n, D), in [0, 1] each, (n,).
    """

    prompt: str
    word: str
    control: str
    concept: str
    gallery: str
    shown: Shown


def pairs() -> list[Pair]:
    """All of the rule: words, most frequent first, then colours."""
    counts = []
    for group in emoji.prompts():
        names = [drawing.name for drawing in emoji.subjects() if drawing.subgroup == group]
        count = Counter(word for name in names for word in set(name.split()) - EMPTY)
        counts += [(n, group, word) for word, n in count.items() if LEAST <= n <= len(names) / 2]
    words = [(group, word) for _, group, word in sorted(counts, key=lambda each: (-each[0], *each[1:]))]
    pairs = []
    for i, (group, word) in enumerate(words):
        names = (drawing.name for drawing in emoji.subjects() if drawing.subgroup == group)
        name_words = {each for name in names for each in name.split()}
        control = next(other for _, other in (*words[i:], *words) if other not in name_words)
        pairs.append(Pair(group, word, control, word, group, partial(named, group, word)))
    hues = list(HUES)
    for prompt, hue in [("heart", "red"), *((f"{hue} heart", hue) for hue in hues)]:
        control = hues[hues.index(hue) - 1]
        pairs.append(Pair(prompt, hue, control, f"{hue} heart", "heart", partial(coloured, hue)))
    return pairs


@cache
def gallery(prompt: str) -> tuple[Tensor, list[str]]:
    """Features (n, D) and names of `VERSIONS` images of each drawing of a subgroup."""
    rng, source = random.Random(0), emoji.packed_sheet()
    drawings = [each for each in emoji.subjects() if each.subgroup == prompt for _ in range(VERSIONS)]
    pixels = emoji.pixels([emoji.image(source, each, rng) for each in drawings])
    return extractor()((pixels * 127.5 + 127.5).round().to(torch.uint8)), [each.name for each in drawings]


def named(prompt: str, word: str, images: Tensor, features: Tensor) -> Tensor:
    """1 where the nearest drawing of the subgroup has the word in its name."""
    known, names = gallery(prompt)
    nearest = torch.cdist(features, known).argmin(1).tolist()
    return torch.tensor([float(word in names[i].split()) for i in nearest])


def coloured(hue: str, images: Tensor, features: Tensor) -> Tensor:
    """Share of the pixels that are strongly of a hue."""
    red, green, blue = images.float().unbind(1)
    chroma = images.amax(1).float() - images.amin(1).float()
    angle = torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))
    off = (angle - HUES[hue] + 180) % 360 - 180
    return ((chroma > CHROMA) & (off.abs() < NEAR)).float().mean((1, 2))


def measure_negative(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Draw each student's images of a prompt with a word of it, or one of others, for a negative prompt."""
    for label, (table, method, steps) in STUDENTS[name].items():
        if rows and label not in rows:
            continue
        file = recipes(name, table)[method]
        run, out = load_config(Run, file, []), trained(file)
        teacher, pipe = run.family.load(), run.family.load()
        row = student_call(run.family, run.method, pipe, steps)
        load_student(pipe, out)
        pipe.fuse_lora()  # pyright: ignore[reportAttributeAccessIssue]
        facts = {"teacher": name, "student": label, "config": config_digest(run), "steps": steps, "n": N}
        for pair in pairs():
            pair_facts = {**facts, "prompt": pair.prompt, "negative": pair.word, "control": pair.control}
            make = partial(suppressed, run, teacher, pipe, row, pair)
            results.once(f"{name}/{label}/{pair.prompt}: {pair.word}", make, **pair_facts)
        if label == "dmd2":
            show(run.family, pipe, row, results.file.with_suffix(".png"))


def suppressed(
    run: Run, teacher: DiffusionPipeline, pipe: DiffusionPipeline, row: PipelineCall, pair: Pair
) -> dict[str, Any]:
    """How much is shown of the concept, by setting; how far images are from the teacher's of it and from drawings.

    `moved` is the distance in features from the same seed without a negative prompt, over what did not show it.
    """
    w, steps = run.teacher_guidance_scale, run.train.teacher_steps
    full = teacher_call(run.family, teacher, steps, w, "teacher")
    concept = extractor()(generate(teacher, full, [pair.concept] * TAUGHT, SEED_A)[0])
    images, plain = drawn(run.family, pipe, row, pair.prompt, "", {})
    start = extractor()(images)
    rest = pair.shown(images, start) < 0.05

    def cell(images: Tensor, cost: Cost) -> dict[str, float]:
        features = extractor()(images)
        near = {"to_teacher": concept, "to_drawings": gallery(pair.gallery)[0]}
        distances = {key: torch.cdist(features, known).min(1).values.mean().item() for key, known in near.items()}
        distances |= {"moved": (features - start)[rest].norm(dim=1).mean().item()} if rest.any() else {}
        return {"shown": pair.shown(images, features).mean().item(), **distances, "seconds_per_image": cost.seconds / N}

    draw = partial(drawn, run.family, pipe, row, pair.prompt)
    settings = {"0": cell(images, plain)} | {key: cell(*draw(pair.word, how)) for key, how in SETTINGS.items()}
    control = {key: cell(*draw(pair.control, SETTINGS[key])) for key in CONTROLLED}
    return {"seeds": [SEED_B], "taught": TAUGHT, "rest": int(rest.sum()), "settings": settings, "other": control}


def drawn(
    family: Family,
    pipe: DiffusionPipeline,
    row: PipelineCall,
    prompt: str,
    text: str,
    how: Mapping[str, Any],
    n: int = N,
) -> tuple[Tensor, Cost]:
    """Images (n, 3, H, W) uint8 of a prompt by the first n seeds, and their cost; plain where `how` is empty."""
    context = negative_prompt(pipe, text, family=family, **how) if how else nullcontext()
    with context:
        return generate(pipe, row, [prompt] * n, SEED_B)


def show(family: Family, pipe: DiffusionPipeline, row: PipelineCall, file: Path) -> None:
    """An image: of each prompt's first word the two seeds of 64 that show most of it, and the one that shows least."""
    firsts = list({pair.prompt: pair for pair in reversed(pairs())}.values())
    firsts = [pair for pair in reversed(firsts) if pair.prompt in emoji.prompts()]
    columns: list[str] = []
    lines: dict[str, list[Tensor]] = {key: [] for key in ("0", *SHOWN)}
    for pair in firsts:
        images = drawn(family, pipe, row, pair.prompt, "", {}, 64)[0]
        order = pair.shown(images, extractor()(images)).argsort(descending=True, stable=True)
        seeds = order[[0, 1, -1]]
        columns += [f"{pair.prompt}, not {pair.word}"] * len(seeds)
        lines["0"] += list(images[seeds])
        for key in SHOWN:
            lines[key] += list(drawn(family, pipe, row, pair.prompt, pair.word, SETTINGS[key], 64)[0][seeds])
    labels = {key: key if key.startswith("nag") else f"scale {key}" for key in lines}
    image_grid([(labels[key], torch.stack(cells)) for key, cells in lines.items()], columns, 2).save(file)
