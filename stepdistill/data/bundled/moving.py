"""The embedded drawings that move: captioned clips, many per prompt.

A caption says what is drawn and how it moves. What it does not say varies: ground, mirroring, place, speed, size, the
sense of a spin. A motion may go on beyond its clip, so that a window may begin where another one ended: what leaves
the canvas on one side enters on the other. There is no mirroring of a whole clip: "moving left" would lie.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.data.bundled import emoji

SIZE = 32  # pixels of a frame's side
DRAWN = 20  # pixels of a drawing's side, where it does not grow or shrink
SMALL, LARGE = 12, (24, 30)  # pixels of its side before it grows, and after
MARGIN = 8  # pixels of the sheet around a drawing, more than one of the canvas has
FRAMES = 9  # of a clip; a motion's way is covered in `FRAMES - 1` steps
HEADINGS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*HEADINGS, "growing", "shrinking", "spinning", "still")
GROUPS = ("animal mammal", "food fruit", "face smiling", "transport ground")
DRAWINGS = 12  # of each group


def movers() -> list[emoji.Drawing]:
    """The drawings that move, `DRAWINGS` of each group, spread over it."""
    drawn = emoji.drawings()
    groups = [[drawing for drawing in drawn if drawing.subgroup == name] for name in GROUPS]
    return [drawing for group in groups for drawing in group[:: len(group) // DRAWINGS][:DRAWINGS]]


@dataclass(frozen=True)
class Course:
    """Where a drawing is at each time: what a caption leaves open, drawn once for a clip."""

    motion: str
    place: tuple[float, float]  # of its upper left corner at time 0, in pixels
    speed: float  # pixels a clip
    turn: int  # degrees a clip
    large: int  # pixels of its side after it grew

    def at(self, time: float) -> tuple[float, float, float, float]:
        """Left, top and side in pixels, and the angle in degrees, at `time` in clips (1: the clip's last frame)."""
        left, top, side = *self.place, float(DRAWN)
        if self.motion in HEADINGS:
            dx, dy = HEADINGS[self.motion]
            return left + dx * self.speed * time, top + dy * self.speed * time, side, 0.0
        if self.motion in ("growing", "shrinking"):
            share = min(time, 1.0) if self.motion == "growing" else max(1 - time, 0.0)
            side = SMALL + (self.large - SMALL) * share
            return (SIZE - side) / 2, (SIZE - side) / 2, side, 0.0
        return left, top, side, self.turn * time if self.motion == "spinning" else 0.0


def course(motion: str, rng: random.Random) -> Course:
    """A course of `motion`: few discrete choices, because a small network blurs a continuum of them."""
    free = SIZE - DRAWN
    place = [float(rng.choice((0, free // 2, free))) for _ in range(2)]
    for axis, heading in enumerate(HEADINGS.get(motion, (0, 0))):
        if heading:  # the clip begins at the side that leaves it room
            place[axis] = 0.0 if heading > 0 else float(free)
    turn = rng.choice((-1, 1)) * rng.choice((90, 180))
    return Course(motion, (place[0], place[1]), rng.choice((0.5, 1.0)) * free, turn, rng.choice(LARGE))


def moving_clip(
    source: Image.Image, drawing: emoji.Drawing, motion: str, rng: random.Random, frames: int = FRAMES, start: int = 0
) -> Tensor:
    """A clip, uint8 (F, 3, 32, 32), of `drawing` in the sheet `source`, from the motion's frame `start` on."""
    left, top = drawing.index % emoji.COLUMNS * emoji.SIDE, drawing.index // emoji.COLUMNS * emoji.SIDE
    drawn = source.crop((left, top, left + emoji.SIDE, top + emoji.SIDE)).convert("RGBa")
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ground = np.array(rng.choice(emoji.GROUNDS), dtype=np.float32)
    way = course(motion, rng)
    rows = [frame(drawn, ground, *way.at((start + f) / (FRAMES - 1))) for f in range(frames)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def frame(drawn: Image.Image, ground: np.ndarray, left: float, top: float, side: float, angle: float) -> np.ndarray:
    """One frame, uint8 (32, 32, 3): `drawn` at a place between pixels, on a canvas whose opposite sides meet."""
    wide = Image.new("RGBa", (3 * emoji.SIDE, 3 * emoji.SIDE))  # as wide as the canvas where the drawing is smallest
    wide.paste(drawn.rotate(angle, Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    scale = emoji.SIDE / side
    # the canvas, moved by the part of the place that is below a pixel; the whole pixels are rolled
    x, y = MARGIN - left % 1 * scale, MARGIN - top % 1 * scale
    box = (x, y, x + SIZE * scale, y + SIZE * scale)
    layer = np.asarray(wide.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box), dtype=np.float32)
    layer = np.roll(layer, (int(top // 1), int(left // 1)), (0, 1))
    return np.clip(layer[..., :3] + ground * (1 - layer[..., 3:] / 255), 0, 255).round().astype(np.uint8)


def motion_caption(drawing: emoji.Drawing, motion: str, rng: random.Random) -> str:
    """A caption of the drawing as an image has it, and the motion (9 in 10)."""
    words = emoji.caption(drawing, rng)
    return f"{words} {motion}" if rng.random() < 0.9 else words


def motion_texts() -> list[str]:
    """Texts for the tokenizer: every drawing's name, subgroup and motion."""
    return [f"{drawing.name} {drawing.subgroup} {motion}" for drawing in movers() for motion in MOTIONS]


def motion_prompts() -> list[str]:
    """The prompts of the tables, `<subgroup> <motion>`, grouped by subgroup."""
    return [f"{group} {motion}" for group in GROUPS for motion in MOTIONS]


def clip_pixels(clips: Tensor) -> Tensor:
    """Clips, uint8 (N, F, 3, H, W), as a video (N, 3, F, H, W) in [-1, 1]."""
    return clips.transpose(1, 2).float() / 127.5 - 1


def displacement(clips: Tensor) -> Tensor:
    """How far the drawing of each clip, uint8 (N, F, 3, H, W), has moved and grown: (N, 3).

    Right and down in pixels, and the last frame's area over the first one's. A place is the phase of the mass along an
    axis, since opposite sides meet; what is far from the median colour of a frame's edge is a drawing.
    """
    pixels = clips.float()
    edge = torch.cat([pixels[..., [0, -1], :].flatten(-2), pixels[..., [0, -1]].flatten(-2)], -1)
    ground = edge.median(-1).values[..., None, None]
    mask = ((pixels - ground).abs().mean(2) > 20).float()
    columns = []
    for mass in (mask.sum(-2), mask.sum(-1)):  # along x, along y
        turns = torch.polar(torch.ones(mass.shape[-1]), torch.arange(mass.shape[-1]) * 2 * torch.pi / mass.shape[-1])
        phase = (mass * turns).sum(-1)
        steps = (phase[:, 1:] * phase[:, :-1].conj()).angle() * mass.shape[-1] / (2 * torch.pi)
        columns.append(steps.sum(1))
    area = mask.sum((-2, -1))
    return torch.stack([*columns, area[:, -1] / area[:, 0].clamp(min=1)], 1)
