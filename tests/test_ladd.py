"""LADD in closed forms: its losses, its gradients, its times, its pairs; and bugs planted in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import close
from oracles.context import Flow, drawn, stable_diffusion
from oracles.fakes import Fake, Stage, batch, updates
from oracles.planted import Bug, bug_tests
from runs import LCM, make, saved_teacher, weights
from test_distribution_updates import DMD, scene
from torch import Tensor

from stepdistill.config.load import load_config
from stepdistill.core import losses
from stepdistill.core.cost import count_calls
from stepdistill.core.errors import ConfigError
from stepdistill.core.schedule import expand
from stepdistill.data import Prompts
from stepdistill.methods import gan
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.rollout import simulate
from stepdistill.networks.roles import TEACHER
from stepdistill.training.checks import check_needs
from stepdistill.training.distill import distill

SD, FLOW = stable_diffusion(), Flow(3.0)
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["table", "flow"])
PART = batch(3, 7, 9)
CM = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, gan=Ladd(generator_weight=0.7))
DM = replace(DMD, gan=Ladd(generator_weight=0.7))


class Watched(Fake):
    """A role that notes what its features are asked for, and at which input its estimates are."""

    def features_at(self, x_t: Tensor, t: Tensor, cond: object, depths: tuple[float, ...]) -> tuple[Tensor, ...]:
        SEEN.append((x_t.detach(), t, cond))
        return Fake.features_at(self, x_t, t, cond, depths)  # pyright: ignore[reportArgumentType]


SEEN: list = []


def watched(schedule, step: int = 0) -> tuple[Stage, StepContext]:
    stage = Stage(schedule, {})
    SEEN.clear()
    return stage, replace(stage.context(step), denoiser=lambda role: Watched(schedule, stage[role]))


def logits(stage: Stage, term: Ladd, x0: Tensor, t: Tensor, purpose: str) -> Tensor:
    """The head's logits at `x0`, by the fakes' formulas."""
    alpha_t, sigma_t = (expand(level, x0) for level in stage.schedule(t))
    x_t = alpha_t * x0 + sigma_t * stage.context(0).noise(PART, purpose)
    features = stage["teacher"] * x_t + PART.cond["mean"] + expand(t / 1000, x0)
    parts = [((1 + depth) * features[..., : i + 1]).sin().flatten(1) for i, depth in enumerate(term.depths)]
    return 3 * stage["head"] * torch.cat(parts, 1)


def times(stage: Stage, term: Ladd, purpose: str) -> Tensor:
    return stage.schedule.lognormal_times(stage.context(0).draw(PART, purpose), term.time_mean, term.time_std)


def sample(stage: Stage, method: Consistency | DMD2) -> Tensor:
    """What the student makes, with its graph."""
    context, schedule = stage.context(0), stage.schedule
    if isinstance(method, DMD2):
        x_t, t, _ = simulate(context, PART, method.sampler(schedule), context.noise(PART, "start"))
    else:
        grid = schedule.grid(method.num_ddim_timesteps)
        t = grid[1 + (context.draw(PART, "gan input t") * method.num_ddim_timesteps).long()]
        first, z = context.draw(PART, "gan start") < 0.5, context.noise(PART, "gan input eps")
        assert PART.latents is not None and 0 < first.sum() < len(first)
        x_t = torch.where(expand(first, z), z, schedule.add_noise(PART.latents, z, t))
        t = torch.where(first, schedule.span[1], t)
    return context.denoiser("student")(x_t, t, PART.cond).x0


# --- losses and gradients ------------------------------------------------------------------------------------------


class Judge:
    """A network whose features are its input and its time."""

    def features_at(self, x_t: Tensor, t: Tensor, cond: object, depths: object) -> tuple[Tensor, Tensor]:
        return x_t, t

    def frozen(self) -> Judge:
        return self


@SCHEDULES
def test_the_best_head_reaches_one_minus_the_total_variation(schedule):
    """P5: at one noise level, of two Gaussians with means d spreads apart, that is `2 Phi(-d / 2)`."""
    size, shift, term = 100_000, 1.5, Ladd(time_mean=-0.3, time_std=1e-6)
    x0, real = (0.6 * torch.randn(size, 1, 1, 1, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    part = Batch(tuple(range(size)), {}, (1, 1, 1), latents=real + shift)
    alpha, sigma = schedule(schedule.lognormal_times(torch.tensor([0.5]).double(), -0.3, 1e-6))
    spread = torch.hypot(0.6 * alpha, sigma)

    def loss(head: Callable) -> Tensor:
        return term.head_loss(drawn(schedule, {TEACHER: Judge(), "head": head}), part, x0)

    def split(edge: Tensor) -> Tensor:
        return loss(lambda features: (features[0].flatten(1) - edge).sign())

    best = split(alpha * shift / 2)
    close(best, torch.erfc(alpha * shift / spread / 8**0.5)[0], 0.006)
    assert 0.1 < best < 0.9 and min(split(0 * alpha), split(alpha * shift)) > best + 0.02
    close(loss(lambda features: 0 * features[0].flatten(1)), 1.0)


def gradient(schedule) -> None:
    for method in (CM, DM):
        stage, term = Stage(schedule, {}), method.gan
        student = updates(method, stage, PART, 0)[0]
        without = updates(replace(method, gan=replace(term, generator_weight=0.0)), stage, PART, 0)[0]
        x0 = sample(stage, method)
        d = -logits(stage, term, x0, times(stage, term, "gan student t"), "gan student eps").mean()
        (pull,) = torch.autograd.grad(d, stage["student"])
        close(student.pull["student"] - without.pull["student"], 0.7 * pull, 1e-9)
        close(student.logs["loss_gan"], d, 1e-9)
        assert pull.abs() > 1e-3


@SCHEDULES
def test_the_student_s_gradient_is_that_of_one_graph_through_its_sample(schedule):
    """In two phases it is `generator_weight d(-mean D) / d student`, as one graph of both networks gives it."""
    gradient(schedule)


def head() -> None:
    for method in (CM, DM):
        stage, term = Stage(FLOW, {}), method.gan
        update = updates(method, stage, PART, 0)[1]
        assert PART.latents is not None
        t = times(stage, term, "gan t")
        real = logits(stage, term, PART.latents, t, "gan real eps")
        fake = logits(stage, term, sample(stage, method).detach(), t, "gan fake eps")
        loss = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
        close(update.logs["loss_head"], loss, 1e-9)
        (pull,) = torch.autograd.grad(loss, stage["head"])
        close(update.pull["head"], pull, 1e-9)


def test_the_head_s_loss_and_gradient_are_the_hinge_s():
    head()


def leaks() -> None:
    for method in (CM, DM):
        stage = Stage(SD, {"teacher": torch.tensor(0.8, dtype=torch.float64, requires_grad=True)})
        found = list(method.updates(stage.context(0), PART, 0))
        names = ("student", "teacher", "fake", "head")
        for update in found:
            pulls = torch.autograd.grad(
                update.loss, [stage[name] for name in names], allow_unused=True, retain_graph=True
            )
            # guidance and the target have no graph, so the teacher is in none
            assert {name for name, pull in zip(names, pulls, strict=True) if pull is not None} == set(update.roles)


def test_no_update_reaches_a_weight_of_another_role():
    """Neither the teacher's, through its features, nor the head's in the student's update, nor the reverse."""
    leaks()


