"""The collapse monitor: compares the student's images with the teacher's at each validation, for every method.

On fixed prompts and seeds, never fitted to: the ratios student / teacher of saturation, luminance, contrast,
high-frequency energy and pairwise diversity, and of the teacher's own denoising error on the samples at a few noise
levels, the score gap: 1 if the teacher denoises the student's samples as well as its own. `training.watch.rules`
decides when a ratio is too far off.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from stepdistill.core.denoise import free_part
from stepdistill.core.files import written_whole
from stepdistill.core.pixels import contrast, diversity, high_frequency, luminance, saturation
from stepdistill.networks.rewards.base import rewards_by_name
from stepdistill.networks.roles import TEACHER
from stepdistill.students.write import write_unproven
from stepdistill.training.logs import Logs
from stepdistill.training.sampling import (
    sample_student,
    sample_teacher,
    teacher_facts,
    to_images,
    validation_images,
    validation_noise,
)
from stepdistill.training.setup import Session
from stepdistill.training.sizes import Size
from stepdistill.training.watch import rules
from stepdistill.training.watch.plot import plot_drift
from stepdistill.training.watch.rules import HELD_OUT, LEVELS, PREFIX, SCORE, TRAINED, Yardstick

logger = logging.getLogger(__name__)
Sampling: TypeAlias = Callable[[Session, list[str], Sequence[int], Size], Tensor]  # latents of prompts by their noises
SETS = 4  # independent sets of the teacher's images, each of the student's size
FIXED = 50_000  # the gap's noises have numbers from here on, clear of the noises that images start from


def drift_statistics(drawn: Tensor) -> dict[str, Tensor]:
    """Each statistic of images, by prompt (P,); of clips the mean over their frames.

    drawn: (S, P, 3, H, W) or (S, P, F, 3, H, W) in [0, 1], S seeds of each of P prompts.
    """
    seeds, prompts = drawn.shape[:2]
    frames = drawn.reshape(seeds, -1, *drawn.shape[-3:])  # (S, P F, 3, H, W)
    each = {
        "saturation": saturation(frames).mean(0),
        "luminance": luminance(frames).mean(0),
        "contrast": contrast(frames).mean(0),
        "high_frequency": high_frequency(frames).mean(0),
        "diversity": diversity(frames),
    }
    return {name: value.reshape(prompts, -1).mean(1) for name, value in each.items()}


def latent_motion(latents: Tensor) -> Tensor:
    """Mean of `|x_{f+1} - x_f|` of each clip's latents (B, C, F, h, w), F of 2 or more, (B,); 0 is a frozen one."""
    return latents.diff(dim=2).abs().flatten(1).mean(1)


def yardstick(sets: Sequence[Mapping[str, Tensor]], facts: Mapping[str, object]) -> Yardstick:
    """Mean and relative spread of the sets' statistics, each (P,).

    A set's value is the mean over the P prompts, which are fixed. So its variance is that of the seeds within each
    prompt, averaged over prompts, over P: with K sets that rests on P (K - 1) differences instead of K - 1.
    """
    mean, spread = {}, {}
    for name in sets[0]:
        table = torch.stack([one[name] for one in sets]).double()  # (K, P)
        mean[name] = table.mean().item()
        std = (table.var(0).mean() / table.shape[1]).sqrt().item()
        spread[name] = max(std / max(mean[name], 1e-12), rules.FLOOR)
    return Yardstick(mean, spread, facts)


def ratios(statistics: Mapping[str, Tensor], teacher: Yardstick) -> dict[str, float]:
    """Student / teacher of every statistic that the teacher has, each averaged over prompts."""
    return {name: statistics[name].double().mean().item() / max(mean, 1e-12) for name, mean in teacher.mean.items()}


