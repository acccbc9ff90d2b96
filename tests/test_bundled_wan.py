"""The bundled video teacher itself."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from PIL import Image

from stepdistill.data.bundled import bundled, emoji, moving, video_autoencoder


def test_the_bundled_teacher_is_small_and_its_autoencoder_keeps_every_frame_alike() -> None:
    folder = bundled("tiny-wan")
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 12 * 2**20
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    decibels = video_autoencoder.psnr(vae, video_autoencoder.draw(emoji.packed_sheet(), random.Random("unseen"), 48))
    assert min(decibels) > 21.5 and max(decibels) - min(decibels) < 0.5


def test_the_bundled_teacher_moves_what_a_first_frame_shows_where_a_caption_says() -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(bundled("tiny-wan"))
    pipe.set_progress_bar_config(disable=True)
    source, drawing, moved = emoji.packed_sheet(), moving.movers()[21], {}
    for motion in ("moving left", "moving right"):
        first = moving.moving_clip(source, drawing, motion, random.Random(3), 1)[0]
        states, none = pipe.encode_prompt(f"{drawing.name} {motion}", "", max_sequence_length=16)
        call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 8, "guidance_scale": 2.0}
        call |= {"prompt_embeds": states, "negative_prompt_embeds": none, "output_type": "pt", "return_dict": False}
        image = Image.fromarray(first.permute(1, 2, 0).numpy())
        video = pipe(image, num_videos_per_prompt=4, generator=torch.Generator().manual_seed(0), **call)[0]
        moved[motion] = moving.displacement((video * 255).byte())[:, 0].mean().item()
    assert moved["moving left"] < -3 and moved["moving right"] > 3
