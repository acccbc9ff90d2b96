"""The scale of rewards: their mean, spread and slope on samples of the teacher, measured once before training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.rewards.base import Reward, RewardScale
from stepdistill.training.sampling import sample_teacher, teacher_facts
from stepdistill.training.setup import Session

SAMPLES = 64
FIRST = 60_000  # numbers of their noises from here on: validation images and the collapse monitor have smaller ones
FILE = "rewards.json"


def calibrate(session: Session) -> None:
    """Measure what the session's method must know of its rewards. It is kept in the run's folder, where a resumed run
    reads it."""
    file, scales = Path(session.run.train.output_dir) / FILE, Scales(session)
    with session.leading() as leader:
        if leader:
            scales.read(file)
            session.run.method.calibrate(scales.measured)
            scales.write(file)
    distributed.barrier()
    scales.read(file)
    session.method = session.run.method.calibrate(lambda reward, slope=False: scales.known[reward.identity])


class Scales:
    """The scales of rewards on one set of the teacher's samples."""

    def __init__(self, session: Session) -> None:
        self.session, self.known = session, dict[str, RewardScale]()

    @cached_property
    def prompts(self) -> list[str]:
        """Of samples spread over the whole of the data."""
        data = self.session.run.data
        return [data.captions(i * len(data) // SAMPLES)[0] for i in range(SAMPLES)]

    @property
    def facts(self) -> dict[str, object]:
        """What the scales depend on, beside the rewards."""
        return teacher_facts(self.session) | {"prompts": self.prompts}

    @cached_property
    def latents(self) -> Tensor:
        """The samples (N, C, h, w), on the cpu."""
        print(f"rewards: sampling {SAMPLES} images of the teacher, to measure mean and spread", flush=True)
        parts = torch.arange(SAMPLES).split(self.session.run.train.train_batch_size)
        drawn = [
            sample_teacher(self.session, [self.prompts[i] for i in part], [FIRST + i for i in part.tolist()]).cpu()
            for part in parts
        ]
        return torch.cat(drawn)

    def measured(self, reward: Reward, slope: bool = False) -> RewardScale:
        """A reward's scale, which is known from then on. Raises ConfigError where all samples score the same."""
        if reward.identity not in self.known:
            parts = zip(*self._scored(reward, slope), strict=True)
            scores, slopes = (torch.cat(part).double() for part in parts)
            if not scores.std() > 0:
                got = f"{reward.identity}, which gives {SAMPLES} images of the teacher the score {scores[0].item():g}"
                why = "there is nothing to climb, and no unit for the margin"
                todo = "check the reward on some images, or set mean, std and slope"
                raise ConfigError(problem(got, "scores that differ", why, todo))
            self.known[reward.identity] = RewardScale(
                scores.mean().item(), scores.std().item(), slopes.mean().item() if slope else None
            )
        return self.known[reward.identity]

    def _scored(self, reward: Reward, slope: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores and slopes (B,) of parts of the samples; no slopes where they are not asked for."""
        session = self.session
        score, size = reward.load(session.accelerator.device), session.run.train.train_batch_size
        for i in range(0, SAMPLES, size):
            latents = self.latents[i : i + size].to(session.accelerator.device).requires_grad_(slope)
            with torch.set_grad_enabled(slope):
                scores = score(session.decode(latents, "rewards see images") / 2 + 0.5, self.prompts[i : i + size])
            slopes = torch.empty(0)
            if slope:
                (pull,) = torch.autograd.grad(scores.sum(), latents)
                slopes = pull.flatten(1).square().mean(1).sqrt().cpu() * pull[0].numel()
            yield scores.detach().cpu(), slopes

    def read(self, file: Path) -> None:
        """What `write` wrote of the same samples; nothing where the file is of others, or broken."""
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError):
            return
        if stored["facts"] == self.facts:
            self.known = {name: RewardScale(**scale) for name, scale in stored["scales"].items()}

    def write(self, file: Path) -> None:
        """Write the scales as JSON, where there are some."""
        if self.known:
            file.parent.mkdir(parents=True, exist_ok=True)
            scales = {name: scale._asdict() for name, scale in self.known.items()}
            file.write_text(json.dumps({"facts": self.facts, "scales": scales}, indent=1) + "\n")
