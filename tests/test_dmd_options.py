"""DMD2's options against closed forms: numbers of steps, sampling with another eta, two noise levels, the anchor."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from oracles import close
from oracles.context import Drawn, Flow, drawn, stable_diffusion
from oracles.gaussian import GaussianTeacher
from oracles.planted import Bug, bug_tests
from test_distribution import Linear, gradient, prompts
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.core.guidance import LINEAR, ImageNorm, TokenNorm
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule, expand, shifted_between
from stepdistill.core.solvers import few_step
from stepdistill.families.rules import rule_with
from stepdistill.methods import dmd2, finetune, rollout
from stepdistill.methods.anchor import Anchor
from stepdistill.methods.augmentation import Augmentation
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan
from stepdistill.methods.rollout import Lengths
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import TEACHER, LoraSpec

SD, FLOW, SHIFTED = stable_diffusion(), Flow(), Flow(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [SD, SHIFTED], ids=["table", "flow"])
MEAN, STD = 0.8, 0.5
FOUR = DMD2(num_inference_steps=4, guidance_scale=1.0, critic_steps=1, eta=0)


class Generator:
    """The student whose every x0 has the data's distribution N(0.8, 0.5^2), in steps of `eta`."""

    def __init__(self, schedule: NoiseSchedule, eta: float) -> None:
        self.schedule, self.eta = schedule, eta

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        alpha_t, sigma_t = (expand(v, x_t) for v in self.schedule(t.double()))
        spread = alpha_t * STD + sigma_t if self.eta == 0 else ((alpha_t * STD) ** 2 + sigma_t**2).sqrt()
        x0 = MEAN + STD * (x_t - alpha_t * MEAN) / spread
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)


# several numbers of steps


def starts_of(lengths: Lengths, schedule: NoiseSchedule, method: DMD2 = FOUR, count: int = 400) -> list[tuple]:
    context = drawn(schedule, {})
    return [lengths.drawn(context, lambda n: method.sampler(schedule, n)).timesteps for _ in range(count)]


@SCHEDULES
def test_one_map_serves_all_numbers_of_steps(schedule):
    """The fixed point of one number of deterministic steps is that of all, at any times."""
    student, context, z = Generator(schedule, 0), drawn(schedule, {}), torch.linspace(-3, 3, 9).double()
    z = z.reshape(-1, 1, 1, 1)
    first = schedule.span[1]
    alpha, sigma = (v.item() for v in schedule(torch.tensor(first).double()))
    for spacing in ("even", "random"):
        lengths = Lengths(steps=tuple(range(1, 17)), spacing=spacing)
        if schedule is SD and spacing == "even":
            lengths = Lengths(steps=(1, 2, 4, 8, 10), spacing=spacing)
        for _ in range(60):
            sampler = lengths.drawn(context, lambda n: FOUR.sampler(schedule, n))
            found = few_step(student, schedule, sampler, z, {})
            close(found, MEAN + STD * (z - alpha * MEAN) / (alpha * STD + sigma), 1e-9)


@SCHEDULES
def test_random_starts_fill_equal_parts_and_numbers_of_steps_are_drawn_as_often_as_they_are_given(schedule):
    lengths = Lengths(steps=(1, 2, 5, 5), t_range=(40.0, 900.0))
    drawn_starts = starts_of(lengths, schedule, count=800)
    counts = Counter(map(len, drawn_starts))
    assert set(counts) == {1, 2, 5} and abs(counts[5] - 400) < 60 and abs(counts[1] - 200) < 50
    assert {starts[0] for starts in drawn_starts} == {schedule.span[1]}
    five = torch.tensor([starts[1:] for starts in drawn_starts if len(starts) == 5], dtype=torch.float64)
    assert (five.diff(dim=1) < 0).all() and five.max() <= 900 and five.min() >= 40
    edges = schedule.random_times(torch.arange(5).double() / 4, 40.0, 900.0)
    for part, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        times = five[:, 3 - part]
        assert times.min() >= low and times.max() <= high
        assert times.max() - times.min() > 0.9 * (high - low - 1)
    if schedule is SD:
        assert (five == five.round()).all()


