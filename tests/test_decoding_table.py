"""The table of Distilled Decoding: what it measures against, and what its page says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles.excess import excess
from tables import benchmark, decoding
from tables.render_decoding import decoding_page

from stepdistill.core.cost import Cost
from stepdistill.evaluation.metrics.encoders import pixel_features

N, PLACES, CODES = 64, 4, 8


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(CODES, (N, PLACES), generator=torch.Generator().manual_seed(seed))


class Teacher:
    """Draws each token alone, with a probability that grows with its number, and paints it as grey."""

    places, codes, settings = PLACES, torch.linspace(-1, 1, CODES)[:, None], SimpleNamespace(guidance_scale=3.0)
    law = torch.log_softmax(torch.arange(CODES) / 4, 0)

    def log_likelihood(self, prompts, tokens):
        return self.law[tokens].mean(1)

    def pixels(self, values):
        return (
            values.reshape(len(values), 1, 2, 2).expand(-1, 3, -1, -1).repeat_interleave(16, 2).repeat_interleave(16, 3)
        )


@pytest.fixture
def ref(monkeypatch):
    for module in (decoding, benchmark):
        monkeypatch.setattr(module, "extractor", pixel_features)
    teacher: Any = Teacher()
    return decoding.TokenReference(teacher, benchmark.prompts(N), tokens(1), tokens(2))


def test_independent_tokens_have_the_laws_of_their_places_and_prompts_and_no_joint_law(ref):
    alike = torch.arange(N)[:, None].expand(-1, PLACES) // 4  # all tokens of an image are equal
    group = torch.arange(N) % 2
    mixed = decoding.shuffled(alike, group, torch.Generator().manual_seed(0))
    for one in (0, 1):
        for place in range(PLACES):
            assert (
                mixed[group == one, place].sort().values.tolist() == alike[group == one, place].sort().values.tolist()
            )
    assert (mixed == mixed[:, :1]).all(1).float().mean() < 0.2
    assert not torch.equal(ref.independent, ref.reference)


def test_a_row_is_measured_against_independent_tokens_and_the_teachers_own(ref):
    """The gap closed is 0 of the one and 1 of the other; half of each, image by image, is between."""
    half = torch.where((torch.arange(N) % 2 == 0)[:, None], ref.own, ref.independent)
    cost = Cost(calls=2, rows=2 * N, batches=1, seconds=1.0)
    rows = {name: ref.judge(x, cost) for name, x in (("own", ref.own), ("none", ref.independent), ("half", half))}
    assert rows["own"]["gap_closed"] == pytest.approx(1) and rows["none"]["gap_closed"] == pytest.approx(0)
    own, none, mixed = (Teacher.law[x].mean(1) for x in (ref.own, ref.independent, half))
    assert rows["half"]["gap_closed"] == pytest.approx(((mixed - none).mean() / (own - none).mean()).item(), rel=1e-5)
    assert rows["half"]["log_likelihood"] == pytest.approx(mixed.mean().item())
    assert rows["own"]["agreement"] == 1 and rows["own"]["excess"] == pytest.approx(0, abs=1e-6)
    assert rows["half"]["agreement"] == pytest.approx((half == ref.own).float().mean().item())
    seen = [ref.seen(x) for x in (ref.independent, ref.reference, ref.own)]
    found = excess(*seen)
    assert [rows["none"]["excess"], *rows["none"]["ci95"]] == pytest.approx([found.value, found.low, found.high])
    assert rows["half"]["calls"] == 2 and rows["half"]["nfe"] == 2


def test_the_page_has_a_line_for_each_row():
    row = {"log_likelihood": -2.351, "log_likelihood_ci95": [-2.4, -2.3], "calls": 64, "nfe": 128}
    student = row | {
        "calls": 1.0,
        "gap_closed": 0.8,
        "gap_closed_ci95": [0.75, 0.85],
        "excess": 12.3,
        "ci95": [8.1, 16.2],
    }
    student |= {"paired": 1.23, "diversity": 0.9, "agreement": 0.4}
    trained = {"pairs": 100, "train_steps": 10}
    pace = {"threads": 2, "tokens, batch 1": {"teacher": 0.6, "1": 0.01, "2": 0.02, "3": 0.03}}
    page = decoding_page(
        {"t/independent": student, "t/teacher": row, "t/whole/1": student | trained, "t/whole/pace": pace}
    )
    assert "| t: teacher | 64, 128 evaluations | -2.35 [-2.40, -2.30] | 100 |" in page
    assert "| t: whole/1 | 1 | " in page and "80.0 [75.0, 85.0] | 12 [8, 16] | 1.2 | 0.90 | 40 |" in page
    assert "| 100 pairs, 10 steps |" in page
    assert "| t: whole | tokens, batch 1 | 600.0 | 10.0 (60.0 x) | 20.0 (30.0 x) | 30.0 (20.0 x) |" in page
