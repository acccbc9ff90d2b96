"""Offline PSO against closed forms, by its own updates: where the optimum is, and what a step trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import close
from oracles.context import Flow, stable_diffusion
from oracles.fakes import Fake, Stage, batch
from torch import Tensor

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.methods.base import Batch, StepContext, Update
from stepdistill.methods.pso_offline import PSOOffline, independent_dimensions

SD, FLOW = stable_diffusion(), Flow()
STARTS = (999.0, 749.0, 499.0, 249.0)
LCM = Sampler(STARTS, eta=1.0)
SAMPLERS = {
    "clean": (SD, LCM),
    "flow": (FLOW, Sampler((1000.0, 750.0, 500.0), eta=1.0)),
    "tcd": (SD, Sampler(STARTS, eta=0.3, clean=False)),
    "ancestral": (SD, Sampler(STARTS, eta=1.0, ancestral=True)),
}


def prompts(count: int, shape: tuple[int, ...] = (1, 1, 1)) -> Batch:
    return Batch(tuple(range(count)), {"mean": torch.zeros(count, 1, 1, 1).double()}, shape, prompts=("",) * count)


def roles(schedule: NoiseSchedule, weight: float, now: Tensor) -> dict[str, Fake]:
    return {"student": Fake(schedule, now), "teacher": Fake(schedule, torch.tensor(weight).double())}


OFFLINE = PSOOffline(sampling=Sampler((999.0,)), beta=1.0)
SPREAD, MEAN, WIDE = 0.5, 1.0, 0.3  # of the model's samples; mean and spread of the images


@dataclass(frozen=True)
class Line:
    """A one-step generator `x0 = offset + slope z`."""

    offset: Tensor
    slope: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        assert (t == 999).all()
        x0 = self.offset + self.slope * x_t
        return Estimate(x0, x_t)


class Gridded(StepContext):
    """Noises on a grid of quantiles, each independent of the others."""

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        return quantiles()[("eps", "sample start").index(purpose)].reshape(-1, 1, 1, 1)

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        return torch.zeros(len(batch.index)).double()


def quantiles() -> tuple[Tensor, ...]:
    """Every combination of 5, 49 and 49 normal quantiles, of variance 1."""
    axes = [torch.erfinv((2 * torch.arange(n) + 1.0).double() / n - 1) for n in (5, 49, 49)]
    return tuple(
        part.flatten() for part in torch.meshgrid(*(axis / axis.std(correction=0) for axis in axes), indexing="ij")
    )


def fitted(method: PSOOffline) -> list[float]:
    """Offset and slope of the student at the optimum of the production loss."""
    student = Line(*(torch.tensor(v).double().requires_grad_() for v in (0.0, SPREAD)))
    teacher = Line(*(torch.tensor(v).double() for v in (0.0, SPREAD)))
    images = (MEAN + WIDE * quantiles()[2]).reshape(-1, 1, 1, 1)
    part = replace(prompts(len(images)), latents=images)
    context = Gridded(
        **vars(replace(Stage(SD, {}).context(0), denoiser={"student": student, "teacher": teacher}.__getitem__))
    )
    solver = torch.optim.LBFGS([student.offset, student.slope], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        (update,) = method.updates(context, part, 0)
        update.loss.backward()
        return update.loss.detach()

    solver.step(loss)
    return [student.offset.item(), student.slope.item()]


def weight() -> float:
    """That of an error of x0 in one of the noise at 999."""
    alpha_t, sigma_t = SD(torch.tensor(999.0).double())
    return (alpha_t / sigma_t).item() ** 2


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.5])
def test_the_samples_move_to_the_images_and_keep_their_spread(factor):
    """`m / (beta w (v^2 + s^2))`, which is the images' mean at `beta = 1 / (w (v^2 + s^2))`."""
    arrives = 1 / (WIDE**2 + SPREAD**2) / weight()
    mean, spread = fitted(replace(OFFLINE, beta=factor * arrives))
    close([mean, spread], [MEAN / factor, SPREAD], 0.04 * MEAN / factor)
    close(spread, SPREAD, 1e-3)


def test_a_smaller_kappa_narrows_the_samples():
    """It adds plain regression, whose answer to pure noise is a mean."""
    assert abs(fitted(replace(OFFLINE, kappa=0.1, beta=1 / weight()))[1]) < 0.15


def test_auto_arrives_at_the_images():
    mean, spread = fitted(PSOOffline(sampling=OFFLINE.sampling))
    close([mean, spread], [MEAN, SPREAD], 0.04)


