"""What a video teacher has learnt of each motion: `python train/motion.py FOLDER` prints it beside the data.

The autoencoder comes first: PSNR of each frame, over clips that it was not trained on. Then a row is a motion: pixels
moved to the right and down, growth of the area, mean difference of neighbouring frames, each a mean over the clips of
all groups. The sheet of the clips is written beside the folder.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from stepdistill.data.bundled import emoji, moving
from stepdistill.data.bundled.video_autoencoder import draw, psnr

CALL = {
    "height": moving.SIZE,
    "width": moving.SIZE,
    "max_sequence_length": 16,
    "output_type": "np",
    "return_dict": False,
}


def data(number: int) -> torch.Tensor:
    """`number` clips of each of the tables' prompts, uint8 (N, F, 3, H, W)."""
    source, rows = emoji.packed_sheet(), []
    for prompt in moving.motion_prompts():
        for k in range(number):
            rng = random.Random(f"{prompt} {k}")
            drawing = rng.choice([d for d in moving.movers() if prompt.startswith(d.subgroup)])
            rows.append(moving.moving_clip(source, drawing, prompt.removeprefix(drawing.subgroup + " "), rng))
    return torch.stack(rows)


def frames(video: np.ndarray) -> torch.Tensor:
    """A pipeline's frames (N, F, H, W, 3) in [0, 1] as uint8 (N, F, 3, H, W)."""
    return torch.from_numpy((video * 255).round().astype(np.uint8)).permute(0, 1, 4, 2, 3)


def from_text(pipe: WanPipeline, number: int, steps: int, scale: float, seed: int) -> torch.Tensor:
    """`number` clips of each prompt."""
    prompts = [prompt for prompt in moving.motion_prompts() for _ in range(number)]
    generator, parts = torch.Generator().manual_seed(seed), []
    for part in range(0, len(prompts), 32):
        call = CALL | {"num_frames": moving.FRAMES, "num_inference_steps": steps, "guidance_scale": scale}
        parts.append(frames(pipe(prompts[part : part + 32], generator=generator, **call)[0]))
    return torch.cat(parts)


def from_image(pipe: WanImageToVideoPipeline, clips: torch.Tensor, steps: int, scale: float, seed: int) -> torch.Tensor:
    """A clip for the first frame of each of `clips`, made of the tables' prompts: the pipeline takes one at a time."""
    number = len(clips) // len(moving.motion_prompts())
    generator, parts = torch.Generator().manual_seed(seed), []
    for i, clip in enumerate(clips):
        states, none = pipe.encode_prompt(moving.motion_prompts()[i // number], "", max_sequence_length=16)
        call = CALL | {"num_frames": moving.FRAMES, "num_inference_steps": steps, "guidance_scale": scale}
        call |= {"prompt_embeds": states, "negative_prompt_embeds": none, "generator": generator}
        parts.append(frames(pipe(Image.fromarray(clip[0].permute(1, 2, 0).numpy()), **call)[0]))
    return torch.cat(parts)


def report(title: str, clips: torch.Tensor) -> None:
    """Print the table of one set of clips, in the order of the prompts."""
    moved, change = moving.displacement(clips), (clips[:, 1:].float() - clips[:, :-1].float()).abs().mean((1, 2, 3, 4))
    number = len(clips) // len(moving.motion_prompts())
    print(f"\n{title}\n{'':14}{'right':>8}{'down':>8}{'area x':>8}{'change':>8}")
    for k, motion in enumerate(moving.MOTIONS):
        rows = [i for i in range(len(clips)) if i // number % len(moving.MOTIONS) == k]
        x, y, area = moved[rows].mean(0).tolist()
        print(f"{motion:14}{x:8.1f}{y:8.1f}{area:8.2f}{change[rows].mean().item():8.2f}")
    print(f"change, all: {change.mean().item():.2f}", flush=True)


def sheet(clips: torch.Tensor, file: Path) -> None:
    """A row for each clip, a column for each frame."""
    rows = torch.cat([torch.cat(list(clip), -1) for clip in clips], -2).permute(1, 2, 0).numpy()
    Image.fromarray(rows).resize((2 * rows.shape[1], 2 * rows.shape[0]), Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=2, help="clips of each prompt")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 4])
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="with an image: half of the way to 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text, image = WanPipeline.from_pretrained(args.folder), WanImageToVideoPipeline.from_pretrained(args.folder)
    for pipe in (text, image):
        pipe.set_progress_bar_config(disable=True)
    true = data(args.num)
    print("autoencoder, dB of each frame:", psnr(text.vae, draw(emoji.packed_sheet(), random.Random("unseen"), 256)))
    report("data", true)
    for steps in args.steps:
        made = from_text(text, args.num, steps, args.guidance_scale, args.seed)
        report(f"from text, {steps} steps", made)
        sheet(made[:: args.num], args.folder.with_name(f"{args.folder.name}-text-{steps}.png"))
        made = from_image(image, true, steps, (1 + args.guidance_scale) / 2, args.seed)
        report(f"from the first frame, {steps} steps", made)
        sheet(made[:: args.num], args.folder.with_name(f"{args.folder.name}-image-{steps}.png"))
