"""Offline pairwise sample optimization (PSO): a few-step model moves to given images, and keeps its few steps.

Plain regression to new images blurs a few-step model, since its few steps then answer with means. Here each image is
compared with a sample of the model itself, for the same prompt. The squares of the model's output cancel in the
comparison, so the loss is linear in it: the model's samples move, and their spread stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.config.kinds import Positive, Share
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.losses import preference_loss, sample_distances
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.methods.base import Batch, StepContext, Tuning, Update
from stepdistill.networks.roles import TEACHER


@dataclass(frozen=True, kw_only=True)
class PSOOffline(Tuning):
    """Offline PSO: images of the data win against samples of the few-step model.

    Equation:
        x^w = an image of the data, x^l = a sample of the few-step model, both of one prompt
        e(net, x) = w_t mean |net(x_t, t).x0 - x|^2,   x_t = alpha_t x + sigma_t eps,   one t and one eps for both
        gain(x) = e(teacher, x) - e(student, x)
        loss = -log sigmoid(beta (gain(x^w) - kappa gain(x^l)))

    The times t are those at which the steps of sampling start. At the first of them `x_t` is pure noise, as in
    sampling. `w_t` turns an error of x0 into that of the noise, or on a flow of the velocity. In one step and one
    dimension, with images of mean m and variance v^2 beside samples of mean 0 and variance s^2, the optimum at kappa 1
    has the mean `m / (beta w_t (v^2 + s^2))` and the model's own variance s^2.

    References:
        Tuning timestep-distilled diffusion model using pairwise sample optimization, Miao et al. 2024,
        https://arxiv.org/abs/2410.03190.

    Args:
        beta: factor of the errors, which are means over dimensions, as published. Smaller values push further. `auto`
            is `d / (w_t (v^2 + s^2))` with d the number of independent dimensions, so that the samples arrive at the
            images. Both are measured on the pairs of each micro-batch, which needs two samples or more.
        kappa: share of the samples' term: 1 as published; below it, the rest is plain regression to the images, which
            narrows the samples (the released scripts have 0.1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    beta: Positive | Literal["auto"] = "auto"
    kappa: Share = 1.0

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        schedule, sampler = context.schedule, self.sampler(context.student_schedule)
        student, teacher = (self.sampled(context, role) for role in ("student", TEACHER))
        starts, eps = torch.tensor(sampler.timesteps, device=context.device), context.noise(batch, "eps")
        t = starts[(context.draw(batch, "t") * len(starts)).long()]
        cond = {key: torch.cat([value, value]) for key, value in batch.cond.items()}
        with torch.no_grad():
            own = self.own_samples(context, batch)
            pair, times, eps = torch.cat([batch.x0, own]), torch.cat([t, t]), torch.cat([eps, eps])
            first = expand(times == sampler.timesteps[0], pair)
            inputs = torch.where(first, eps, schedule.add_noise(pair, eps, times))
            before = teacher(inputs, times, cond).x0
        now = student(inputs, times, cond).x0
        gain = sample_distances("l2", before, pair) - sample_distances("l2", now, pair)
        win, lose = gain.chunk(2)
        logit = self.scale(schedule, t, batch.x0, own) * (win - self.kappa * lose)
        moved = sample_distances("l2", now.detach(), before).mean()
        yield Update("student", preference_loss(logit), logit=logit.detach().mean(), moved=moved)

    def scale(self, schedule: NoiseSchedule, t: Tensor, win: Tensor, lose: Tensor) -> Tensor:
        """beta, () or (B,), of the errors of x0 in pairs (B, C, H, W) at t (B,). ConfigError for a single pair."""
        if self.beta == "auto":
            return independent_dimensions(win - lose) / (win - lose).var(0).mean().clamp(min=1e-12)
        alpha_t, sigma_t = schedule(t)
        return self.beta * schedule.denoising_target(torch.ones_like(sigma_t), -alpha_t / sigma_t) ** 2


def independent_dimensions(x: Tensor) -> Tensor:
    """In how many dimensions samples (B, ...) vary independently, (): the inverse of the mean squared cosine of two.

    It is D for D independent numbers of one variance, and `(tr C)^2 / tr C^2` of a covariance C, about.
    """
    if len(x) < 2:
        todo = "set train.train_batch_size to 2 or more, or method.beta to a number"
        raise ConfigError(problem("beta auto in a micro-batch of 1", "2 or more", "samples are compared", todo))
    unit = normalize(x.flatten(1))
    squares = (unit @ unit.T).square()
    return (len(x) * (len(x) - 1)) / (squares.sum() - squares.trace()).clamp(min=1e-12)
