"""States of the teacher's own guided trajectories, with its guided output there: what guidance adapters learn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Seed
from stepdistill.core.errors import ConfigError, DataError, problem
from stepdistill.core.random import noise_of, sample_rng
from stepdistill.data.base import GuidedState, Sample
from stepdistill.data.made import SampleCount, TeacherCalls, TeacherMade


@dataclass(frozen=True, kw_only=True)
class Trajectories(TeacherMade):
    """States on guided trajectories that the teacher makes from a source's prompts, before training and once only.

    A trajectory has one guidance scale, drawn for it. Of its states a random few are kept: x_t and the network's
    guided output there, in half precision; all of it is a function of `seed` and the trajectory's number. Jensen &
    Sadat 2025, https://arxiv.org/abs/2503.07274, keep every step; at SDXL's size a trajectory then has 262 MB.

    Args:
        source: the prompts; captions are dropped there, not here.
        folder: where the states are kept. What lies there is used where teacher and settings are the same, and
            refused where they are not. A generation that was cut goes on where it was; more may be added by `count`.
        count: number of trajectories.
        num_inference_steps: N, deterministic solver steps of a trajectory (DDIM; Euler for a flow).
        kept_steps: states kept of each: a number of random ones, 1 to N; or a list of numbers of steps, 1 to N - 1,
            after which they are kept. Beyond the last one the teacher is not called.
        guidance_range: w of `uncond + w (cond - uncond)` is uniform between these two, ...
        guidance_hole: ... but never in here: scales to test on. None leaves nothing out.
        seed: of noises, scales, and which steps are kept.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prompts", "trajectories"})
    chunk: ClassVar[int] = 16
    title: ClassVar[str] = "Guided trajectories"
    stored: ClassVar[str] = "trajectories.json"
    count: SampleCount = 512
    num_inference_steps: Count = 50
    kept_steps: int | tuple[Count, ...] = 10
    guidance_range: tuple[Amount, Amount] = (1.0, 12.0)
    guidance_hole: tuple[float, float] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        (low, high), hole = self.guidance_range, self.guidance_hole
        if low > high or (hole is not None and not low < hole[0] <= hole[1] < high):
            got = f"guidance_range {list(self.guidance_range)} with guidance_hole {hole and list(hole)}"
            why = "scales are drawn between the range's ends, and outside of the hole"
            raise ConfigError(problem(got, "low <= high, and the hole strictly inside", why, "correct the numbers"))
        kept, last = self.kept_steps, self.num_inference_steps - 1
        if isinstance(kept, tuple) and (not kept or list(kept) != sorted(set(kept)) or kept[-1] > last or kept[0] < 1):
            got, expected = f"kept_steps {list(kept)}", f"ascending numbers of steps, 1 to {last}"
            raise ConfigError(problem(got, expected, "they are steps of the teacher's solver", "correct the list"))
        if not 1 <= self.states <= self.num_inference_steps or self.count < 1:
            got = f"count {self.count}, kept_steps {self.kept_steps} of num_inference_steps {self.num_inference_steps}"
            why = "there would be no states, or some twice"
            raise ConfigError(problem(got, "count >= 1 and 1 <= kept_steps <= steps", why, "correct the numbers"))
        if self.proportion_empty_prompts:
            got, why = (
                "proportion_empty_prompts beside stored outputs",
                "an output belongs to the prompt it was made by",
            )
            raise ConfigError(problem(got, "0", why, "set it on data.source instead"))

    def facts(self, teacher: str, shape: Sequence[int]) -> dict[str, object]:
        """What all trajectories depend on; prompts are noted by chunk, so that more can be added."""
        names = ("num_inference_steps", "kept_steps", "guidance_range", "guidance_hole", "seed")
        return {"teacher": teacher, "shape": list(shape)} | {name: vars(self)[name] for name in names}

    def drawn(self, i: int) -> tuple[float, list[int]]:
        """The guidance scale of trajectory i, and the steps of it that are kept, ascending from 0."""
        rng, (low, high) = sample_rng(self.seed, -1 - i), self.guidance_range
        start, end = self.guidance_hole or (high, high)
        scale = low + rng.random() * (high - low - (end - start))
        scale += end - start if scale >= start else 0.0
        if isinstance(self.kept_steps, tuple):
            return scale, list(self.kept_steps)
        return scale, sorted(rng.sample(range(self.num_inference_steps), self.kept_steps))

    def prompt_of(self, i: int) -> str:
        """The prompt of trajectory i: the source's items in turn."""
        return self.source.prompt(i % len(self.source), sample_rng(self.seed, i))

    def make(self, teacher: TeacherCalls, ids: Sequence[int]) -> dict[str, Tensor]:
        noise = torch.stack([noise_of(self.seed, i, teacher.shape) for i in ids])
        prompts = [self.prompt_of(i) for i in ids]
        scales, kept = (torch.tensor(each) for each in zip(*(self.drawn(i) for i in ids), strict=True))
        states = teacher.trajectories(prompts, noise, scales, kept, self.num_inference_steps)
        halves = {"x_t": states.x_t.half(), "output": states.output.half()}
        return halves | {"t": states.t.float(), "guidance_scale": states.guidance_scale.float()}

    def marks(self, ids: Sequence[int]) -> dict[str, str]:
        """Prompts are noted by file, so that more can be added."""
        return {"prompts": sha256("\n".join(map(self.prompt_of, ids)).encode()).hexdigest()[:16]}

    def __len__(self) -> int:
        return self.count * self.states

    @property
    def states(self) -> int:
        """The number of states kept of each trajectory."""
        return len(self.kept_steps) if isinstance(self.kept_steps, tuple) else self.kept_steps

    def captions(self, i: int) -> Sequence[str]:
        return [self.prompt_of(i // self.states)]

    def sample(self, i: int, rng: random.Random) -> Sample:
        j, k = divmod(i, self.states)
        try:
            with safe_open(self._chunk(j // self.chunk), "pt") as file:  # a slice reads no more than itself
                rows = {name: file.get_slice(name)[j % self.chunk, k].float() for name in GuidedState._fields}
        except (OSError, SafetensorError) as error:
            todo = "let the run make them, or `stepdistill data make`"
            got = f"no readable {self._chunk(j // self.chunk)} ({error})"
            raise DataError(problem(got, "guided states", "they are trained on", todo)) from error
        noise = noise_of(self.seed, j, tuple(rows["x_t"].shape))
        return Sample(prompt=self.prompt_of(j), noise=noise, state=GuidedState(**rows), item=i)

    def name(self, i: int) -> str:
        return f"state {i % self.states} of trajectory {i // self.states} in {self.path}"

    def stamp(self, i: int) -> str:
        return self.prompt_of(i // self.states)
