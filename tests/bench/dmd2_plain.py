"""A cycle of DMD2 in its plainest form, over three copies of one network; and what it shares with ours."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from stepdistill.data.bundled import build
from stepdistill.families.sd import StableDiffusion

FAMILY = StableDiffusion(pretrained_teacher_model="random")
GUIDANCE, RATE, LOW, HIGH = 7.5, 1e-4, 20, 980  # guidance in our form, `uncond + w (cond - uncond)`
TIMES = (999, 749, 499, 249)  # where the student's steps start
FULL = 4 + 4 + 8  # bytes a parameter of a full fine-tune: float32 weight, gradient and Adam's two moments


def stable_diffusion() -> UNet2DConditionModel:
    """The network of Stable Diffusion 1.5, for latents of 32 x 32."""
    levels, deep = 3, (320, 640, 1280, 1280)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=deep,
        down_block_types=(*("CrossAttnDownBlock2D",) * levels, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * levels),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


@dataclass(frozen=True)
class Setup:
    """What the sides share; by default the size of Stable Diffusion 1.5."""

    unet: Callable[[], UNet2DConditionModel] = stable_diffusion
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 77
    rank: int = 32
    batch: int = 1
    critic_steps: int = 5
    checkpointing: bool = True

    def network(self) -> UNet2DConditionModel:
        """A frozen network with random weights, made in its own precision: a float32 one beside it would be a peak."""
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            return self.unet().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def embeddings(self, net: UNet2DConditionModel, rows: int, key: int) -> Tensor:
        """Random states of a text encoder, (rows, tokens, width)."""
        generator = torch.Generator().manual_seed(key)
        return torch.randn(rows, self.tokens, net.config["cross_attention_dim"], generator=generator)


@cache
def noise_table() -> Tensor:
    """The teacher's, as its pipeline holds it."""
    return build.vp_scheduler().alphas_cumprod


class Draws(NamedTuple):
    """The random numbers of a step: simulated steps, then noise (B, C, H, W) and times (B,)."""

    taken: int
    start: Tensor
    again: list[Tensor]
    score_t: Tensor
    score_eps: Tensor
    fake_t: Tensor
    fake_eps: Tensor


class Reference:
    """The plain loop over three networks.

    Args:
        full: train student and fake score in full, without LoRAs.
    """

    def __init__(self, setup: Setup, full: bool = False) -> None:
        self.setup, self.teacher = setup, setup.network()
        self.student, self.fake = self.trainable(full), self.trainable(full)
        self.null = setup.embeddings(self.teacher, 1, 0).expand(setup.batch, -1, -1)
        alphas = noise_table().double()
        self.alpha, self.sigma = alphas.sqrt().float(), (1 - alphas).sqrt().float()
        self.shape = (setup.batch, 4, *[self.teacher.config["sample_size"]] * 2)
        self.params = {n: [p for p in n.parameters() if p.requires_grad] for n in (self.student, self.fake)}
        self.optimizers = {n: torch.optim.AdamW(p, lr=RATE, weight_decay=0.0) for n, p in self.params.items()}
        self.schedulers = {n: get_scheduler("constant", o) for n, o in self.optimizers.items()}

    def trainable(self, full: bool) -> UNet2DConditionModel:
        """A copy of the teacher, with a LoRA of its own or trained in full."""
        net, rank = deepcopy(self.teacher), self.setup.rank
        if full:
            net.requires_grad_(True)
        else:
            net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=FAMILY.lora_targets(net)))
        cast_training_params(net, torch.float32)
        if self.setup.checkpointing:
            net.enable_gradient_checkpointing()
        return net

    def draw(self, taken: int) -> Draws:
        shape, batch = self.shape, self.setup.batch
        again = [torch.randn(shape) for _ in range(taken)]
        score_t, fake_t = torch.randint(LOW, HIGH + 1, (batch,)), torch.randint(0, len(self.alpha), (batch,))
        return Draws(taken, torch.randn(shape), again, score_t, torch.randn(shape), fake_t, torch.randn(shape))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return alpha * x0 + sigma * eps

    def eps(self, net: nn.Module, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setup.dtype == torch.bfloat16):
            return net(x, t, states, return_dict=False)[0].float()

    def x0(self, net: nn.Module, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return (x - sigma * self.eps(net, x, t, states)) / alpha

    @torch.no_grad()
    def simulated(self, states: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        x, times = draws.start, [torch.full((len(draws.start),), t) for t in TIMES]
        for i in range(draws.taken):
            x = self.noised(self.x0(self.student, x, times[i], states), draws.again[i], times[i + 1])
        return x, times[draws.taken]

    def student_loss(self, x0: Tensor, states: Tensor, draws: Draws) -> Tensor:
        with torch.no_grad():
            t, x = draws.score_t, self.noised(x0, draws.score_eps, draws.score_t)
            cond = self.x0(self.teacher, x, t, states)
            uncond = self.x0(self.teacher, x, t, self.null)
            real = uncond + GUIDANCE * (cond - uncond)
            fake = self.x0(self.fake, x, t, states)
            gradient = torch.nan_to_num((fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True))
        return 0.5 * nn.functional.mse_loss(x0, (x0 - gradient).detach())

    def fake_loss(self, x0: Tensor, states: Tensor, draws: Draws) -> Tensor:
        x = self.noised(x0, draws.fake_eps, draws.fake_t)
        return nn.functional.mse_loss(self.eps(self.fake, x, draws.fake_t, states), draws.fake_eps)

    def update(self, net: nn.Module, loss: Tensor) -> float:
        loss.backward()
        nn.utils.clip_grad_norm_(self.params[net], 1.0)
        self.optimizers[net].step()
        self.schedulers[net].step()
        self.optimizers[net].zero_grad(set_to_none=True)
        return loss.item()

    def step(self, number: int, states: Tensor, draws: Draws) -> list[float]:
        x, t = self.simulated(states, draws)
        if number % self.setup.critic_steps == 0:
            x0 = self.x0(self.student, x, t, states)
            losses = [self.update(self.student, self.student_loss(x0, states, draws))]
            x0 = x0.detach()
        else:
            losses = []
            with torch.no_grad():
                x0 = self.x0(self.student, x, t, states)
        return [*losses, self.update(self.fake, self.fake_loss(x0, states, draws))]
