"""Replicates of the diversity within prompts, for its interval and for those of quotients."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import feature_diversity
from stepdistill.evaluation.metrics.jackknife import block_sizes
from stepdistill.evaluation.metrics.stats import rows_of


def diversity_replicates(features: Tensor, prompt_index: Tensor, blocks: int = 20) -> Tensor:
    """`feature_diversity` of all samples, then without each block of consecutive ones: (1 + blocks,), float64.

    As `stepdistill.evaluation.metrics.jackknife.interval` takes them, also quotients and differences of equal blocks.
    Each prompt needs two samples without any block, see `fewest_outside`. Raises TypeError, ValueError.

    Args:
        features: (N, D).
        prompt_index: (N,) integers.
    """
    x, prompt_index = rows_of(features), prompt_index.cpu()
    feature_diversity(features, prompt_index)  # its checks
    own = torch.repeat_interleave(torch.arange(1, blocks + 1), torch.tensor(block_sizes(len(x), blocks)))
    outside = (own.unsqueeze(1) != torch.arange(blocks + 1)).double()  # of a sample and each replicate; 0 has all
    replicate = torch.zeros(blocks + 1, dtype=torch.float64)
    prompts = prompt_index.unique()
    for prompt in prompts:
        mine = prompt_index == prompt
        kept, apart = outside[mine], torch.cdist(x[mine], x[mine], compute_mode="donot_use_mm_for_euclid_dist")
        count = kept.sum(0)
        if count.min() < 2:
            raise ValueError(
                f"diversity_replicates got {int(count.min())} samples of prompt {prompt.item()} outside of block "
                f"{int(count.argmin())}, expected two or more: a single image has no pairwise distance; draw more or "
                "drop the prompt"
            )
        replicate += (apart @ kept * kept).sum(0) / (count * (count - 1) * len(prompts))
    return replicate


def fewest_outside(prompt_index: Tensor, blocks: int = 20) -> int:
    """The fewest samples that any prompt keeps without one block, for prompt_index (N,). Raises ValueError."""
    _, place, counts = prompt_index.cpu().unique(return_inverse=True, return_counts=True)
    parts = place.split(block_sizes(len(place), blocks))
    return min(int((counts - part.bincount(minlength=len(counts))).min()) for part in parts)
