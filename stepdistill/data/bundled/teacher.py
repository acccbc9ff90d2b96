"""Train the bundled teachers: a small autoencoder, then a UNet or a flow transformer with its text towers.

Plain pre-training, so it shares nothing with the distillation trainer: the text towers learn together with the
denoiser, on latents that are encoded once.
"""

from __future__ import annotations

import json
import random
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.config.kinds import Amount, Count, Decay, Place, Positive, Seed, Share
from stepdistill.core.files import written_whole
from stepdistill.data.bundled import build, emoji

CARD = """---
license: cc-by-4.0
tags: [diffusers, text-to-image]
---
# {name}

A toy teacher for stepdistill's quickstart, tests and tables: 32-pixel emoji from their names, trained for {steps} steps
by `train/teacher.py`. Trained on Twemoji, Copyright 2020 Twitter, Inc and other contributors, graphics licensed under
CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/
"""
NOTES = {"unet": "", "transformer": "\nPass `max_sequence_length=16` to its call, as in its training.\n"}


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """What `train/teacher.py` reads. All counts are of optimizer steps and images.

    Args:
        pipeline: `sd` (UNet, epsilon, Stable Diffusion's noise table) or `sd3` (transformer, rectified flow).
        output_dir: the pipeline folder to write; the autoencoder is taken from `vae_dir` where one is given.
        images: augmented images per drawing that are encoded before training.
        dropout: how often a caption is dropped, for classifier-free guidance.
    """

    pipeline: str
    output_dir: Place
    vae_dir: Place | None = None
    seed: Seed = 0
    threads: Count = 2
    vae_steps: Count = 800
    vae_learning_rate: Positive = 2e-3
    train_batch_size: Count = 64
    max_train_steps: Count = 6000
    learning_rate: Amount = 1e-3
    warmup: Count = 200
    ema: Decay = 0.999
    images: Count = 40
    dropout: Share = 0.1
    checkpointing_steps: Count = 500


def train_vae(spec: TeacherSpec, folder: Path) -> AutoencoderKL:
    """An L1 + L2 autoencoder with a faint KL term; its latents are scaled to unit variance."""
    torch.manual_seed(spec.seed)
    rng = random.Random(spec.seed)
    source, drawn = emoji.packed_sheet(), emoji.drawings()
    vae = build.vae().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=spec.vae_learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.vae_learning_rate, total_steps=spec.vae_steps, pct_start=0.05
    )
    batch = spec.train_batch_size
    bar = tqdm(range(spec.vae_steps), desc="autoencoder", mininterval=5)
    for _ in bar:
        x = emoji.pixels([emoji.image(source, rng.choice(drawn), rng) for _ in range(batch)])
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x, return_dict=False)[0]
            y = vae.decode(posterior.sample()).sample
        error = (y.float() - x).square().mean()
        loss = (y.float() - x).abs().mean() + error + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(psnr=f"{10 * torch.log10(4 / error.detach()).item():.1f}", refresh=False)
    x = emoji.pixels([emoji.image(source, rng.choice(drawn), rng) for _ in range(512)])
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5)
    )
    vae.half().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder)


