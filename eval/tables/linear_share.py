"""How much of a reward tuning can reach at most: the part that is linear in the noises of a student's steps.

A stochastic step is a normal distribution, of which training moves the mean alone. With a large beta, PSO's optimum
moves it by `g_k / beta`, where `g_k = Cov(r, z_k)` given the state before step k. So the mean reward rises by
`sum_k |g_k|^2 / beta`, and the optimum over all distributions would raise it by `Var(r) / beta`, both given the
starting noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.prediction import Estimate
from stepdistill.core.progress import progress
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import few_step
from stepdistill.evaluation.metrics.jackknife import Interval, ratio_of_means
from stepdistill.evaluation.spec import SEED_B
from stepdistill.families.base import Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.students.contract import read_contract
from stepdistill.students.single import in_memory
from tables.benchmark import prompts

STARTS, PATHS = 32, 256  # starting noises, and paths of each and of each step
Reward = Callable[[Tensor, list[str]], Tensor]


def linear_share(draw: Callable[[int, int], tuple[Tensor, Tensor]], starts: int, steps: int) -> Interval:
    """`sum_k |g_k|^2 / Var(r)`, both means over the starting noises.

    Args:
        draw: rewards (M,) and noises of step k (M, D), of paths that share starting noise i and the noises before k.
        steps: number of stochastic steps.
    """
    linear, total = torch.zeros(starts, dtype=torch.float64), torch.zeros(starts, dtype=torch.float64)
    for i in progress(range(starts), title="linear share", unit="noise", shown=True):
        for k in range(steps):
            r, z = (each.double() for each in draw(i, k))
            halves = zip(r.chunk(2), z.chunk(2), strict=True)
            first, last = ((a - a.mean()) @ b / (len(a) - 1) for a, b in halves)  # apart, |g_k|^2 has no bias
            linear[i] += first @ last
            if k == 0:
                total[i] = r.var()
    return ratio_of_means(linear, total, min(20, starts // 2))


@torch.no_grad()
def student_share(family: Family, folder: Path, reward: Reward) -> Interval:
    """`linear_share` of a student folder's own steps."""
    contract = read_contract(folder)
    pipe, backbone = in_memory(folder, contract, family)
    schedule, sampler = family.schedule(pipe.scheduler), contract.sampler()
    denoise = Denoiser(backbone, "student", schedule, family.kind(pipe), family.call, grad=False)
    shape, captions = family.latent_shape(pipe, *contract.resolution), prompts(STARTS)

    def draw(i: int, k: int) -> tuple[Tensor, Tensor]:
        fresh, noises = torch.Generator().manual_seed(STARTS * k + i), []
        one = family.condition(pipe, [captions[i]])
        each = {key: value.expand(PATHS, *value.shape[1:]) for key, value in one.items()}

        def noise(step: int) -> Tensor:
            noises.append(torch.randn(1 if step < k else PATHS, *shape, generator=fresh).expand(PATHS, *shape))
            return noises[-1]

        def once_where_shared(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            if len(noises) > k:  # the paths have parted
                return denoise(x_t, t, cond)
            est = denoise(x_t[:1], t[:1], one)
            return Estimate(est.x0.expand_as(x_t), est.eps.expand_as(x_t))

        x_t = noise_of(SEED_B, i, shape).expand(PATHS, *shape)
        ends = few_step(once_where_shared, schedule, sampler, x_t, each, noise)
        return reward(family.decode(pipe, ends) / 2 + 0.5, []), noises[k].flatten(1)

    return linear_share(draw, STARTS, len(sampler.timesteps) - 1)