@pytest.mark.parametrize("dimensions", [1, 6, 48])
def test_auto_counts_independent_dimensions(dimensions):
    """`d / (v^2 + s^2)` of errors of x0, whatever the mean is of the numbers that repeat each dimension."""
    noise = torch.randn(2, 400, dimensions, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    win, lose = (part.repeat(1, 1, 4, 4) for part in (0.01 + WIDE * noise[0], SPREAD * noise[1]))
    method, t = PSOOffline(sampling=LCM), torch.full((400,), 499.0).double()
    scale = method.scale(SD, t, win, lose)
    close(scale * (WIDE**2 + SPREAD**2) / dimensions, 1.0, 0.1)
    close(method.scale(SD, t, 7 * win, 7 * lose) * 49, scale, 1e-9)  # no unit of the latents matters
    close(independent_dimensions(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])), 3.0)  # one of three pairs agrees
    with pytest.raises(ConfigError, match="micro-batch of 1"):
        method.scale(SD, t[:1], win[:1], lose[:1])
    assert (method.scale(SD, t, win, win) * 0).isfinite()


def test_a_number_is_a_factor_of_the_errors_of_noise_or_velocity():
    method, t, win = PSOOffline(sampling=LCM, beta=3.0), torch.full((5,), 499.0).double(), torch.ones(5, 1, 2, 2)
    alpha_t, sigma_t = SD(t)
    close(method.scale(SD, t, win, win), 3 * (alpha_t / sigma_t) ** 2, 1e-12)
    close(method.scale(FLOW, t, win, win), 3 / FLOW(t)[1] ** 2, 1e-9)


def offline_step(schedule: NoiseSchedule, method: PSOOffline, now: Tensor) -> tuple[Update, StepContext, Batch]:
    context = replace(Stage(schedule, {}).context(0), denoiser=roles(schedule, 0.7, now).__getitem__)
    part = batch(3, 7, 8, 5)
    (update,) = method.updates(context, part, 0)
    return update, context, part


@pytest.mark.parametrize("name", SAMPLERS)
def test_offline_starts_at_log_2_with_the_gradient_of_the_errors(name):
    """O-f1: `beta / 2 grad (e_win - e_lose)`, with errors of noise or velocity, as the schedule's loss has them."""
    schedule, sampler = SAMPLERS[name]
    now = torch.tensor(0.7).double().requires_grad_()
    method = PSOOffline(sampling=sampler, beta=3.0)
    update, context, part = offline_step(schedule, method, now)
    close(update.loss, math.log(2), 1e-12)
    (pull,) = torch.autograd.grad(update.loss, now)

    t = torch.tensor(sampler.timesteps)[(context.draw(part, "t") * len(sampler.timesteps)).long()]
    eps, networks = context.noise(part, "eps"), roles(schedule, 0.7, now)
    with torch.no_grad():
        again = lambda k: context.noise(part, f"sample again {k}")  # noqa: E731
        own = few_step(networks["teacher"], schedule, sampler, context.noise(part, "sample start"), part.cond, again)

    def error(x: Tensor) -> Tensor:
        x_t = torch.where(expand(t == sampler.timesteps[0], x), eps, schedule.add_noise(x, eps, t))
        alpha_t, sigma_t = (expand(v, x) for v in schedule(t.double()))
        noise = (x_t - alpha_t * x) / sigma_t
        est = networks["student"](x_t, t, part.cond)
        return (schedule.denoising_target(*est) - schedule.denoising_target(x, noise)).square().mean()

    (expected,) = torch.autograd.grad(error(part.x0) - error(own), now)
    assert pull.abs() > 1e-6
    close(pull, 1.5 * expected, 1e-9)
    assert (t == sampler.timesteps[0]).any() and (t != sampler.timesteps[0]).any()


def test_offline_moves_away_from_its_own_samples_step_by_step():
    """O-f7: the margin on a fixed batch rises under small steps; the teacher stays the reference."""
    now, logits = torch.tensor(0.7).double().requires_grad_(), []
    for _ in range(5):
        update, _, _ = offline_step(SD, PSOOffline(sampling=LCM, beta=3.0), now)
        logits.append(update.logs["logit"].item())
        now = (now - 0.01 * torch.autograd.grad(update.loss, now)[0]).detach().requires_grad_()
    assert logits[0] == 0 and all(a < b for a, b in zip(logits, logits[1:], strict=False))
    assert update.logs["moved"] > 0


def test_offline_draws_only_the_contract_s_times():
    """O-f4: over many samples all of them, and no other."""
    asked: set[float] = set()

    class Seen(Fake):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            asked.update(t.tolist())
            return super().__call__(x_t, t, cond)

    context = Stage(SD, {}).context(0)
    weights = {"student": torch.tensor(0.7).double().requires_grad_(), "teacher": torch.tensor(0.7).double()}
    networks = {role: Seen(SD, value) for role, value in weights.items()}
    context = replace(context, denoiser=networks.__getitem__)
    for _ in PSOOffline(sampling=LCM).updates(context, batch(*range(9)), 0):
        pass
    assert asked == set(STARTS)