@pytest.mark.parametrize("name", ["sd", "sana", "flux"])
def test_on_networks_each_update_trains_its_roles_alone(name):
    bone, part, context = scene(CM, name)
    own = {id(p) for role in bone.declared for p in bone.parameters_of(role).values()}
    with count_calls(bone.net) as cost:
        for update in CM.updates(context, part, 0):
            update.loss.backward()
            (role,) = update.roles
            given = [key for key, p in bone.parameters_of(role).items() if p.grad is not None and p.grad.any()]
            assert len(given) >= len(bone.parameters_of(role)) - (role == "head")  # its last bias may have none
            others = set(bone.declared) - {role}
            assert all(p.grad is None for other in others for p in bone.parameters_of(other).values())
            assert all(p.grad is None for p in bone.net.parameters() if id(p) not in own)
            bone.zero_grad(set_to_none=True)
    assert cost.calls == 3 + 1 + 3  # those of LCM, the student again, and the judge at three kinds of samples


# --- times and pairs -----------------------------------------------------------------------------------------------


def same_time() -> None:
    _, context = watched(FLOW)
    list(CM.updates(context, PART, 0))
    (_, student, _), (_, real, _), (_, fake, _) = SEEN
    assert torch.equal(real, fake) and not torch.equal(real, student)


def test_the_head_sees_samples_and_data_at_one_time():
    same_time()


@SCHEDULES
def test_its_times_are_the_papers(schedule):
    """SANA-Sprint: the angle is `atan(e^tau / 0.5)` with tau ~ N(-0.6, 1)."""
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    class Even(StepContext):
        def draw(self, batch, purpose):
            return u

    alpha, sigma = schedule(Ladd().times(Even(**vars(Stage(schedule, {}).context(0))), PART, "gan t"))
    tau = (sigma / alpha / 2).log()
    inside = (u > 0.005) & (u < 0.995)  # a table ends before the distribution does
    close(tau[inside], (-0.6 + torch.special.ndtri(u))[inside], 2e-3)
    close(tau.quantile(torch.tensor([0.1587, 0.5, 0.8413]).double()), [-1.6, -0.6, 0.4], 5e-3)


