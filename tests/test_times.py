"""The times at which every method asks its roles, and how often: histograms against the distributions that the
papers and docstrings declare.

A fixed point is a fixed point under every density, so no closed form notices a wrong one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles.context import Flow, Table, stable_diffusion
from oracles.fakes import Brightness
from oracles.gaussian import GaussianTeacher
from torch import Tensor, nn

from stepdistill.config.registry import offered
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data.base import GuidedState
from stepdistill.methods.adapter import Assistant
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.finetune import FineTune
from stepdistill.methods.gan import Gan
from stepdistill.methods.guided_lora import GuidedLora
from stepdistill.methods.perflow import PeRFlow
from stepdistill.methods.progressive import ProgressiveHalving
from stepdistill.methods.pso_offline import PSOOffline
from stepdistill.methods.pso_online import PSOOnline
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.regression import Regression
from stepdistill.methods.reward import RewardTerm
from stepdistill.methods.scm import SCM
from stepdistill.methods.score_matching import TeacherScoreMatching
from stepdistill.methods.slimflow import FlowGuided
from stepdistill.methods.tdm import TDM
from stepdistill.methods.vsd import VSD
from stepdistill.networks.time_weight import TimeWeight

STEPS, ROWS = 100, 40  # of a run whose samples draw for themselves
SHARED = 999  # of one whose batch shares a draw, with one sample
SHIFT = 3.0
SCHEDULES = {"table": stable_diffusion(), "flow": Flow(SHIFT)}
TRAINED = "student, with a graph"


@dataclass(frozen=True)
class Law:
    """A distribution of times.

    Args:
        below: its distribution function.
        low, high: its lowest and highest time.
        atoms: all of its times, ascending, where they are few.
        draws: how many independent ones a run has.
    """

    below: Callable[[float], float]
    low: float
    high: float
    atoms: tuple[float, ...] = ()
    draws: int = STEPS * ROWS


def weighted(times: Iterable[float], weights: Iterable[float] | None = None, draws: int = STEPS * ROWS) -> Law:
    """A few times, evenly or by weight."""
    times = list(times)
    shares = list(weights or [1.0] * len(times))
    rows = sorted((time, share / sum(shares)) for time, share in zip(times, shares, strict=True) if share)
    atoms = tuple(dict.fromkeys(time for time, _ in rows))
    return Law(lambda t: sum(share for time, share in rows if time <= t + 1e-3), atoms[0], atoms[-1], atoms, draws)


def dense(schedule: NoiseSchedule, low: float, high: float) -> Law:
    """Between two times, as dense as the solver's grid: each entry of a table equally often; of a flow even before the
    shift."""
    if isinstance(schedule, Table):
        return Law(lambda t: (math.floor(t) - low + 1) / (high - low + 1), low, high)

    def before(t: float) -> float:
        return t / (1000 * SHIFT - (SHIFT - 1) * t)

    return Law(lambda t: (before(t) - before(low)) / (before(high) - before(low)), low, high)


def along(
    schedule: NoiseSchedule,
    low: float,
    high: float,
    shape: Callable[[float], float] = lambda u: u,
    part: tuple[float, float] = (0.0, 1.0),
) -> Law:
    """Between two times, or in a part of the way, by the share of noise `sigma / (alpha + sigma)`; `shape` is the
    distribution function of the share of the way."""

    def share(t: float) -> float:
        alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
        return (sigma / (alpha + sigma)).item()

    def way(t: float) -> float:
        return (share(t) - share(low)) / (share(high) - share(low))

    ends = [bisect(way, low, high, end) for end in part]
    return Law(lambda t: shape((way(t) - part[0]) / (part[1] - part[0])), *ends)


def lognormal(schedule: NoiseSchedule, mean: float, std: float) -> Law:
    """`sigma / alpha = e^tau / 0.5`, tau ~ N(mean, std^2)."""

    def below(t: float) -> float:
        alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
        return torch.special.ndtr(((0.5 * sigma / alpha).log() - mean) / std).item()

    return Law(below, *schedule.span)


def bisect(rising: Callable[[float], float], low: float, high: float, value: float) -> float:
    """Where a rising function has a value."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return high


def mixed(laws: list[Law]) -> Law:
    """Each equally often."""
    return Law(
        lambda t: sum(0.0 if t < law.low else 1.0 if t > law.high else law.below(t) for law in laws) / len(laws),
        min(law.low for law in laws),
        max(law.high for law in laws),
    )


