"""The methods' own updates against closed forms: the guided teacher of Gaussian data, and two of its steps in one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from oracles import close
from oracles.context import Flow, Network, Scripted, Tabular, column, stable_diffusion
from oracles.gaussian import GaussianTeacher, ddim_gain, guided_mean
from tiny import FAMILIES, backbone, batch, context, pipeline
from torch import nn

from stepdistill.core.denoise import SCALE, guided, with_scale
from stepdistill.core.prediction import Estimate, estimate
from stepdistill.core.schedule import expand
from stepdistill.core.solvers import few_step, follow
from stepdistill.data import GuidedState
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Batch, Method, Update
from stepdistill.methods.guided_lora import GuidedLora
from stepdistill.methods.progressive import ProgressiveHalving, two_steps
from stepdistill.networks.roles import TEACHER, Ema

MEAN, NULL, STD, N = 0.7, -0.5, 0.6, 20
X0, EPS = column(-0.4, 0.3, 0.9, 2.0), column(1.1, -0.2, 0.5, -1.4)
COND, NOTHING = {"mean": torch.full_like(X0, MEAN)}, {"mean": column(NULL)}
SCHEDULES = pytest.mark.parametrize("schedule", [stable_diffusion(), Flow()], ids=["table", "flow"])


def update(method: Method, schedule, roles, part: Batch, share: float = 0.5, step: int = 0) -> Update:
    context = Scripted(
        schedule=schedule,
        null=NOTHING,
        denoiser=roles.__getitem__,
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
        draws={"t": torch.full((4,), share, dtype=torch.float64)},
        eps=EPS,
    )
    (only,) = method.updates(context, part, step)
    return only


PART = Batch((0, 1, 2, 3), COND, (1, 1, 1), X0)


# adapters


@SCHEDULES
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_loss_is_zero_at_guidance_by_the_scale_of_the_state(schedule, kind):
    """O-d: and nowhere else: w - 1, or w twice, is off by what it should be."""
    teacher, t = GaussianTeacher(schedule, STD), torch.tensor([900.0, 600.0, 300.0, 50.0], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 5.0, 7.5], dtype=torch.float64)
    x_t = schedule.add_noise(X0, EPS, t)
    speak = Network(teacher, kind, schedule)
    c, u = (speak.native(teacher(x_t, t, cond), t) for cond in (COND, {"mean": column(NULL).expand_as(X0)}))
    part = Batch((0, 1, 2, 3), COND, (1, 1, 1), state=GuidedState(x_t, t, w, u + expand(w, u) * (c - u)))

    def student(change):
        def call(x, times, cond):
            own = {key: value for key, value in cond.items() if key != SCALE}
            return guided(teacher, NOTHING, change(cond[SCALE]))(x, times, own)

        return {"student": Network(call, kind, schedule)}

    method = AdapterGuidance(width=4)
    assert update(method, schedule, student(lambda w: w), part).loss < 1e-24
    gap = (c - u).square().flatten()
    for change in (lambda w: w - 1, lambda w: w * w, lambda w: w.flip(0), torch.ones_like):
        expected = ((change(w) - w) ** 2 * gap).mean()
        close(update(method, schedule, student(change), part).loss, expected)


def test_the_guided_mean_is_straight_in_the_scale():
    """O-d4 in closed form: what adapters are to become has samples with mean mu_u + w (mu_c - mu_u)."""
    sd = stable_diffusion()
    teacher, method = GaussianTeacher(sd, STD), AdapterGuidance(width=4, num_inference_steps=N)

    def student(x_t, t, cond):
        return guided(teacher, NOTHING, cond[SCALE])(x_t, t, {"mean": cond["mean"]})

    sampler, offsets = method.sampler(sd), []
    assert sampler.guidance_scale == 1 and sampler.adapter_range == (1.0, 12.0)
    for w in (1.0, 2.0, 3.0, 8.0):
        drawn = few_step(with_scale(student, w), sd, sampler, EPS, COND)
        alone = few_step(teacher, sd, sampler, EPS, {"mean": torch.full_like(X0, guided_mean(NULL, MEAN, w))})
        close(drawn, alone, 1e-6)  # w is float32
        offsets.append(drawn)
    close(offsets[2] - 2 * offsets[1] + offsets[0], torch.zeros_like(X0), 1e-6)
    close(offsets[3] - offsets[0], 7 * (offsets[1] - offsets[0]), 1e-6)


def test_odd_settings_are_refused():
    with pytest.raises(ValueError, match="a scale that the adapters learn, in guidance_range"):
        AdapterGuidance(sampling_guidance_scale=20.0)
    with pytest.raises(ValueError, match="width is 0"):
        AdapterGuidance(width=0)
    for steps in ((), (10, 4), (0,)):
        with pytest.raises(ValueError, match="half of the one before"):
            ProgressiveHalving(steps=steps)
    with pytest.raises(ValueError, match="stage_steps is 0"):
        ProgressiveHalving(stage_steps=0)
    with pytest.raises(ValueError, match="does not divide"):
        ProgressiveHalving(steps=(16, 8)).check(stable_diffusion())
    with pytest.raises(ValueError, match="the batch has none"):
        next(AdapterGuidance().updates(None, Batch((0,), {}, (1, 1, 1)), 0))


# a LoRA at one scale


@SCHEDULES
@pytest.mark.parametrize("states", ["noised", "trajectories"])
def test_a_guided_lora_becomes_the_guided_teacher(schedule, states):
    """O-e3: least squares reaches zero, and then one pass without guidance samples T7's Gaussian."""
    method = GuidedLora(guidance_scale=7.5, states=states, num_inference_steps=N)
    teacher, kind = GaussianTeacher(schedule, STD), "flow" if isinstance(schedule, Flow) else "epsilon"
    learner = Tabular(schedule, N)
    roles = {"student": Network(learner, kind, schedule), TEACHER: teacher}
    for j in range(1, N + 1):
        t = schedule.grid(N)[j].item()
        share = t / 1000 if isinstance(schedule, Flow) else (t + 0.5) / 1000
        times = torch.full((4,), t, dtype=torch.float64)
        x_t = schedule.add_noise(X0, EPS, times)
        state = GuidedState(x_t, times, torch.ones(4), torch.zeros_like(x_t))  # of another scale, which counts nothing
        part = Batch((0, 1, 2, 3), COND, (1, 1, 1), X0, state=state)
        learner.fit(j, update(method, schedule, roles, part, share).loss)
        assert update(method, schedule, roles, part, share).loss < 1e-20
    sampler = method.sampler(schedule)
    assert sampler.guidance_scale == 1 and sampler.adapter_scale is None
    mean = torch.full_like(X0, guided_mean(NULL, MEAN, 7.5))
    drawn, exact = (few_step(d, schedule, sampler, EPS, c) for d, c in ((learner, COND), (teacher, {"mean": mean})))
    close(drawn, exact, 1e-6)


