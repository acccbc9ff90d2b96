"""The teacher draws the last tokens that the student keeps again: by its map, from the same noise, in few calls."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from decoders import KEEPS, PROMPTS, random_pipeline, small_janus, small_teacher, untrained_student
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core.cost import count_calls
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.random import noise_of
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.with_teacher import contract_teacher, draw_with_teacher, most_teacher_steps


@cache
def teacher() -> TokenTeacher:
    return small_teacher(guidance_scale=3.0, temperature=1.3, top_k=20)


@cache
def student() -> OneStepPipeline:
    return random_pipeline(teacher())


def noise(rows: int = len(PROMPTS)) -> Tensor:
    return torch.stack([noise_of(0, i, teacher().shape) for i in range(rows)])


@cache
def own() -> Tensor:
    """The teacher's own tokens."""
    return teacher().draw(PROMPTS, noise())


def drawn(teacher_steps: int, calls: int = 3) -> Tensor:
    return draw_with_teacher(student(), teacher(), PROMPTS, noise(), teacher_steps, calls)[0]


def given_tokens_are_read_in_one_call() -> None:
    """The logits after them are those of one after another, and the tokens go on from the noise of their own places."""
    for known in (0, 1, 21, 63):
        given, singly = own()[:, :known], teacher().steps(PROMPTS)
        expected = next(singly)
        for i in range(known):
            expected = singly.send(given[:, i])
        with count_calls(teacher().model.model.language_model) as cost:
            assert torch.allclose(next(teacher().steps(PROMPTS, given)), expected, atol=1e-4)
        assert cost.calls == 1 and cost.rows == 2 * len(PROMPTS)
        assert torch.equal(teacher().draw(PROMPTS, noise(), given), own())
    other = own().flip(0)[:, :9]
    longer = teacher().draw(PROMPTS, noise(), other, 12)
    assert longer.shape == (3, 12) and torch.equal(longer[:, :9], other)
    assert torch.equal(teacher().draw(PROMPTS, noise(), longer, 12), longer)


def asked(calls: int, output_type: str = "tokens") -> Tensor:
    """What the student draws by its own call."""
    pipe: Any = student()
    return pipe(PROMPTS, noise=noise(), num_inference_steps=calls, output_type=output_type).images


def without_the_teacher_it_is_the_student() -> None:
    for calls in (1, 2, 3):
        tokens, values = draw_with_teacher(student(), teacher(), PROMPTS, noise(), 0, calls)
        for kind in ("tokens", "pt"):
            assert torch.equal(asked(calls, kind), student().images(tokens, values, kind))
        assert torch.equal(asked(calls), tokens)


def over_the_whole_gap_they_are_the_teachers_tokens() -> None:
    """From no token on, the teacher draws its own; so those before the second gap are exact, and the gap's are, too."""
    tokens = drawn(21)
    assert torch.equal(tokens[:, :42], own()[:, :42]) and (tokens[:, 42:] != own()[:, 42:]).any()
    assert torch.equal(drawn(21, 2)[:, :21], own()[:, :21])


def only_the_last_ones_are_drawn_again() -> None:
    """By hand: the student's call, M tokens of the teacher one by one, the student's next call."""
    first = asked(1)
    expected = first.clone()
    for i in range(16, 21):
        expected[:, i] = teacher().map(noise()[:, i], teacher().logits(PROMPTS, expected)[:, i])
    assert (expected[:, 16:21] != first[:, 16:21]).any()
    network, heads = student().language_model, student().heads
    with torch.no_grad():
        expected, _ = heads.next_call(network, *student().read(PROMPTS), noise(), expected, 21)
    assert torch.equal(drawn(5, 2), expected)


def calls_are_those_of_the_definition() -> None:
    for steps, calls in ((0, 3), (4, 2), (21, 3)):
        with (
            count_calls(student().language_model) as ours,
            count_calls(teacher().model.model.language_model) as theirs,
        ):
            drawn(steps, calls)
        assert ours.calls == calls and ours.rows == calls * len(PROMPTS)
        assert theirs.calls == steps * (calls - 1) and theirs.rows == 2 * theirs.calls * len(PROMPTS)


