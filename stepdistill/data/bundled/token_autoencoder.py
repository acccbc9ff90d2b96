"""Train the token teacher's autoencoder: unit vectors first, then a codebook of them, then codes alone.

A codebook that learns from its first step on loses codes that no vector is near. One from k-means has none.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers.models.janus.modeling_janus import JanusVQVAE

from stepdistill.core.files import written_whole
from stepdistill.data.bundled import emoji
from stepdistill.data.bundled.build_tokens import janus_config
from stepdistill.data.bundled.teacher_spec import TeacherSpec

SAVED = 100  # steps from one checkpoint of the training to the next
TESTED = 256  # images that the training does not see, whose PSNR it prints
COUNTED = 1024  # images whose vectors make the codebook
ROUNDS = 20  # of k-means
COMMITMENT = 0.25  # weight of the distance of vectors to their codes


def drawn_images(rng: random.Random, number: int) -> Tensor:
    """`number` images (N, 3, 32, 32) in [-1, 1]."""
    source, drawn = emoji.packed_sheet(), emoji.drawings()
    return emoji.pixels([emoji.image(source, rng.choice(drawn), rng) for _ in range(number)])


def unit_vectors(vae: JanusVQVAE, x: Tensor) -> Tensor:
    """The vectors (B, d, h, w) of images, of length 1."""
    return normalize(vae.quant_conv(vae.encoder(x)).float(), dim=1)


def codebook(vae: JanusVQVAE) -> Tensor:
    """The codes (V, d) that are decoded, of length 1, as `get_codebook_entry` has them."""
    return normalize(vae.quantize.embedding.weight, dim=-1)


def tokens_of(vectors: Tensor, codes: Tensor) -> Tensor:
    """The tokens (B, h w), in raster order, whose codes are nearest to unit vectors (B, d, h, w)."""
    return (vectors.flatten(2).transpose(1, 2) @ codes.T).argmax(-1)


def decoded(vae: JanusVQVAE, vectors: Tensor) -> Tensor:
    """Images of vectors (B, d, h, w)."""
    return vae.decoder(vae.post_quant_conv(vectors)).float()


def spherical_means(vectors: Tensor, count: int) -> Tensor:
    """k-means of unit vectors (N, d) on the sphere: `count` means of length 1, each nearest to at least one vector."""
    means = vectors[torch.randperm(len(vectors))[:count]]
    for _ in range(ROUNDS):
        near, index = (vectors @ means.T).max(1)
        total = torch.zeros_like(means).index_add_(0, index, vectors)
        empty = torch.bincount(index, minlength=count) == 0
        total[empty] = vectors[near.argsort()[: int(empty.sum())]]  # those that are furthest from all means
        means = normalize(total, dim=1)
    return means


def image_reconstruction(vae: JanusVQVAE, x: Tensor, coded: bool) -> tuple[Tensor, float]:
    """The loss on images, L1 + L2, and the mean squared error alone; `coded` puts the codes in the vectors' place."""
    vectors, off = unit_vectors(vae, x), torch.zeros(())
    if coded:
        codes = codebook(vae)
        near = codes[tokens_of(vectors, codes)].transpose(1, 2).unflatten(2, vectors.shape[2:])
        off = (near - vectors.detach()).square().sum(1).mean()
        off = off + COMMITMENT * (near.detach() - vectors).square().sum(1).mean()
        vectors = vectors + (near - vectors).detach()  # the gradient passes over the choice
    y = decoded(vae, vectors)
    error = (y - x).square().mean()
    return (y - x).abs().mean() + error + 0.1 * off, error.item()


@torch.no_grad()
def image_psnr(vae: JanusVQVAE, x: Tensor, coded: bool) -> float:
    """PSNR in dB of images in [-1, 1]."""
    return 10 * math.log10(
        4 / (sum(image_reconstruction(vae, part, coded)[1] for part in x.split(64)) / len(x.split(64)))
    )


def train_token_autoencoder(spec: TeacherSpec, work: Path) -> JanusVQVAE:
    """The autoencoder, in float32. A run that was cut goes on in `work`."""
    torch.manual_seed(spec.seed)
    vae = JanusVQVAE(janus_config(1).vq_config).train()  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=spec.vae_learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    state, start, total = work / "vae.pt", 0, spec.vae_steps + spec.vae_code_steps
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    test = drawn_images(random.Random(f"{spec.seed} test"), TESTED)
    bar = tqdm(range(start, total), initial=start, total=total, desc="autoencoder", mininterval=10)
    for step in bar:
        torch.manual_seed(spec.seed * 1_000_003 + step)
        if step == spec.vae_steps:
            with torch.no_grad():
                seen = drawn_images(random.Random(f"{spec.seed} codes"), COUNTED)
                vectors = torch.cat([unit_vectors(vae, part) for part in seen.split(64)])
                codes = spherical_means(vectors.transpose(1, 3).reshape(-1, vectors.shape[1]), len(codebook(vae)))
                vae.quantize.embedding.weight.copy_(codes)
        coded = step >= spec.vae_steps
        at, of = (step - spec.vae_steps, spec.vae_code_steps) if coded else (step, spec.vae_steps)
        for group in optimizer.param_groups:  # a warm-up and a cosine for each of the two parts
            peak = spec.vae_learning_rate * (0.5 if coded else 1.0)
            group["lr"] = peak * min((at + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * at / of))
        x = drawn_images(random.Random(f"{spec.seed} {step}"), spec.train_batch_size)
        loss, error = image_reconstruction(vae, x, coded)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / error):.1f}", refresh=False)
        if (step + 1) % SAVED == 0 or step + 1 == total:
            with written_whole(state) as part:
                torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
            tqdm.write(f"step {step + 1}: {image_psnr(vae, test, coded):.2f} dB")
    return vae.eval().requires_grad_(False)
