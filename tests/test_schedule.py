"""The noise process is the scheduler's own, and its grids hold the times that the schedulers visit."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from oracles import close, stock
from oracles.context import Flow, Table, stable_diffusion
from oracles.gaussian import marginal_std, solver_gain, trajectory_gain

from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.regression import Regression

ULP = 1e-12


def snr(schedule: NoiseSchedule, t):
    alpha_t, sigma_t = schedule(t)
    return (alpha_t / sigma_t).log()


# tables


def test_a_table_is_the_schedulers_own():
    cumprod = stock.ddim().alphas_cumprod
    alpha_t, sigma_t = DiscreteVP(cumprod)(torch.arange(1000.0).double())
    close(alpha_t, cumprod.sqrt(), ULP)
    close(sigma_t, (1 - cumprod).sqrt(), ULP)


def test_stable_diffusion_at_its_ends():
    schedule = DiscreteVP(stock.ddim().alphas_cumprod)
    alpha_t, sigma_t = schedule(torch.tensor([0.0, 800.0, 999.0]))
    close(alpha_t, [0.99957, 0.192, 0.0683], 3e-4)
    close(sigma_t, [0.02916, 0.981, 0.99767], 5e-4)
    assert alpha_t.dtype == torch.float32 and schedule(torch.zeros(1).double())[0].dtype == torch.float64


def test_between_entries_log_snr_is_linear():
    schedule = stable_diffusion()
    low, high = snr(schedule, torch.tensor([300.0])), snr(schedule, torch.tensor([301.0]))
    close(snr(schedule, torch.tensor([300.25])), 0.75 * low + 0.25 * high, ULP)
    alpha_t, sigma_t = schedule(torch.linspace(0, 999, 777).double())
    close(alpha_t**2 + sigma_t**2, torch.ones(777), ULP)
    assert (sigma_t.diff() > 0).all()


def test_outside_the_table_is_its_nearest_end():
    schedule = stable_diffusion()
    close(torch.stack(schedule(torch.tensor([-5.0, 1200.0]))), torch.stack(schedule(torch.tensor([0.0, 999.0]))))


@pytest.mark.parametrize("schedule", [stable_diffusion(), Flow(1.0), Flow(3.0)], ids=["table", "flow", "shifted"])
def test_time_inverts_the_levels(schedule):
    t = torch.tensor([0.5, 3.0, 17.25, 500.0, 640.7, 999.0]).double()
    close(schedule.time(snr(schedule, t)), t, 1e-8)
    assert schedule.time(torch.zeros(2)).dtype == torch.float32


def test_time_stays_inside_the_table():
    close(stable_diffusion().time(torch.tensor([50.0, -50.0])), [0.0, 999.0])


def test_a_zero_terminal_snr_table_gives_no_nan():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] < 1e-12
    cumprod = scheduler.alphas_cumprod.clone()
    cumprod[-1] = 0.0
    schedule = Table(cumprod)
    t = torch.tensor([0.0, 500.5, 998.0, 998.5, 999.0]).double()
    alpha_t, sigma_t = schedule(t)
    assert alpha_t.isfinite().all() and sigma_t.isfinite().all()
    close([alpha_t[-1].item(), sigma_t[-1].item()], [0.0, 1.0], 0)
    log_snr = snr(schedule, t)
    close(schedule.time(log_snr)[[0, 1, 2, 4]], t[[0, 1, 2, 4]], 1e-8)
    below = schedule.time(log_snr[2].float() - torch.tensor([1e-6, 1.0, 10.0, torch.inf]))  # below the last entry
    assert below.isfinite().all() and (below >= 998).all() and (below.diff() >= 0).all()


# grids

VISITED = {
    1: ([999], [999]),
    2: ([999, 499], [999, 499]),
    4: ([999, 759, 499, 259], [999, 749, 499, 249]),
    8: ([999, 879, 759, 639, 499, 379, 259, 139], [999, 874, 749, 624, 499, 374, 249, 124]),
}


@pytest.mark.parametrize("n", VISITED)
def test_students_visit_the_times_of_their_scheduler(n):
    schedule, (sparse, trailing) = stable_diffusion(), VISITED[n]
    for scheduler, times in ((stock.lcm(), sparse), (stock.tcd(), sparse), (stock.ddim(), trailing)):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == times
    for method, times in (
        (Consistency(end="clean"), sparse),
        (Consistency(end="any"), sparse),
        (Consistency(end="edge", num_ddim_timesteps=40), trailing),
        (Regression(), trailing),
    ):
        assert list(method.sampler(schedule, n).timesteps) == times


def test_a_grid_holds_every_time_and_the_end():
    grid = stable_diffusion().grid(50)
    assert grid.tolist() == [0, *range(19, 1000, 20)]
    scheduler = stock.ddim()
    scheduler.set_timesteps(50)
    assert grid.flip(0)[:-1].tolist() == scheduler.timesteps.tolist()


def test_a_grid_between_the_entries_is_refused():
    for n in (3, 0, -1, 30):
        with pytest.raises(ValueError, match="does not divide the table's 1000 entries.*Choose one of"):
            stable_diffusion().grid(n)
    with pytest.raises(ValueError, match="at least 1"):
        Flow().grid(0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_a_flow_grid_is_the_euler_schedulers(n, shift):
    scheduler, grid = stock.euler(n, shift), Rectified(shift).grid(n)
    close(grid.flip(0)[:-1], scheduler.timesteps, 2e-4)
    close(grid.flip(0) / 1000, scheduler.sigmas, 2e-7)
    assert grid[0] == 0 and grid[-1] == 1000 and (grid.diff() > 0).all()


def test_a_shifted_flow_in_four_steps():
    assert Flow(3.0).grid(4).tolist() == [0, 500, 750, 900, 1000]
    for method in (Consistency(end="edge", num_ddim_timesteps=100), Regression()):
        assert method.sampler(Rectified(3.0), 4).timesteps == (1000, 900, 750, 500)


def test_the_straight_path():
    alpha_t, sigma_t = Rectified(3.0)(torch.tensor([0.0, 250.0, 1000.0]))
    close(alpha_t, [1.0, 0.75, 0.0], 0)
    close(sigma_t, [0.0, 0.25, 1.0], 0)


# noise


def test_noise_is_added_as_the_scheduler_adds_it():
    x0, eps = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0, 17, 999])
    schedule = stable_diffusion()
    mine = DiscreteVP(stock.ddim().alphas_cumprod).add_noise(x0, eps, t.double())
    close(mine, stock.ddim().add_noise(x0, eps, t), ULP)
    assert schedule.add_noise(x0, eps, None) is x0


# the solver's own error, which is what students inherit


def test_the_solvers_gain_on_stable_diffusion():
    schedule, std = stable_diffusion(), 0.6
    ode = marginal_std(schedule, std, 0.0) / marginal_std(schedule, std, 999.0)
    close(ode, 0.6013505847845484)
    shrinks = {
        1: 0.0895,
        2: 0.3744,
        4: 0.6291,
        10: 0.8262,
        25: 0.9226,
        50: 0.95926,
        100: 0.97903,
        250: 0.99151,
    }
    for n, shrink in shrinks.items():
        close(solver_gain(schedule, std, n) / ode, shrink, 5.1e-5)
    close(solver_gain(schedule, std, 50), 0.5768535673620518)
    close(solver_gain(schedule, std, 1000) / ode, 1.0, 3e-3)


@pytest.mark.parametrize(
    ("shift", "solver", "one_jump", "four", "two"),
    [
        (1.0, (0.5596686, 0.5835454, 0.5917166), (0.3993440, 0.4130737, 0.4177137), 0.5525984, 0.5131558),
        (3.0, (0.5280097, 0.5702323, 0.5849367), (0.3613299, 0.3719739, 0.3750611), 0.5150208, 0.4495377),
    ],
)
def test_gains_on_flow_grids(shift, solver, one_jump, four, two):
    for n, whole, biased in zip((20, 50, 100), solver, one_jump, strict=True):
        close(solver_gain(Flow(shift), 0.6, n), whole, 1e-7)
        close(trajectory_gain(Flow(shift), 0.6, n, 1), biased, 1e-7)
    close(trajectory_gain(Flow(shift), 0.6, 100, 4), four, 1e-7)
    close(trajectory_gain(Flow(shift), 0.6, 100, 2), two, 1e-7)


def test_gains_of_trajectory_students_on_stable_diffusion():
    gains = {50: 0.57685, 10: 0.56072, 5: 0.53616, 2: 0.45556, 1: 0.35705}
    for segments, gain in gains.items():
        close(trajectory_gain(stable_diffusion(), 0.6, 50, segments), gain, 5.1e-6)


@pytest.mark.parametrize(
    "schedule", [stable_diffusion(), Rectified(), Rectified(3.0)], ids=["table", "flow", "shifted"]
)
@pytest.mark.parametrize("t", [0.0, 1.0, 400.0, 400.5, 401.0, 998.0])
def test_the_levels_have_a_derivative_at_whole_times(schedule, t):
    """Of a table that of the entries on its right."""
    time = torch.tensor([t], dtype=torch.float64)
    rates = torch.func.jvp(schedule, (time,), (torch.ones_like(time),))[1]
    h = 1e-6
    for rate, before, after in zip(rates, schedule(time), schedule(time + h), strict=True):
        assert rate.item() == pytest.approx(((after - before) / h).item(), rel=1e-4)
        assert rate.item() != 0


def test_a_table_that_ends_at_pure_noise_has_finite_levels():
    table = torch.linspace(0.99, 0.0, 10, dtype=torch.float64)
    schedule, times = DiscreteVP(table), torch.linspace(0, 9, 19, dtype=torch.float64)
    alpha, sigma = schedule(times)
    assert alpha[-1] == 0 and sigma[-1] == 1 and torch.allclose(alpha[::2] ** 2, table, atol=1e-12)
    slopes = torch.func.jvp(schedule, (times,), (torch.ones(19).double(),))[1]
    assert all(part[:-3].isfinite().all() for part in slopes)


@pytest.mark.parametrize("schedule", [stable_diffusion(), Rectified(3.0)], ids=["table", "flow"])
def test_the_angle_and_the_rate_of_time(schedule):
    t = torch.tensor([3.3, 250.7, 500.2, 998.4], dtype=torch.float64)
    angle, rate = torch.func.jvp(schedule.angle, (t,), (torch.ones_like(t),))
    alpha, sigma = schedule(t)
    assert torch.allclose(angle.tan(), sigma / alpha, rtol=1e-9)
    assert torch.allclose(schedule.time_per_angle(t), 1 / rate, rtol=1e-9)
    assert torch.allclose(schedule.time_per_angle(t.float()), (1 / rate).float(), rtol=1e-3)
    ends = schedule.angle(torch.tensor(schedule.span, dtype=torch.float64))
    assert 0 <= ends[0] < 0.03 and 1.5 < ends[1] <= torch.pi / 2


@pytest.mark.parametrize("schedule", [stable_diffusion(), Rectified(3.0)], ids=["table", "flow"])
def test_times_are_lognormal(schedule):
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    alpha, sigma = schedule(schedule.lognormal_times(u, -0.6, 1.3))
    tau = (0.5 * sigma / alpha).log()
    inside = slice(2_000, 15_000)
    assert torch.allclose(tau[inside], -0.6 + 1.3 * torch.distributions.Normal(0.0, 1.0).icdf(u[inside]), atol=2e-3)
    t = schedule.lognormal_times(torch.tensor([0.0, 1 - 2**-24]), 0.2, 20.0)
    assert t.tolist() == list(schedule.span)