ORACLES = [
    given_tokens_are_read_in_one_call,
    without_the_teacher_it_is_the_student,
    over_the_whole_gap_they_are_the_teachers_tokens,
    only_the_last_ones_are_drawn_again,
    calls_are_those_of_the_definition,
]


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
def test_sampling_with_the_teacher(oracle):
    oracle()


def test_the_likelihood_of_a_wrong_student_rises_with_the_teachers_tokens():
    guided = small_teacher(guidance_scale=3.0)
    prompts = PROMPTS * 8
    values = [
        guided.log_likelihood(
            prompts, draw_with_teacher(student(), guided, prompts, noise(len(prompts)), steps, 3)[0]
        ).mean()
        for steps in (0, 7, 14, 21)
    ]
    assert values == sorted(values) and values[-1] - values[0] > 3


def test_what_cannot_be_is_refused():
    assert most_teacher_steps(KEEPS) == 21 and most_teacher_steps((0, 30, 42)) == 12 and most_teacher_steps((0,)) == 0
    for steps, calls, message in (
        (22, 3, r"teacher_steps is 22: expected 0 to 21"),
        (-1, 3, "teacher_steps is -1"),
        (1, 1, "expected 0 to 0"),
        (0, 4, "calls is 4: expected 1 to 3"),
        (0, 0, "calls is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            drawn(steps, calls)


def test_the_teacher_is_that_of_the_contract(tmp_path):
    janus = small_janus(tmp_path / "janus")
    contract = read_decoder(untrained_student(janus, tmp_path / "student", guidance_scale=2.0))
    assert contract_teacher(contract).settings.guidance_scale == 2.0
    moved = janus.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="does not exist"):
        contract_teacher(contract)
    assert contract_teacher(contract, str(moved)).digest == contract.base_hash
    elsewhere = contract_teacher(contract, str(moved), "meta")
    assert elsewhere.model.device.type == "meta" and "codes" not in vars(elsewhere)  # it has none of another device
    other = replace(contract, teacher={**contract.teacher, "guidance_scale": 2.5})
    with pytest.raises(ConfigError, match="whose hash is .*, expected .*, as in the contract"):
        contract_teacher(other, str(moved))
    with pytest.raises(StudentError, match="expected the settings of a Janus"):
        contract_teacher(replace(contract, teacher={"temperature": 0}))


BUGS = {
    "one token fewer is drawn again": Bug(
        draw_with_teacher, "keep - teacher_steps]", "keep - teacher_steps + 1]", only_the_last_ones_are_drawn_again
    ),
    "the teacher has another noise": Bug(
        draw_with_teacher,
        "teacher.draw(prompts, noise,",
        "teacher.draw(prompts, noise.flip(1),",
        over_the_whole_gap_they_are_the_teachers_tokens,
    ),
    "the teacher draws all of them": Bug(
        draw_with_teacher, "tokens[:, : keep - teacher_steps]", "tokens[:, :0]", only_the_last_ones_are_drawn_again
    ),
    "the student keeps fewer": Bug(
        draw_with_teacher,
        "tokens, keep)\n    return",
        "tokens, keep - 1)\n    return",
        only_the_last_ones_are_drawn_again,
    ),
    "noise from the first place on": Bug(
        TokenTeacher.draw, "eps[:, i]", "eps[:, i - first]", given_tokens_are_read_in_one_call
    ),
    "given tokens are read for one pass of guidance alone": Bug(
        TokenTeacher.steps,
        "given.repeat(len(asked), 1)",
        "given.flip(0).repeat(len(asked), 1)",
        given_tokens_are_read_in_one_call,
    ),
    "the tokens are masked": Bug(
        TokenTeacher._continued, "torch.ones_like", "torch.zeros_like", given_tokens_are_read_in_one_call
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError, IndexError)
