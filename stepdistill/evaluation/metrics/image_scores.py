"""Scores of single images and clips beside their features: CLIPScore, likeness to the teacher's, and motion.

A clip's score is the mean of its frames'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import EvaluationError, MissingWeights, problem
from stepdistill.core.files import hash_of
from stepdistill.data.images import resized_part
from stepdistill.evaluation.metrics.features import check_images
from stepdistill.evaluation.metrics.motion import frame_consistency, motion
from stepdistill.networks.clip import Clip, clip
from stepdistill.networks.lpips import lpips

BATCH = 64  # images that go through CLIP at once
ImageScore = Callable[[Tensor, Sequence[int]], dict[str, list[float]]]  # of images and their numbers, by name
TeacherImages = Callable[[Sequence[int]], Tensor]  # those of the same prompts and noises, by their numbers


@dataclass(frozen=True)
class PromptLikeness:
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
    def load(name: str, prompts: Sequence[str], prefix: str, device: torch.device) -> PromptLikeness:
        """Raises MissingWeights."""
        try:
            return PromptLikeness(clip(name, device), name, prefix, prompts)
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
        """Scores by name, of images (B, 3, H, W) or clips (B, F, 3, H, W) uint8 with these numbers."""
        frames = images.flatten(0, -4)
        prompts = [self.prompts[i] for i in numbers for _ in range(len(frames) // len(images))]
        scores = {"clip": _per_item(clip_scores(self.model, frames, prompts, self.prefix), images)}
        return scores if images.ndim == 4 else scores | clip_consistency(self.model, images)


def motion_score(clips: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
    """How much clips (B, F, 3, H, W) uint8 move, see `stepdistill.evaluation.metrics.motion`."""
    return {"motion": motion(clips).tolist()}


def pixel_likeness(teacher: TeacherImages) -> ImageScore:
    """PSNR in dB and SSIM (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861) of images and the teacher's, by
    torchmetrics. Raises EvaluationError where that is not installed."""
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    except ImportError as error:
        why, todo = "it computes PSNR and SSIM", "pip install 'stepdistill[fid]', or leave `pixels` out"
        raise EvaluationError(problem(f"metric pixels, and {error}", "torchmetrics", why, todo)) from error

    def score(images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        a, b = (each.flatten(0, -4).double() for each in (images, teacher(numbers)))
        psnr = peak_signal_noise_ratio(a, b, data_range=255.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
        assert isinstance(ssim, Tensor)
        # equal images have infinite PSNR, which JSON cannot hold: one grey level in one value is the next best
        best = 10 * math.log10(255.0**2 * a[0].numel())
        return {"psnr": _per_item(psnr.clamp(max=best), images), "ssim": _per_item(ssim, images)}

    return score


def perceptual_likeness(teacher: TeacherImages, device: torch.device) -> ImageScore:
    """LPIPS (AlexNet) of images and the teacher's. Raises ConfigError where its weights are not there."""
    network = lpips("alex", device)

    @torch.no_grad()
    def score(images: Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
        a, b = (each.flatten(0, -4).to(device).float() / 127.5 - 1 for each in (images, teacher(numbers)))
        return {"lpips": _per_item(network(a, b), images)}

    return score


def _per_item(scores: Tensor, items: Tensor) -> list[float]:
    """The mean score of each item's frames; an image is one frame."""
    return scores.reshape(len(items), -1).mean(1).tolist()


@torch.no_grad()
def clip_consistency(clip: Clip, clips: Tensor) -> dict[str, list[float]]:
    """`frame_consistency` of CLIP's embeddings of clips (B, F, 3, H, W) uint8: with the frame before, and the first."""
    side, features = clip.model.config.vision_config.image_size, []
    for part in clips.flatten(0, 1).cpu().split(BATCH):
        squares = torch.stack([_square(image, side) for image in part])
        features.append(clip.features(squares.to(clip.model.device, torch.float32) / 255).cpu())
    adjacent, first = frame_consistency(torch.cat(features).unflatten(0, clips.shape[:2]))
    return {"consistency": adjacent.tolist(), "consistency_first": first.tolist()}


@torch.no_grad()
def clip_scores(clip: Clip, images: Tensor, prompts: Sequence[str], prefix: str = "") -> Tensor:
    """Scores (N,) in [0, 100], float32 on the CPU: 100 max(cos, 0) of each image and its prompt.

    Hessel et al. 2021, https://arxiv.org/abs/2104.08718, with torchmetrics' scale of 100 for the paper's 2.5. The mean
    over images is of values at or above zero, where torchmetrics bounds the mean alone. As CLIP's own processor does,
    the shorter side is resized, the middle cut out; a prompt's tokens beyond the tokenizer's limit (77) are left out.
    Numbers of different CLIP models, or of different prefixes, are not comparable. Raises TypeError, ValueError.

    Args:
        images: uint8 (N, 3, H, W).
        prefix: goes before every prompt, such as the paper's "A photo depicts ".
    """
    check_images("clip_scores", images)
    if len(prompts) != len(images):
        raise ValueError(
            f"clip_scores got {len(images)} images and {len(prompts)} prompts, expected equal numbers: each "
            "image is scored with its own prompt; pass both over the same list"
        )
    side = clip.model.config.vision_config.image_size
    words, cosines = [prefix + prompt for prompt in prompts], []
    for start in range(0, len(images), BATCH):
        part = torch.stack([_square(image, side) for image in images[start : start + BATCH].cpu()])
        cosines.append(clip(part.to(clip.model.device, torch.float32) / 255, words[start : start + BATCH]))
    return 100 * torch.cat(cosines).clamp(min=0).cpu()


def _square(image: Tensor, side: int) -> Tensor:
    """uint8 (3, side, side), as CLIP's processor makes it by PIL, so that `clip` has nothing left to resize."""
    pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    width, height = (side * length // min(pil.size) for length in pil.size)
    left, top = (width - side) // 2, (height - side) // 2
    part = (left, top, left + side, top + side)
    pil = resized_part(pil, (width, height), part, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)
