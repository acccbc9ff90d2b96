"""Every field of every method does something, and to what it is said to; and a batch's loss is its samples' mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from oracles import close
from oracles.context import Flow, stable_diffusion
from oracles.fakes import Brightness, Keyed, Stage, batch, perceptual, similarity, updates
from torch import Tensor

from stepdistill.config.registry import every, offered
from stepdistill.config.schema import fields, structures
from stepdistill.core.random import step_generator
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.methods import reflow, vsd
from stepdistill.methods.adapter import Assistant
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.methods.anchor import Anchor
from stepdistill.methods.augmentation import Augmentation
from stepdistill.methods.base import Method
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.finetune import FineTune
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.methods.guided_lora import GuidedLora
from stepdistill.methods.perflow import PeRFlow
from stepdistill.methods.progressive import ProgressiveHalving
from stepdistill.methods.pso_offline import PSOOffline
from stepdistill.methods.pso_online import PSOOnline
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.regression import Regression
from stepdistill.methods.reward import RewardTerm
from stepdistill.methods.rollout import Lengths
from stepdistill.methods.scm import SCM
from stepdistill.methods.score_matching import TeacherScoreMatching
from stepdistill.methods.slimflow import FlowGuided
from stepdistill.methods.tdm import TDM
from stepdistill.methods.vsd import VSD, ClipTerm
from stepdistill.networks.lpips import Lpips

SCHEDULES = {"table": stable_diffusion(), "flow": Flow(3.0)}
STEPS = range(6)
INDEX = (3, 7, 8, 5)


@dataclass(frozen=True)
class Change:
    """A method, another value of one of its fields (dotted inside of a term), and all that this changes."""

    method: Method
    path: str
    value: Any
    changes: str

    @property
    def changed(self) -> Method:
        name, _, inner = self.path.partition(".")
        if not inner:
            return replace(self.method, **{name: self.value})
        before = vars(self.method)[name]
        after = replace(term_of(self.method, name), **{inner: self.value})
        return replace(self.method, **{name: (after, *before[1:]) if isinstance(before, tuple) else after})

    def __str__(self) -> str:
        return f"{type(self.method).__name__}.{self.path}"


def term_of(method: Method, name: str) -> Any:
    """The term in a field of a method, or the first of several; None where there is none."""
    value = vars(method)[name]
    return next(iter(value), None) if isinstance(value, tuple) else value


def changes(method: Method, **values: tuple[Any, str] | tuple[Any, str, dict[str, Any]]) -> list[Change]:
    """By field: its other value, what that changes, and what else the method has before and after."""
    rows = [(name, value, what, *more) for name, (value, what, *more) in values.items()]
    return [
        Change(replace(method, **(more[0] if more else {})), name.replace("__", "."), value, what)
        for name, value, what, *more in rows
    ]


LADD = {
    "gan__generator_weight": (0.7, "loss"),
    "gan__depths": ((0.5, 1.0), "roles loss"),
    "gan__time_mean": (0.4, "loss"),
    "gan__time_std": (1.6, "loss"),
    "gan__misaligned_pairs": (True, "loss"),
}
TERM = RewardTerm(reward=Brightness(), margin=2.0, mean=0.2, std=0.7, slope=1.0)
OTHER = replace(TERM, reward=Brightness(kappa=2.0), weight=0.3)
OF_A_TERM = {
    "rewards__reward": (Brightness(kappa=4.0), "rewards loss"),
    "rewards__weight": (0.5, "loss"),
    "rewards__margin": (3.0, "loss"),
    "rewards__mean": (0.5, "loss"),
    "rewards__std": (0.3, "loss"),
}
EMA = {"ema_decay": (0.5, "roles")}
FEW = Sampler((999.0, 749.0, 499.0, 249.0), eta=1.0)
GUIDED = {"sampling_guidance_scale": (3.0, "sampler guidance")}
CHANGES = [
    *changes(
        Consistency(),
        end=("any", "sampler loss"),
        segments=((5,), "loss", {"end": "edge"}),
        stage_steps=(3, "loss", {"end": "any", "segments": (10, 1), "stage_steps": 1}),
        num_ddim_timesteps=(20, "sampler loss"),
        guidance_scale=((2.0, 9.0), "guidance loss"),
        loss_type=("l2", "loss"),
        huber_c=(0.5, "loss"),
        target=("ema", "loss"),
        eta=(0.7, "sampler", {"end": "any"}),
        num_inference_steps=(2, "sampler"),
        gan=(Ladd(), "roles turns loss"),
        **EMA,
        **GUIDED,
    ),
    *changes(Consistency(gan=Ladd()), gan__max_time_probability=(0.9, "loss"), **LADD),
    *changes(
        DMD2(critic_steps=2),
        num_inference_steps=(2, "sampler loss"),
        timesteps=((749.0, 399.0), "sampler loss"),
        eta=(0.0, "sampler loss"),
        guidance_scale=(3.0, "guidance loss"),
        critic_steps=(3, "turns"),
        warmup_steps=(1, "turns"),
        t_range=((200.0, 600.0), "loss"),
        gan=(Gan(), "roles needs turns loss"),
        rewards=((TERM,), "rewards loss"),
        regression_weight=(0.5, "needs loss", {"num_inference_steps": 1}),
        lengths=(Lengths(steps=(4,)), "loss"),
        augmentation=(Augmentation(), "loss"),
        anchor=(Anchor(steps=2, num_inference_steps=8), "loss"),
        off_path=(0.5, "loss"),
        rollout_updates=(2, "loss"),
        fake_decay=(0.9, "roles"),
        renoise_shift=(5.0, "loss"),
        **EMA,
    ),
    *changes(
        DMD2(critic_steps=2, lengths=Lengths(steps=(4,))),
        lengths__steps=((5, 2), "loss"),
        lengths__spacing=("even", "loss"),
        lengths__t_range=((300.0, 500.0), "loss"),
    ),
    *changes(
        DMD2(critic_steps=2, augmentation=Augmentation(), anchor=Anchor(steps=2, num_inference_steps=8)),
        augmentation__t_range=((300.0, 500.0), "loss"),
        augmentation__below_start=(False, "loss"),
        anchor__steps=(3, "loss"),
        anchor__num_inference_steps=(5, "loss"),
        anchor__weight=(0.5, "loss"),
        anchor__guidance_scale=(3.0, "loss"),
        anchor__stored=(True, "needs loss"),
    ),
    *changes(DMD2(critic_steps=2, rewards=(TERM, OTHER)), **OF_A_TERM),
    *changes(
        DMD2(critic_steps=1, gan=Gan(generator_weight=0.3, discriminator_weight=0.4)),
        gan__generator_weight=(0.7, "loss"),
        gan__discriminator_weight=(0.7, "loss"),
        gan__features=("teacher", "loss"),
        gan__loss_type=("hinge", "loss"),
        gan__r1_weight=(2.0, "loss"),
        gan__r1_sigma=(0.5, "loss", {"gan": Gan(r1_weight=2.0)}),
        gan__divergence=("jensen_shannon", "loss"),
    ),
    *changes(DMD2(critic_steps=1, gan=Ladd()), **LADD),
    *changes(
        VSD(),
        guidance_scale=((0.5, 4.0), "guidance loss"),
        timestep=(499.0, "sampler loss"),
        warmup_steps=(2, "turns"),
        t_range=((200.0, 600.0), "loss"),
        proportion_empty_prompts=(0.9, "loss"),
        clip=(ClipTerm(), "loss models"),
        **EMA,
    ),
    *changes(
        VSD(clip=ClipTerm()),
        clip__pretrained_clip_model=("other/clip", "models"),
        clip__threshold=(0.5, "loss"),
        clip__weight=(0.5, "loss"),
        clip__decay_steps=(3, "loss"),
    ),
    *changes(
        DisBack(matching=DMD2(critic_steps=1), waypoints=2, recording_steps=1, backtracking_steps=1),
        matching=(VSD(), "sampler guidance loss"),
        waypoints=(3, "roles turns loss"),
        recording_steps=(2, "roles turns loss"),
        backtracking_steps=(2, "loss"),
    ),
    *changes(
        Feedback(sampling=Sampler((999.0, 749.0, 499.0, 249.0), eta=1.0), rewards=(TERM, OTHER)),
        sampling=(Sampler((749.0, 399.0), eta=1.0), "sampler loss"),
        rewards=((TERM,), "rewards loss"),
        rewards__slope=(2.0, "loss"),
        exits=("all", "loss"),
        anchor_shift=(0.5, "loss"),
        held_out=(Brightness(kappa=3.0), "rewards"),
        **OF_A_TERM,
        **EMA,
    ),
    *changes(
        GuidedLora(),
        guidance_scale=(3.0, "guidance loss"),
        states=("trajectories", "needs loss"),
        num_inference_steps=(10, "sampler"),
    ),
    *changes(
        AdapterGuidance(),
        arch=("mixed", "roles"),
        width=(64, "roles"),
        guidance_range=((1.0, 9.0), "sampler"),
        num_inference_steps=(25, "sampler"),
        **GUIDED,
    ),
    *changes(
        PeRFlow(),
        windows=(2, "sampler loss"),
        solver_steps=(3, "loss"),
        guidance_scale=(3.0, "guidance loss"),
        density=("u_shaped", "loss"),
        loss_type=("huber", "loss"),
        num_inference_steps=(8, "sampler"),
        **EMA,
        **GUIDED,
    ),
    *changes(
        Assistant(sampling=FEW),
        sampling=(Sampler((749.0, 399.0), eta=1.0), "loss"),
        num_inference_steps=(10, "sampler"),
        **EMA,
    ),
    *changes(FineTune(sampling=FEW), sampling=(Sampler((749.0, 399.0), eta=1.0), "sampler"), **EMA),
    *changes(
        PSOOffline(sampling=FEW, beta=2.0),
        sampling=(Sampler((749.0, 399.0), eta=1.0), "sampler loss"),
        beta=("auto", "loss"),
        kappa=(0.5, "loss"),
        **EMA,
    ),
    *changes(
        PSOOnline(sampling=Sampler((999.0, 749.0, 499.0, 249.0), eta=1.0), reward=Brightness(), std=0.7),
        sampling=(Sampler((749.0, 99.0), eta=1.0), "sampler loss"),
        reward=(Brightness(kappa=2.0), "rewards loss"),
        beta=(2.0, "loss"),
        clip_range=(None, "loss"),
        temperature=(0.5, "loss"),
        std=(0.3, "loss"),
        held_out=(Brightness(kappa=3.0), "rewards"),
        **EMA,
    ),
    *changes(ProgressiveHalving(stage_steps=1), steps=((20, 10), "sampler roles loss"), stage_steps=(2, "roles loss")),
    *changes(
        Reflow(),
        density=("u_shaped", "loss"),
        loss_type=("huber", "loss"),
        lpips=(Lpips(), "loss models"),
        annealing_steps=(4, "loss"),
        random_flip=(True, "loss"),
        width=(0.5, "roles"),
        num_inference_steps=(2, "sampler"),
        first_noise=(True, "sampler finalized"),
        **EMA,
        **GUIDED,
    ),
    *changes(
        Reflow(lpips=Lpips()),
        lpips__weight=(2.0, "loss"),
        lpips__net=("alex", "models"),
        lpips__samples=(2, "loss"),
        lpips__divide=(True, "loss"),
    ),
    *changes(
        Regression(),
        num_inference_steps=(2, "sampler loss"),
        timesteps=((749.0, 399.0), "sampler loss"),
        loss_type=("huber", "loss"),
        huber_c=(0.5, "loss", {"loss_type": "huber"}),
        **EMA,
    ),
    *changes(
        SCM(warmup_steps=2),
        guidance_scale=((2.0, 9.0), "guidance loss"),
        time_mean=(0.5, "loss"),
        time_std=(0.5, "loss"),
        warmup_steps=(4, "loss"),
        tangent_offset=(0.5, "loss"),
        difference=(0.1, "loss"),
        num_inference_steps=(2, "sampler"),
        starts=(((1.4,), (1.5, 1.0)), "sampler"),
        gan=(Ladd(), "roles turns loss"),
        **EMA,
    ),
    *changes(SCM(gan=Ladd()), gan__max_time_probability=(0.9, "loss"), **LADD),
    *changes(
        Boot(),
        num_ddim_timesteps=(10, "loss"),
        guidance_scale=(3.0, "guidance loss"),
        boundary_weight=(0.5, "loss"),
        weight_limit=(2.0, "loss"),
        curriculum_steps=(4, "loss"),
        **EMA,
    ),
    *changes(
        TDM(critic_steps=2, num_inference_steps=2),
        num_inference_steps=(1, "sampler loss"),
        timesteps=((749.0, 399.0), "sampler loss"),
        guidance_scale=(3.0, "guidance loss"),
        separate=(False, "loss"),
        gap=(50.0, "loss"),
        t_min=(100.0, "loss"),
        loss_type=("l2", "loss"),
        huber_c=(0.5, "loss"),
        fake_target=("noise", "loss"),
        critic_steps=(3, "turns"),
        warmup_steps=(1, "turns"),
        **EMA,
    ),
    *changes(
        TeacherScoreMatching(),
        width=(0.25, "roles"),
        guidance_scale=(3.0, "guidance loss"),
        num_inference_steps=(10, "sampler"),
        **EMA,
        **GUIDED,
    ),
    *changes(
        FlowGuided(),
        flow_weight=(0.5, "loss"),
        turn_range=((0.4, 0.5), "loss"),
        loss_type=("huber", "loss"),
        lpips=(Lpips(), "loss models"),
        width=(0.5, "roles"),
        **EMA,
    ),
    *changes(
        FlowGuided(lpips=Lpips()),
        lpips__weight=(2.0, "loss"),
        lpips__net=("alex", "models"),
        lpips__samples=(2, "loss"),
    ),
]
ELSEWHERE = {
    "FlowGuided.lpips.divide": "refused: its one step starts at the share of noise 1",
    "DMD2.gan.max_time_probability": "refused: its student starts from its own steps",
    "PSOOnline.labels": "refused: hard labels have no scale; what they do is in test_pso_online.py",
    "DMD2.rewards.slope": "of the anchor, which it does not have",
    "DMD2.guidance_norm": "the session makes its rule; what it does is in test_dmd_options.py",
    "DMD2.weak": "it needs a LoRA at a strength of its own; what it does is in test_weak.py",
}


def paths(cls: type[Method]) -> Iterator[str]:
    """Every field of a method and of its terms; a method inside of a method has its own entries."""
    for name, hint in fields(cls).items():
        yield f"{cls.__name__}.{name}"
        for term in structures(hint):
            if not issubclass(term, Method | Sampler):  # a sampler is set as a whole
                yield from (f"{cls.__name__}.{name}.{inner}" for inner in fields(term))


def test_every_field_of_every_method_is_here():
    every(Method)
    known = [path for cls in offered(Method) for path in paths(cls)]
    assert sorted(known) == sorted([*map(str, CHANGES), *ELSEWHERE])


@pytest.fixture(autouse=True)
def models(monkeypatch) -> list[str]:
    """The names of the CLIPs and LPIPS networks that were asked for."""
    asked: list[str] = []
    monkeypatch.setattr(reflow, "lpips", lambda net, device: asked.append(net) or perceptual)
    monkeypatch.setattr(vsd, "clip", lambda name, device: asked.append(name) or similarity)
    return asked


def sampled(method: Method, schedule: NoiseSchedule, steps: int | None) -> Sampler | str:
    """How the method is sampled in these steps, or why it is not."""
    try:
        return method.sampler(schedule, steps)
    except ValueError as error:
        return str(error)


def effects(method: Method, models: list[str]) -> dict[str, Any]:
    """All that a method says and does, by name."""
    schedule, part = SCHEDULES["table"], batch(*INDEX)
    stage, finalized = Stage(schedule, {}), method.finalize(lambda: 1.0)
    models.clear()
    seen = {(step, u.roles): u.numbers.tolist() for step in STEPS for u in updates(method, stage, part, step)}
    return {
        "roles": (method.roles(), method.student_role()),
        "needs": method.needs,
        "sampler": [sampled(method, schedule, steps) for steps in (None, 1, 2, 5)],
        "guidance": (method.guidance_scale, method.sampling_guidance_scale),
        "finalized": finalized.sampler(schedule) == method.sampler(schedule),
        "turns": list(seen),
        "models": sorted(set(models)),
        "rewards": (method.trained_rewards, method.held_out),
        "loss": seen,
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what differs; losses are compared where both have an update."""
    common = before["loss"].keys() & after["loss"].keys()
    assert common
    loss = {"loss"} if any(before["loss"][key] != after["loss"][key] for key in common) else set()
    return {key for key in before.keys() - {"loss"} if before[key] != after[key]} | loss


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_field_changes_what_it_is_said_to(change, models):
    before, after = effects(change.method, models), effects(change.changed, models)
    assert differences(before, after) == set(change.changes.split())


