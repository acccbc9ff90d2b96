"""The identity of features: network, weights, resampling and precision. It decides the name of a distance on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INCEPTION = "inception-2015-12-05"
RANDOM_INCEPTION = "random-inception"
FID_WEIGHTS = "6726825d"  # the start of the sha256 of the file, as torch-fidelity and pytorch-fid name it
NO_WEIGHTS = "none"


@dataclass(frozen=True)
class Identity:
    """What a row of features depends on; distances are comparable where it, N and the reference are equal.

    Args:
        weights_sha256: of the file, or of the tensors (`hash_of`); `none` where there are no weights.
        weights_path: file, folder or hub id; or what else the weights come from.
        dim: features a row.
        layer: the layer that they are read from.
        resize: resampling and size.
        input_norm: what the network is given for a grey level u in [0, 255].
        dtype: of the network's weights and activations.
        batch: images that go through the network at once; results depend on it by rounding.
        clips: whether they are of clips: of one frame each, and of the differences of frames.
    """

    arch: str
    weights_sha256: str
    weights_path: str
    dim: int
    layer: str
    resize: str
    input_norm: str
    dtype: Dtype
    batch: int
    clips: bool = False

    @property
    def id(self) -> str:
        """`<arch>@<first 8 hex digits of the weights' sha256>/<resize>`, and `/<dtype>` where that is not fp32, and
        `/clips` of clips."""
        text = f"{self.arch}@{self.weights_sha256[:8]}/{self.resize}" + f"/{self.dtype}" * (self.dtype != "fp32")
        return text + "/clips" * self.clips

    @property
    def key(self) -> Literal["fid", "fd", "fd_frames"]:
        """The name of a Frechet distance on these features: `fid` on the weights that FID is defined on, else `fd`; of
        clips, whose frames it compares, `fd_frames`.

        Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
        """
        if self.clips:
            return "fd_frames"
        return "fid" if self.arch == INCEPTION and self.weights_sha256.startswith(FID_WEIGHTS) else "fd"

    def reasons(self) -> list[str]:
        """Why values on these features are not comparable with published ones of this name; empty if they may be."""
        reasons = []
        if self.arch == RANDOM_INCEPTION:
            reasons.append("the network's weights are random")
        if self.arch == INCEPTION and self.key == "fd":
            reasons.append(f"unknown weights: sha256 {self.weights_sha256[:8]}, and FID is defined on {FID_WEIGHTS}")
        if self.dtype != "fp32":
            reasons.append(f"features in {self.dtype}: half precision moves the distance")
        return reasons
