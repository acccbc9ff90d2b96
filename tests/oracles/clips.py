"""Moving drawings as uint8 clips, and the same clips broken."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.data.bundled import emoji

MOTIONS = ("left", "right", "up", "down")
FRAMES = 5


@cache
def sprites() -> list[Image.Image]:
    """Some drawings, 20 pixels a side."""
    sheet = emoji.packed_sheet()
    drawn = [drawing for drawing in emoji.subjects() if drawing.subgroup in ("animal mammal", "food fruit")]
    places = [(d.index % emoji.COLUMNS * emoji.SIDE, d.index // emoji.COLUMNS * emoji.SIDE) for d in drawn]
    cut = [sheet.crop((x, y, x + emoji.SIDE, y + emoji.SIDE)).convert("RGBa") for x, y in places]
    return [sprite.resize((20, 20), Image.Resampling.LANCZOS).convert("RGBA") for sprite in cut]


def moving(n: int, seed: int, frames: int = FRAMES) -> Tensor:
    """Clips (n, frames, 3, 32, 32) of drawings that move by 6 or 12 pixels, motion i of `MOTIONS` in turn."""
    rng, clips = random.Random(seed), []
    for i in range(n):
        sprite, ground = rng.choice(sprites()), rng.choice(emoji.GROUNDS)
        still, reach, clip = rng.choice((0, 6, 12)), rng.choice((6, 12)), []
        for f in range(frames):
            way = round(reach * f / (frames - 1))
            back = 12 - reach + way  # so that "right" is "left" reversed
            place = {"left": (12 - way, still), "right": (back, still), "up": (still, 12 - way), "down": (still, back)}
            canvas = Image.new("RGB", (32, 32), ground)
            canvas.paste(sprite, place[MOTIONS[i % len(MOTIONS)]], sprite)
            clip.append(np.asarray(canvas))
        clips.append(np.stack(clip))
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).contiguous()


def frozen(clips: Tensor) -> Tensor:
    """The first frame of each clip for ever."""
    return clips[:, :1].expand_as(clips).contiguous()


def slowed(clips: Tensor) -> Tensor:
    """Half as fast, each frame twice."""
    return clips[:, [f // 2 for f in range(clips.shape[1])]]
