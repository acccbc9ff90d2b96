"""LoRAs of lower rank: by singular values, of the change of a layer's weight or of another LoRA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.networks.lora.layer import LayerLora

FLOOR = 1e-8  # of the largest eigenvalue of a second moment: directions that no input has count this much


def low_rank(change: Tensor, rank: int, moment: Tensor | None = None) -> LayerLora:
    """The LoRA that is closest to the change D of a layer's weight, with alpha = rank.

    Without `moment` it minimises `|D - up down|_F` (Eckart & Young 1936). With M, it minimises the mean square of the
    outputs' error, `E|(D - up down) x|^2 = |(D - up down) R|_F^2` for `M = R R^T`. Hence `D R = U S V^T` is cut at the
    rank, and `down = S V^T R^-1`, which is `U^T D`: no inverse is formed. This is the whitening of SVD-LLM (Wang et al.
    2024, https://arxiv.org/abs/2403.07378), and with a diagonal M that of ASVD (Yuan et al. 2023,
    https://arxiv.org/abs/2312.05821). Only the full M makes it independent of a rotation of the channels.

    Args:
        change: D, (outputs, inputs), of a convolution (outputs, channels, height, width).
        rank: of the LoRA; what a smaller layer has less is zeros.
        moment: M = E[x x^T] of the inputs x, (inputs, inputs), up to a factor.
    """
    matrix = change.double().flatten(1)
    u, s, _ = torch.linalg.svd(matrix if moment is None else matrix @ _root(moment), full_matrices=False)
    kept = min(rank, len(s))
    up = u[:, :kept]
    down = up.T @ matrix
    size = down.norm(dim=1).sqrt()  # both matrices have the same size, as training goes on best
    up, down = up * size, down / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None]
    up, down = F.pad(up, (0, rank - kept)), F.pad(down, (0, 0, 0, rank - kept))
    kernel = change.shape[2:]
    up = up.reshape(*up.shape, *[1] * len(kernel))
    return LayerLora(down.float().reshape(rank, *change.shape[1:]), up.float(), float(rank))


def cut(lora: LayerLora, rank: int) -> LayerLora:
    """The closest LoRA of a lower rank, with alpha = rank; a LoRA that has no more than `rank` is returned as it is.

    Its product is never formed: with `up = Q_u R_u` and `down^T = Q_d R_d`, the core `R_u R_d^T` has its singular
    values.
    """
    if rank >= len(lora.down):
        return lora
    q_up, r_up = torch.linalg.qr(lora.up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(lora.down.double().flatten(1).T)
    core = low_rank(lora.scale * r_up @ r_down.T, rank)
    up, down = (q_up @ core.up.double()).float(), (core.down.double() @ q_down.T).float()
    return LayerLora(down.reshape(rank, *lora.down.shape[1:]), up.reshape(-1, rank, *lora.up.shape[2:]), float(rank))


def padded(lora: LayerLora, down: Tensor) -> LayerLora:
    """The same LoRA at the rank of `down` (rank, ...), with alpha = rank.

    What is added to its `up` is zeros, and to its `down` the last rows of the one that is given. So it adds the same to
    the weight, and all of it can be trained: with zeros on both sides, neither has a gradient.
    """
    up = (lora.up * lora.scale).to(down)
    more = up.new_zeros(len(up), len(down) - len(lora.down), *up.shape[2:])
    return LayerLora(
        torch.cat([lora.down.to(down), down[len(lora.down) :]]), torch.cat([up, more], 1), float(len(down))
    )


def _root(moment: Tensor) -> Tensor:
    """R with `R R^T` the moment, (inputs, inputs) in float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors * values.clamp(min=values[-1] * FLOOR).sqrt()
