"""What one update of a consistency method does: its target, its guidance, its calls, its draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import close
from oracles.context import (
    Flow,
    Rows,
    Tabular,
    affine,
    column,
    consistency,
    every_step,
    joined,
    product,
    solved,
    stable_diffusion,
    sweep,
    teacher_table,
    update,
)
from oracles.dirac import Dirac
from oracles.gaussian import GaussianTeacher, guided_mean, levels
from oracles.mixture import Mixture
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, guided
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import DiscreteVP
from stepdistill.core.solvers import few_step, follow
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.consistency import Consistency

SD, MEAN, NULL, STD = stable_diffusion(), 0.7, -0.4, 0.6
TEACHER = GaussianTeacher(SD, STD)
SCHEDULES = {"table": SD, "flow": Flow(3.0)}


# Where the teacher is a student already


def at_the_start(method: Consistency, segments: int) -> tuple[float, float]:
    """The loss and its largest gradient where the student is the teacher, over every grid step and end."""
    student = teacher_table(SD, method.num_ddim_timesteps, MEAN, STD)
    roles = {"teacher": TEACHER, "student": student}
    loss = update(method, SD, roles, every_step(method, segments, MEAN), null=NULL).loss
    gradient = torch.cat(torch.autograd.grad(loss, (student.offset, student.slope)))
    return loss.item(), gradient.abs().max().item()


@pytest.mark.parametrize("end", ["any", "edge"])
def test_as_many_segments_as_steps_leave_nothing_to_learn(end):
    """Except guidance, which is then what the step distils."""
    loss, gradient = at_the_start(consistency(end, 20, n=20), 20)
    assert loss < 1e-29 and gradient < 1e-13
    assert at_the_start(consistency(end, 20, n=20, guidance_scale=2.0), 20)[0] > 1e-3


@pytest.mark.parametrize(("end", "segments"), [("clean", 1), ("any", 1), ("any", 10), ("edge", 1), ("edge", 10)])
def test_elsewhere_the_teacher_is_no_fixed_point(end, segments):
    loss, gradient = at_the_start(consistency(end, segments, n=20), segments)
    assert loss > 1e-6 and gradient > 1e-5


# Any teacher: the student that reproduces the solver's rollout has nothing to learn


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("end", "segments"), [("clean", 1), ("edge", 1), ("edge", 4)])
def test_the_rollout_is_the_fixed_point_for_two_modes(end, segments, name):
    schedule, method = SCHEDULES[name], consistency(end, segments, n=20)
    roles = {"teacher": Mixture(schedule), "student": solved(method, schedule, Mixture(schedule))}
    assert update(method, schedule, roles, every_step(method, segments, MEAN)).loss < 1e-25
    untrained = roles | {"student": Mixture(schedule)}
    assert update(method, schedule, untrained, every_step(method, segments, MEAN)).loss > 1e-4


def test_two_modes_stay_two():
    """The ODE's quantile map, and the 50-step solver that LCM ends at; a mean-seeking one gives 0.54."""
    flow, lcm, x = Flow(), consistency(), column(-1.5, -0.2, 0.4, 2.0)
    teacher, solver = Mixture(flow), [-1.2076421, 0.7268602, 1.2003669, 2.0903927]
    close(teacher.ode_map(x, 1000.0, None).flatten(), [-1.2289427, 0.7278068, 1.2097080, 2.1226278], 1e-7)
    close(follow(teacher, flow, flow.grid(50).flip(0).tolist(), x, {}).flatten(), solver, 1e-7)
    student = solved(lcm, flow, teacher)
    close(few_step(student, flow, lcm.sampler(flow, 1), x, {}).flatten(), solver, 1e-7)
    close(few_step(teacher, flow, lcm.sampler(flow, 1), x, {}).flatten(), [0.54] * 4)
    rows = Rows(torch.full((4,), 49), x, x, torch.zeros_like(x))  # at t = 1000 the state is the noise
    assert update(lcm, flow, {"teacher": teacher, "student": student}, rows).loss < 1e-25


# A point mass for each prompt


def prompts(method: Consistency, segments: int = 1) -> Rows:
    """Every grid step and end, for three prompts side by side."""
    rows = joined([every_step(method, segments, mean) for mean in (MEAN, -1.3, 2.0)])
    return replace(rows, x0=rows.mean)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("end", "segments"), [("any", 1), ("any", 5), ("edge", 1), ("edge", 5)])
def test_point_masses_are_fixed(end, segments, name):
    schedule, method = SCHEDULES[name], consistency(end, segments, n=20)
    point = Dirac(schedule)
    assert update(method, schedule, {"teacher": point, "student": point}, prompts(method, segments)).loss < 1e-28