MATCHING = [c for c in CHANGES if isinstance(c.method, DMD2 | VSD) and c.path != "warmup_steps"]


@pytest.mark.parametrize("change", MATCHING, ids=str)
def test_a_method_inside_of_another_has_its_own_fields(change, models):
    before, after = (
        effects(DisBack(matching=m, waypoints=2, recording_steps=1, backtracking_steps=1), models)
        for m in (change.method, change.changed)
    )
    assert differences(before, after) == set(change.changes.split())


def on(method: Method, change: Change) -> Change | None:
    """The same change of another method; None where it has no such term, or has the value already."""
    name, _, inner = change.path.partition(".")
    owner = term_of(method, name) if inner else method
    if owner is None or (inner or name) not in vars(owner):
        return None
    return None if vars(owner)[inner or name] == change.value else replace(change, method=method)


# beside the changes above, the values that leave another setting without effect
IDLE = [
    *changes(FlowGuided(), flow_weight=(0.0, "")),
    *changes(DisBack(matching=DMD2(critic_steps=1), recording_steps=1, backtracking_steps=50), waypoints=(1, "")),
    *changes(ProgressiveHalving(), steps=((20,), "")),
]
SAID_TWICE = {"DMD2.timesteps DMD2.num_inference_steps", "Regression.timesteps Regression.num_inference_steps"}
# what is stored must be of these, see test_trajectories.py
SAID_TWICE |= {f"DMD2.anchor.stored DMD2.anchor.{name}" for name in ("steps", "num_inference_steps", "guidance_scale")}


