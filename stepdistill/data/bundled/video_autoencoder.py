"""Train the video teacher's autoencoder: single frames first, then clips of the full length.

An autoencoder that was trained on shorter clips does not carry over: errors grow in its causal caches, frame by frame.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.core.files import written_whole
from stepdistill.data.bundled import build, moving
from stepdistill.data.bundled.emoji import packed_sheet
from stepdistill.data.bundled.teacher_spec import TeacherSpec

SAVED = 100  # steps from one checkpoint of the training to the next
TESTED = 64  # clips that the training does not see, whose PSNR it prints
SCALED = 256  # clips whose latents give the scale


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Make `vae` an image autoencoder frame by frame: no layer looks back, and time is shortened by the mean.

    So what single frames teach holds for clips from their first step on.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
            continue
        if not name.endswith("time_conv"):
            module.weight[:, :, :-1] = 0
            continue
        for parameter in module.parameters():
            parameter.zero_()
        out, into = module.weight.shape[:2]
        for o in range(out):
            if out == into:  # two frames to one
                module.weight[o, o, 1:] = 0.5
            else:  # one frame to two
                module.weight[o, o % into, -1] = 1.0


def draw(source: Image.Image, rng: random.Random, number: int, frames: int = moving.FRAMES) -> Tensor:
    """`number` clips of `frames`, (N, 3, F, H, W) in [-1, 1], from any time of their motion."""
    drawn = moving.movers()
    rows = [
        moving.moving_clip(
            source, rng.choice(drawn), rng.choice(moving.MOTIONS), rng, frames, rng.randrange(moving.FRAMES)
        )
        for _ in range(number)
    ]
    return moving.clip_pixels(torch.stack(rows))


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, x: Tensor) -> list[float]:
    """PSNR in dB of each frame of `x`, (N, 3, F, H, W) in [-1, 1], over all clips."""
    parts = [vae.decode(vae.encode(part, return_dict=False)[0].mode(), return_dict=False)[0] for part in x.split(16)]
    error = (torch.cat(parts) - x).square().mean((0, 1, 3, 4))
    return [round(value, 2) for value in (10 * torch.log10(4 / error)).tolist()]


def reconstruction(vae: AutoencoderKLWan, x: Tensor) -> tuple[Tensor, float]:
    """The loss on clips `x`, L1 + L2 and a faint KL term, and the mean squared error alone."""
    posterior = vae.encode(x, return_dict=False)[0]
    y = vae.decode(posterior.sample(), return_dict=False)[0]
    error = (y - x).square().mean()
    return (y - x).abs().mean() + error + 1e-6 * posterior.kl().mean(), error.item()


def train_video_autoencoder(spec: TeacherSpec, work: Path, folder: Path) -> None:
    """Train and write the autoencoder; its latents get mean 0 and variance 1. A run that was cut goes on in `work`."""
    torch.manual_seed(spec.seed)
    source, state = packed_sheet(), work / "vae.pt"
    vae = build.wan_vae(32, (1, 2), 16, 2)
    inflate(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=spec.vae_learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    total, start = spec.vae_steps + spec.vae_clip_steps, 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    test = draw(source, random.Random(f"{spec.seed} test"), TESTED)
    bar = tqdm(range(start, total), initial=start, total=total, desc="autoencoder", mininterval=10)
    for step in bar:
        torch.manual_seed(spec.seed * 1_000_003 + step)
        single = step < spec.vae_steps
        number, frames = (32, 1) if single else (8, moving.FRAMES)
        at, of = (step, spec.vae_steps) if single else (step - spec.vae_steps, spec.vae_clip_steps)
        for group in optimizer.param_groups:  # a warm-up and a cosine for each of the two parts
            peak = spec.vae_learning_rate * (1.0 if single else 0.5)
            group["lr"] = peak * min((at + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * at / of))
        loss, error = reconstruction(vae, draw(source, random.Random(f"{spec.seed} {step}"), number, frames))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / error):.1f}", refresh=False)
        if (step + 1) % SAVED == 0:
            with written_whole(state) as part:
                torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
            tqdm.write(f"step {step + 1}, dB of each frame: {psnr(vae, test)}")
    x = draw(source, random.Random(f"{spec.seed} scale"), SCALED)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part, return_dict=False)[0].mode() for part in x.split(16)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.half().save_pretrained(folder)
