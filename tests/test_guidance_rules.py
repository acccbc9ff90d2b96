"""Rules of guidance against the pipelines' own lines, and the laws that a student tends to under each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core import denoise, guidance
from stepdistill.core.denoise import Condition, concatenated, filled, guided, without_prompt
from stepdistill.core.guidance import LINEAR, Capped, Linear, Rule, TokenNorm, Truncated, on_estimates
from stepdistill.core.prediction import Estimate, Kind, estimate, output
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified
from stepdistill.core.solvers import follow
from stepdistill.methods.base import StepContext

FLOW = Rectified()
TABLE = DiscreteVP(torch.linspace(0.999, 0.005, 1000))


def outputs(rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two network outputs (B, 4, 6, 4), and no two values of which are alike."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, 4, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def packed(y: Tensor) -> Tensor:
    """(B, 6, 16): 2 x 2 places and all channels as a token, as Qwen-Image's pipeline packs them."""
    return y.view(len(y), 4, 3, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(y), 6, 16)


def test_a_token_keeps_its_norm_with_the_prompt():
    uncond, cond = outputs()
    u, c = packed(uncond), packed(cond)
    mixed = u + 4.0 * (c - u)
    theirs = mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
    ours = TokenNorm(2)(uncond, cond, 4.0, torch.zeros(2))
    torch.testing.assert_close(packed(ours), theirs)


def test_a_cap_scales_whole_images_down_and_none_up():
    uncond, cond = outputs(4)
    cond[0], uncond[1] = 0.1 * cond[0], 1.8 * cond[1]  # a first one that grows much, and a second one that shrinks
    for most in (0.5, 1.0):
        ours = Capped(most)(uncond, cond, 2.0, torch.zeros(4))
        for row in range(4):
            y, limit = uncond[row] + 2.0 * (cond[row] - uncond[row]), most * cond[row].norm()
            theirs = y * (limit / y.norm()) if y.norm() > limit else y
            torch.testing.assert_close(ours[row], theirs)
    torch.testing.assert_close(Capped(1.0)(uncond, cond, 2.0, torch.zeros(4))[1], 0.2 * cond[1])
    scales = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    mixed = Capped(0.5)(uncond, cond, scales, torch.zeros(4))
    assert torch.equal(mixed[::2], cond[::2])
    torch.testing.assert_close(mixed[1::2], Capped(0.5)(uncond, cond, 2.0, torch.zeros(4))[1::2])


def test_truncated_guidance_ends_where_it_says():
    uncond, cond = outputs(3)
    t = torch.tensor([901.0, 401.0, 399.0])  # 1 - t / 1000: 0.099, 0.599, 0.601
    ours = Truncated(Capped(1.0), 0.6)(uncond, cond, 3.0, t)
    rule = Capped(1.0)(uncond, cond, 3.0, t)
    assert torch.equal(ours[:2], rule[:2])
    assert torch.equal(ours[2], cond[2])
    assert not torch.allclose(rule[2], cond[2])