class Watch:
    """The collapse monitor of one run; on the main process only.

    What it knows is in the run's folder: the teacher's statistics in `watch.json`, the history in `metrics.jsonl`,
    the best student so far in `best/`. So a resumed run goes on as if it had never stopped.

    Args:
        start: the step that the run begins at. What an earlier run left of later steps is dropped; 0 measures the
            untrained student.
    """

    def __init__(self, session: Session, logs: Logs, start: int) -> None:
        self.session, self.logs = session, logs
        self.spec = session.run.train
        self.out = Path(self.spec.output_dir)
        if start == 0 or self._best().get("step", 0) > start:
            shutil.rmtree(self.out / "best", ignore_errors=True)
        self.prompts = list(self.spec.validation_prompts)
        self.teacher = self._yardstick()
        due = start % (self.spec.validation_steps or 1) == 0
        if due or not any(SCORE in row for row in rules.read_metrics(logs.file)):
            self.look(start)  # before training, or what a signal left undone after the checkpoint

    def look(self, step: int) -> bool:
        """Measure, log, warn, keep the best and plot; whether the run should stop. A step is measured once."""
        if any(row["step"] == step and SCORE in row for row in rules.read_metrics(self.logs.file)):
            return False
        measured = self._measure(sample_student, 0)
        ratio = ratios(measured, self.teacher)
        spread = self.teacher.spread
        score = rules.drift_score({name: rules.deviation(ratio[name], spread[name]) for name in ratio})
        rewards = {key: measured[key].mean().item() for key in measured if key.startswith((TRAINED, HELD_OUT))}
        # the student that a held-out reward scores highest is the best, whatever its distance
        cost = min((-value for key, value in rewards.items() if key.startswith(HELD_OUT)), default=score)
        if step and math.isfinite(cost):
            self._keep(step, cost)  # before the row that says the step is measured
        self.logs.write(step, {PREFIX + name: value for name, value in ratio.items()} | rewards | {SCORE: score})
        rows = rules.read_metrics(self.logs.file)
        past = rules.history(rows, spread)
        alarms = [name for name in past if rules.alarming(name, past[name], spread[name])]
        # it is said once, when it begins
        fresh = [name for name in alarms if not rules.alarming(name, past[name][:-1], spread[name])]
        for name in rules.worth_reporting(fresh, past):
            logger.warning("step %d, twice running: %s", step, rules.sentence(name, past[name], spread[name]))
        plot_drift(rows, spread, self.out / "samples" / "watch.png")
        if rules.deceived(rows):
            said = "; ".join(rules.reward_sentence(*pair) for pair in rules.reward_scores(rows).items())
            logger.warning(
                "the run stops at step %d, after a checkpoint: the held-out reward has fallen %d validations in a row "
                "while a trained one rose (%s). Use best/",
                step,
                rules.FALLS,
                said,
            )
            return True
        if alarms and self.spec.watch_stop:
            names = ", ".join(rules.title(name) for name in alarms)
            logger.warning("the collapse monitor stops the run at step %d, after a checkpoint: %s", step, names)
        return bool(alarms) and self.spec.watch_stop

    def _keep(self, step: int, score: float) -> None:
        """Write the exported role to `best/` where no student of this run had a lower score."""
        if not score < self._best().get("score", math.inf):
            return
        session = self.session
        with written_whole(self.out / "best") as part:
            write_unproven(
                part,
                family=session.run.family,
                pipe=session.pipe,
                backbone=session.backbone,
                role=session.run.method.student_role(),
                method=session.method,
                resolution=session.batches.size,
                sizes=session.sizes.sizes,
                base=session.base,
                start=session.start,
            )
            (part / "watch.json").write_text(json.dumps({"step": step, "score": score}) + "\n")

    def _best(self) -> dict[str, float]:
        """Step and score of the best student so far; nothing before the first."""
        stored = self.out / "best" / "watch.json"
        return json.loads(stored.read_text()) if stored.exists() else {}

    def _yardstick(self) -> Yardstick:
        """The teacher's statistics: those in the folder where they are of the same teacher and settings."""
        facts = teacher_facts(self.session) | {
            "prompts": self.prompts,
            "images": list(self.spec.validation_images),
            "samples": self.spec.watch_samples,
            "sizes": [list(size) for size in self.session.shown_sizes],
            "sets": SETS,
        }
        stored = Yardstick.read(self.out / "watch.json")
        if stored and stored.facts == facts:
            return stored
        print("collapse monitor: sampling the teacher's images, to measure the spread over seeds", flush=True)
        drawn = yardstick([self._measure(sample_teacher, k) for k in range(1, SETS + 1)], facts)
        drawn.save(self.out / "watch.json")
        return drawn

    def _measure(self, make: Sampling, number: int) -> dict[str, Tensor]:
        """All statistics of one set of images, by prompt (P,), or by size and prompt (sizes x P,) of a run of several
        sizes; set 0 is the student's, which rewards score, the others the teacher's.

        Of several sizes the first and the most elongated share the samples, so that a look costs what it costs at one.
        """
        sizes = self.session.shown_sizes
        seeds = max(2, self.spec.watch_samples // len(sizes))
        parts = [self._measure_at(size, make, number * len(sizes) + k, seeds) for k, size in enumerate(sizes)]
        scored = {} if number else self._rewards([drawn for drawn, _ in parts])
        return {name: torch.cat([values[name] for _, values in parts]) for name in parts[0][1]} | scored

    def _measure_at(
        self, size: Size, make: Sampling, number: int, seeds: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Images of one size, for each seed those of all prompts, and their statistics (P,).

        One seed of all prompts at a time, which takes no more memory than a validation's images do.
        """
        prompts = len(self.prompts)
        drawn, errors, moves = [], [], []
        for j in range(seeds):
            first = (number * seeds + j) * prompts
            latents = make(self.session, self.prompts, range(first, first + prompts), size)
            drawn.append(to_images(self.session, latents))
            if latents.ndim == 5 and latents.shape[2] > 1:
                moves.append(latent_motion(latents).cpu())
            errors.append(self._errors(latents, range(j * prompts, (j + 1) * prompts), size))
        gaps = {name: torch.stack([one[name] for one in errors]).mean(0) for name in rules.GAPS}
        motion = {rules.MOTION: torch.stack(moves).mean(0)} if moves else {}
        return drawn, drift_statistics(torch.stack(drawn)) | motion | gaps

    @torch.no_grad()
    def _rewards(self, drawn: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """The scores (P,) of sets of images (P, 3, H, W), those of each size in turn, by each reward."""
        method, device = self.session.run.method, self.session.accelerator.device
        rewards = {TRAINED + name: reward for name, reward in rewards_by_name(method.trained_rewards).items()}
        if method.held_out is not None:
            rewards[HELD_OUT + type(method.held_out).__name__] = method.held_out
        return {
            key: torch.stack([reward.load(device)(images.to(device), self.prompts) for images in chain(*drawn)])
            .mean(0)
            .cpu()
            for key, reward in rewards.items()
        }

    @torch.no_grad()
    def _errors(self, x0: Tensor, ids: Sequence[int], size: Size) -> dict[str, Tensor]:
        """The teacher's mean squared error (P,) in the noise at each level, one call a level, without guidance.

        Frames that are held have none: they would bring the student's error and the teacher's together.
        """
        context, images = self.session.context(0, size), validation_images(self.session, self.prompts)
        cond = self.session.batches.with_images(self.prompts, images)
        top = context.schedule.grid(1)[-1].item()
        errors = {}
        for number, (name, level) in enumerate(zip(rules.GAPS, LEVELS, strict=True)):
            noises = (FIXED + len(LEVELS) * i + number for i in ids)
            eps = validation_noise(self.session, noises, size)
            t = torch.full((len(x0),), level * top, device=x0.device)
            est = context.denoiser(TEACHER)(context.schedule.add_noise(x0, eps, t), t, cond)
            errors[name] = free_part((est.eps - eps).square(), cond).flatten(1).mean(1).cpu()
        return errors
