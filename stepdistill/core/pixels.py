"""Plain statistics of images, no network needed: what over-saturation, blur and collapse change first.

Images are float RGB in [0, 1], (..., 3, H, W); the leading dimensions are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16  # pixels a side; collapsed images under unlike noise are still the same image


def clips_of(pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) as they are, and videos (B, 3, F, H, W) frame by frame, (B, F, 3, H, W)."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2)


def frames_of(pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) as they are; of videos (B, 3, F, H, W) their frames, one after the other, (B F, 3, H, W)."""
    return clips_of(pixels).flatten(0, -4)


def filmstrip(clips: Tensor, most: int = 5) -> Tensor:
    """Images (N, 3, H, W) as they are; of clips (N, F, 3, H, W) at most `most` frames, evenly spaced, side by side."""
    if clips.ndim == 4:
        return clips
    frames, count = clips.shape[1], min(most, clips.shape[1])
    chosen = [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]
    return torch.cat([clips[:, f] for f in chosen], -1)


def luma(images: Tensor) -> Tensor:
    """Brightness (..., H, W) in [0, 1] with the weights of Rec. 601."""
    red, green, blue = images.unbind(-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def saturation(images: Tensor) -> Tensor:
    """Mean over pixels of the largest less the smallest channel, in [0, 1]; 0 is grey."""
    return (images.amax(-3) - images.amin(-3)).mean((-2, -1))


def luminance(images: Tensor) -> Tensor:
    """Mean luma, in [0, 1]."""
    return luma(images).mean((-2, -1))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of luma over the image's pixels, in [0, 0.5]."""
    return luma(images).std((-2, -1), correction=0)


def high_frequency(images: Tensor) -> Tensor:
    """Mean square of luma less its 3 x 3 average: the energy of edges and noise, which blur takes away."""
    y = luma(images)
    flat = y.reshape(-1, 1, *y.shape[-2:])
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (flat - blurred).square().mean((-3, -2, -1)).reshape(y.shape[:-2])


def diversity(images: Tensor) -> Tensor:
    """Mean distance (root mean square, in [0, 1]) between the images of one prompt, reduced to thumbnails.

    images (S, P, 3, H, W): S >= 2 seeds of each of P prompts. Returns (P,); 0 where all seeds give one image.
    """
    seeds, prompts = images.shape[:2]
    if seeds < 2:
        raise ValueError(f"diversity got {seeds} images for each prompt, expected at least 2: distances need pairs")
    small = F.adaptive_avg_pool2d(images.flatten(0, 1), THUMBNAIL).reshape(seeds, prompts, -1)
    apart = [(small[i] - small[j]).square().mean(-1).sqrt() for i in range(seeds) for j in range(i)]
    return sum(apart[1:], apart[0]) / len(apart)


def resized_square(images: Tensor, side: int) -> Tensor:
    """The middle (..., 3, side, side) of images whose shorter side is resized to `side`, differentiably.

    Bicubic with antialiasing, then clamped to [0, 1], as the image processors of CLIP do it on bytes.
    """
    height, width = (side * length // min(images.shape[-2:]) for length in images.shape[-2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (height - side) // 2, (width - side) // 2
    return resized[..., top : top + side, left : left + side]


def to_uint8(images: Tensor) -> Tensor:
    """Quantise float images of any shape in [0, 1] to uint8, rounding half to even as numpy does.

    Values up to 1e-3 outside [0, 1] are clamped. Raises TypeError for integer input, ValueError for
    empty, non-finite or out-of-range input.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"to_uint8 got {images.dtype}, expected floating point in [0, 1]: scaling integers by 255 would "
            "wrap around; pass uint8 images on as they are, divide other integers by their maximum"
        )
    if images.numel() == 0:
        raise ValueError(f"to_uint8 got an empty tensor {tuple(images.shape)}, expected at least one value")
    # 255 levels do not fit in the mantissa of bfloat16
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    bad = int((~images.isfinite()).sum())
    if bad:
        raise ValueError(
            f"to_uint8 got {bad} non-finite values of {images.numel()}, expected all in [0, 1]: a VAE in "
            "half precision can overflow; decode in float32"
        )
    low, high = images.min().item(), images.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"to_uint8 got values in [{low:.4g}, {high:.4g}], expected [0, 1]: clipping would hide a wrong "
            "range; convert images in [-1, 1] by x / 2 + 0.5 and clamp(0, 1) what a decoder overshoots"
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
