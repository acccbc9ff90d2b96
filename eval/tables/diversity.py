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
    Each prompt needs two samples without any block. Raises TypeError, ValueError.
    """
    x, prompt_index = rows_of(features), prompt_index.cpu()
    feature_diversity(features, prompt_index)  # its checks
    without = [torch.arange(0), *torch.arange(len(x)).split(block_sizes(len(x), blocks))]
    replicate = torch.zeros(len(without), dtype=torch.float64)
    prompts = prompt_index.unique()
    for prompt in prompts:
        places = (prompt_index == prompt).nonzero().flatten()
        apart = torch.cdist(x[places], x[places], compute_mode="donot_use_mm_for_euclid_dist")
        for k, block in enumerate(without):
            kept = ~torch.isin(places, block)
            count = int(kept.sum())
            if count < 2:
                raise ValueError(
                    f"diversity_replicates got {count} samples of prompt {prompt.item()} outside of block {k}, "
                    "expected two or more: a single image has no pairwise distance; draw more or drop the prompt"
                )
            replicate[k] += apart[kept][:, kept].sum() / (count * (count - 1) * len(prompts))
    return replicate