def starts() -> None:
    u, share = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, 0.3
    part = replace(batch(*([3] * 1000)), index=tuple(range(1000)))
    given = torch.linspace(100, 500, 1000, dtype=torch.float64)
    seen = []

    class Even(StepContext):
        def draw(self, batch, purpose):
            return u

    stage = Stage(SD, {})
    context = Even(**vars(stage.context(0)))

    def student(x_t, t, cond):
        seen.append((x_t, t))
        return stage.context(0).denoiser("student")(x_t, t, cond)

    _, x0, _ = Ladd(max_time_probability=share).student_term(context, part, student, given, 899.0)
    (x_t, t) = seen[0]
    assert torch.equal(t == 899, u < share) and torch.equal(t[300:], given[300:])
    assert not x0.requires_grad
    assert part.latents is not None
    eps = (x_t - expand(SD(t)[0], x_t) * part.latents) / expand(SD(t)[1], x_t)
    z = context.noise(part, "gan input eps").double()
    assert torch.equal(x_t[:300], z[:300]) and torch.allclose(eps[300:], z[300:], atol=1e-6)


def test_the_student_starts_where_sampling_does_with_its_probability():
    """Diffusers' port has the probability itself in the place of that time."""
    starts()


def grid_times() -> None:
    seen = []
    for step in range(30):
        stage = Stage(FLOW, {})

        def denoiser(role, stage=stage):
            def call(x_t, t, cond):
                if role == "student" and torch.is_grad_enabled():
                    seen.append(t)
                return stage.context(0).denoiser(role)(x_t, t, cond)

            return call if role == "student" else stage.context(0).denoiser(role)

        method = replace(CM, gan=Ladd(max_time_probability=0.0), num_ddim_timesteps=4)
        list(method.updates(replace(stage.context(step), denoiser=denoiser), PART, step))
    first, again = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert again.unique().tolist() == first.unique().tolist() == FLOW.grid(4)[1:].tolist()
    assert (first != again).any()


def test_the_second_pass_of_a_consistency_student_is_at_its_own_times():
    grid_times()


def misaligned() -> None:
    term = Ladd(misaligned_pairs=True)
    stage, context = watched(SD)
    x0 = sample(stage, CM).detach()
    loss = term.head_loss(context, PART, x0)
    (_, t, _), _, (x_t, other, cond) = SEEN
    assert not torch.equal(t, other) and torch.equal(cond["mean"], PART.cond["mean"])
    assert PART.latents is not None
    rolled = PART.latents[[2, 0, 1]]  # no sample beside its own prompt
    alpha_t, sigma_t = (expand(level, x_t) for level in SD(other))
    close(x_t, alpha_t * rolled + sigma_t * stage.context(0).noise(PART, "gan misaligned eps"), 1e-12)
    real, fake, wrong = (
        logits(stage, term, part, time, f"gan {name} eps")
        for part, time, name in ((PART.latents, t, "real"), (x0, t, "fake"), (rolled, other, "misaligned"))
    )
    close(loss, ((1 - real).relu().mean() + (1 + torch.cat([fake, wrong])).relu().mean()) / 2, 1e-9)


def alone() -> None:
    """A batch of one sample has no other prompt: its own data would be learned as fake."""
    losses_of_one = []
    for pairs in (True, False):
        _, context = watched(SD)
        part = batch(3)
        losses_of_one.append(Ladd(misaligned_pairs=pairs).head_loss(context, part, 0 * part.x0))
        assert len(SEEN) == 2
    assert torch.equal(*losses_of_one)


def test_misaligned_pairs_are_data_beside_the_next_sample_s_prompt():
    misaligned()


def test_one_sample_has_no_misaligned_pair():
    alone()


def test_the_term_changes_no_other_draw():
    """The consistency and the score's terms are the same to the bit, with and without it."""
    for method in (CM, DM):
        stage = Stage(SD, {})
        one, without = updates(method, stage, PART, 0), updates(replace(method, gan=None), stage, PART, 0)
        name = "loss_fake"
        assert torch.equal(one[0].logs["loss"], without[0].logs["loss"])
        if isinstance(method, DMD2):
            assert torch.equal(one[1].logs[name], without[1].logs[name])


# --- runs and configs ----------------------------------------------------------------------------------------------