@SCHEDULES
@pytest.mark.parametrize("method", [AdapterGuidance(num_inference_steps=N), GuidedLora(num_inference_steps=N)])
def test_one_pass_ends_where_the_teacher_s_own_steps_end(schedule, method):
    """A table's last time is not clean: the same network, sampled to another end, draws other images."""
    teacher = GaussianTeacher(schedule, STD)
    drawn = few_step(teacher, schedule, method.sampler(schedule), EPS, COND)
    close(drawn, follow(teacher, schedule, schedule.grid(N).flip(0).tolist(), EPS, COND), 1e-12)


def test_needs_follow_the_states():
    assert GuidedLora().needs == {"latents"} and GuidedLora(states="trajectories").needs == {"trajectories"}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lora_is_all_that_is_added(name):
    """O-e1, O-e2: at zero it is the base, and training takes one network, one LoRA and one batched teacher call."""
    pipe = pipeline(name)
    net = FAMILIES[name].network(pipe)
    base = {p.data_ptr() for p in net.parameters()}
    bone, method = backbone(name, pipe), GuidedLora(guidance_scale=3.0)
    bone.add("student", method.roles()["student"])
    own = {p.data_ptr() for p in bone.parameters_of("student").values()}
    assert {p.data_ptr() for p in bone.parameters()} == base | own and not base & own
    rows, part, scene = [], batch(name, pipe), context(name, pipe, bone)
    handle = net.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    (only,) = method.updates(scene, part, 0)
    handle.remove()
    assert rows == [4, 2]
    only.loss.backward()
    assert all(p.grad is not None for p in bone.parameters_of("student").values())
    t = scene.schedule.random_times(scene.draw(part, "t"), *scene.schedule.span)
    x_t = scene.schedule.add_noise(part.latents, scene.noise(part, "eps"), t)
    teacher = scene.denoiser(TEACHER)
    with torch.no_grad():
        c = teacher.native(teacher(x_t, t, part.cond), t)
        y = teacher.native(guided(teacher, scene.null, 3.0)(x_t, t, part.cond), t)
    assert only.loss.item() == pytest.approx((c - y).square().mean().item(), rel=1e-4)


# half the steps


