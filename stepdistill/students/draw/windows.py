"""Videos that are longer than those a student was trained for: window after window, each of which begins with the end
of the one before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.core.errors import ConfigError, problem

Window = Callable[[Tensor, int], Tensor]  # frames (B, C, o, H, W) that are given and a number, to (B, C, F, H, W)


def stitched(draw: Window, begin: Tensor, windows: int, overlap: int) -> Tensor:
    """A sequence (B, C, F + (W - 1) (F - o), H, W) of W windows of F frames, each given the last o before it.

    With exact windows every window has the right distribution. Across a seam only what the overlap knows is carried
    on: the covariance of a frame before it and one after it is `S_io S_oo^-1 S_ok`. One frame carries no velocity.

    Args:
        draw: a window that begins with given frames, and its number from 0.
        begin: (B, C, k, H, W), what the first window begins with.
        overlap: o, from 1 to F - 1.
    """
    video = draw(begin, 0)
    frames = video.shape[2]
    if not 0 < overlap < frames:
        got, why = f"an overlap of {overlap} frames", "a window begins with them and must go on"
        raise ConfigError(problem(got, f"1 to {frames - 1}", why, "choose another overlap"))
    for number in range(1, windows):
        given = video[:, :, -overlap:]
        video = torch.cat([video, draw(given, number)[:, :, overlap:]], 2)
    return video