@pytest.mark.parametrize("kind", sorted({type(change.method) for change in CHANGES}, key=lambda kind: kind.__name__))
def test_a_value_that_another_leaves_without_effect_is_refused(kind, models):
    """For every pair of fields: with the one changed, a change of the other has an effect, or is refused."""
    seen = cache(lambda method: effects(method, models))
    of_kind = [change for change in [*CHANGES, *IDLE] if type(change.method) is kind]
    idle, pairs = [], 0
    for first, second in product(of_kind, of_kind):
        try:
            then = None if first.path == second.path else on(first.changed, second)
            methods = (then.method, then.changed) if then else ()
        except ValueError:
            continue
        if methods:
            pairs += 1
            idle += [] if differences(*map(seen, methods)) else [f"{first} {second}"]
    assert pairs > 1 and set(idle) <= SAID_TWICE


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Consistency(loss_type="l2", huber_c=0.5), "huber_c is 0.5: .* only with loss_type 'huber'"),
        (lambda: Regression(huber_c=0.5), "huber_c is 0.5: .* only with loss_type 'huber'"),
        (lambda: TDM(loss_type="l2", huber_c=0.5), "huber_c is 0.5: .* only with loss_type 'huber'"),
        (lambda: Consistency(end="clean", eta=0.7), "eta is 0.7: .* only with end 'any'"),
        (lambda: Consistency(end="edge", eta=0.0), "eta is 0.0: .* only with end 'any'"),
        (
            lambda: Consistency(end="edge", segments=(5,), stage_steps=3),
            "stage_steps is 3: .* only with several segments",
        ),
        (
            lambda: DMD2(timesteps=(399.0,), num_inference_steps=2),
            "num_inference_steps is 2: .* only with timesteps none",
        ),
        (
            lambda: Regression(timesteps=(399.0,), num_inference_steps=2),
            "num_inference_steps is 2: .* only with timesteps none",
        ),
        (
            lambda: TDM(timesteps=(399.0,), num_inference_steps=2),
            "num_inference_steps is 2: .* only with timesteps none",
        ),
        (
            lambda: DMD2(gan=Ladd(max_time_probability=0.9)),
            "max_time_probability is 0.9: .* only with a method whose student starts from noised data",
        ),
        (lambda: Gan(r1_sigma=0.5), "r1_sigma is 0.5: .* only with an r1_weight above 0"),
        (
            lambda: FlowGuided(flow_weight=0.0, turn_range=(0.4, 0.5)),
            "turn_range is .* only with a flow_weight above 0",
        ),
        (lambda: TDM(num_inference_steps=1, separate=False), "separate is False: .* only with several steps"),
        (lambda: DisBack(waypoints=1, backtracking_steps=2), "backtracking_steps is 2: .* only with several waypoints"),
        (lambda: ProgressiveHalving(steps=(4,), stage_steps=2), "stage_steps is 2: .* only with several stages"),
    ],
)
def test_what_has_no_effect_is_named_with_what_it_needs(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_number_of_steps_may_be_said_beside_their_timesteps():
    for kind in (DMD2, Regression, TDM):
        both, one = kind(timesteps=(749.0, 399.0), num_inference_steps=2), kind(timesteps=(749.0, 399.0))
        assert both.sampler(SCHEDULES["table"]) == one.sampler(SCHEDULES["table"])


# --- draws and images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_no_two_draws_of_a_step_are_one(change):
    """Else a scale would follow a time, or a score's noise that of the student. R1 alone asks for one noise twice."""
    asked: list[tuple[int | str, str]] = []

    class Listening(Keyed):
        def _generator(self, index: int | str, purpose: str) -> torch.Generator:
            asked.append((index, purpose))
            return step_generator(self.seed, self.step, index, purpose)

    for method in (change.method, change.changed):
        for step in STEPS:
            asked.clear()
            context = Listening(**vars(Stage(SCHEDULES["table"], {}).context(step)))
            for _ in method.updates(context, batch(3, 7), step):
                pass
            twice = {purpose for key, purpose in asked if asked.count((key, purpose)) > 1}
            assert twice <= {"gan real t", "gan real eps"}


def test_clip_sees_images_from_zero_to_one(monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(vsd, "clip", lambda *_: lambda images, prompts: seen.append(images) or images.flatten(1).sum(1))
    decoded = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 1.5], dtype=torch.float64)
    context = replace(Stage(SCHEDULES["table"], {}).context(0), decode=lambda latents: decoded.expand(1, 3, 1, 6))
    next(VSD(clip=ClipTerm()).updates(context, batch(3), 0))
    close(seen[0][0, 0, 0], torch.tensor([0.0, 0.0, 0.25, 0.5, 1.0, 1.0]), 1e-12)