def test_swapped_prompts_are_noticed():
    method = consistency("any", n=20)

    def swapped(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return Dirac(SD)(x_t, t, {key: value.flip(0) for key, value in cond.items()})

    for roles in ({"teacher": swapped, "student": Dirac(SD)}, {"teacher": Dirac(SD), "student": swapped}):
        assert update(method, SD, roles, prompts(method)).loss > 1e-3


def test_lcm_sees_a_point_masss_noise_at_its_first_step_only():
    lcm, roles = consistency(n=20), {"teacher": Dirac(SD), "student": Dirac(SD)}
    rows = prompts(lcm)
    close(update(lcm, SD, roles, rows.where(rows.i == 0)).loss, levels(SD, 0.0)[1] ** 2, 2e-6)
    assert update(lcm, SD, roles, rows.where(rows.i > 0)).loss < 1e-10


@pytest.mark.parametrize("end", ["clean", "any", "edge"])
def test_guidance_enters_at_the_end_of_the_grid(end):
    """At the start, with point masses, the first grid step of a flow alone shows the guided mean."""
    schedule, method = Flow(), consistency(end, n=20, guidance_scale=3.0)
    roles = {"teacher": Dirac(schedule), "student": Dirac(schedule)}
    rows = prompts(method)
    ends = torch.zeros_like(rows.i) if end == "clean" else method.ends(rows.i, rows.chance, 1)
    first, later = rows.where(rows.i == 0), rows.where((rows.i > 0) & (ends == 0))
    shift = guided_mean(NULL, first.mean, 3.0) - first.mean
    close(update(method, schedule, roles, first, null=NULL).loss, shift.square().mean(), 1e-3)
    assert update(method, schedule, roles, later, null=NULL).loss < 1e-8


# Guidance


def test_the_guided_mean():
    """`uncond + w (cond - uncond)`: the other convention, 1 + w, would move it by `cond - uncond`."""
    for scale in (7.5, 0.0):
        lcm = consistency(guidance_scale=scale)
        gain, offset = affine(lcm, sweep(lcm, SD, TEACHER, MEAN, null=NULL), SD, 999.0, 0.0)
        mean = offset / (levels(SD, 0.0)[0] - gain * levels(SD, 999.0)[0])
        close(gain, 0.5768535673620518)
        close(mean, guided_mean(NULL, MEAN, scale))
        assert abs(mean - guided_mean(NULL, MEAN, 1 + scale)) > 0.9 * (MEAN - NULL)


def test_a_hidden_scale_is_averaged():
    lcm = consistency(guidance_scale=(2.0, 9.0))
    draws = (0.0, 0.25, 0.95)
    gain, offset = affine(lcm, sweep(lcm, SD, TEACHER, MEAN, null=NULL, guidance=draws), SD, 999.0, 0.0)
    close(gain, 0.5768535673620518)
    mean = guided_mean(NULL, MEAN, 2.0 + 7.0 * sum(draws) / 3)
    close(offset, mean * (levels(SD, 0.0)[0] - gain * levels(SD, 999.0)[0]))


@pytest.mark.parametrize("nulls", [(NULL,), (NULL, 0.9)], ids=["one", "each its own"])
def test_guidance_is_one_call_and_none_is_none(nulls):
    sizes = []

    def counted(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        sizes.append((len(x_t), len(t), len(cond["mean"])))
        return TEACHER(x_t, t, cond)

    x, cond, null = column(0.1, 0.2), {"mean": column(MEAN, -1.0)}, {"mean": column(*nulls)}
    assert guided(counted, null, 1) is counted
    mixed = guided(counted, null, column(1.0, 4.0).flatten())(x, column(499.0, 19.0).flatten(), cond)
    assert sizes == [(4, 4, 4)]
    for row, (t, mean) in enumerate(((499.0, MEAN), (19.0, guided_mean(nulls[-1], -1.0, 4.0)))):
        truth = TEACHER(x[row : row + 1], column(t).flatten(), {"mean": column(mean)})
        close([mixed.x0[row].item(), mixed.eps[row].item()], [truth.x0.item(), truth.eps.item()])


# The update itself


def production(seed: int = 0, step: int = 0) -> StepContext:
    roles = {"teacher": TEACHER, "student": Mixture(SD)}
    null = {"mean": column(NULL)}
    return StepContext(
        SD, null, roles.__getitem__, nn.ModuleDict().__getitem__, nn.Identity(), seed, step, torch.device("cpu")
    )


def batch(first: int, size: int) -> Batch:
    index = tuple(range(first, first + size))
    return Batch(index, {"mean": torch.full((size, 1, 1, 1), MEAN)}, (1, 2, 2), latents=torch.ones(size, 1, 2, 2))


def test_the_scale_is_drawn_for_each_sample():
    method = consistency("any", guidance_scale=(2.0, 9.0))
    scale = production().guidance(method.guidance_scale, batch(0, 256))
    assert scale.shape == (256,) and len(scale.unique()) == 256
    assert scale.min() >= 2 and scale.max() < 9
    close(scale.mean(), 5.5, 0.4)


def test_a_batch_is_its_samples():
    """Every draw belongs to a sample, so that micro-batches and processes change nothing."""
    method = consistency("any", guidance_scale=(2.0, 9.0))

    def loss(first: int, size: int, step: int = 3) -> Tensor:
        (only,) = method.updates(production(step=step), batch(first, size), step)
        return only.loss

    close(loss(5, 4), torch.stack([loss(5 + k, 1) for k in range(4)]).mean(), 1e-7)
    close(loss(5, 4), (loss(5, 2) + loss(7, 2)) / 2, 1e-7)
    assert loss(5, 1) != loss(6, 1) and loss(5, 1) != loss(5, 1, step=4)


def test_one_update_of_the_student_alone():
    method, student = consistency("any"), teacher_table(SD, 50, MEAN, STD)
    calls = []

    def role(name, denoise):
        def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            calls.append((name, len(x_t), torch.is_grad_enabled()))
            return denoise(x_t, t, cond)

        return call

    roles = {"teacher": role("teacher", TEACHER), "student": role("student", student)}
    done = update(method, SD, roles, product(torch.tensor([7]), torch.tensor([0.1]), MEAN))
    assert done.roles == ("student",) and done.loss.shape == () and not done.logs["loss"].requires_grad
    assert sorted(calls) == [("student", 2, False), ("student", 2, True), ("teacher", 2, False)]


@pytest.mark.parametrize("end", ["clean", "any", "edge"])
def test_the_target_carries_no_graph(end):
    """The gradient is that against a constant target, made by another student of equal weights."""
    own, other = (consistency(end, n=20, target=target) for target in ("student", "ema"))
    student, average = (sweep(own, SD, TEACHER, MEAN) for _ in range(2))
    for table in (student, average):
        with torch.no_grad():
            table.slope += 0.1
            table.offset -= 0.2
    rows, roles = every_step(own, 1, MEAN), {"teacher": TEACHER, "student": student, "ema": average}
    gradients = [
        torch.cat(torch.autograd.grad(update(method, SD, roles, rows).loss, (student.offset, student.slope)))
        for method in (own, other)
    ]
    assert gradients[1].abs().max() > 1e-4
    close(gradients[0], gradients[1], 1e-15)
    loss = update(other, SD, roles, rows).loss
    assert torch.autograd.grad(loss, average.slope, allow_unused=True) == (None,)


def test_the_target_is_the_average_if_asked():
    """At grid step 5 an average that is off moves the target of `ema`, and leaves that of `student`."""
    student, average = teacher_table(SD, 50, MEAN, STD), Tabular(SD, 50)
    rows, roles = (
        product(torch.tensor([5]), torch.tensor([0.1]), MEAN),
        {"teacher": TEACHER, "student": student},
    )
    expected = update(consistency(target="student"), SD, roles, rows).loss
    roles["ema"] = average
    close(update(consistency(target="student"), SD, roles, rows).loss, expected, 0)
    assert update(consistency(target="ema"), SD, roles, rows).loss > 10 * expected


def test_single_precision_is_the_same_update():
    for end in ("clean", "any", "edge"):
        method = consistency(end, n=20, guidance_scale=7.5)
        rows = every_step(method, 1, MEAN)
        single = replace(rows, x0=rows.x0.float(), eps=rows.eps.float(), mean=rows.mean.float())
        roles = {"teacher": TEACHER, "student": teacher_table(SD, 20, MEAN, STD)}
        table = DiscreteVP(SD(torch.arange(1000.0))[0] ** 2)
        losses = [update(method, s, roles, r, NULL).loss for s, r in ((SD, rows), (table, single))]
        close(losses[1] / losses[0], 1.0, 1e-5)


def test_a_batch_without_latents_is_refused():
    bare = replace(batch(0, 2), latents=None)
    with pytest.raises(ValueError, match="the batch has none"):
        next(consistency().updates(production(), bare, 0))