STEPS = {"checkpointing_steps": 1, "max_train_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two steps, beside its teacher and its data."""
    place = tmp_path_factory.mktemp("whole")
    teacher, method = saved_teacher(place / "teacher"), replace(LCM, gan=Ladd(misaligned_pairs=True))
    return distill(make(teacher, place / "samples", place / "out", method, **STEPS))


def test_a_resumed_run_equals_a_whole_one(whole, tmp_path):
    place, method = whole.parent, replace(LCM, gan=Ladd(misaligned_pairs=True))
    source = {"resume_from_checkpoint": str(whole / "checkpoint-1")}
    distill(make(place / "teacher", place / "samples", tmp_path / "out", method, **STEPS, **source))
    for role in ("student", "ema", "head"):
        found = [weights(out, 2, role) for out in (whole, tmp_path / "out")]
        assert torch.equal(*found) and not torch.equal(found[0], weights(whole, 1, role))


def config(tmp_path: Path, kind: type, text: str):
    (tmp_path / "method.yaml").write_text(text)
    return load_config(kind, tmp_path / "method.yaml")


def test_a_term_without_a_type_is_the_first_that_the_method_takes(tmp_path):
    assert config(tmp_path, DMD2, "gan: {generator_weight: 0.3}").gan == Gan(generator_weight=0.3)
    assert config(tmp_path, Consistency, "gan: {depths: [0.5]}").gan == Ladd(depths=(0.5,))
    text = "gan: {type: stepdistill.methods.gan.Ladd, generator_weight: 0.3}"
    assert config(tmp_path, DMD2, text).gan == Ladd(generator_weight=0.3)
    assert load_config(DMD2, None, ["gan.generator_weight=0.3"]).gan == Gan(generator_weight=0.3)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (DMD2, "gan: {type: stepdistill.methods.gan.Ladd, divergence: jeffreys}", "gan.divergence: unknown"),
        (DMD2, "gan: {depths: [0.5]}", "gan.depths: unknown"),
        (Consistency, "gan: {type: stepdistill.methods.gan.Gan}", "expected a dataclass that is a Ladd"),
        (Consistency, "gan: {depths: []}", "depths is .* expected ascending shares"),
        (Consistency, "gan: {depths: [0.5, 0.5]}", "depths is .* expected ascending shares"),
        (Consistency, "gan: {depths: [0.0, 0.5]}", "depths is .* expected ascending shares"),
        (Consistency, "gan: {depths: [0.5, 1.5]}", "depths"),
        (Consistency, "gan: {time_std: 0}", "time_std"),
        (Consistency, "gan: {max_time_probability: 1.5}", "max_time_probability"),
        (Consistency, "{end: edge, segments: [5], gan: {}}", "gan with segments .*expected segments .1."),
        (DMD2, "gan: {type: stepdistill.methods.gan.Ladd, max_time_probability: 0.1}", "max_time_probability is 0.1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, kind, text, said):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, kind, text)


def test_depths_out_of_range_are_refused_in_python_too():
    for depths in ((), (0.5, 1.5), (-0.1, 0.5), (0.7, 0.3)):
        with pytest.raises(ValueError, match="depths"):
            Ladd(depths=depths)


@pytest.mark.parametrize("method", [CM, DM], ids=["consistency", "dmd2"])
def test_it_needs_images(method):
    with pytest.raises(ConfigError, match="latents"):
        check_needs(Prompts(prompts=("rose",)), method)


# --- bugs ----------------------------------------------------------------------------------------------------------

JUDGED, TERM, HEAD = Ladd._judged, Ladd.student_term, Ladd.head_loss
BUGS = {
    "hinge twice": Bug(HEAD, "0.5 * ", "", head),
    "hinge on one side": Bug(losses.discriminator_loss, "(1 - real)", "(1 + real)", head),
    "student downhill": Bug(losses.generator_loss, "-fake.mean()", "fake.mean()", lambda: gradient(FLOW)),
    "no weight": Bug(gan.two_phase, "weight * ", "", lambda: gradient(FLOW)),
    "the student judges itself": Bug(JUDGED, "context.denoiser(TEACHER)", 'context.denoiser("student")', head),
    "the teacher's weights in the graph": Bug(JUDGED, ".frozen()", "", leaks),
    "the head trains the student": Bug(TERM, "x0.detach()", "x0", leaks),
    "fake at another time": Bug(
        HEAD, 'x0, t, "gan fake eps"', 'x0, self.times(context, batch, "gan fake t"), "gan fake eps"', same_time
    ),
    "Diffusers' noisiest time": Bug(TERM, "first, start, t", "first, self.max_time_probability, t", starts),
    "the other share": Bug(TERM, "< self", "> self", starts),
    "data without noise": Bug(TERM, 'context.noise(batch, "gan input eps")', "0 * batch.x0", starts),
    "noised data at the start": Bug(TERM, "expand(first, z), z,", "expand(first, z), 0.9 * z,", starts),
    "pairs that are aligned": Bug(HEAD, "roll(1, 0)", "roll(3, 0)", misaligned),
    "pairs with rolled pixels": Bug(HEAD, "roll(1, 0)", "roll(1, 2)", misaligned),
    "a pair of one sample": Bug(HEAD, " and len(x0) > 1", "", alone),
    "clean data among the student's times": Bug(Consistency.updates, ".long() + 1]", ".long()]", grid_times),
}


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS, RuntimeError)
