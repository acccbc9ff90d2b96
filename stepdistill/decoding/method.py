"""Distilled Decoding: one call for all tokens, by regression on the map from noise to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepdistill.config.kinds import Amount, Decay, Whole
from stepdistill.core.random import step_generator
from stepdistill.methods.base import Update
from stepdistill.networks.lpips import Lpips, lpips
from stepdistill.networks.roles import Copy, Ema, Lora, Role


@dataclass(frozen=True)
class TokenBatch:
    """B images as the teacher has drawn them.

    Args:
        index: the samples' positions in the whole run's stream of data; they key the random draws.
        ids: (B, P) of the prompts, padded on the left.
        mask: (B, P).
        noise: (B, n, d), of which the tokens were drawn.
        tokens: (B, n).
    """

    index: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    noise: Tensor
    tokens: Tensor


class Student(Protocol):
    """The student's network."""

    def __call__(self, batch: TokenBatch, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, n, V) and values (B, n, d) of vectors x (B, n, d), of which `kept` (B, n) are codes."""
        ...


@dataclass(frozen=True)
class TokenContext:
    """What the method may use in one step: the student, the codes (V, d), the decoder, and random draws.

    Args:
        decode: images (B, 3, H, W) in about [-1, 1] of codes or other vectors (B, n, d), with gradients.
    """

    student: Student
    codes: Tensor
    decode: Callable[[Tensor], Tensor]
    seed: int
    step: int
    device: torch.device

    def draw(self, batch: TokenBatch, purpose: str) -> Tensor:
        """Uniform in [0, 1), (B,)."""
        rows = [torch.rand((), generator=step_generator(self.seed, self.step, i, purpose)) for i in batch.index]
        return torch.stack(rows).to(self.device)


@dataclass(frozen=True, kw_only=True)
class DistilledDecoding:
    """Distilled Decoding of an autoregressive image model into one to three calls. Experimental.

    Equation:
        X_t = (c_{q_1}, ..., c_{q_t}, eps_{t+1}, ..., eps_n),  q = the teacher's tokens of eps
        loss = mean_{i>t} [ CE( logits_i(X_t), q_i ) + value_weight | value_i(X_t) - c_{q_i} |^2 ]
               + LPIPS( decode(c_{q_1}, ..., c_{q_t}, value_{t+1}, ..., value_n), decode(c_q) )

    The mean is over the unknown places of all images of a micro-batch, each with its own t: places weigh alike, and an
    image of which less is known weighs more.

    A token depends on the noise of its place and on the tokens before, which depend on theirs. So the network stays
    causal, and place i reads x_i and writes q_i. The autoregressive model wrote q_{i+1} there.

    References:
        Liu et al. 2024, https://arxiv.org/abs/2412.17153.

    Args:
        keeps: t, how many tokens are known, each as often; none takes 0, n / 3 and 2 n / 3. The student may be sampled
            with these alone.
        value_weight: weight of the values.
        lpips: perceptual term of the values' images, with its weight; without it no image is decoded.
        split: how many places of an image are decoded from codes; the values of those after them that the last call
            does not keep are decoded as they are. None decodes codes alone, and the values are of no use to the student
            then.
        whole: train the whole language model; else a LoRA.
        ema_decay: decay of the exponential moving average of the student, which is exported; none exports the student
            itself.
    """

    keeps: tuple[Whole, ...] | None = None
    value_weight: Amount = 0.5
    lpips: Lpips | None = None
    split: Whole | None = None
    whole: bool = False
    ema_decay: Decay | None = 0.999

    def __post_init__(self) -> None:
        if self.keeps is not None and (self.keeps[:1] != (0,) or sorted(set(self.keeps)) != list(self.keeps)):
            raise ValueError(f"keeps is {list(self.keeps)}: expected numbers of tokens that ascend from 0")
        if self.split is not None and not self.value_weight and self.lpips is None:
            raise ValueError(f"split is {self.split}: expected none, since no term trains the values after it")
        if self.lpips is not None and self.lpips.divide:
            raise ValueError("lpips.divide is true: expected false, since tokens have no share of noise")

    def trained_keeps(self, places: int) -> tuple[int, ...]:
        """t in [0, n), ascending. Raises ValueError."""
        keeps = (0, places // 3, 2 * places // 3) if self.keeps is None else self.keeps
        if keeps[-1] >= places:
            raise ValueError(f"keeps is {list(keeps)}: expected fewer than the {places} tokens of an image")
        return keeps

    def check(self, places: int) -> None:
        """Raise ValueError for what does not fit images of this many tokens."""
        self.trained_keeps(places)
        if self.split is not None and self.split >= places:
            raise ValueError(f"split is {self.split}: expected fewer than the {places} tokens of an image")

    def roles(
        self, network: Callable[[], nn.Module] | None = None, heads: Callable[[], nn.Module] | None = None
    ) -> dict[str, Role]:
        """The student's language model and its heads, and their averages.

        Args:
            network: makes a whole student.
            heads: makes its heads.
        """
        trained: dict[str, Role] = {"student": Copy(network) if self.whole else Lora(), "heads": Copy(heads)}
        if self.ema_decay is None:
            return trained
        return trained | {f"ema_{name}": Ema(name, self.ema_decay) for name in trained}

    @property
    def exported(self) -> tuple[str, str]:
        """The roles that are written: language model and heads."""
        return ("student", "heads") if self.ema_decay is None else ("ema_student", "ema_heads")

    def updates(self, context: TokenContext, batch: TokenBatch, step: int) -> Iterator[Update]:
        """One update."""
        places = batch.tokens.shape[1]
        keeps = torch.tensor(self.trained_keeps(places), device=context.device)
        t = keeps[(context.draw(batch, "tokens kept") * len(keeps)).long()]
        kept = torch.arange(places, device=context.device) < t[:, None]
        codes = context.codes[batch.tokens]
        logits, values = context.student(batch, torch.where(kept[..., None], codes, batch.noise), kept)
        new = (~kept).nonzero(as_tuple=True)  # numbers, which tensors without content take as indices, too
        entropy = cross_entropy(logits[new].float(), batch.tokens[new])
        off = (values[new].float() - codes[new]).square().sum(-1).mean()
        loss, measured = entropy + self.value_weight * off, {"cross_entropy": entropy, "value": off}
        if self.lpips is not None:
            some = slice(self.lpips.samples)
            images = context.decode(torch.where(kept[..., None], codes, values.float())[some])
            apart = lpips(self.lpips.net, context.device)(images, context.decode(codes[some]))
            measured["lpips"] = apart.mean()
            loss = loss + self.lpips.weight * measured["lpips"]
        yield Update(("student", "heads"), loss, **measured)