@SCHEDULES
def test_one_step_of_the_target_is_two_of_the_teacher(schedule):
    """O-e4, to 1e-9, down to clean data; and of a constant teacher the target is that constant."""
    teacher, grid = GaussianTeacher(schedule, STD), schedule.grid(2 * N)
    for j in range(2, 2 * N + 1, 2):
        t, middle, end = (torch.full((4,), grid[j - k].item(), dtype=torch.float64) for k in range(3))
        x_t, last = schedule.add_noise(X0, EPS, t), torch.full((4,), j == 2)
        x0 = two_steps(teacher, schedule, x_t, t, middle, end, COND, last)
        alpha_t, sigma_t = (expand(v, x_t) for v in schedule(t))
        eps = (x_t - alpha_t * x0) / sigma_t
        x_middle = schedule.add_noise(*teacher(x_t, t, COND), middle)
        est = teacher(x_middle, middle, COND)
        landed, expected = (x0, est.x0) if j == 2 else (schedule.add_noise(e[0], e[1], end) for e in ((x0, eps), est))
        close(landed, expected)

        def constant(x, times, cond):
            alpha, sigma = (expand(v, x) for v in schedule(times))
            return Estimate(torch.full_like(x, 0.3), (x - 0.3 * alpha) / sigma)

        close(two_steps(constant, schedule, x_t, t, middle, end, COND, last), torch.full_like(x_t, 0.3))


@SCHEDULES
def test_halved_twice_it_draws_what_the_first_teacher_draws(schedule):
    """O-e5: N, N / 2, N / 4 steps, each stage by exact least squares, with the stage before as its teacher."""
    method = ProgressiveHalving(steps=(10, 5), stage_steps=3)
    roles: dict = {"teacher_0": GaussianTeacher(schedule, STD)}
    for k, n in enumerate(method.steps):
        roles["student"] = Tabular(schedule, n)
        for j in range(1, n + 1):
            share, step = (j - 0.5) / n, 3 * k + j % 3
            roles["student"].fit(j, update(method, schedule, roles, PART, share, step).loss)
            assert update(method, schedule, roles, PART, share, step).loss < 1e-18
        roles[f"teacher_{k + 1}"] = roles["student"]
    times = schedule.grid(20).flip(0).tolist()
    expected = follow(roles["teacher_0"], schedule, times[:-1], EPS, COND)
    expected = roles["teacher_0"](expected, torch.full((4,), times[-2], dtype=torch.float64), COND).x0
    close(few_step(roles["student"], schedule, method.sampler(schedule), EPS, COND), expected, 1e-8)
    assert len(method.sampler(schedule).timesteps) == 5
    gain = ddim_gain(schedule, STD, [*times[:-1]])
    assert gain > 0  # the chain is no constant


def test_stages_and_their_teachers():
    method = ProgressiveHalving(steps=(4, 2, 1), stage_steps=10)
    assert [method.stage(step) for step in (0, 9, 10, 29, 30, 99)] == [0, 0, 1, 2, 2, 2]
    kept = [role for role in method.roles().values() if isinstance(role, Ema)]
    assert [(role.of, role.decay, role.until) for role in kept] == [("student", 0.0, k) for k in (0, 10, 20)]
    # a stage's teacher is the student as it was when the stage began, and moves no more
    bone = backbone("sd", pipeline("sd"))
    for name, role in method.roles().items():
        bone.add(name, role)
    at = {}
    for step in range(25):
        at[step] = {key: p.clone() for key, p in bone.state("student").items()}
        for p in bone.parameters_of("student").values():
            p.data += 0.01
        bone.average(["student"], step)
    for name, began in (("teacher_0", 0), ("teacher_1", 10), ("teacher_2", 20)):
        assert all(torch.equal(value, at[began][key]) for key, value in bone.state(name).items()), name


def test_the_weight_is_the_truncated_signal_to_noise_ratio():
    sd, method = stable_diffusion(), ProgressiveHalving(steps=(10,))
    teacher = GaussianTeacher(sd, STD)
    for j, (low, high) in enumerate(pairwise(sd.grid(10).tolist()), start=1):
        alpha, sigma = (v.item() for v in sd(torch.tensor(high, dtype=torch.float64)))

        def off(x_t, t, cond, j=j, low=low, first=j == 1):
            middle = sd.grid(20)[2 * j - 1].double().expand(4)
            ends = torch.full((4,), low, dtype=torch.float64)
            x0 = two_steps(teacher, sd, x_t, t, middle, ends, cond, torch.full((4,), first))
            return estimate("sample", x0 + 0.5, x_t, t, sd)

        got = update(method, sd, {"student": off, "teacher_0": teacher}, PART, (j - 0.5) / 10).loss
        close(got, 0.25 * max(1.0, (alpha / sigma) ** 2))
