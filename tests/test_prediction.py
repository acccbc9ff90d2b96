"""One 2x2 system serves every prediction type, and its step is each scheduler's step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from oracles import close, stock
from oracles.context import Flow, Network, spoken, stable_diffusion
from oracles.gaussian import GaussianTeacher
from torch import Tensor

from stepdistill.core.denoise import guided
from stepdistill.core.prediction import Estimate, estimate, output, row
from stepdistill.core.schedule import DiscreteVP, Rectified, expand

VP = ("epsilon", "sample", "v_prediction")
KINDS = (*VP, "flow")
SCHEDULES = {"table": stable_diffusion(), "flow": Flow(3.0)}
TIMES = torch.tensor([19.0, 259.0, 500.5, 999.0]).double()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(schedule) -> tuple[Tensor, Estimate, tuple[Tensor, Tensor]]:
    est = Estimate(normal(0, 4, 2, 3, 3), normal(1, 4, 2, 3, 3))
    alpha_t, sigma_t = (expand(v, est.x0) for v in schedule(TIMES))
    return alpha_t * est.x0 + sigma_t * est.eps, est, (alpha_t, sigma_t)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, name):
    schedule = SCHEDULES[name]
    x_t, est, levels = state(schedule)
    y = spoken(kind, est, *levels)
    back = estimate(kind, y, x_t, TIMES, schedule)
    close(back.x0, est.x0)
    close(back.eps, est.eps)
    close(output(kind, back, TIMES, schedule), y)


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_explains_its_state(kind):
    schedule, y = stable_diffusion(), normal(5, 4, 2, 3, 3)
    x_t, _, _ = state(schedule)
    close(schedule.add_noise(*estimate(kind, y, x_t, TIMES, schedule), TIMES), x_t)


def test_the_step_of_every_kind_is_ddims():
    for kind in VP:
        for n in (1, 4, 10):
            scheduler, schedule = stock.ddim(kind), DiscreteVP(stock.ddim().alphas_cumprod)
            scheduler.set_timesteps(n)
            times = [*scheduler.timesteps.tolist(), 0]  # its last step ends on the table's first entry
            for t, s in pairwise(times):
                x_t, y = normal(t, 3, 2, 2, 2), normal(t + 1, 3, 2, 2, 2)
                now, then = (torch.full((3,), float(v)).double() for v in (t, s))
                mine = schedule.add_noise(*estimate(kind, y, x_t, now, schedule), then)
                close(mine, scheduler.step(y, t, x_t).prev_sample)
                close(estimate(kind, y, x_t, now, schedule).x0, scheduler.step(y, t, x_t).pred_original_sample)


def test_the_step_of_a_flow_is_eulers():
    for shift in (1.0, 3.0):
        scheduler, schedule = stock.euler(4, shift), Rectified(shift)
        for t, s in pairwise([*scheduler.timesteps, torch.tensor(0.0)]):
            x_t, y = normal(1, 3, 2, 2, 2).float(), normal(2, 3, 2, 2, 2).float()
            now, then = t.expand(3), s.expand(3)
            mine = schedule.add_noise(*estimate("flow", y, x_t, now, schedule), then)
            close(mine, scheduler.step(y, t, x_t).prev_sample, 2e-6)


def test_all_kinds_of_teacher_are_one():
    """A network of any kind that holds the same knowledge gives the same estimate, guided or not."""
    for schedule in (SCHEDULES["table"], SCHEDULES["flow"]):
        x_t, _, _ = state(schedule)
        cond, null = {"mean": torch.full_like(x_t, 0.7)}, {"mean": torch.zeros_like(x_t[:1])}
        teacher = GaussianTeacher(schedule, 0.6)
        for wrap in (lambda d: d, lambda d, null=null: guided(d, null, 7.5)):
            truth = wrap(teacher)(x_t, TIMES, cond)
            for kind in KINDS:
                est = wrap(Network(teacher, kind, schedule))(x_t, TIMES, cond)
                close(est.x0, truth.x0)
                close(est.eps, truth.eps)


def test_half_inputs_are_converted_in_float32():
    """At t = 999 an epsilon's error reaches x0 multiplied by 14.6, so the subtraction may not round again."""
    schedule = DiscreteVP(stock.ddim().alphas_cumprod)
    t, x_t, y = torch.tensor([999.0]), normal(0, 1, 1, 8, 8).bfloat16(), normal(1, 1, 1, 8, 8).bfloat16()
    x, o = x_t.double(), y.double()
    alpha_t, sigma_t = (v.item() for v in schedule(t.double()))
    exact = {
        "epsilon": (x - sigma_t * o) / alpha_t,
        "sample": o,
        "v_prediction": alpha_t * x - sigma_t * o,
        "flow": (x - sigma_t * o) / (alpha_t + sigma_t),
    }
    for kind in KINDS:
        est = estimate(kind, y, x_t, t, schedule)
        assert est.x0.dtype == est.eps.dtype == torch.float32
        close(est.x0, exact[kind], 3e-5)


def test_a_zero_terminal_snr_table_is_for_v():
    schedule = DiscreteVP(torch.linspace(0.99, 0.0, 1000))
    t, x_t, y = torch.tensor([999.0]), normal(0, 1, 1, 2, 2), normal(1, 1, 1, 2, 2)
    close(estimate("v_prediction", y, x_t, t, schedule).x0, -y)
    close(estimate("v_prediction", y, x_t, t, schedule).eps, x_t)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'velocity': expected epsilon, sample, v_prediction or flow"):
        row("velocity", torch.ones(1), torch.zeros(1))
