"""Images to the 299 x 299 that Inception reads, in the four ways that published FIDs used."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate

Resize = Literal["clean", "torchmetrics", "pytorch-fid", "tf1"]
SIDE = 299


def to_299(images: Tensor, resize: Resize) -> Tensor:
    """Images (N, C, H, W) of any size, grey levels in [0, 255], to float32 (N, C, 299, 299) in [0, 255].

    `clean`: bicubic, antialiased, as Pillow on float32; Parmar et al. 2022, https://arxiv.org/abs/2104.11222.
    `torchmetrics`: bilinear, antialiased (its default since 1.8).
    `pytorch-fid`: bilinear, not antialiased.
    `tf1`: bilinear, not antialiased, corners in place of pixel centres, as TensorFlow 1; torch-fidelity, EDM, StyleGAN.
    Raises ValueError for another name.
    """
    x, size = images.float(), (SIDE, SIDE)
    match resize:
        case "clean":
            return interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)  # bicubic overshoots
        case "torchmetrics":
            return interpolate(x, size, mode="bilinear", antialias=True)
        case "pytorch-fid":
            return interpolate(x, size, mode="bilinear")
        case "tf1":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            return interpolate_bilinear_2d_like_tensorflow1x(x, size, align_corners=False)
    raise ValueError(
        f"resize got {resize!r}, expected 'clean', 'torchmetrics', 'pytorch-fid' or 'tf1': they move features, and "
        "so distances; choose the one of the values to compare with, or 'clean'"
    )
