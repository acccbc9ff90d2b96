"""Captioned first frames of the moving drawings, which an image-to-video student of `tiny-wan` is trained with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.files import write_text
from stepdistill.data.bundled import emoji
from stepdistill.data.bundled.moving import motion_prompts, movers, moving_clip


def first_frames(number: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Images (N, 3, 32, 32) uint8 that clips begin with, and their captions: the tables' prompts in turn."""
    pool, source, images, captions = motion_prompts(), emoji.packed_sheet(), [], []
    for i in range(number):
        rng, caption = random.Random(f"first frame {seed} {i}"), pool[i % len(pool)]
        drawing = rng.choice([drawing for drawing in movers() if caption.startswith(drawing.subgroup)])
        motion = caption.removeprefix(f"{drawing.subgroup} ")
        images.append(moving_clip(source, drawing, motion, rng, frames=1)[0])
        captions.append(caption)
    return torch.stack(images), captions


def write_first_frames(folder: Path, number: int = 1024, seed: int = 0) -> None:
    """Write them as `stepdistill.data.ImageFolder` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (image, caption) in enumerate(zip(*first_frames(number, seed), strict=True)):
        name = f"{i:05}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    write_text(folder / "metadata.jsonl", "\n".join(lines))
