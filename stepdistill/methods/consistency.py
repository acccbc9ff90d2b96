"""Consistency distillation along the teacher's solver: LCM, TCD, TSCD and PCM in one class.

The teacher makes one guided solver step `x_t -> x_u` on a grid of N times. Where the student jumps from `x_t` to an
end time s, it must land where it lands from `x_u`. The four methods differ only in s:

    LCM         clean data                         `segments: [1], end: clean`
    TCD, CTM    any grid time below t              `segments: [1], end: any`
    TSCD        any grid time down to t's segment  `segments: [8, 4, 2, 1], end: any`, one stage after the other
    PCM         the lower edge of t's phase        `segments: [4], end: edge`

What training converges to, exactly, is the teacher's N-step DDIM (or Euler) rollout to s with `end: clean` and
`end: edge`; not its ODE. With `end: any` the network cannot know s (it sees t only), so the squared loss averages over
s and the average feeds on itself: for a Gaussian teacher with std 0.6 on Stable Diffusion's table the one-step gain
is 0.357 where 50 DDIM steps give 0.577 and the ODE 0.601 (`tests/oracles/gaussian.py`, `trajectory_gain`). That is
the released TCD form, kept as published; more segments shrink the bias and as many segments as grid steps remove it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from stepdistill.config.kinds import Amount, Count, Decay, Positive
from stepdistill.core.losses import Distance, distance
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler
from stepdistill.methods.base import Averaged, Batch, StepContext, Update, check_effect
from stepdistill.methods.gan import Ladd
from stepdistill.networks.roles import TEACHER, Role


@dataclass(frozen=True, kw_only=True)
class Consistency(Averaged):
    """LCM, TCD, TSCD or PCM with a LoRA student.

    Equation:
        x_u = the guided teacher's solver step from x_t to u, the grid time below t
        loss = E d( jump(student, x_t, t -> s), jump(target, x_u, u -> s) ), where the target has no gradient
        a jump to s is alpha_s x0 + sigma_s eps; a jump to clean data is c_skip(t) x_t + c_out(t) x0
        with `gan` the student's loss and the head's are those of `Ladd`, too, at other times of the grid

    References:
        Latent consistency models, Luo et al. 2023, https://arxiv.org/abs/2310.04378, and LCM-LoRA,
        https://arxiv.org/abs/2311.05556: `end: clean`.
        Trajectory consistency distillation, Zheng et al. 2024, https://arxiv.org/abs/2402.19159: `end: any`.
        Hyper-SD (TSCD), Ren et al. 2024, https://arxiv.org/abs/2404.13686, section 3.1:
        `end: any, segments: [8, 4, 2, 1], stage_steps: 1000, num_ddim_timesteps: 40`.
        Phased consistency model, Wang et al. 2024, https://arxiv.org/abs/2405.18407:
        `end: edge, segments: [4], num_ddim_timesteps: 40`.

    Args:
        end: where the student's jump ends: `clean` data (LCM), `any` time of the segment (TCD, TSCD), or its `edge`
            (PCM).
        segments: number of segments of the time axis in each stage; each must divide num_ddim_timesteps.
        stage_steps: training steps of each stage; the last stage runs to the end. Required with several stages.
        num_ddim_timesteps: N, number of steps of the teacher's solver.
        guidance_scale: w of `uncond + w (cond - uncond)` in the teacher's step; a pair is a range that each sample
            draws from. 1 leaves guidance to sampling; then train with dropped captions. The student does not take w as
            an input.
        sampling_guidance_scale: default guidance scale of sampling, stored in the contract; keep 1 unless
            guidance_scale is 1.
        loss_type: `huber` or `l2`.
        huber_c: constant c of the pseudo-Huber loss, in latent units.
        target: network that gives the target: the `student` itself, or its average (`ema`).
        eta: share of each sampling step that is renoised, with `end: any` (TCD's gamma).
        num_inference_steps: default number of sampling steps, stored in the contract.
        gan: adversarial term on the student's estimates of clean data; with one segment only, since in several the
            student does not aim at clean data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"latents"})

    end: Literal["clean", "any", "edge"] = "clean"
    segments: tuple[int, ...] = (1,)
    stage_steps: Count | None = None
    num_ddim_timesteps: Count = 50
    guidance_scale: Amount | tuple[Amount, Amount] = 7.5
    sampling_guidance_scale: Amount = 1.0
    loss_type: Distance = "huber"
    huber_c: Positive = 1e-3
    ema_decay: Decay | None = 0.95
    target: Literal["student", "ema"] = "student"
    eta: float = 0.3
    num_inference_steps: Count = 4
    gan: Ladd | None = None

    def __post_init__(self) -> None:
        n = self.num_ddim_timesteps
        odd = [k for k in self.segments if k < 1 or n % k]
        if odd or not self.segments:
            raise ValueError(
                f"segments {list(self.segments)} do not divide num_ddim_timesteps {n}: the edge of a segment would lie "
                f"between two timesteps. Choose a grid that {odd or 'at least one segment'} divides, such as 40 or 200"
            )
        if self.end == "clean" and self.segments != (1,):
            raise ValueError(f"end 'clean' takes one segment, got {list(self.segments)}; use end 'any' or 'edge'")
        if len(self.segments) > 1 and not self.stage_steps:
            raise ValueError(f"segments {list(self.segments)} are {len(self.segments)} stages: set stage_steps")
        if self.target == "ema" and self.ema_decay is None:
            raise ValueError("target 'ema' needs an average: set ema_decay, such as 0.95")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}: expected a share in [0, 1]")
        if self.gan is not None and max(self.segments) > 1:
            raise ValueError(
                f"gan with segments {list(self.segments)}: expected segments [1], since the term asks that the student "
                "aim at clean data, and in several segments it aims at their edges; leave gan out, or set segments [1]"
            )
        check_effect(self, "stage_steps", len(self.segments) > 1, "several segments")
        check_effect(self, "huber_c", self.loss_type == "huber", "loss_type 'huber'")
        check_effect(self, "eta", self.end == "any", "end 'any'")

    def roles(self) -> dict[str, Role]:
        return Averaged.roles(self) | ({} if self.gan is None else self.gan.roles())

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        steps = steps or self.num_inference_steps
        if steps > self.num_ddim_timesteps:
            raise ValueError(f"{steps} sampling steps on a grid of {self.num_ddim_timesteps}: timesteps would repeat")
        starts = schedule.starts(self.num_ddim_timesteps)
        # the grid's own times, as LCMScheduler and TCDScheduler choose them; DDIM's trailing ones where steps divide N
        chosen = np.floor(np.linspace(0, len(starts), steps, endpoint=False)).astype(int)
        eta = {"clean": 1.0, "any": self.eta, "edge": 0.0}[self.end]
        clean = self.end == "clean" or schedule.straight
        return Sampler(tuple(starts[k] for k in chosen), eta, clean, self.sampling_guidance_scale)

    def segments_at(self, step: int) -> int:
        """The number of segments of the stage that `step` (from 0) belongs to."""
        stage = step // self.stage_steps if self.stage_steps else 0
        return self.segments[min(stage, len(self.segments) - 1)]

    def ends(self, i: Tensor, chance: Tensor, segments: int) -> Tensor:
        """Grid indices of s for steps from `grid[i + 1]` to `grid[i]`: never above i, never below the segment."""
        length = self.num_ddim_timesteps // segments
        edge = i // length * length
        if self.end == "any":
            return edge + (chance * (i - edge + 1)).long().clamp(max=i - edge)
        return edge

    def jump(self, est: Estimate, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
        """From x_t to the end: a DDIM step on the estimate; for `clean` LCM's boundary-respecting head."""
        if self.end != "clean":
            return schedule.add_noise(est.x0, est.eps, s)
        scaled = (10 * expand(t, x_t)) ** 2 + 0.25
        return 0.25 / scaled * x_t + 10 * expand(t, x_t) / scaled.sqrt() * est.x0

    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        schedule, cond = context.student_schedule, batch.cond  # the student is sampled on the grid that it learns on
        grid = schedule.grid(self.num_ddim_timesteps).to(context.device)
        i = (context.draw(batch, "t") * self.num_ddim_timesteps).long()
        t, u = grid[i + 1], grid[i]
        s = grid[self.ends(i, context.draw(batch, "s"), self.segments_at(step))]
        x_t = schedule.add_noise(batch.x0, context.noise(batch, "eps"), t)

        with torch.no_grad():
            teacher = context.guided(TEACHER, context.guidance(self.guidance_scale, batch))
            x_u = schedule.add_noise(*teacher(x_t, t, cond), u)
            target = self.jump(context.denoiser(self.target)(x_u, u, cond), x_u, u, s, schedule)
            if self.end != "clean":  # the jump from s to s is the identity, exactly
                target = torch.where(expand(s == u, x_u), x_u, target)
        jumped = self.jump(context.denoiser("student")(x_t, t, cond), x_t, t, s, schedule)
        loss = distance(self.loss_type, jumped, target, self.huber_c)
        if self.gan is None:
            yield Update("student", loss)
            return
        again = grid[(context.draw(batch, "gan input t") * self.num_ddim_timesteps).long() + 1]
        start = self.sampler(schedule, 1).timesteps[0]
        term, x0, logs = self.gan.student_term(context, batch, context.denoiser("student"), again, start)
        yield Update("student", loss + term, loss=loss, **logs)
        yield Update("head", self.gan.head_loss(context, batch, x0))
