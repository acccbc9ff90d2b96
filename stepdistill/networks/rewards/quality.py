"""A reward of one's own: what tells good images from bad ones, learned from some hundred of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stepdistill.config.kinds import Place
from stepdistill.networks.rewards.base import Reward, Score
from stepdistill.networks.rewards.weights import weights_digest, weights_in


@dataclass(frozen=True, kw_only=True)
class Quality(Reward):
    """The log-odds that an image is a good one, by a logistic head on features of EfficientNet-Lite0.

    It needs no download and knows nothing but what it was shown, such as the teacher's images and those of one step:
    `train/quality.py` makes the head. One direction of the features is easily climbed without better images: hold
    another reward out.

    Equation:
        score = w . features(image) + b

    References:
        EfficientNet, Tan & Le 2019, https://arxiv.org/abs/1905.11946.

    Args:
        head: the .safetensors file of the head.
    """

    head: Place

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}@{weights_digest(self.head)}"

    def build(self, device: torch.device) -> Score:
        from stepdistill.networks.efficientnet import DIM, average_pool, efficientnet

        with weights_in(self.head) as tensors:
            weight, bias, size = tensors["weight"].to(device), tensors["bias"].to(device), int(tensors["size"])
            if weight.shape != (DIM,):
                raise KeyError(f"a weight of {DIM} numbers")
        net = efficientnet(size, device)
        return lambda images, prompts: average_pool(net, 255 * images, size) @ weight + bias


def logistic_head(good: Tensor, bad: Tensor, ridge: float = 0.01) -> tuple[Tensor, Tensor]:
    """The weight (D,) and the bias () of a logistic regression between features (N, D) and (M, D).

    Equation:
        minimise mean log(1 + exp(-y (w . x + b))) + ridge / 2 |w|^2 over standardised features x, y = 1 or -1

    Either kind counts half, whatever N and M are.
    """
    rows = torch.cat([good, bad]).double()
    mean, std = rows.mean(0), rows.std(0).clamp(min=1e-6)
    rows, labels = (rows - mean) / std, torch.cat([torch.ones(len(good)), torch.zeros(len(bad))]).double()
    share = torch.cat([torch.full((len(each),), 0.5 / len(each)) for each in (good, bad)]).double()
    weight, bias = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in ((rows.shape[1],), ()))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        odds = rows @ weight + bias
        value = binary_cross_entropy_with_logits(odds, labels, share, reduction="sum") + ridge / 2 * weight @ weight
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = weight.detach() / std, bias.detach()
    return weight.float(), (bias - weight @ mean).float()
