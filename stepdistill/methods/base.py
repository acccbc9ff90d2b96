"""What a method is: hyper-parameters, the roles it declares, and a generator of updates in the paper's order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, RoleDenoise
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data.base import GuidedState
from stepdistill.networks.roles import Role


class Update(NamedTuple):
    """One optimizer step of `roles` on `loss` (a scalar with a graph); `logs` are detached scalars."""

    roles: tuple[str, ...]
    loss: Tensor
    logs: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples.

    Args:
        index: the samples' positions in the whole run's stream of data; they key the random draws.
        cond: the family's embeddings, B rows each.
        prompts: what they are embeddings of, B of them.
        shape: (C, H, W) of one latent.
        latents: (B, C, H, W) clean latents in the network's scale, where the data has them.
        noise: (B, C, H, W) the starting noise that the teacher turned into `latents`, where the data are pairs.
        state: of B guided trajectories, where the data are such.
    """

    index: tuple[int, ...]
    cond: Condition
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None
    prompts: tuple[str, ...] = ()
    state: GuidedState | None = None


@dataclass(frozen=True)
class StepContext:
    """What a method may touch in one step: denoisers and modules by role, the schedule, the null condition, pixels
    (B, 3, H, W) in about [-1, 1] from latents, and randomness.

    Draws are keyed by (seed, step, sample, purpose), so the number of processes, accumulation, or a term switched
    off change no other draw. No method uses a global generator.
    """

    schedule: NoiseSchedule
    null: Condition
    denoiser: Callable[[str], RoleDenoise]
    module: Callable[[str], nn.Module]
    decode: Callable[[Tensor], Tensor]
    seed: int
    step: int
    device: torch.device

    def _generator(self, index: int | str, purpose: str) -> torch.Generator:
        key = blake2b(f"{self.seed}/{self.step}/{index}/{purpose}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "big"))

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal (B, C, H, W)."""
        rows = [torch.randn(batch.shape, generator=self._generator(i, purpose)) for i in batch.index]
        return torch.stack(rows).to(self.device)

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        """Uniform in [0, 1), (B,)."""
        rows = [torch.rand((), generator=self._generator(i, purpose)) for i in batch.index]
        return torch.stack(rows).to(self.device)

    def shared(self, purpose: str) -> float:
        """One uniform number in [0, 1), the same for every sample, micro-batch and process of this step."""
        return torch.rand((), generator=self._generator("shared", purpose)).item()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A distillation method. Subclasses are final, hold nothing but hyper-parameters, and cite their paper."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What a sample must carry: "prompts", "latents" (images do, too), "pairs" (latents and their noise), or
        "trajectories" (guided states)."""

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """The roles to add to the backbone, in order."""

    @abstractmethod
    def student_role(self) -> str:
        """The role that becomes the student."""

    @abstractmethod
    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        """How the student is sampled in `steps` steps (None: as many as it is trained for)."""

    @abstractmethod
    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError where this method cannot run on this noise process; called before any training."""

    def finalize(self, bend: Callable[[], float]) -> Method:
        """The method as the student is exported, after training; `bend` measures straightness over transport cost."""
        return self

    @abstractmethod
    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step. Their number and roles depend on `step` and the config only; no yield inside a
        role's context or `no_grad`; only detached tensors are held across a yield."""
