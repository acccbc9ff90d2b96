"""The config of a bundled teacher's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepdistill.config.kinds import Amount, Count, Decay, Place, Positive, Seed, Share


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What `train/teacher.py` reads. All counts are of optimizer steps and images.

    Args:
        pipeline: `sd` (UNet, epsilon, Stable Diffusion's noise table), `sd3` (transformer, rectified flow), `wan`
            (the same on clips of moving drawings) or `janus` (a language model of image tokens).
        output_dir: the pipeline folder to write; the autoencoder is taken from `vae_dir` where one is given.
        vae_clip_steps: the video autoencoder's steps on clips of the full length, after `vae_steps` on single frames.
        vae_code_steps: the token autoencoder's steps with codes, after `vae_steps` with any vectors.
        images: augmented images per drawing that are encoded before training; clips per drawing and motion for `wan`.
        dropout: how often a caption is dropped, for classifier-free guidance.
    """

    pipeline: Literal["sd", "sd3", "wan", "janus"]
    output_dir: Place
    vae_dir: Place | None = None
    seed: Seed = 0
    threads: Count = 2
    vae_steps: Count = 800
    vae_clip_steps: Count = 1000
    vae_code_steps: Count = 800
    vae_learning_rate: Positive = 2e-3
    train_batch_size: Count = 64
    max_train_steps: Count = 6000
    learning_rate: Amount = 1e-3
    warmup: Count = 200
    ema: Decay = 0.999
    images: Count = 40
    dropout: Share = 0.1
    checkpointing_steps: Count = 500