def u_shape(s: float, a: float = 4.0) -> float:
    """The integral of `e^{as} + e^{a (1 - s)}` from 0 to s, over that to 1."""
    return (math.exp(a * s) - math.exp(a * (1 - s)) - 1 + math.exp(a)) / (2 * (math.exp(a) - 1))


class Recorded:
    """A Gaussian teacher for every role; the times that it is asked at."""

    def __init__(self, name: str, schedule: NoiseSchedule, asked: Mapping[str, list[Tensor]]) -> None:
        self.name, self.asked, self.teacher = name, asked, GaussianTeacher(schedule, 0.6)
        self.gain = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Estimate:
        self.asked[self.name + ", with a graph" * torch.is_grad_enabled()].append(t)
        x0, eps = self.teacher(x_t, t, {"mean": torch.zeros_like(x_t)})
        return Estimate(self.gain * x0, self.gain * eps)

    def queried(self, x_t: Tensor, t: Tensor, cond: object, *levels: Tensor) -> Estimate:
        return self(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        self.asked[f"{self.name}'s features"].append(t)
        return self.gain * x_t

    def frozen(self) -> Recorded:
        return self

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        return est.eps


@dataclass(frozen=True)
class Ends:
    """The schedule of a method, and the times that it jumps to."""

    schedule: NoiseSchedule
    times: list[Tensor]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule(t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | None) -> Tensor:
        if t is not None:
            self.times.append(t)
        return self.schedule.add_noise(x0, eps, t)


def asked(method: Method, schedule: NoiseSchedule, steps: int = STEPS, rows: int = ROWS) -> dict[str, Tensor]:
    """The times of every role's calls, with a graph and without, in a run of `method`; and the ends of its jumps."""
    times: dict[str, list[Tensor]] = defaultdict(list)
    roles = {name: Recorded(name, schedule, times) for name in ("teacher", *method.roles())}
    t, x = states(schedule)[:rows], torch.ones(rows, 1, 1, 1, dtype=torch.float64)
    for step in range(steps):
        context = StepContext(
            schedule=Ends(schedule, times["jumps"]),  # pyright: ignore[reportArgumentType]
            null={},
            denoiser=roles.__getitem__,
            module={"head": nn.Flatten(), "weight": TimeWeight()}.__getitem__,
            decode=nn.Identity(),
            seed=0,
            step=step,
            device=torch.device("cpu"),
        )
        index = tuple(range(step * rows, (step + 1) * rows))
        batch = Batch(index, {}, (1, 1, 1), latents=x, noise=x, state=GuidedState(x, t, torch.ones(rows), x))
        for _ in method.updates(context, batch, step):
            pass
    return {role: torch.cat(seen).double() for role, seen in times.items() if seen}


def check(seen: Tensor, law: Law) -> None:
    """Raise AssertionError where times are not of a distribution."""
    values, counts = seen.unique(return_counts=True)
    assert values[0] >= law.low - 1e-3 and values[-1] <= law.high + 1e-3
    if law.atoms:
        torch.testing.assert_close(values, torch.tensor(law.atoms, dtype=torch.float64), rtol=0, atol=1e-3)
    else:  # both edges are reached, and nothing is heaped on them
        assert law.below(values[0].item()) < 0.005 and law.below(values[-1].item()) > 0.995
        assert max(counts[0], counts[-1]) < 0.01 * len(seen)
    below = torch.tensor([law.below(value) for value in values.tolist()], dtype=torch.float64)
    # Kolmogorov and Smirnov's bound at 0.1 %
    assert (counts.cumsum(0) / len(seen) - below).abs().max() < 1.95 / law.draws**0.5


def cases(schedule: NoiseSchedule) -> dict[str, tuple[Method, dict[str, Law]]]:
    """Every method, and the declared distribution of the times at which its roles are asked."""
    low, high = schedule.span
    fine, coarse, given = schedule.grid(20).tolist(), schedule.grid(10).tolist(), states(schedule).tolist()
    span, scores, starts = dense(schedule, low, high), dense(schedule, 20, 980), schedule.grid(4)[1:].tolist()
    # windows are even in the scheduler's time, and not in the grid's
    edges = [*([1000, 750, 500, 250] if schedule.straight else [999, 749, 499, 249]), 0]
    windows = list(pairwise(edges))
    exits = weighted(starts, draws=SHARED)
    before = weighted(starts, range(4), draws=SHARED)  # k steps are simulated before step k, the noisiest first
    through = weighted(starts, range(1, 5), draws=SHARED)
    few = Sampler(schedule.starts(4), eta=1.0)
    rewards = (RewardTerm(reward=Brightness(), mean=0.0, std=1.0, slope=1.0),)
    matching = {"teacher": scores, "fake": scores, "fake, with a graph": span}
    halves = {t: 0.1 for t in fine[2::2]}
    halves |= {t: halves.get(t, 0.0) + 0.2 for t in coarse[2::2]}
    half, quarter = STEPS // 2, STEPS // 4

    def of_states(gap: float, lowest: float, overlapping: bool = False) -> dict[str, Law]:
        """Each step's times: from its end, or the lowest, to `gap` below its start, or below the first one."""
        steps = pairwise([*reversed(starts), 0.0])
        laws = [dense(schedule, max(s, lowest), (starts[-1] if overlapping else t) - gap) for t, s in steps]
        law = replace(mixed(laws), draws=SHARED)
        return {"teacher": law, "fake": law, "fake, with a graph": law}

    mirrored = [low + high - t for t in fine]  # BOOT's network is told them; each update asks at the noisiest, too
    return {
        "lcm": (
            Consistency(num_ddim_timesteps=20),
            {TRAINED: weighted(fine[1:]), "teacher": weighted(fine[1:]), "student": weighted(fine[:-1])},
        ),
        "tcd": (
            Consistency(end="any", num_ddim_timesteps=20, target="ema"),
            {TRAINED: weighted(fine[1:]), "ema": weighted(fine[:-1])},
        ),
        "tscd": (Consistency(end="any", num_ddim_timesteps=20, segments=(4,)), {TRAINED: weighted(fine[1:])}),
        "pcm": (Consistency(end="edge", num_ddim_timesteps=20, segments=(4,)), {TRAINED: weighted(fine[1:])}),
        "dmd2's rollouts": (DMD2(critic_steps=1), {TRAINED: exits, "student": before}),
        "dmd2's rollouts for the fake score": (DMD2(warmup_steps=SHARED), {"student": through}),
        "dmd2": (DMD2(critic_steps=1), matching),
        "gan": (DMD2(critic_steps=1, gan=Gan(features="teacher")), {"teacher's features": span}),
        "gan on the fake score": (DMD2(critic_steps=1, gan=Gan(features="fake")), {"fake's features": span}),
        "boot": (
            Boot(num_ddim_timesteps=20),
            {
                TRAINED: weighted([*mirrored[:-1], low], [*[1.0] * 20, 20.0]),
                "student": weighted(mirrored[1:]),
                "teacher": weighted([*fine[1:], high], [*[1.0] * 20, 20.0]),
            },
        ),
        "scm": (
            SCM(time_mean=-0.5, time_std=0.5, difference=0.1),
            {TRAINED: lognormal(schedule, -0.5, 0.5), "teacher": lognormal(schedule, -0.5, 0.5)},
        ),
        "tdm": (TDM(), {TRAINED: exits, "student": before, **of_states(10, 20)}),
        "tdm, overlapping": (TDM(separate=False, gap=50.0, t_min=100.0), of_states(50, 100, overlapping=True)),
        "vsd": (VSD(), {TRAINED: weighted([high]), **matching}),
        "disback": (
            DisBack(matching=VSD(), waypoints=2, recording_steps=quarter, backtracking_steps=quarter),
            {"teacher": replace(scores, draws=half * ROWS), "waypoint_1": replace(scores, draws=quarter * ROWS)},
        ),
        "reflow": (Reflow(), {TRAINED: along(schedule, low, high)}),
        "rf++": (Reflow(density="u_shaped"), {TRAINED: along(schedule, low, high, u_shape)}),
        "perflow": (
            PeRFlow(num_inference_steps=8),
            {
                TRAINED: mixed([along(schedule, clean, noisy) for noisy, clean in windows]),
                "teacher": weighted([a + (b - a) * i / 8 for a, b in windows for i in range(8)]),
            },
        ),
        "slimflow": (
            FlowGuided(),
            {TRAINED: weighted([high]), "flow": along(schedule, low, high, part=(0.2, 0.8))},
        ),
        "slimflow, late": (FlowGuided(turn_range=(0.5, 0.9)), {"flow": along(schedule, low, high, part=(0.1, 0.5))}),
        "feedback": (
            Feedback(sampling=few, rewards=rewards, exits="all"),
            {TRAINED: exits, "student": before, "teacher": exits},
        ),
        "feedback on the last half": (
            Feedback(sampling=few, rewards=rewards),
            {
                TRAINED: weighted(starts[:2], draws=SHARED),
                "student": weighted(starts, (0, 1, 2, 2), draws=SHARED),
                "teacher": weighted(starts[:2], draws=SHARED),
            },
        ),
        "online pso": (
            PSOOnline(sampling=few, reward=Brightness(), std=1.0),
            {TRAINED: weighted(starts[1:]), "student": weighted(starts), "teacher": weighted(starts[1:])},
        ),
        "offline pso": (PSOOffline(sampling=few), {TRAINED: weighted(starts), "teacher": weighted(starts)}),
        "assistant": (Assistant(sampling=few), {TRAINED: span, "teacher": weighted(starts)}),
        "fine-tuning": (FineTune(sampling=few), {TRAINED: span}),
        "regression": (Regression(), {TRAINED: exits, "student": before}),
        "progressive": (
            ProgressiveHalving(steps=(10, 5), stage_steps=half),
            {
                TRAINED: weighted(halves, halves.values()),
                "teacher_0": weighted(fine[1:]),
                "teacher_1": weighted(coarse[1:]),
            },
        ),
        "guided lora": (GuidedLora(), {TRAINED: span, "teacher": span}),
        "guided lora on trajectories": (
            GuidedLora(states="trajectories"),
            {TRAINED: weighted(given), "teacher": weighted(given)},
        ),
        "agd": (AdapterGuidance(), {TRAINED: weighted(given)}),
        "score matching": (TeacherScoreMatching(), {TRAINED: span, "teacher": span}),
    }


def states(schedule: NoiseSchedule) -> Tensor:
    """The times of a batch of trajectories."""
    return schedule.random_times((torch.arange(ROWS) + 0.5) / ROWS, *schedule.span)


ALL = {name: cases(schedule) for name, schedule in SCHEDULES.items()}


def test_every_method_is_here():
    assert {type(method) for method, _ in ALL["flow"].values()} == set(offered(Method)) != set()


@pytest.mark.parametrize("case", ALL["flow"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_are_asked_as_often_as_declared(schedule, case):
    method, laws = ALL[schedule][case]
    shared = any(law.draws == SHARED for law in laws.values())
    seen = asked(method, SCHEDULES[schedule], *((SHARED, 1) if shared else ()))
    calls = seen.keys() - {"jumps"}
    assert laws.keys() <= calls
    for role, law in laws.items():
        check(seen[role], law)


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_jumps_end_where_the_papers_end_them(schedule, segments):
    """TCD's and TSCD's at each grid time below t and in its segment, equally often for each t; PCM's at its edge."""
    schedule, length = SCHEDULES[schedule], 20 // segments
    grid, weights = schedule.grid(20).tolist(), [0.0] * 20
    for i in range(20):
        for j in range(i - i % length, i + 1):
            weights[j] += 1 / (i % length + 1)
    for end, law in {"any": weighted(grid[:20], weights), "edge": weighted(grid[:20:length])}.items():
        method = Consistency(end=end, num_ddim_timesteps=20, segments=(segments,))
        seen = asked(method, schedule)["jumps"].reshape(STEPS, 4, ROWS)  # x_t, x_u, and the target's and student's ends
        assert torch.equal(seen[:, 2], seen[:, 3]) and (seen[:, 2] <= seen[:, 1]).all()
        check(seen[:, 3].flatten(), law)


@pytest.mark.parametrize(
    ("schedule", "change"),
    [
        ("flow", lambda t: t.clamp(20, 980)),
        ("table", lambda t: t.clamp(20, 980)),
        ("flow", lambda t: 1000 * t / (3 * 1000 - 2 * t)),
        ("flow", lambda t: 20 + 0.9 * (t - 20)),
        ("table", lambda t: (20 + 0.97 * (t - 20)).floor()),
    ],
    ids=["clamped", "a table clamped", "without the shift", "a part of the range", "an edge that is not reached"],
)
def test_a_wrong_density_is_noticed(schedule, change):
    schedule = SCHEDULES[schedule]
    u = torch.rand(STEPS * ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check(schedule.random_times(u, 20, 980), dense(schedule, 20, 980))
    with pytest.raises(AssertionError):
        check(change(schedule.random_times(u, *schedule.span)), dense(schedule, 20, 980))