@torch.no_grad()
def encode(spec: TeacherSpec, vae: AutoencoderKL, file: Path) -> Tensor:
    """Latents (images, drawings, C, 8, 8) in half precision, as the pipeline's own scale has them."""
    if file.exists():
        return torch.load(file, weights_only=True)
    rng = random.Random(spec.seed + 1)
    source, drawn = emoji.packed_sheet(), emoji.subjects()
    rows = []
    for _ in tqdm(range(spec.images), desc="encode", mininterval=5):
        x = emoji.pixels([emoji.image(source, drawing, rng) for drawing in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            parts = [vae.encode(part, return_dict=False)[0].mode() for part in x.split(64)]
        rows.append(torch.cat(parts).half())
    latents = torch.stack(rows)
    torch.save(latents, file)
    return latents


def zero_modulation(transformer: nn.Module) -> None:
    """DiT's adaLN-zero start, which Diffusers leaves to the loader of weights: every block begins as the identity."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm1" in name or "norm_out" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def conditions(pipe: DiffusionPipeline, captions: list[str]) -> tuple[Tensor, Tensor | None]:
    """Token states (and SD3's pooled state) with a graph, exactly as the pipeline's `encode_prompt` makes them."""
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if pipe.__class__.__name__ == "StableDiffusionPipeline":
        return pipe.text_encoder(ids)[0], None
    states, pooled = [], []
    for tower in (pipe.text_encoder, pipe.text_encoder_2):
        out = tower(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled.append(out[0])
    state = torch.cat(states, -1)
    return torch.cat([state, torch.zeros_like(state)], 1), torch.cat(pooled, -1)  # T5's zeros


def denoising_loss(pipe: DiffusionPipeline, x0: Tensor, captions: list[str]) -> Tensor:
    """Epsilon matching on the pipeline's noise table, or velocity matching on the straight path."""
    batch = len(x0)
    u = (torch.arange(batch) + torch.rand(batch)) / batch  # stratified: less noise in the gradient
    eps = torch.randn_like(x0)
    states, pooled = conditions(pipe, captions)
    if pooled is None:
        t = (u * 1000).long()
        alpha = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        out = pipe.unet(alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps, t, states).sample
        return (out.float() - eps).square().mean()
    shift = pipe.scheduler.config.shift
    sigma = (shift * u / (1 + (shift - 1) * u)).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * eps
    out = pipe.transformer(
        x_t, timestep=1000 * sigma.flatten(), encoder_hidden_states=states, pooled_projections=pooled
    ).sample
    return (out.float() - (eps - x0)).square().mean()


def networks(spec: TeacherSpec, vae: AutoencoderKL) -> tuple[DiffusionPipeline, nn.ModuleList]:
    """A pipeline with seeded random weights, and its networks that are trained: denoiser and text towers."""
    torch.manual_seed(spec.seed)
    tokens = build.tokenizer(build.drawing_texts())
    if spec.pipeline == "sd":
        pipe = build.sd(tokens, vae)
        return pipe, nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    pipe = build.sd3(tokens, vae)
    zero_modulation(pipe.transformer)
    return pipe, nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()


def train_teacher(spec: TeacherSpec) -> Path:
    """Train one teacher and write its pipeline folder. A run that was cut goes on from its last checkpoint."""
    torch.set_num_threads(spec.threads)
    out = Path(spec.output_dir)
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    vae_dir = Path(spec.vae_dir) if spec.vae_dir else work / "vae"
    vae = AutoencoderKL.from_pretrained(vae_dir) if vae_dir.exists() else train_vae(spec, vae_dir)
    latents = encode(spec, vae, work / "latents.pt")
    shift, scale = vae.config["shift_factor"], vae.config["scaling_factor"]
    if spec.pipeline == "sd":  # this pipeline knows no shift
        shift = 0.0

    pipe, nets = networks(spec, vae)
    params = list(nets.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=spec.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        # constant, then linear to zero over the last 40 %
        lambda i: min(1.0, (i + 1) / spec.warmup, (spec.max_train_steps - i) / (0.4 * spec.max_train_steps)),
    )
    start, seconds, state = 0, 0.0, work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        nets.load_state_dict(saved["nets"])
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, seconds = saved["step"], saved["seconds"]
    drawn = emoji.subjects()
    began = time.time()
    bar = tqdm(
        range(start, spec.max_train_steps),
        initial=start,
        total=spec.max_train_steps,
        desc="denoiser",
        mininterval=10,
    )
    mean = 0.0
    for step in bar:
        torch.manual_seed(spec.seed * 1_000_003 + step)
        rng = random.Random(spec.seed * 1_000_003 + step)
        rows = [(rng.randrange(spec.images), rng.randrange(len(drawn))) for _ in range(spec.train_batch_size)]
        x0 = (torch.stack([latents[row] for row in rows]).float() - shift) * scale
        captions = ["" if rng.random() < spec.dropout else emoji.caption(drawn[i], rng) for _, i in rows]
        with torch.autocast("cpu", torch.bfloat16):
            loss = denoising_loss(pipe, x0, captions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(spec.ema, (step + 1) / (step + 10)))
        mean += (loss.item() - mean) / min(step - start + 1, 200)
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % spec.checkpointing_steps == 0 or step + 1 == spec.max_train_steps:
            facts = {"steps": step + 1, "seconds": round(seconds + time.time() - began), "loss": round(mean, 4)}
            saved = {"nets": nets.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "step": step + 1, "seconds": facts["seconds"]}
            with written_whole(state) as part:
                torch.save(saved, part)
            save_teacher(pipe, params, average, out, facts)
    return out


@torch.no_grad()
def save_teacher(
    pipe: DiffusionPipeline, params: list[nn.Parameter], average: list[Tensor], out: Path, facts: dict
) -> None:
    """Write the averaged weights as a pipeline folder: halves, except the text towers.

    transformers loads half files in half, which would then meet a float32 UNet.
    """
    trained = [p.detach().clone() for p in params]
    for p, mean in zip(params, average, strict=True):
        p.copy_(mean)
    pipe.save_pretrained(out)
    name = "unet" if "unet" in pipe.components else "transformer"
    deepcopy(pipe.components[name]).half().save_pretrained(out / name)
    deepcopy(pipe.vae).half().save_pretrained(out / "vae")
    for file in out.glob("*/config.json"):  # Diffusers and transformers keep the path that a part was read from
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    (out / "README.md").write_text(CARD.format(name=out.name, steps=facts["steps"]) + NOTES[name])
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    for p, old in zip(params, trained, strict=True):
        p.copy_(old)
