"""Metrics of video clips, uint8 (N, F, 3, H, W): single frames, how they move, and how windows are joined.

A Frechet distance of frames cannot see a clip that is frozen, slow or shuffled; that of the differences of adjacent
frames can. It cannot see a reversed clip where as many clips move one way as the other: that takes a distance for each
motion. All numbers of motion are in grey levels, of 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stepdistill.core.random import sample_rng
from stepdistill.evaluation.metrics.features import Extractor
from stepdistill.evaluation.metrics.jackknife import replicates

FRAME_SEED = 0  # of the draws of one frame a clip
GREY = 127  # of a difference image where nothing moves
LEAST_OF_GROUP = 10  # clips: five blocks of two


class Bend(NamedTuple):
    """Mean squares of second differences over time, one a clip (N,): at the seams of windows, and at other frames."""

    seam: Tensor
    inside: Tensor


def check_uint8_clips(who: str, clips: Tensor) -> None:
    """Raise TypeError, ValueError for anything but uint8 (N, F, 3, H, W) with F >= 2; `who` is named in it."""
    if clips.dtype != torch.uint8:
        raise TypeError(
            f"{who} got clips of {clips.dtype}, expected uint8 in [0, 255]: [0, 1], [-1, 1] and "
            "[0, 255] cannot be told apart safely; convert float clips with to_uint8"
        )
    if clips.ndim != 5 or clips.shape[2] != 3 or 0 in clips.shape or clips.shape[1] < 2:
        raise ValueError(
            f"{who} got clips of shape {tuple(clips.shape)}, expected (N, F, 3, H, W) with F of 2 or more: frames come "
            "before channels, and one frame has no motion; permute, or evaluate images"
        )


def frame_features(extractor: Extractor, clips: Tensor, numbers: Sequence[int]) -> Tensor:
    """Features (N, D) of one frame of each clip, drawn uniformly by the clip's number: the same frame in every row.

    All frames of a clip would be N F rows that depend on one another. Raises TypeError, ValueError.
    """
    check_uint8_clips("frame_features", clips)
    picked = [sample_rng(FRAME_SEED, number).randrange(clips.shape[1]) for number in numbers]
    return extractor(torch.stack([clip[f] for clip, f in zip(clips, picked, strict=True)]))


def motion_features(extractor: Extractor, clips: Tensor) -> Tensor:
    """Features (N, D) of the difference images `127 + (x_{f+1} - x_f) / 2`, averaged over each clip.

    Raises TypeError, ValueError.
    """
    check_uint8_clips("motion_features", clips)
    return torch.stack([extractor(_difference_images(clip)).mean(0) for clip in clips])


def motion(clips: Tensor) -> Tensor:
    """Mean over pixels and time of `|x_{f+1} - x_f|` of each clip, (N,) float64; 0 is a frozen one.

    A student's mean over clips, over its teacher's at equal noises, is its motion ratio. Raises TypeError, ValueError.
    """
    check_uint8_clips("motion", clips)
    return torch.stack([_differences(clip).abs().double().mean() for clip in clips])


def image_distance(clips: Tensor, images: Tensor, frame: int = 1) -> Tensor:
    """Mean absolute difference of one frame of each clip from its image (N, 3, H, W), (N,) float64.

    Where a pipeline holds its image, frame 0 is that image, and only frame 1 shows whether the clip goes on from it.
    Raises TypeError, ValueError.
    """
    check_uint8_clips("image_distance", clips)
    if images.shape != clips[:, 0].shape or images.dtype != torch.uint8:
        raise ValueError(
            f"image_distance got images {tuple(images.shape)} of {images.dtype}, expected {tuple(clips[:, 0].shape)} "
            "of uint8: each clip is compared with its own image; crop them as the clips"
        )
    return (clips[:, frame].double() - images.double()).abs().mean((1, 2, 3))


def frame_consistency(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosines of adjacent frames, and of each later frame with the first, (N,) each, of features (N, F, D).

    Both are 1 for a frozen clip: read them beside the motion ratio only.
    """
    adjacent = cosine_similarity(features[:, 1:], features[:, :-1], dim=-1)
    first = cosine_similarity(features[:, 1:], features[:, :1], dim=-1)
    return adjacent.mean(1), first.mean(1)


def seam_bend(sequences: Tensor, window: int, overlap: int) -> Bend:
    """How far motion changes where windows are joined, and elsewhere: mean squares of `x_{f+1} - 2 x_f + x_{f-1}`.

    A window goes on from the last `overlap` frames before it. At a seam f is the last of those. Equal means are a join
    that cannot be seen; one frame of overlap tells no velocity, so that its seams bend more. Raises ValueError.

    Args:
        sequences: (N, T, ...) of any number type, with `T = window + k (window - overlap)` frames and k >= 1.
        window: frames of one window.
    """
    new, length = window - overlap, sequences.shape[1]
    if not 1 <= overlap < window or length <= window or (length - window) % new or window < 4:
        raise ValueError(
            f"seam_bend got {length} frames of windows of {window} with overlap {overlap}, expected window + k (window "
            "- overlap) frames, k of 1 or more, windows of 4 or more: seams are at the end of each overlap; pass the "
            "numbers that the sequence was made with"
        )
    bends = torch.stack([_bends(sequence) for sequence in sequences])  # of frames 1 to T - 2
    at_seam = torch.zeros(length - 2, dtype=torch.bool)
    at_seam[window - 2 :: new] = True
    return Bend(bends[:, at_seam].mean(1), bends[:, ~at_seam].mean(1))


def replicates_by_group(
    rows: Sequence[Tensor], ref: Tensor, groups: Tensor, blocks: int = 20
) -> tuple[dict[int, Tensor], list[int]]:
    """`replicates` of each group's own features, such as those of one motion, and how many samples each block holds.

    Block k of all groups may leave at once, so that the mean over groups of these replicates is one, too. Groups too
    small for `blocks` have fewer. Raises TypeError, ValueError.

    Args:
        rows, ref: features (N, D) each in one order, see `replicates`.
        groups: (N,) the number of each sample's group.
    """
    members = {int(group): (groups == group).nonzero().flatten() for group in groups.unique()}
    smallest = min(members, key=lambda group: len(members[group]))
    blocks = min(blocks, len(members[smallest]) // 2)
    if len(members[smallest]) < LEAST_OF_GROUP:
        raise ValueError(
            f"replicates_by_group got {len(members[smallest])} samples of group {smallest}, expected {LEAST_OF_GROUP} "
            "or more: an interval needs five blocks of two; draw more, or merge groups"
        )
    values = {group: replicates([row[own] for row in rows], ref[own], blocks) for group, own in members.items()}
    return values, [sum(len(own.tensor_split(blocks)[k]) for own in members.values()) for k in range(blocks)]


def _differences(clip: Tensor) -> Tensor:
    """int16 (F - 1, 3, H, W)."""
    return clip[1:].to(torch.int16) - clip[:-1].to(torch.int16)


def _difference_images(clip: Tensor) -> Tensor:
    """uint8 (F - 1, 3, H, W). Halves are rounded to even, so that a reversed clip has the mirror image about grey."""
    return (GREY + _differences(clip) / 2).round().to(torch.uint8)


def _bends(sequence: Tensor) -> Tensor:
    """(T - 2,) float64."""
    x = sequence.double().reshape(len(sequence), -1)
    return (x[2:] - 2 * x[1:-1] + x[:-2]).square().mean(1)