@pytest.mark.parametrize("steps", [5, 10, 50])
def test_guidance_ends_at_the_very_step_of_the_pipeline_where_a_level_is_the_limit(steps):
    """1 - t / 1000 in single precision is at times one digit above what (1000 - t) / 1000 is."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    uncond, cond = (torch.full((steps, 1, 1, 1), value) for value in (0.0, 1.0))
    for after in (i / steps for i in range(steps)):
        theirs = [level > after for level in ((1000 - scheduler.timesteps.float()) / 1000).tolist()]
        ours = Truncated(LINEAR, after)(uncond, cond, 3.0, scheduler.timesteps)
        assert (ours.flatten() == 1.0).tolist() == theirs


def test_rules_say_their_names():
    rules: dict[str, Rule] = {
        "linear": LINEAR,
        "token_norm": TokenNorm(2),
        "capped": Capped(0.5),
        "capped, truncated": Truncated(Capped(0.5), 0.6),
    }
    assert {rule.name for rule in rules.values()} == set(rules)
    assert all(rule.name == name for name, rule in rules.items())
    assert rules["capped"].equation.startswith("y min(1, 0.5 |cond| / |y|)")
    assert rules["capped, truncated"].equation.endswith("cond at times below 400")
    assert all("uncond + w (cond - uncond)" in rule.equation for rule in rules.values())


@dataclass(frozen=True)
class Prompted:
    """A network whose output is the mean of the prompt's true tokens times a map of x_t."""

    kind: Kind
    schedule: NoiseSchedule

    def raw(self, x_t: Tensor, cond: Condition) -> Tensor:
        weight = cond["mask"].double()
        mean = (cond["states"] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return mean[:, :, None, None] * torch.tanh(x_t) + mean.flip(1)[:, :, None, None]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return estimate(self.kind, self.raw(x_t, cond), x_t, t, self.schedule)


def prompts(*lengths: int) -> Condition:
    """Prompts of so many tokens, filled up to the longest."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randn(1, n, 4, generator=generator, dtype=torch.float64) for n in lengths]
    masks = [torch.ones(1, n, dtype=torch.bool) for n in lengths]
    return {"states": torch.cat(filled(rows)), "mask": torch.cat(filled(masks))}


@pytest.mark.parametrize(("kind", "schedule"), [("flow", FLOW), ("epsilon", TABLE), ("v_prediction", TABLE)])
@pytest.mark.parametrize("rule", [Linear(), TokenNorm(2), Capped(0.5)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("lengths", [(3, 5), (7, 9)], ids=["a longer null", "a shorter null"])
def test_guidance_is_the_rule_on_outputs_of_single_calls(kind, schedule, rule, lengths):
    net, null, cond = Prompted(kind, schedule), prompts(6), prompts(*lengths)
    x, t = outputs()[0], torch.tensor([700.0, 55.0], dtype=torch.float64)
    scale = torch.tensor([2.0, 4.5], dtype=torch.float64)
    ours = guided(net, null, scale, on_estimates(rule, kind, schedule))(x, t, cond)
    for row in range(2):
        alone = {key: value[row : row + 1, : lengths[row]] for key, value in cond.items()}
        y = rule(net.raw(x[row : row + 1], null), net.raw(x[row : row + 1], alone), scale[row].item(), t[row : row + 1])
        theirs = estimate(kind, y, x[row : row + 1], t[row : row + 1], schedule)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-5, atol=1e-5)


def test_conditions_of_unequal_length_are_joined():
    first, second = prompts(2, 4), prompts(7)
    both = concatenated(first, second)
    assert both["mask"].sum(1).tolist() == [2, 4, 7]
    assert torch.equal(both["states"][1, :4], first["states"][1])
    assert not both["states"][:2, 4:].any()
    assert torch.equal(both["states"][2], second["states"][0])


def test_a_null_of_another_length_replaces_the_prompt_alone():
    image = torch.ones(2, 3)
    given = without_prompt(prompts(6), {**prompts(3, 5), "image": image})
    assert given["states"].shape == (2, 6, 4)
    assert given["mask"].all()
    assert given["image"] is image


def fixed_point(rule: Rule, w: float, steps: int = 600) -> tuple[float, float, float]:
    """Mean of a coordinate, and spreads along the mean and across it, of the Gaussian that distribution matching with
    an exact critic leads to.

    The teacher's law is N(0.35, 0.25) in 16 coordinates that are one token; without the prompt its mean is -0.35.
    """
    generator = torch.Generator().manual_seed(0)
    wide, std, centre = 16, 0.5, 0.35
    along = torch.full((wide,), 1 / math.sqrt(wide), dtype=torch.float64)

    def teacher(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        sigma = (t / 1000)[:, None, None, None]
        power = (1 - sigma) ** 2 * std**2 + sigma**2
        mean = cond["mean"][:, None, None, None]
        x0 = mean + (1 - sigma) * std**2 / power * (x_t - (1 - sigma) * mean)
        return Estimate(x0, (x_t - (1 - sigma) * x0) / sigma)

    null, cond = ({"mean": torch.full((256,), sign * centre, dtype=torch.float64)} for sign in (-1, 1))
    real = guided(teacher, null, w, on_estimates(rule, "flow", FLOW))
    mean, spread, across = centre * math.sqrt(wide), std, std
    tail = []
    for step in range(steps):
        rate = 0.15 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3
        z, eps = (torch.randn(256, wide, generator=generator, dtype=torch.float64) for _ in range(2))
        sigma = 0.02 + 0.96 * torch.rand(256, 1, generator=generator, dtype=torch.float64)
        parallel = (z @ along)[:, None]
        rest = z - parallel * along
        x0 = mean * along + spread * parallel * along + across * rest
        x_t = (1 - sigma) * x0 + sigma * eps
        off = x_t - (1 - sigma) * mean * along
        off_along = (off @ along)[:, None] * along
        gains = [(1 - sigma) * v**2 / ((1 - sigma) ** 2 * v**2 + sigma**2) for v in (spread, across)]
        fake = mean * along + gains[0] * off_along + gains[1] * (off - off_along)
        target = real(x_t.view(256, 4, 2, 2), 1000 * sigma[:, 0], cond).x0.flatten(1)
        gradient = fake - target
        own = (gradient @ along)[:, None]
        mean -= rate * own.mean().item()
        spread -= rate * (own * parallel).mean().item()
        across -= rate * ((gradient - own * along) * rest).sum(1).mean().item() / (wide - 1)
        tail.append((mean / math.sqrt(wide), spread, across))
    return tuple(torch.tensor(tail[-150:]).mean(0).tolist())


LAWS = {
    ("linear", 2.0): (1.05, 0.5, 0.5),  # mean + (w - 1) (mean - other mean), and the data's own spread
    ("linear", 4.0): (2.45, 0.5, 0.5),
    ("token_norm", 1.0): (0.35, 0.5, 0.5),
    ("token_norm", 2.0): (0.67, 0.77, 0.69),  # bounded in w, and wider: a shortened velocity leaves noise
    ("token_norm", 4.0): (0.81, 0.89, 0.84),
    ("capped", 4.0): (0.81, 0.89, 0.84),
}
RULES: dict[str, Rule] = {"linear": LINEAR, "token_norm": TokenNorm(2), "capped": Capped(1.0)}


@pytest.mark.parametrize(("name", "w"), LAWS)
def test_the_law_that_a_rule_leads_to(name, w):
    assert fixed_point(RULES[name], w) == pytest.approx(LAWS[name, w], abs=0.03)


def gaussian(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
    """A teacher of the spread 0.5 around the mean in `cond`."""
    level = (t / 1000)[:, None, None, None]
    mean = cond["mean"][:, None, None, None]
    gain = (1 - level) * 0.5**2 / ((1 - level) ** 2 * 0.5**2 + level**2)
    x0 = mean + gain * (x_t - (1 - level) * mean)
    return Estimate(x0, (x_t - (1 - level) * x0) / level)


def truncated(after: float, rows: int) -> tuple[denoise.Denoise, Condition]:
    """That teacher with guidance 4, which ends at `after`, and its prompts; their mean is 0.35, and -0.35 without."""
    null, cond = ({"mean": torch.full((rows,), sign * 0.35, dtype=torch.float64)} for sign in (-1, 1))
    return guided(gaussian, null, 4.0, on_estimates(Truncated(LINEAR, after), "flow", FLOW)), cond


@pytest.mark.parametrize(("after", "share"), [(0.3, 0.44), (0.6, 0.84)])
def test_the_law_of_truncated_guidance(after, share):
    """The mean goes a share of the way to that of the linear rule, and the spread stays the data's.

    Of the times in the loss, each pulls the mean by its weight `sigma^2 / ((1 - sigma)^2 s^2 + sigma^2)`, the late ones
    to the data's own mean. All is linear in the noise, so that two mirrored points give the loss's mean gradient.
    """
    sigma = torch.linspace(0.02, 0.98, 20_001, dtype=torch.float64)
    pull = sigma**2 / ((1 - sigma) ** 2 * 0.5**2 + sigma**2)
    expected = (pull[1 - sigma <= after].sum() / pull.sum()).item()
    real, cond = truncated(after, 2 * len(sigma))
    levels, z = sigma.repeat(2), torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(sigma))

    def gradient(mean: float, spread: float) -> tuple[float, float]:
        """Of the student's mean and spread, whose law an exact critic knows."""
        x_t = (1 - levels) * (mean + spread * z)
        gain = (1 - levels) * spread**2 / ((1 - levels) ** 2 * spread**2 + levels**2)
        fake = mean + gain * (x_t - (1 - levels) * mean)
        off = fake - real(x_t[:, None, None, None], 1000 * levels, cond).x0.flatten()
        return off.mean().item(), (off * z).mean().item()

    law = 0.35 + 2.1 * expected
    assert gradient(law, 0.5) == pytest.approx((0.0, 0.0), abs=1e-3)
    assert gradient(law + 0.05, 0.5)[0] > 0.01 and gradient(law - 0.05, 0.5)[0] < -0.01
    assert gradient(law, 0.55)[1] > 0.005 and gradient(law, 0.45)[1] < -0.005
    assert expected == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("after", "share"), [(0.3, 0.21), (0.6, 0.60)])
