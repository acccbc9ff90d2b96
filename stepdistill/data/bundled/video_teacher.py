"""What the video teacher learns from: an autoencoder, latents of moving drawings, a loss on text, image and clip.

One network with a time of its own for each token learns three tasks: a clip from text, an image (a clip of one frame)
from text, and the rest of a clip from its first latent frames, which are clean and told the time 0, as Wan 2.2 TI2V has
its first one. A held beginning of several latent frames lets a window go on where another one ended, with its motion.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.data.bundled import build, moving
from stepdistill.data.bundled.emoji import packed_sheet
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.data.bundled.video_autoencoder import train_video_autoencoder

STARTS = 2  # halves of the clips: from the motion's first frame, and from any later one
IMAGE_SHARE, TEXT_SHARE = 0.1, 0.5  # of the batches; the others hold a beginning
LONGER_SHARE = 0.4  # of the batches that hold a beginning, with more than its first latent frame


@torch.no_grad()
def encode_clips(spec: TeacherSpec, vae: AutoencoderKLWan, file: Path) -> Tensor:
    """Latents (2, drawings, motions, clips, C, F', h, w) in half precision, as the pipeline's own scale has them.

    The first half are clips from their motion's first frame, the second half go on from a later one.
    """
    if file.exists():
        return torch.load(file, weights_only=True)
    source, drawn = packed_sheet(), moving.movers()
    mean, std = (torch.tensor(vae.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    rows = []
    for start in tqdm([s for s in range(STARTS) for _ in drawn], desc="encode", mininterval=5):
        drawing, rng = drawn[len(rows) % len(drawn)], random.Random(f"{spec.seed} {len(rows)} clips")
        clips = [
            moving.moving_clip(source, drawing, motion, rng, start=start and rng.randrange(moving.FRAMES))
            for motion in moving.MOTIONS
            for _ in range(spec.images)
        ]
        parts = [
            vae.encode(part, return_dict=False)[0].mode() for part in moving.clip_pixels(torch.stack(clips)).split(16)
        ]
        rows.append(((torch.cat(parts) - mean) / std).half().unflatten(0, (len(moving.MOTIONS), spec.images)))
    latents = torch.stack(rows).unflatten(0, (STARTS, len(drawn)))
    torch.save(latents, file)
    return latents


def token_times(sigma: Tensor, shape: torch.Size) -> Tensor:
    """The times 1000 sigma of the tokens, (B, F' h/2 w/2), where `sigma` (B, F') is that of each latent frame."""
    tokens = shape[-2] * shape[-1] // 4
    return 1000 * sigma.repeat_interleave(tokens, 1)


def text_states(pipe: DiffusionPipeline, captions: list[str]) -> Tensor:
    """Token states (B, 16, D) with a graph, zeros at the padding, as the pipeline's `encode_prompt` has them."""
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


def video_loss(pipe: DiffusionPipeline, x0: Tensor, captions: list[str], held: int) -> Tensor:
    """Velocity matching on the straight path, over the latent frames after the first `held`; x0 (B, C, F', h, w)."""
    batch, frames = len(x0), x0.shape[2]
    u = (torch.arange(batch) + torch.rand(batch)) / batch  # stratified: less noise in the gradient
    shift = pipe.scheduler.config.shift
    sigma = (shift * u / (1 + (shift - 1) * u))[:, None].repeat(1, frames)
    sigma[:, :held] = 0
    eps, level = torch.randn_like(x0), sigma[:, None, :, None, None]
    x_t, times = (1 - level) * x0 + level * eps, token_times(sigma, x0.shape)
    out = pipe.transformer(x_t, times, text_states(pipe, captions), return_dict=False)[0]
    return (out - (eps - x0))[:, :, held:].square().mean()


def identity_start(transformer: nn.Module) -> None:
    """DiT's adaLN-zero start, which Diffusers leaves to the loader of weights."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("time_proj.weight") or name.startswith("proj_out"):
            nn.init.zeros_(parameter)


class VideoLessons:
    """Batches of captioned clips for one `spec`; `work` keeps the autoencoder and the latents."""

    def __init__(self, spec: TeacherSpec, work: Path) -> None:
        self.spec, self.drawn = spec, moving.movers()
        folder = Path(spec.vae_dir) if spec.vae_dir else work / "vae"
        if not folder.exists():
            train_video_autoencoder(spec, work, folder)
        self.vae = AutoencoderKLWan.from_pretrained(folder)
        self.latents = encode_clips(spec, self.vae, work / "latents.pt")

    def networks(self) -> tuple[DiffusionPipeline, nn.ModuleList]:
        """The pipeline, and its networks that learn."""
        torch.manual_seed(self.spec.seed)
        pipe = build.wan(build.tokenizer(moving.motion_texts(), 800), self.vae)
        identity_start(pipe.transformer)
        return pipe, nn.ModuleList([pipe.transformer, pipe.text_encoder]).train()

    def batch(self, rng: random.Random) -> tuple[Tensor, list[str], int]:
        """Latents (B, C, F', h, w), captions, and how many latent frames are held; four times as many single frames."""
        task, number, frames, held = rng.random(), self.spec.train_batch_size, self.latents.shape[5], 0
        if task < IMAGE_SHARE:
            number, frames = 4 * number, 1
        elif task >= IMAGE_SHARE + TEXT_SHARE:
            held = rng.randrange(2, frames) if rng.random() < LONGER_SHARE else 1
        rows, captions = [], []
        for _ in range(number):
            start = rng.randrange(STARTS) if held else 0
            drawing, motion = rng.randrange(len(self.drawn)), rng.randrange(len(moving.MOTIONS))
            rows.append(self.latents[start, drawing, motion, rng.randrange(self.spec.images), :, :frames])
            words = moving.motion_caption(self.drawn[drawing], moving.MOTIONS[motion], rng)
            captions.append("" if rng.random() < self.spec.dropout else words)
        return torch.stack(rows).float(), captions, held

    def loss(self, pipe: DiffusionPipeline, rng: random.Random) -> Tensor:
        """The loss of one batch, a scalar."""
        return video_loss(pipe, *self.batch(rng))

    def write(self, pipe: DiffusionPipeline, out: Path) -> None:
        """The pipeline's folder, in half precision."""
        build.write_halves(pipe, out)