def test_even_starts_are_those_that_sampling_has():
    method = replace(FOUR, timesteps=(799.0,), num_inference_steps=4, eta=0)
    found = set(starts_of(Lengths(steps=(1, 2, 4), spacing="even"), SD, method))
    assert found == {(799.0,), (799.0, 399.0), (799.0, 599.0, 399.0, 199.0)}


def test_starts_below_the_first_one_and_the_same_for_all_samples():
    method = replace(FOUR, timesteps=(400.0,), eta=0)
    for starts in starts_of(Lengths(steps=(3,)), SHIFTED, method):
        assert starts[0] == 400.0 and 20 <= starts[2] < starts[1] <= 399.0


def test_the_rollout_takes_the_drawn_steps():
    """What the student is trained at is what the drawn sampler reaches."""
    seen: list[Tensor] = []
    student = Generator(SHIFTED, 0)

    def watched(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        seen.append(t)
        return student(x_t, t, cond)

    teacher = GaussianTeacher(SHIFTED, STD)
    method = replace(FOUR, num_inference_steps=3, lengths=Lengths(steps=(3,)))
    context = drawn(SHIFTED, {"student": watched, "fake": teacher, TEACHER: teacher}, step=0.9)
    next(method.updates(context, prompts(2, MEAN), 1))
    times = [t[0].item() for t in seen]
    assert len(times) == 3 and times[0] == 1000.0 and times == sorted(times, reverse=True)
    assert times != list(method.sampler(SHIFTED, 3).timesteps)


# the eta of training and of sampling


def test_steps_are_deterministic_on_flows_and_renoised_on_tables_by_default():
    method = replace(FOUR, eta=None)
    assert method.sampler(FLOW).eta == 0 and method.sampler(SD).eta == 1
    assert replace(method, eta=1).sampler(FLOW).eta == 1 and replace(method, eta=0).sampler(SD).eta == 0


@pytest.mark.parametrize(
    ("trained", "sampled", "expected"),
    [
        (0, 0, (0.5,) * 4),
        (1, 1, (0.5,) * 4),
        (0, 1, (0.501, 0.435, 0.363, 0.301)),
        (1, 0, (0.501, 0.576, 0.698, 0.824)),
    ],
)
def test_a_student_that_is_sampled_with_the_other_eta_has_another_spread(trained, sampled, expected):
    """Of data with std 0.5, in 1, 2, 4 and 8 steps: the map of deterministic steps renoised, and the reverse."""
    z, fresh = torch.randn(200_000, 1, 1, 1, dtype=torch.float64), torch.Generator().manual_seed(1)
    for steps, std in zip((1, 2, 4, 8), expected, strict=True):
        sampler = replace(FOUR, eta=sampled).sampler(SHIFTED, steps)
        again = lambda _: torch.randn(z.shape, dtype=torch.float64, generator=fresh)  # noqa: E731
        found = few_step(Generator(SHIFTED, trained), SHIFTED, sampler, z, {}, again)
        assert abs(found.std().item() - std) < 0.003 and abs(found.mean().item() - MEAN) < 0.01


# times


@SCHEDULES
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_shifted_times_have_the_density_of_their_formula_within_the_range(schedule, shift):
    u = (torch.arange(4000).double() + 0.5) / 4000
    times = schedule.random_times(u, 20.0, 980.0, shift)
    alpha, sigma = schedule(times)
    share = sigma / (alpha + sigma)
    v = share / (shift - (shift - 1) * share)  # uniform between the range's own
    first, last = (s / (shift - (shift - 1) * s) for s in (v_of(schedule, t) for t in (20.0, 980.0)))
    close(v, first + u * (last - first), 2e-3 if schedule is SD else 1e-9)
    assert times.min() >= 20 and times.max() <= 980
    ends = ((times <= times.min()) | (times >= times.max())).double().mean()
    assert ends < 0.02  # a clamp heaps draws there


def v_of(schedule: NoiseSchedule, t: float) -> float:
    alpha, sigma = (v.item() for v in schedule(torch.tensor(t).double()))
    return sigma / (alpha + sigma)


def test_without_a_shift_times_are_as_before_and_scores_and_critic_take_the_shift():
    u = torch.rand(100, dtype=torch.float64)
    close(SHIFTED.random_times(u, 20.0, 980.0), 1000 * shifted_between(u, 0.02, 0.98, 3.0), 1e-12)
    seen: dict[str, list[Tensor]] = {TEACHER: [], "fake": []}
    exact = GaussianTeacher(FLOW, STD)

    def recorded(role: str):
        def call(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
            seen[role].append(t)
            return exact(x_t, t, cond)

        return call

    roles = {"student": Linear(0.1, 0.4), "fake": recorded("fake"), TEACHER: recorded(TEACHER)}
    method = replace(FOUR, num_inference_steps=1, renoise_shift=5.0)
    list(method.updates(drawn(FLOW, roles, score_t=0.5, fake_t=0.5), prompts(3, MEAN), 0))
    close(seen[TEACHER][0], FLOW.random_times(torch.full((3,), 0.5).double(), 20.0, 980.0, 5.0), 1e-9)
    close(seen["fake"][0], seen[TEACHER][0], 1e-9)
    close(seen["fake"][1], FLOW.random_times(torch.full((3,), 0.5).double(), 0.0, 1000.0, 5.0), 1e-9)


# updates of the fake score on one rollout


def test_a_rollout_serves_several_updates_of_the_fake_score_each_with_its_own_noise():
    teacher = GaussianTeacher(FLOW, STD)
    roles = {"student": Linear(0.1, 0.4), "fake": teacher, TEACHER: teacher}
    context, method = drawn(FLOW, roles), replace(FOUR, num_inference_steps=1, rollout_updates=3)
    found = list(method.updates(context, prompts(3, MEAN), 0))
    assert [update.roles for update in found] == [("student",), *[("fake",)] * 3]
    noises = [context.seen[name] for name in ("fake eps", "fake 1 eps", "fake 2 eps")]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 3
    assert len({update.loss.item() for update in found[1:]}) == 3


# two noise levels


def effective_mean(range_: tuple[float, float], w: float = 3.0, std: float = 0.5) -> float:
    """`m_c + (w - 1)(m_c - m_u) E_r[sigma^2 / C] / E_s[sigma^2 / C]` for the prompt's mean 0.7 and the null's 0."""

    def part(low: float, high: float) -> float:
        t = low + (high - low) * (torch.arange(20_000).double() + 0.5) / 20_000
        return (t**2 / (((1 - t) * std) ** 2 + t**2)).mean().item()

    return 0.7 + (w - 1) * 0.7 * part(*range_) / part(0.02, 0.98)


@pytest.mark.parametrize("range_", [(0.02, 0.98), (0.02, 0.5), (0.5, 0.98)])
def test_guidance_at_levels_of_its_own_counts_as_much_as_these_levels_make_it(range_, monkeypatch):
    """The fixed point is where the mean gradient is zero: for w = 3 beyond, below, or at the plain 2.1."""
    monkeypatch.setattr(dmd2, "normalised", lambda x0, fake, real, cond: fake - real)
    t_range = tuple(1000 * t for t in range_)
    method = replace(
        FOUR, num_inference_steps=1, guidance_scale=3.0, augmentation=Augmentation(t_range=t_range, below_start=False)
    )
    expected, teacher = effective_mean(range_), GaussianTeacher(FLOW, STD)
    if range_ == (0.02, 0.98):
        assert abs(expected - 2.1) < 1e-9
    for b, zero in ((expected, True), (2.1 + (0.5 if range_ == (0.02, 0.98) else 0.0), False)):
        student = Linear(b, STD)
        roles = {"student": student, "fake": student.score(FLOW), TEACHER: teacher}
        pull = gradient(method, drawn(FLOW, roles), prompts(60_000, 0.7)).flatten()
        size = abs(pull.mean().item())
        assert (size < 5 * pull.std().item() / len(pull) ** 0.5) == zero, (b, size)


def test_guidance_stays_below_the_start_of_the_students_step():
    seen: list[Tensor] = []
    exact = GaussianTeacher(FLOW, STD)

    def teacher(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        seen.append(t)
        return exact(x_t, t, cond)

    roles = {"student": Generator(FLOW, 0), "fake": exact, TEACHER: teacher}
    for below, top in ((True, 250.0), (False, 980.0)):
        seen.clear()
        method = replace(FOUR, guidance_scale=2.0, augmentation=Augmentation(below_start=below))
        next(method.updates(drawn(FLOW, roles, step=0.99), prompts(400, MEAN), 0))
        scores, guided = seen
        assert len(scores) == 400 and len(guided) == 800
        assert 0.97 * top < guided.max() <= top and guided.min() >= 20 and scores.max() > 950


# the anchor


class Steps(nn.Module):
    """A student `x0 = k_t x` with a slope of its own at each time."""

    def __init__(self, times: tuple[float, ...], slopes: tuple[float, ...]) -> None:
        super().__init__()
        self.times = torch.tensor(times, dtype=torch.float64)
        self.slope = nn.Parameter(torch.tensor(slopes, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        row = (self.times == t[:1].double()).nonzero().item()
        x0 = self.slope[row] * x_t
        alpha_t, sigma_t = (expand(v, x_t) for v in FLOW(t.double()))
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        return est.eps - est.x0


def slopes_of(student: Steps) -> Tensor:
    """The gradient of its slopes."""
    assert student.slope.grad is not None
    return student.slope.grad


def anchored(method: DMD2, student: Steps, **fixed: float) -> Drawn:
    teacher = GaussianTeacher(FLOW, STD)
    return drawn(FLOW, {"student": student, "fake": GaussianTeacher(FLOW, 0.3), TEACHER: teacher}, 0, **fixed)


@pytest.mark.parametrize(
    ("steps", "of", "slope"),
    [(25, 400, 0.008), (60, 420, 0.021), (100, 400, 0.041), (200, 400, 0.118), (400, 400, 0.5)],
)
def test_the_anchor_s_optimum_has_the_slope_of_the_teacher_s_path(steps, of, slope):
    """`(S_k - t_k) / (1 - t_k)` for data N(0, 0.5^2), S_k the spread at the anchor's time."""
    t_k = 1 - steps / of
    exact = (math.hypot((1 - t_k) * STD, t_k) - t_k) / (1 - t_k)
    assert abs(exact - slope) < 1e-3
    student, term = Steps((1000.0,), (exact,)), Anchor(steps=steps, num_inference_steps=of, weight=0.3)
    context, batch = anchored(FOUR, student), prompts(64, 0.0)
    start = context.noise(batch, "start")
    loss = term.loss(context, batch, start, 1000.0, 1.0)
    loss.backward()
    # its gradient is 2 weight E[(k - k*) z^2]: k* is where it is zero, up to the solver's error
    distance = slopes_of(student).item() / (2 * 0.3 * start.square().mean().item())
    assert abs(distance) < 4e-3
    with torch.no_grad():
        student.slope.add_(0.1)
    more = term.loss(context, batch, start, 1000.0, 1.0).item()
    close(torch.tensor(more), torch.tensor(0.3 * 0.1**2 * start.square().mean().item()), 6e-4)


def test_the_anchor_follows_the_guided_teacher():
    """Its line differs from the unguided one by what guidance adds: to the method's scale, or to its own."""
    student, batch = Steps((1000.0,), (0.0,)), prompts(8, 0.7)
    context = anchored(FOUR, student)
    start = context.noise(batch, "start")
    term = Anchor(steps=10, num_inference_steps=40, weight=1.0)
    plain, guided = (term.loss(context, batch, start, 1000.0, w).item() for w in (1.0, 3.0))
    assert guided > 2 * plain
    assert replace(term, guidance_scale=3.0).loss(context, batch, start, 1000.0, 1.0).item() == guided


def test_the_scores_never_reach_the_first_step():
    """Its gradient is exactly zero where the anchor has no weight, whichever step is drawn."""
    times = FOUR.sampler(FLOW).timesteps
    method = replace(FOUR, anchor=Anchor(steps=1, num_inference_steps=4, weight=0.0), guidance_scale=2.0)
    reached = set()
    for share in (0.0, 0.2, 0.34, 0.5, 0.7, 0.99):
        student = Steps(times, (0.1, 0.2, 0.3, 0.4))
        next(method.updates(anchored(method, student, step=share), prompts(16, 0.7), 0)).loss.backward()
        grad = slopes_of(student)
        assert grad[0] == 0 and (grad != 0).sum() == 1
        reached.add(int(grad.nonzero().item()))
    assert reached == {1, 2, 3}


def test_an_anchor_changes_the_first_step_alone():
    times = FOUR.sampler(FLOW).timesteps
    found = []
    for weight in (0.0, 0.05):
        student = Steps(times, (0.1, 0.2, 0.3, 0.4))
        method = replace(FOUR, anchor=Anchor(steps=10, num_inference_steps=40, weight=weight))
        update = next(method.updates(anchored(method, student, step=0.5), prompts(16, 0.7), 0))
        update.loss.backward()
        found.append(slopes_of(student).clone())
        assert ("loss_anchor" in update.logs) and (update.logs["loss_anchor"] > 0) == (weight > 0)
    assert (found[0] != found[1]).tolist() == [True, False, False, False]


# off the path


def test_off_the_path_the_matching_is_without_guidance_and_at_states_of_the_students_own():
    """With the scores equal only guidance is left, and that term has none; else it pulls at a second time."""
    states: list[tuple[Tensor, Tensor]] = []
    teacher = GaussianTeacher(FLOW, STD)
    student = Generator(FLOW, 0)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def watched(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        states.append((x_t, t))
        est = student(x_t, t, cond)
        return Estimate(est.x0 * scale, est.eps)

    roles = {"student": watched, "fake": teacher, TEACHER: teacher}
    method = replace(FOUR, guidance_scale=3.0, off_path=0.7)
    context = drawn(FLOW, roles, step=0.3, off_path_t=0.6)
    update = next(method.updates(context, prompts(4, 0.7), 0))
    assert update.logs["loss_off_path"] == 0
    (x_t, t), (x_r, r) = states[-2:]
    est = student(x_t, t, {})
    close(r, FLOW.random_times(torch.full((4,), 0.6, dtype=torch.float64), 20.0, 980.0), 1e-9)
    close(x_r, FLOW.add_noise(est.x0, est.eps, r), 1e-9)
    assert not x_r.requires_grad
    roles["fake"] = GaussianTeacher(FLOW, 0.2)
    context = drawn(FLOW, roles, step=0.3)
    update = next(method.updates(context, prompts(4, 0.7), 0))
    plain = next(replace(method, off_path=0.0).updates(drawn(FLOW, roles, step=0.3), prompts(4, 0.7), 0))
    assert update.logs["loss_off_path"] > 0
    close(update.loss.detach(), plain.logs["loss"] + 0.7 * update.logs["loss_off_path"], 1e-9)


def test_a_floor_bounds_the_normaliser():
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    fake, real = torch.full_like(x, 0.06), torch.full_like(x, 0.02)
    close(dmd2.normalised(x, fake, real, {}), torch.full_like(x, 2.0), 1e-12)
    close(dmd2.normalised(x, fake, real, {}, 0.1), torch.full_like(x, 0.4), 1e-12)


# the fake score that follows the student


def backbone(rank: int = 2) -> Backbone:
    torch.manual_seed(0)
    return Backbone(nn.Sequential(nn.Linear(6, 6, bias=False)), LoraSpec(rank=rank), ["0"])


def fill(bone: Backbone, role: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in bone.parameters_of(role).values():
        p.data = torch.randn(p.shape, generator=generator)


def test_the_fake_score_starts_as_the_student_and_follows_each_of_its_updates():
    bone, method = backbone(), replace(FOUR, fake_decay=0.9, ema_decay=0.5)
    for name, role in method.roles().items():
        bone.add(name, role)
    before = {key: value.clone() for key, value in bone.state("fake").items()}
    assert all(torch.equal(before[key], value) for key, value in bone.state("student").items())
    fill(bone, "student", 1)
    fill(bone, "fake", 2)
    teacher, (student, fake, ema) = (
        dict(bone.net.named_parameters())["0.base_layer.weight"].clone(),
        ({k: v.clone() for k, v in bone.state(role).items()} for role in ("student", "fake", "ema")),
    )
    bone.average(("fake",), 0)
    assert all(torch.equal(fake[key], value) for key, value in bone.state("fake").items())
    bone.average(("student",), 0)
    for key in fake:
        close(bone.state("fake")[key], 0.9 * fake[key] + 0.1 * student[key], 1e-6)
        close(bone.state("ema")[key], 0.5 * ema[key] + 0.5 * student[key], 1e-6)
        assert torch.equal(bone.state("student")[key], student[key])
    assert torch.equal(dict(bone.net.named_parameters())["0.base_layer.weight"], teacher)
    assert all(p.requires_grad for p in bone.parameters_of("fake").values())


@pytest.mark.parametrize(("decay", "rate", "k"), [(0.97, 0.05, 2), (0.97, 0.05, 5), (0.9, 0.1, 3)])
def test_a_fake_score_that_follows_settles_a_share_of_the_way_to_the_student(decay, rate, k):
    """`r (1 - decay) / (1 - r decay)` with r = (1 - rate)^k: what its own updates leave of a distance."""
    bone = backbone()
    for name, role in replace(FOUR, fake_decay=decay, ema_decay=None).roles().items():
        bone.add(name, role)
    for p in bone.parameters_of("student").values():
        p.data.fill_(1.0)
    left = (1 - rate) ** k
    for step in range(2000):
        bone.average(("student",), step)
        for p in bone.parameters_of("fake").values():  # its own optimum is 0
            p.data.mul_(left)
    share = left * (1 - decay) / (1 - left * decay)
    for p in bone.parameters_of("fake").values():
        close(p, torch.full_like(p, share), 1e-4)


def test_factors_that_start_equal_are_blended_as_their_products_are():
    """With one A for both roles the product is exact; with two it loses size, and the code makes them equal."""
    bone = backbone()
    for name, role in replace(FOUR, fake_decay=0.97, ema_decay=None).roles().items():
        bone.add(name, role)
    student, fake = (list(bone.parameters_of(role).values()) for role in ("student", "fake"))
    assert torch.equal(student[0], fake[0])
    student[1].data, fake[1].data = torch.randn(6, 2), torch.randn(6, 2)
    wanted = 0.97 * fake[1] @ fake[0] + 0.03 * student[1] @ student[0]
    bone.average(("student",), 0)
    close(fake[1] @ fake[0], wanted, 1e-6)


# norms


def test_the_image_s_norm_is_that_with_the_prompt_and_a_token_s_that_of_one_token():
    uncond, cond = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    y = uncond + 3.0 * (cond - uncond)
    found = ImageNorm()(uncond, cond, 3.0, torch.zeros(2))
    close(found.flatten(1).norm(dim=1), cond.flatten(1).norm(dim=1), 1e-9)
    close(found / y, (found / y)[:, :1, :1, :1].expand_as(y), 1e-9)
    one = y[:1, :, :1, :1], uncond[:1, :, :1, :1], cond[:1, :, :1, :1]
    close(ImageNorm()(one[1], one[2], 3.0, torch.zeros(1)), TokenNorm(1)(one[1], one[2], 3.0, torch.zeros(1)), 1e-9)


def test_a_token_of_a_video_is_in_one_frame():
    """An odd number of frames, which patches of frames would not divide, and of another size than the rest."""
    uncond, cond = (torch.randn(2, 3, 5, 4, 6, dtype=torch.float64) for _ in range(2))
    found = TokenNorm(2)(uncond, cond, 3.0, torch.zeros(2))
    for frame in range(5):
        alone = TokenNorm(2)(uncond[:, :, frame], cond[:, :, frame], 3.0, torch.zeros(2))
        close(found[:, :, frame], alone, 1e-12)


@pytest.mark.parametrize(("name", "side"), [("sd", 1), ("sd3", 2), ("flux", 2)])
def test_a_method_s_norm_takes_the_place_of_the_pipeline_s_rule(name, side):
    family = tiny.FAMILIES[name]
    net = family.network(tiny.pipeline(name))
    assert rule_with("token", family, net) == TokenNorm(side)
    assert rule_with("image", family, net) == ImageNorm()
    assert rule_with(None, family, net) == family.rule == LINEAR


# what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anchor": Anchor(), "num_inference_steps": 1}, "anchor with a student of 1 step"),
        ({"anchor": Anchor(), "lengths": Lengths(steps=(1, 4))}, "anchor with a student of 1 step"),
        ({"num_inference_steps": 4, "lengths": Lengths(steps=(1, 2))}, "expected numbers around 4"),
        ({"augmentation": Augmentation(), "weak": 0.5}, "weak is 0.5"),
        ({"rollout_updates": 2, "gan": Gan()}, "rollout_updates is 2"),
        ({"eta": 0.5}, "eta is 0.5"),
    ],
)
def test_settings_that_have_no_effect_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DMD2(**settings)


def test_settings_are_refused_on_the_schedule_that_they_do_not_fit():
    with pytest.raises(ValueError, match="several steps with fresh noise"):
        replace(FOUR, regression_weight=1.0, eta=1).check(FLOW)
    replace(FOUR, regression_weight=1.0, eta=None).check(FLOW)
    with pytest.raises(ValueError, match="several steps with fresh noise"):
        replace(FOUR, regression_weight=1.0, eta=None).check(SD)
    with pytest.raises(ValueError, match="end at timestep 949"):
        replace(
            FOUR, timesteps=(799.0, 399.0), num_inference_steps=4, anchor=Anchor(steps=1, num_inference_steps=20)
        ).check(SD)
    for steps, words in (((), "empty"), ((2,), "t_range")):
        with pytest.raises(ValueError, match=words):
            Lengths(steps=steps, t_range=(500.0, 20.0))
    with pytest.raises(ValueError, match="at most"):
        Anchor(steps=41)


BELOW = test_guidance_stays_below_the_start_of_the_students_step
SLOPE = lambda: test_the_anchor_s_optimum_has_the_slope_of_the_teacher_s_path(100, 400, 0.041)  # noqa: E731
FIRST = test_the_scores_never_reach_the_first_step
PARTS = lambda: test_random_starts_fill_equal_parts_and_numbers_of_steps_are_drawn_as_often_as_they_are_given(SHIFTED)  # noqa: E731
OFF = test_off_the_path_the_matching_is_without_guidance_and_at_states_of_the_students_own
FOLLOWS = test_the_fake_score_starts_as_the_student_and_follows_each_of_its_updates
ETA = test_steps_are_deterministic_on_flows_and_renoised_on_tables_by_default
SHIFT = test_without_a_shift_times_are_as_before_and_scores_and_critic_take_the_shift
AGAIN = test_a_rollout_serves_several_updates_of_the_fake_score_each_with_its_own_noise
DENSITY = lambda: test_shifted_times_have_the_density_of_their_formula_within_the_range(SHIFTED, 5.0)  # noqa: E731
ROLL = test_the_rollout_takes_the_drawn_steps
GUIDED = test_the_anchor_follows_the_guided_teacher

BUGS = {
    "one start for all parts": Bug(Lengths.drawn, "(i + context", "(0 * i + context", PARTS),
    "starts not stratified": Bug(
        Lengths.drawn, '(i + context.shared(f"start {i}")) / (n - 1)', 'context.shared(f"start {i}")', PARTS
    ),
    "lengths not drawn": Bug(Lengths.drawn, 'context.shared("length")', "0.0", PARTS),
    "the contract's steps in the place of the drawn ones": Bug(DMD2.towards, "self.lengths is None", "True", ROLL),
    "eta turned round": Bug(
        rollout.default_eta,
        "0.0 if schedule.straight else 1.0",
        "1.0 if schedule.straight else 0.0",
        ETA,
    ),
    "shift clamped": Bug(shifted_between, "first + u * (last - first)", "u.clamp(first, last)", DENSITY),
    "shift turned round": Bug(
        shifted_between, "shift * v / (1 + (shift - 1) * v)", "v / (shift - (shift - 1) * v)", DENSITY
    ),
    "the critic without the shift": Bug(
        finetune.score_matching_loss,
        "*context.schedule.span, shift",
        "*context.schedule.span",
        SHIFT,
    ),
    "one noise for all updates of a rollout": Bug(
        finetune.score_matching_loss,
        'f"{role} {again}" if again else role',
        "role",
        AGAIN,
    ),
    "guidance twice": Bug(
        DMD2.real_score, "return context.denoiser(target)", "return context.guided(target, self.guidance_scale)", BELOW
    ),
    "guidance above the start": Bug(Augmentation.move, "min(high, start)", "high", BELOW),
    "the anchor's first step by the scores": Bug(
        DMD2.towards, "first=0 if self.anchor is None else 1", "first=0", FIRST
    ),
    "the student's grid for the anchor": Bug(Anchor.times, "self.num_inference_steps", "4", SLOPE),
    "anchor's sign": Bug(Anchor.loss, "chord(schedule, start, t, state,", "chord(schedule, start, t, -state,", SLOPE),
    "anchor at another time": Bug(Anchor.path, "per_sample(times[-1], start)", "per_sample(times[-2], start)", SLOPE),
    "unguided anchor": Bug(
        Anchor.scale, "of_method if self.guidance_scale is None", "1.0 if self.guidance_scale is None", GUIDED
    ),
    "off-path states with a graph": Bug(DMD2.off_path_loss, "est.x0.detach()", "est.x0", OFF),
    "off-path guided": Bug(
        DMD2.off_path_loss,
        "context.denoiser(role)(x_s",
        "context.guided(role, 3.0 if role == target else 1.0)(x_s",
        OFF,
    ),
    "off path on the path": Bug(DMD2.off_path_loss, "est.eps.detach()", 'context.noise(batch, "x")', OFF),
    "blended the wrong way": Bug(Backbone.average, "1 - role.decay", "role.decay", FOLLOWS),
    "the student follows, too": Bug(Backbone.average, "(name, of))", "(of, name))", FOLLOWS),
    "blended after the fake score's steps": Bug(
        Backbone.average, "for of in stepped", "for of in self.declared", FOLLOWS
    ),
}

test_oracles_pass, test_bugs_are_noticed = bug_tests(BUGS, KeyError)