def test_the_law_that_a_teacher_of_truncated_guidance_draws(after, share):
    """It is another one: along the ODE what guidance gave early is forgotten, but for `s a / (a^2 s^2 + (1 - a)^2)^0.5`
    with a = `after`, by which the state's own spread grows."""
    real, cond = truncated(after, 3)
    z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    low, mean, high = follow(real, FLOW, torch.linspace(1000, 0, 1001).tolist(), z, cond).flatten().tolist()
    expected = 0.5 * after / math.hypot(0.5 * after, 1 - after)
    assert mean == pytest.approx(0.35 + 2.1 * expected, abs=5e-3) and expected == pytest.approx(share, abs=0.01)
    assert (high - low) / 2 == pytest.approx(0.5, abs=5e-3)


def test_rescaled_in_x0_it_would_be_another_rule():
    def combine(uncond: Estimate, cond: Estimate, scale: float | Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        x0 = TokenNorm(2)(uncond.x0, cond.x0, scale, t)
        sigma = (t / 1000)[:, None, None, None]
        return Estimate(x0, (x_t - (1 - sigma) * x0) / sigma)

    uncond, cond = outputs()
    x, t = outputs(seed=1)[0], torch.tensor([700.0, 400.0], dtype=torch.float64)
    parts = [estimate("flow", y, x, t, FLOW) for y in (uncond, cond)]
    right = on_estimates(TokenNorm(2), "flow", FLOW)(parts[0], parts[1], 4.0, x, t)
    assert (combine(parts[0], parts[1], 4.0, x, t).x0 - right.x0).abs().max() > 0.5


def test_a_context_guides_by_its_rule():
    net, null, cond = Prompted("flow", FLOW), prompts(6), prompts(3, 5)
    given = {name: None for name in ("module", "decode", "seed", "step", "device")}
    context = StepContext(
        schedule=FLOW,
        null=null,
        denoiser=lambda role: net,  # pyright: ignore[reportArgumentType]
        combine=on_estimates(TokenNorm(2), "flow", FLOW),
        **given,  # pyright: ignore[reportArgumentType]
    )
    x, t = outputs()[0], torch.tensor([700.0, 55.0], dtype=torch.float64)
    y = output("flow", context.guided("teacher", 4.0)(x, t, cond), t, FLOW)
    norm = output("flow", net(x, t, cond), t, FLOW)
    torch.testing.assert_close(packed(y).norm(dim=-1), packed(norm).norm(dim=-1))
    assert context.guided("teacher", 1) is net


def tokens() -> None:
    test_a_token_keeps_its_norm_with_the_prompt()


def caps() -> None:
    test_a_cap_scales_whole_images_down_and_none_up()


def ends() -> None:
    test_truncated_guidance_ends_where_it_says()


def outputs_of() -> None:
    for lengths in ((3, 5), (7, 9)):
        test_guidance_is_the_rule_on_outputs_of_single_calls("flow", FLOW, TokenNorm(2), lengths)


def lengths_of() -> None:
    test_conditions_of_unequal_length_are_joined()
    test_a_null_of_another_length_replaces_the_prompt_alone()


BUGS = {
    "a norm of one channel": Bug(TokenNorm._norm, "y.square().sum(1)", "y.square()[:, 0]", tokens),
    "a norm of rows": Bug(TokenNorm._norm, "(-3, -1), keepdim", "(-3,), keepdim", tokens),
    "no norm": Bug(TokenNorm.__call__, "self._norm(cond) / self._norm(y)", "1", tokens),
    "a cap that scales up": Bug(Capped.__call__, "norm > most", "norm > 0", caps),
    "a cap where there is no guidance": Bug(Capped.__call__, "scale == 1, cond,", "scale == 1, capped,", caps),
    "a cap without its share": Bug(Capped.__call__, "self.most * cond", "cond", caps),
    "truncated at the other end": Bug(Truncated.__call__, "(1000 - t) / 1000", "t / 1000", ends),
    "truncated to no prompt": Bug(Truncated.__call__, "where(free, cond,", "where(free, uncond,", ends),
    "linear whatever the rule": Bug(guidance.on_estimates, "isinstance(rule, Linear)", "True", outputs_of),
    "halves swapped": Bug(guidance.on_estimates, "in (uncond, cond)", "in (cond, uncond)", outputs_of),
    "filled up in front": Bug(
        denoise.filled,
        "[row, row.new_zeros(len(row), length - row.shape[1], *row.shape[2:])]",
        "[row.new_zeros(len(row), length - row.shape[1], *row.shape[2:]), row]",
        lengths_of,
    ),
    "a null cut to the prompt": Bug(
        denoise.without_prompt, "*null[key].shape[1:])", "*null[key].shape[1:])[:, : value.shape[1]]", lengths_of
    ),
    "a context without its rule": Bug(
        StepContext.guided, "self.null, scale, self.combine", "self.null, scale", test_a_context_guides_by_its_rule
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