def test_the_clip_term_decays_from_the_student_s_first_step():
    stage, terms = (
        Stage(SCHEDULES["table"], {}),
        (None, ClipTerm(threshold=1.0), ClipTerm(threshold=1.0, decay_steps=4)),
    )
    for step, weight in ((2, 1.0), (4, 0.5), (6, 0.0)):
        methods = (VSD(warmup_steps=2, clip=term) for term in terms)
        plain, whole, decayed = (updates(method, stage, batch(*INDEX), step)[0].loss for method in methods)
        close(decayed - plain, weight * (whole - plain), 1e-12)
        assert whole - plain > 0.01


# --- the mean over a batch -------------------------------------------------------------------------------------------

NOT_A_MEAN = {
    "DMD2.gan.divergence": "the weights of f-distill are normalised over the batch, as published",
    "PSOOffline.beta": "auto measures the pairs of a micro-batch",
    "Consistency.gan.misaligned_pairs": "the pairs are made within a batch, as published",
    "DMD2.gan.misaligned_pairs": "the same",
    "SCM.gan.misaligned_pairs": "the same",
    "Reflow.lpips.samples": "the term's mean is that of the samples that are decoded, as tested below",
    "FlowGuided.lpips.samples": "the same",
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_batch_s_loss_is_the_mean_of_its_samples_losses(change, name):
    """Values, gradients and logs. So neither micro-batches nor processes change what is learned."""
    for method in (change.method, change.changed):
        if method is not change.method and str(change) in NOT_A_MEAN:
            continue
        stage = Stage(SCHEDULES[name], {})
        for step in (0, 3):
            whole = updates(method, stage, batch(*INDEX), step)
            alone = [updates(method, stage, batch(i), step) for i in INDEX]
            for update, *single in zip(whole, *alone, strict=True):
                values = torch.stack([each.numbers for each in single])
                close(update.numbers, values.mean(0), 1e-9 * values.abs().max().item() + 1e-12)


@pytest.mark.parametrize("method", [Reflow(loss_type="huber"), FlowGuided()], ids=lambda method: type(method).__name__)
def test_a_perceptual_term_on_some_samples_has_its_whole_weight(method):
    """Decoding fewer samples saves memory: the term's mean over those is added to the mean of the rest of the loss."""

    def numbers(term: Lpips, *index: int) -> Tensor:
        (update,) = updates(replace(method, lpips=term), Stage(SCHEDULES["table"], {}), batch(*index), 0)
        return torch.stack([update.loss, update.pull["student"]])

    rest = [numbers(Lpips(weight=0.0), i) for i in INDEX]
    terms = [numbers(Lpips(weight=2.0), i) - r for i, r in zip(INDEX, rest, strict=True)]
    expected = torch.stack(rest).mean(0) + torch.stack(terms[:3]).mean(0)
    close(numbers(Lpips(weight=2.0, samples=3), *INDEX), expected, 1e-9)
    close(numbers(Lpips(weight=2.0, samples=9), *INDEX), torch.stack(rest).mean(0) + torch.stack(terms).mean(0), 1e-9)


def test_a_step_from_pure_noise_has_no_share_to_divide_by():
    with pytest.raises(ValueError, match="divide.*expected false"):
        FlowGuided(lpips=Lpips(divide=True))


def test_stages_end_at_their_steps():
    """With stages of more than one step, at which counting from 0 and from 1 differ."""
    path = DisBack(matching=DMD2(critic_steps=1), waypoints=3, recording_steps=2, backtracking_steps=3)
    assert [path.target(step) for step in range(6, 13)] == ["waypoint_2"] * 3 + ["waypoint_1"] * 3 + ["teacher"]
    tscd = Consistency(end="any", segments=(8, 4, 2), num_ddim_timesteps=40, stage_steps=3)
    assert [tscd.segments_at(step) for step in range(11)] == [8] * 3 + [4] * 3 + [2] * 5
    halving = ProgressiveHalving(steps=(8, 4), stage_steps=3)
    assert [halving.stage(step) for step in range(8)] == [0] * 3 + [1] * 5
    assert [Reflow(annealing_steps=4).beta(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    weights = [ClipTerm(weight=2.0, decay_steps=4).weight_at(step) for step in range(6)]
    assert weights == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_a_term_decays_from_the_student_s_first_step():
    """The warm-up is none of its steps."""
    for step, share in ((2, 1.0), (3, 0.75), (6, 0.0)):
        fading, constant = (
            updates(VSD(warmup_steps=2, clip=term), Stage(SCHEDULES["table"], {}), batch(*INDEX), step)[0].loss
            for term in (ClipTerm(decay_steps=4, threshold=2.0), ClipTerm(weight=0.1 * share, threshold=2.0))
        )
        close(fading, constant, 1e-12)
