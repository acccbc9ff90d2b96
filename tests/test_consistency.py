"""LCM, TCD, TSCD and PCM converge to what closed forms say: their own updates, swept to convergence."""

from __future__ import annotations

import pytest
import torch
from oracles import close, stock
from oracles.context import (
    Flow,
    Network,
    affine,
    column,
    consistency,
    product,
    stable_diffusion,
    sweep,
    teacher_table,
    update,
)
from oracles.gaussian import (
    GaussianTeacher,
    levels,
    marginal_std,
    solver_gain,
    trajectory_gain,
    trajectory_slopes,
)
from tables.lcm_study import exact
from torch import Tensor

from stepdistill.core.prediction import Estimate
from stepdistill.core.solvers import few_step, follow
from stepdistill.methods.consistency import Consistency

SD, MEAN, STD = stable_diffusion(), 0.7, 0.6
TEACHER = GaussianTeacher(SD, STD)
SCHEDULES = {"table": SD, "flow": Flow(3.0)}


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# LCM


def test_at_time_zero_the_student_is_the_identity():
    x_t, t = column(-2.0, 0.3, 5.0), times(0, 0, 0)
    est = Estimate(column(7.0, -1.0, 0.0), column(1.0, 2.0, 3.0))
    close(consistency().jump(est, x_t, t, t, SD), x_t, 0)


def test_the_boundary_head_is_lcms():
    t, (skip, out) = times(0, 19, 999), ([], [])
    scheduler = stock.lcm()
    for value in t:
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(value)
        skip.append(c_skip.item())
        out.append(c_out.item())
    zero, one = torch.zeros(3, 1, 1, 1).double(), torch.ones(3, 1, 1, 1).double()
    close(consistency().jump(Estimate(zero, zero), one, t, t, SD).flatten(), skip, 1e-15)
    close(consistency().jump(Estimate(one, zero), zero, t, t, SD).flatten(), out, 1e-15)


def test_lcm_converges_to_fifty_ddim_steps():
    """And not to the ODE, whose gain is 0.60135."""
    lcm = consistency()
    gain, offset = affine(lcm, sweep(lcm, SD, TEACHER, MEAN), SD, 999.0, 0.0)
    close(gain, 0.5768535673620518)
    close(offset, 0.6721372352500814)
    close(gain, solver_gain(SD, STD, 50))


def test_every_prediction_type_converges_to_the_same():
    """Teacher and student speak one of the four, and are converted as a denoiser converts."""
    lcm = consistency()
    for kind in ("epsilon", "sample", "v_prediction", "flow"):
        student = sweep(lcm, SD, Network(TEACHER, kind, SD), MEAN, kind)
        close(affine(lcm, student, SD, 999.0, 0.0), [0.5768535673620518, 0.6721372352500814])


def test_a_finer_grid_comes_closer_to_the_ode():
    ode = marginal_std(SD, STD, 0.0) / marginal_std(SD, STD, 999.0)
    lcm = consistency(n=200)
    gain, _ = affine(lcm, sweep(lcm, SD, TEACHER, MEAN), SD, 999.0, 0.0)
    close(gain, solver_gain(SD, STD, 200))
    assert 0 < ode - gain < (ode - 0.57685) / 3


