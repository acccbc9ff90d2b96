"""What is measured of single images beside their features: CLIP score, and likeness to the teacher's image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepdistill.core.errors import EvaluationError, MissingWeights, problem
from stepdistill.evaluation.fill import Score
from stepdistill.evaluation.metrics.clip_score import clip_scores
from stepdistill.evaluation.metrics.identity import hash_of
from stepdistill.evaluation.store import Store
from stepdistill.networks.clip import Clip, clip
from stepdistill.networks.lpips import lpips


@dataclass(frozen=True)
class ClipScore:
    """CLIP scores of images with their prompts.

    Args:
        model: the CLIP.
        name: folder or hub id of it.
        prefix: before each prompt.
        prompts: of every image, by number.
    """

    model: Clip
    name: str
    prefix: str
    prompts: Sequence[str]

    @staticmethod
    def load(name: str, prompts: Sequence[str], prefix: str, device: torch.device) -> ClipScore:
        """Raises MissingWeights."""
        try:
            return ClipScore(clip(name, device), name, prefix, prompts)
        except OSError as error:
            raise MissingWeights(
                f"the CLIP score needs {name}, which is no folder, not in the Hugging Face cache, and could not be "
                f"downloaded: {str(error).splitlines()[0]}\n"
                f"Copy the folder (`hf download {name} --local-dir PATH`) from a connected machine and pass\n"
                "  --clip PATH\nor leave the score out."
            ) from error

    @cached_property
    def facts(self) -> dict[str, str]:
        """What the scores depend on besides images and prompts."""
        digest = hash_of(self.model.model.state_dict())
        return {"model": f"{self.name}@{digest[:8]}", "weights_sha256": digest, "prefix": self.prefix}

    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        """Scores by name, of images (B, 3, H, W) uint8 with these numbers."""
        own = [self.prompts[i] for i in numbers]
        return {"clip": clip_scores(self.model, images, own, self.prefix).tolist()}


def against_teacher(teacher: Store) -> Score:
    """PSNR in dB and SSIM (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861) of images and the teacher's, by
    torchmetrics. Raises EvaluationError where that is not installed."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        why, todo = "they are torchmetrics'", "pip install 'stepdistill[fid]', or leave `pixels` out"
        raise EvaluationError(problem(f"metric pixels, and {error}", "torchmetrics", why, todo)) from error

    def score(images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        a, b = images.double(), _same(teacher, numbers).double()
        psnr = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
        assert isinstance(ssim, Tensor)
        # equal images have infinite PSNR, which JSON cannot hold: one grey level in one value is the next best
        best = 10 * math.log10(255.0**2 * images[0].numel())
        return {"psnr": psnr.clamp(max=best).tolist(), "ssim": ssim.tolist()}

    return score


def perceptual(teacher: Store, device: torch.device) -> Score:
    """LPIPS (AlexNet) of images and the teacher's. Raises ConfigError where its weights are not there."""
    network = lpips("alex", device)

    @torch.no_grad()
    def score(images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        a, b = (each.to(device).float() / 127.5 - 1 for each in (images, _same(teacher, numbers)))
        return {"lpips": network(a, b).tolist()}

    return score


def _same(teacher: Store, numbers: Sequence[int]) -> Tensor:
    """The teacher's images of the same prompts and noises."""
    return teacher.images(range(numbers[0], numbers[-1] + 1))
