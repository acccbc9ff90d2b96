"""The contract of a reward: a frozen, differentiable score of images and their prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from stepdistill.core.devices import full_precision
from stepdistill.core.errors import ConfigError, MissingWeights, problem
from stepdistill.core.pixels import frames_of

Score: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W) and B prompts to scores (B,)
TODO = "see docs/guides/rewards.md for where weights are found, and for how a pickle is converted"


class RewardScale(NamedTuple):
    """A reward on samples of the teacher.

    Args:
        mean: of the scores.
        std: standard deviation of the scores.
        slope: root mean square of the score's gradient over the elements of a sample's latents, times their number: a
            reward that is linear in the latents rises by at most `slope` where they move by 1. None where it is not
            asked for: a reward may have no gradient.
    """

    mean: float
    std: float
    slope: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reward(ABC):
    """A score of images, higher is better, which a config names by the dotted path of its class.

    Subclasses hold settings only, all of them hashable, and build the score from them.
    """

    @abstractmethod
    def build(self, device: torch.device) -> Score:
        """The score on a device, with frozen float32 weights. It is given float32 images in about [0, 1]: what a
        decoder overshoots is clamped here, as the network's own preprocessing does it."""

    @property
    def identity(self) -> str:
        """What the scores depend on: the class, with its settings or, as `CLASS@DIGEST`, the sha256 of its weights."""
        return repr(self)

    def load(self, device: torch.device) -> Score:
        """The score, built once for each reward and device in this process.

        It takes images (B, 3, H, W) in about [0, 1] with their B prompts, computes in float32 whatever the autocast,
        and gives (B,). Where the images ask for a gradient, the scores have one.

        Raises:
            MissingWeights: when loading; the weights were not found.
            WrongWeights: when loading; they are another network's.
            ConfigError: when called; the scores are not as described.
        """
        return _loaded(self, device)


class MeasureReward(Protocol):
    """Scores samples of the teacher by a reward, with the slope where it is asked for."""

    def __call__(self, reward: Reward, slope: bool = False) -> RewardScale: ...


def rewards_by_name(rewards: Iterable[Reward]) -> dict[str, Reward]:
    """Rewards by class name; a second one of a class has a number."""
    names, seen = {}, Counter[str]()
    for reward in rewards:
        name = type(reward).__name__
        seen[name] += 1
        names[name if seen[name] == 1 else f"{name}_{seen[name]}"] = reward
    return names


@cache
def _loaded(reward: Reward, device: torch.device) -> Score:
    try:
        compute = reward.build(device)
    except OSError as error:  # of Transformers
        got, why = f"{reward!r} without its files ({str(error).splitlines()[0]})", "it could not be loaded"
        raise MissingWeights(problem(got, "folders, or hub ids that can be reached", why, TODO)) from error

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.ndim == 5:
            count = images.shape[2]
            each = score(frames_of(images), [prompt for prompt in prompts for _ in range(count)])
            return each.view(-1, count).mean(1)
        with full_precision(device):
            scores = compute(images.float(), prompts)
        if scores.shape != images.shape[:1]:
            got = f"scores of shape {tuple(scores.shape)} from {reward.identity} for {len(images)} images"
            why, todo = "each image has one score", "return one number for each image"
            raise ConfigError(problem(got, f"({len(images)},)", why, todo))
        if torch.is_grad_enabled() and images.requires_grad and not scores.requires_grad:
            why = "the student would learn nothing from it"
            todo = "compute it from the images with torch alone, without detach, item or numpy"
            raise ConfigError(problem(f"{reward.identity} without a gradient", "one in the images", why, todo))
        return scores

    return score