def test_the_teacher_itself_is_no_few_step_student():
    gain, _ = affine(consistency(), teacher_table(SD, 50, MEAN, STD), SD, 999.0, 0.0)
    close(gain * marginal_std(SD, STD, 999.0), 0.025, 5e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_lcm_on_a_flow(shift):
    goldens = {1.0: (0.5596686, 0.5835454), 3.0: (0.5280097, 0.5702323)}
    schedule = Flow(shift)
    for n, golden in zip((20, 50), goldens[shift], strict=True):
        lcm = consistency(n=n)
        student = sweep(lcm, schedule, GaussianTeacher(schedule, STD), MEAN, "flow")
        gain, offset = affine(lcm, student, schedule, 1000.0, 0.0)
        close(gain, golden, 1e-6)
        close(gain, solver_gain(schedule, STD, n))
        close(offset, MEAN)


def test_the_study_of_lcm_draws_with_what_it_converges_to():
    schedule, x = Flow(3.0), column(0.0, 1.0)
    student = exact(GaussianTeacher(schedule, STD), schedule, 20)
    zero, one = student(x, times(1000, 1000), {"mean": torch.full_like(x, MEAN)}).x0.flatten()
    close(one - zero, 0.5280097, 1e-6)
    close(zero, MEAN, 1e-6)


# TCD and TSCD


def test_the_jump_is_the_identity_to_the_same_time_and_ddim_to_zero():
    tcd, x_t, t = consistency("any"), column(-2.0, 0.3, 5.0), times(19, 499, 999)
    y = column(0.3, -1.0, 2.0)
    est = Network(lambda *_: Estimate(y, y), "v_prediction", SD)(x_t, t, {})  # any network
    close(tcd.jump(est, x_t, t, t, SD), x_t)
    alpha_0, sigma_0 = levels(SD, 0.0)
    close(tcd.jump(est, x_t, t, 0 * t, SD), alpha_0 * est.x0 + sigma_0 * est.eps)


def test_tcd_converges_to_its_own_biased_point():
    tcd = consistency("any")
    student = sweep(tcd, SD, TEACHER, MEAN)
    close(student.slope.detach(), trajectory_slopes(SD, STD, 50, 1))
    close(student.slope[50], 0.328624897)
    close(affine(tcd, student, SD, 999.0, 0.0)[0], 0.35705, 5e-6)


@pytest.mark.parametrize(
    ("segments", "golden"), [(50, 0.57685), (10, 0.56072), (5, 0.53616), (2, 0.45556), (1, 0.35705)]
)
def test_more_segments_shrink_the_bias(segments, golden):
    tscd = consistency("any", segments)
    student = sweep(tscd, SD, TEACHER, MEAN)
    edges, gain = SD.grid(segments).flip(0).tolist(), 1.0
    for t, s in zip(edges[:-1], edges[1:], strict=True):
        gain *= affine(tscd, student, SD, t, s)[0]
    close(gain, golden, 6e-6)
    close(gain, trajectory_gain(SD, STD, 50, segments))


@pytest.mark.parametrize(
    ("shift", "n", "golden"),
    [(1.0, 20, 0.3993440), (1.0, 50, 0.4130737), (3.0, 20, 0.3613299), (3.0, 50, 0.3719739)],
)
def test_tcd_on_a_flow(shift, n, golden):
    schedule, tcd = Flow(shift), consistency("any", n=n)
    student = sweep(tcd, schedule, GaussianTeacher(schedule, STD), MEAN, "flow")
    close(affine(tcd, student, schedule, 1000.0, 0.0)[0], golden, 1e-6)


@pytest.mark.parametrize(("shift", "segments", "golden"), [(1.0, 4, 0.5525984), (3.0, 2, 0.4495377)])
def test_tscd_on_a_flow(shift, segments, golden):
    schedule, tscd = Flow(shift), consistency("any", segments, n=100, eta=0.0)
    student = sweep(tscd, schedule, GaussianTeacher(schedule, STD), MEAN, "flow")
    x, cond = column(0.0, 1.0), {"mean": column(MEAN, MEAN)}
    low, high = few_step(student, schedule, tscd.sampler(schedule, segments), x, cond).flatten().tolist()
    close(high - low, golden, 1e-6)


def test_ends_stay_in_the_segment_and_meet_each_time_equally():
    """Starts exactly on a segment's edge belong to the segment below it."""
    for segments in (1, 2, 5, 10, 50):
        tscd, length = consistency("any", segments), 50 // segments
        for i in range(50):
            lowest = (i + 1 + length - 1) // length * length - length  # t is grid[i + 1], u is grid[i]
            count = i - lowest + 1
            chance = (torch.arange(count, dtype=torch.float64) + 0.5) / count
            assert tscd.ends(torch.full((count,), i), chance, segments).tolist() == list(range(lowest, i + 1))
            largest = torch.tensor([0.0, 1 - 2**-24])  # what a float32 draw can be
            assert tscd.ends(torch.full((2,), i), largest, segments).tolist() == [lowest, i]
            assert consistency("edge", segments).ends(torch.tensor([i]), largest[1:], segments).tolist() == [lowest]


def test_stages_follow_each_other():
    hyper = Consistency(end="any", segments=(8, 4, 2, 1), stage_steps=10, num_ddim_timesteps=40)
    assert [hyper.segments_at(step) for step in (0, 9, 10, 19, 20, 29, 30, 39, 40, 10**6)] == [
        8, 8, 4, 4, 2, 2, 1, 1, 1, 1,
    ]  # fmt: skip


def test_the_stage_decides_the_ends_of_an_update():
    """At the last stage's first grid step above an edge of the first stage, targets reach below it."""
    hyper = Consistency(
        end="any", segments=(4, 1), stage_steps=10, num_ddim_timesteps=20, loss_type="l2", guidance_scale=1.0
    )
    roles = {"teacher": TEACHER, "student": teacher_table(SD, 20, MEAN, STD)}
    rows = product(torch.tensor([5]), times(0.0), MEAN)
    close(update(hyper, SD, roles, rows, step=9).loss, 0.0, 1e-25)  # one solver step above the edge
    assert update(hyper, SD, roles, rows, step=10).loss > 1e-6


# PCM


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("phases", [1, 2, 4, 8, 20, 40])
def test_pcm_is_the_solver_sample_for_sample(phases, name):
    """In M steps, for every number M of phases, and so for any two of them alike."""
    schedule, pcm = SCHEDULES[name], consistency("edge", phases, n=40)
    teacher = GaussianTeacher(schedule, STD)
    student = sweep(pcm, schedule, teacher, MEAN, "v_prediction")
    x, cond = column(-2.0, 0.1, 1.5), {"mean": column(MEAN, MEAN, MEAN)}
    rollout = follow(teacher, schedule, schedule.grid(40).flip(0).tolist(), x, cond)
    close(few_step(student, schedule, pcm.sampler(schedule, phases), x, cond), rollout)


@pytest.mark.parametrize(("n", "phases"), [(40, 4), (40, 8), (50, 2), (50, 5), (100, 4), (200, 8)])
def test_phases_begin_where_ddim_steps(n, phases):
    pcm, scheduler = consistency("edge", phases, n=n), stock.ddim()
    i = torch.arange(n)
    edges = SD.grid(n)[pcm.ends(i, torch.rand(n), phases).unique()].tolist()
    scheduler.set_timesteps(phases)
    assert edges == [0, *scheduler.timesteps.flip(0).tolist()[:-1]]
    assert list(pcm.sampler(SD, phases).timesteps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("n", "segments"), [(50, (4,)), (40, (8, 3)), (50, (0,)), (50, ())])
def test_segments_that_do_not_divide_the_grid_are_refused(n, segments):
    with pytest.raises(ValueError, match=f"do not divide num_ddim_timesteps {n}"):
        Consistency(end="edge", segments=segments, stage_steps=1, num_ddim_timesteps=n)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"segments": (2,), "end": "clean"}, "one segment"),
        ({"segments": (2, 1), "end": "any"}, "stage_steps"),
        ({"target": "ema", "ema_decay": None}, "ema_decay"),
        ({"eta": 1.5}, r"\[0, 1\]"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        Consistency(**wrong)


def test_a_grid_that_the_table_does_not_hold_is_refused_before_training():
    with pytest.raises(ValueError, match="does not divide the table's 1000 entries"):
        Consistency(num_ddim_timesteps=48).check(SD)
