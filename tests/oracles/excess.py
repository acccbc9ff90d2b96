"""The excess of a row over the teacher's own distance, from features."""

from torch import Tensor

from stepdistill.evaluation.metrics.jackknife import Interval, block_sizes, interval, replicates


def excess(row: Tensor, ref: Tensor, floor: Tensor, blocks: int = 20) -> Interval:
    """F(row, ref) - F(floor, ref) with a block-jackknife interval; may be negative.

    All three are features (N, D) in one order of prompts. Each replicate drops the same run of consecutive
    indices from all three, so what they share cancels. The interval is for the expected excess at this N.
    """
    distances = replicates([row, floor], ref, blocks)
    return interval(distances[0] - distances[1], block_sizes(len(row), blocks))
