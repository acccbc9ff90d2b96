"""Straight paths instead of curved ones: reflow, rf++, PeRFlow, and the first stage of SlimFlow.

The teacher's ODE carries a state from one time to a later, cleaner one along a curve. The student learns to get there
along a straight line, which one solver step follows without error. What "straight" means on any schedule is in
`core.solvers`; it makes one engine of these, for epsilon, v and flow networks alike: the student is sampled by
stock schedulers, and before training it has the teacher's own velocity.

    reflow      one line from pure noise to the teacher's sample, which was made before
    PeRFlow     K lines, from the noisier end of a window to where a few solver steps of the teacher carry it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.denoise import guided
from stepdistill.core.losses import WholeDistance, whole
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, chord, evenly, share_of_noise, solve, time_of_share, u_shaped
from stepdistill.methods.base import Batch, Method, StepContext, Update
from stepdistill.methods.consistency import latents_of
from stepdistill.networks.lpips import Net, lpips
from stepdistill.networks.roles import TEACHER, Copy, Ema, Lora, Role

logger = logging.getLogger(__name__)
STRAIGHT = 0.01  # straightness over transport cost, 32 steps
Density = Literal["uniform", "u_shaped"]


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """rf++'s perceptual term: LPIPS between the decoded ends of the student's line and of the true one.

    With it the loss is `(1 - s) premetric + weight LPIPS` at the share of noise s. It needs torchmetrics, torchvision
    and the weights that torchvision downloads.

    References:
        rf++, Lee et al. 2024, https://arxiv.org/abs/2405.20320, section 4.2.
        LPIPS, Zhang et al. 2018, https://arxiv.org/abs/1801.03924.

    Args:
        weight: of the term.
        net: `vgg`, `alex` or `squeeze`.
        samples: how many of a micro-batch's samples are decoded; none takes all.
        divide: divide the term by s (the paper's configuration F).
    """

    weight: float = 1.0
    net: Net = "vgg"
    samples: int | None = None
    divide: bool = False


@dataclass(frozen=True, kw_only=True)
class Reflow(Method):
    """Reflow on pairs of noise and the teacher's samples; with `annealing_steps` SlimFlow's first stage.

    Annealed, the noise of a pair is `sqrt(1 - beta^2) z + beta z'` with fresh z', and beta falls from 1 to 0: training
    begins as flow matching on the teacher's samples, which a fresh, smaller network learns more easily.

    References:
        Flow straight and fast, Liu et al. 2022, https://arxiv.org/abs/2209.03003, and InstaFlow, Liu et al. 2023,
        https://arxiv.org/abs/2309.06380.
        rf++, Lee et al. 2024, https://arxiv.org/abs/2405.20320: the density and the premetrics.
        SlimFlow, Zhu et al. 2024, https://arxiv.org/abs/2407.12718, section 4.1: annealing, flips, smaller students.

    Args:
        density: of the share of noise along the line: `uniform`, or rf++'s `u_shaped`, more at both ends.
        loss_type: of velocities: `l2`, or rf++'s `huber` of a whole sample. The latter, and LPIPS, keep the minimum
            only because the end of a pair is a function of its noise.
        lpips: the perceptual term; none decodes no image.
        annealing_steps: steps until the noise is the pair's own; 0 begins with it.
        random_flip: mirror a pair's noise and latents together, every other time.
        width: below 1 the student is a smaller network of about this share of the channels, with fresh weights.
        sampling_guidance_scale: written into the contract; 1 where the pairs were made with guidance.
        num_inference_steps: steps that the contract names.
        first_noise: sample by rf++'s rule, which keeps the noise that sampling began with. It is right on straight
            paths only: it is dropped at the end where straightness over transport cost is not below 0.01, which takes
            32 steps from 256 noises to measure. Diffusers alone does not have it; `stepdistill.load_student` does.
        ema_decay: decay of the average of the student that is exported; none exports the student itself.
    """

    density: Density = "uniform"
    loss_type: WholeDistance = "l2"
    lpips: Lpips | None = None
    annealing_steps: int = 0
    random_flip: bool = False
    width: float = 1.0
    sampling_guidance_scale: float = 1.0
    num_inference_steps: int = 1
    first_noise: bool = False
    ema_decay: float | None = 0.99

    def __post_init__(self) -> None:
        if self.annealing_steps < 0:
            raise ValueError(f"annealing_steps is {self.annealing_steps}: expected 0 or more")
        student_of(self.width)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.ema_decay is None else {"ema": Ema("student", self.ema_decay)}
        return {"student": student_of(self.width)} | average

    def student_role(self) -> str:
        return "student" if self.ema_decay is None else "ema"

    def check(self, schedule: NoiseSchedule) -> None:
        self.sampler(schedule)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return evenly(schedule, steps or self.num_inference_steps, self.sampling_guidance_scale, self.first_noise)

    def finalize(self, bend: Callable[[], float]) -> Reflow:
        if not self.first_noise or (found := bend()) < STRAIGHT:
            return self
        logger.warning(
            "first_noise: straightness over transport cost is %.3g, expected below %g: on paths that bend, the first "
            "noise leads away from the flow, so the student is sampled by plain steps; train it longer, or set "
            "method.first_noise to false",
            *(found, STRAIGHT),
        )
        return replace(self, first_noise=False)

    def beta(self, step: int) -> float:
        """The share of fresh noise in `step` (from 0)."""
        return max(0.0, 1 - step / self.annealing_steps) if self.annealing_steps else 0.0

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        z, x0 = pairs_of(batch)
        if self.random_flip:
            mirrored = expand(context.draw(batch, "flip") < 0.5, z)
            z, x0 = (torch.where(mirrored, value.flip(-1), value) for value in (z, x0))
        beta = self.beta(step)
        if beta:
            z = (1 - beta**2) ** 0.5 * z + beta * context.noise(batch, "annealing")
        bottom, top = (torch.full((len(z),), time, device=z.device) for time in context.schedule.span)
        line = chord(context.schedule, z, top, x0, bottom)
        est, error, share = along(context, batch, line, top, bottom, self.density)
        losses = whole(self.loss_type, error)
        if self.lpips:
            ends = (context.schedule.add_noise(*each, bottom) for each in (est, line))
            term = seen_apart(self.lpips, context, *ends)
            losses = (1 - share) * losses
            losses[: len(term)] += term / share[: len(term)] if self.lpips.divide else term
        loss = losses.mean()
        yield Update(("student",), loss, {"loss": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class PeRFlow(Method):
    """Piecewise rectified flow: a straight line in each of K windows of time.

    The teacher is run inside the window only, from noised data, so no pairs need be made. Two things differ from the
    publication. The line is straight in flow coordinates and not in x, so that DDIM and Euler follow it and no
    scheduler of its own is needed. And the noisiest window begins at pure noise, as sampling does: a table that is
    not pure noise at its end would otherwise be trained at starts that sampling never sees.

    References:
        PeRFlow, Yan et al. 2024, https://arxiv.org/abs/2405.07510, section 3.

    Args:
        windows: K, evenly spaced in the scheduler's time.
        solver_steps: the teacher's steps in a window.
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher. 1, with captions dropped in the data, leaves
            guidance to sampling time (CFG-sync); a larger one goes into the student (CFG-fixed).
        sampling_guidance_scale: written into the contract; 1 where the teacher was guided.
        density: of the share of noise within a window, `uniform` or `u_shaped`.
        loss_type: of velocities: `l2`, or rf++'s `huber` of a whole sample.
        num_inference_steps: steps that the contract names; none is one a window.
        ema_decay: decay of the average of the student that is exported; none exports the student itself.
    """

    windows: int = 4
    solver_steps: int = 8
    guidance_scale: float = 7.5
    sampling_guidance_scale: float = 1.0
    density: Density = "uniform"
    loss_type: WholeDistance = "l2"
    num_inference_steps: int | None = None
    ema_decay: float | None = 0.99

    def __post_init__(self) -> None:
        for name in ("windows", "solver_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.num_inference_steps and self.num_inference_steps % self.windows:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}: expected a multiple of the "
                f"{self.windows} windows, else a step would leap over an edge, where the path has a corner"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.ema_decay is None else {"ema": Ema("student", self.ema_decay)}
        return {"student": Lora()} | average

    def student_role(self) -> str:
        return "student" if self.ema_decay is None else "ema"

    def check(self, schedule: NoiseSchedule) -> None:
        schedule.check(self.sampler(schedule).timesteps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return evenly(schedule, steps or self.num_inference_steps or self.windows, self.sampling_guidance_scale)

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        edges = torch.tensor([*self.sampler(context.schedule, self.windows).timesteps, context.schedule.span[0]])
        edges = edges.to(context.device)
        k = (context.draw(batch, "window") * self.windows).long()
        noisy, clean = edges[k], edges[k + 1]
        z = context.noise(batch, "eps")
        start = torch.where(expand(k == 0, z), z, context.schedule.add_noise(latents_of(batch), z, noisy))
        teacher = guided(context.denoiser(TEACHER), context.null, self.guidance_scale)
        with torch.no_grad():
            end = solve(teacher, context.schedule, start, noisy, clean, self.solver_steps, batch.cond)
        line = chord(context.schedule, start, noisy, end, clean)
        _, error, _ = along(context, batch, line, noisy, clean, self.density)
        loss = whole(self.loss_type, error).mean()
        yield Update(("student",), loss, {"loss": loss.detach()})


def along(
    context: StepContext, batch: Batch, line: Estimate, t: Tensor, s: Tensor, density: Density
) -> tuple[Estimate, Tensor, Tensor]:
    """At a drawn point of the line between the times t and s (B,): the student's estimate, the error of its velocity
    (B, C, H, W), and the share of noise (B,)."""
    low, high = (share_of_noise(context.schedule, time) for time in (s, t))
    drawn = context.draw(batch, "t")
    share = low + (u_shaped(drawn) if density == "u_shaped" else drawn) * (high - low)
    now = time_of_share(context.schedule, share)
    est = context.denoiser("student")(context.schedule.add_noise(*line, now), now, batch.cond)
    return est, (est.eps - est.x0) - (line.eps - line.x0), share


def seen_apart(term: Lpips, context: StepContext, a: Tensor, b: Tensor) -> Tensor:
    """The weighted perceptual distance of the first samples' latents, decoded."""
    a, b = (context.decode(latents[: term.samples]) for latents in (a, b))
    return term.weight * lpips(term.net, a.device)(a, b)


def student_of(width: float) -> Lora | Copy:
    """A LoRA, or below 1 a fresh network of about this share of the channels. Raises ValueError outside of (0, 1]."""
    if not 0 < width <= 1:
        raise ValueError(f"width is {width}: expected a share of the teacher's channels in (0, 1]")
    return Lora() if width == 1 else Copy(width=width)


def pairs_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Noise and the latents that the teacher turned it into."""
    if batch.latents is None or batch.noise is None:
        raise ValueError("reflow needs pairs of noise and the teacher's latents; the batch has none")
    return batch.noise, batch.latents
