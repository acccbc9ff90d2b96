"""What the image teachers learn from: an autoencoder, latents that are encoded once, a loss on captions."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.data.bundled import build, emoji
from stepdistill.data.bundled.teacher_spec import TeacherSpec


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
def encode_images(spec: TeacherSpec, vae: AutoencoderKL, file: Path) -> Tensor:
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


def image_networks(spec: TeacherSpec, vae: AutoencoderKL) -> tuple[DiffusionPipeline, nn.ModuleList]:
    """A pipeline with seeded random weights, and its networks that are trained: denoiser and text towers."""
    torch.manual_seed(spec.seed)
    tokens = build.tokenizer(build.drawing_texts())
    if spec.pipeline == "sd":
        pipe = build.sd(tokens, vae)
        return pipe, nn.ModuleList([pipe.unet, pipe.text_encoder]).train()
    pipe = build.sd3(tokens, vae)
    zero_modulation(pipe.transformer)
    return pipe, nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()


class ImageLessons:
    """Batches of captioned images for one `spec`; `work` keeps the autoencoder and the latents."""

    def __init__(self, spec: TeacherSpec, work: Path) -> None:
        self.spec, self.drawn = spec, emoji.subjects()
        folder = Path(spec.vae_dir) if spec.vae_dir else work / "vae"
        self.vae = AutoencoderKL.from_pretrained(folder) if folder.exists() else train_vae(spec, folder)
        self.latents = encode_images(spec, self.vae, work / "latents.pt")
        self.scale, self.shift = self.vae.config["scaling_factor"], self.vae.config["shift_factor"]
        if spec.pipeline == "sd":  # this pipeline knows no shift
            self.shift = 0.0

    def networks(self) -> tuple[DiffusionPipeline, nn.ModuleList]:
        """The pipeline, and its networks that learn."""
        return image_networks(self.spec, self.vae)

    def loss(self, pipe: DiffusionPipeline, rng: random.Random) -> Tensor:
        """The loss of one batch, a scalar."""
        spec, drawn = self.spec, self.drawn
        rows = [(rng.randrange(spec.images), rng.randrange(len(drawn))) for _ in range(spec.train_batch_size)]
        x0 = (torch.stack([self.latents[row] for row in rows]).float() - self.shift) * self.scale
        captions = ["" if rng.random() < spec.dropout else emoji.caption(drawn[i], rng) for _, i in rows]
        with torch.autocast("cpu", torch.bfloat16):
            return denoising_loss(pipe, x0, captions)

    def write(self, pipe: DiffusionPipeline, out: Path) -> None:
        """The pipeline's folder, in half precision."""
        build.write_halves(pipe, out)
