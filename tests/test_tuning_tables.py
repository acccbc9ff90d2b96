"""The tables of tuning: their held-out score, the optimum of a reward of 0 or 1, their images, and their pages."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tables import feedback, new_images, render, rise
from tables.linear_share import STARTS, linear_share
from tables.recipes import recipes
from torch import Tensor

from stepdistill.config.load import load_config
from stepdistill.data import ImageFolder
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.sd import StableDiffusion
from stepdistill.training.recipe import Run

FAMILY = StableDiffusion(pretrained_teacher_model="tiny-sd")


def test_the_held_out_score_tells_full_steps_from_one(monkeypatch):
    torch.manual_seed(0)
    good, bad, fresh = (torch.randn(400, 8) + shift for shift in (1.0, -1.0, 1.0))
    called = []
    monkeypatch.setattr(feedback, "teacher_call", lambda *given: called.append(given[2:4]))
    monkeypatch.setattr(feedback, "generate", lambda *_, **__: (None, None))
    monkeypatch.setattr(feedback, "extractor", lambda: lambda _: bad)
    facts = {"teacher_guidance_scale": "7.5"}
    score = feedback.quality(FAMILY, StoredFeatures({"reference": good}, ["rose"] * 400, facts))
    assert called == [(1, 7.5)]
    assert (score(fresh) > 0).float().mean() > 0.98 and (score(bad) < 0).float().mean() > 0.98


def images(p: Tensor, again: int, shift: float = 0.0) -> rise.Paths:
    """A share p of images with a white border, whose features are 3 away from the others', all `shift` from those."""
    white = (torch.arange(again) < (p * again).round()[:, None]).float()
    return rise.Paths(white, torch.randn(*white.shape, 2) + 3 * white[..., None] + shift)


@pytest.mark.parametrize(("share", "reached"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_optimum_raises_the_log_odds_of_every_noise(monkeypatch, tmp_path, share, reached):
    torch.manual_seed(0)
    p, again = torch.linspace(0.05, 0.95, 40), 1000
    wanted = 1 / (1 + (1 - p) / p * math.exp(-1.5))
    after = p + share * (wanted - p)
    made = {("before", SEED_A): images(p, again), ("before", SEED_B): images(p, again)}
    made["after", SEED_A] = images(after, again, share)
    monkeypatch.setattr(rise, "paths", lambda family, folder, seed: made[folder.name, seed])
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / "distill_config.json").write_text("{}")
    train = SimpleNamespace(output_dir=str(tmp_path / "after"), max_train_steps=1)
    run: Any = SimpleNamespace(train=train, start_from="before", family=FAMILY)
    row = rise.risen(run, 1.5)
    assert row["wanted"] == pytest.approx(wanted.mean().item(), abs=1e-3) and row["before"] == pytest.approx(0.5)
    assert row["reached"] == pytest.approx(reached, abs=5e-3)
    # each kind moved by `share` in both features, which are 3 away from the other kind's
    for kind in ("excess_white", "excess_other"):
        assert row[kind] == pytest.approx(2 * share**2, abs=0.06)
        assert row[f"{kind}_ci95"][0] < 2 * share**2 < row[f"{kind}_ci95"][1]
    assert row["apart"] == pytest.approx(18, rel=0.03)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("reward", "share"),
    [(lambda z: z.sum(1), 1.0), (lambda z: (z.sum(1) > 0).float(), 2 / math.pi), (lambda z: z[:, 0] * z[:, 1], 0.0)],
)
def test_the_linear_share_of_rewards_that_are_known(reward, share, steps):
    """`sum_k |Cov(r, z_k)|^2 / Var(r)`; each step here has as much of it as the other."""

    def draw(start: int, step: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(4096, 4, generator=torch.Generator().manual_seed(2 * start + step))
        return reward(z), z

    found = linear_share(draw, STARTS, steps)
    assert found.value == pytest.approx(steps * share, abs=0.02)
    assert found.low - 0.01 < steps * share < found.high + 0.01


@pytest.mark.parametrize("by", [1.0, 2.0])
def test_pso_has_the_beta_of_its_rise(by, tmp_path, monkeypatch):
    """`p ~ p_before exp(D r / (beta temperature std))`: a reward that differs by 1 is worth `rise` nats."""
    runs = []
    monkeypatch.setattr(rise, "risen", lambda run, by: runs.append(run) or {})
    monkeypatch.setattr(rise, "linear", lambda run: {})

    @dataclass
    class Kept:
        def once(self, key, make, **facts):
            make()

    kept: Any = Kept()
    rise.measure_rise("tiny-sd", by, kept, tmp_path)
    method, pipe = runs[0].method, FAMILY.load()
    numbers = math.prod(FAMILY.latent_shape(pipe, 32, 32))
    assert numbers / (method.beta * method.temperature * method.std) == pytest.approx(by)
    assert method.clip_range is None and method.labels == "soft"
    white = torch.stack([torch.ones(3, 32, 32), torch.zeros(3, 32, 32)])
    assert method.reward.load(torch.device("cpu"))(white, ["", ""]).tolist() == [1.0, 0.0]


def test_offline_pso_gets_the_white_ones_of_the_teachers_samples(tmp_path, monkeypatch):
    run = load_config(Run, recipes("tiny-sd", "feedback")["pso_offline"], [])
    source = load_config(Run, recipes("tiny-sd", "consistency")["regression"], ["data.count=64"]).data
    monkeypatch.setattr(feedback, "load_config", lambda *_: SimpleNamespace(data=source))
    feedback.sample_images("tiny-sd", run, tmp_path / "white", feedback.WHITE_ENOUGH)
    data = replace(run.data, train_data_dir=str(tmp_path / "white"))
    assert isinstance(data, ImageFolder) and 8 < len(data) < 56
    files = [json.loads(line) for line in (tmp_path / "white" / "metadata.jsonl").read_text().splitlines()]
    for row in files:
        image = Image.open(tmp_path / "white" / row["file_name"])
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 32, 32, 3)
        assert feedback.whiteness(pixels.permute(0, 3, 1, 2), [row["text"]]) > feedback.WHITE_ENOUGH
        assert row["text"] == source.prompt_of(int(row["file_name"][:5]))


def test_the_plain_sampler_to_compare_with_is_the_best_one_of_as_many_steps(tmp_path):
    rows = {"a/DDIM/4": 3.0, "a/DPM/4": 2.0, "a/DPM/8": 1.0, "b/DPM/4": 0.5}
    (tmp_path / "teachers.json").write_text(json.dumps({key: {"excess": value} for key, value in rows.items()}))
    assert new_images.plain_row("a", tmp_path / "teachers.json", 4) == {"excess": 2.0}


def spans(**values: float) -> dict[str, Any]:
    return values | {f"{key}_ci95": [value - 0.1, value + 0.1] for key, value in values.items()}


def test_the_pages_show_each_row_once():
    row = {"excess": 10.0, "ci95": [5.0, 15.0], "diversity": 0.9, "calls": 4.0}
    scores = spans(reward=0.5, held_out=0.25, detail=2.0)
    taken = {"train_steps": 200, "train_seconds": 90}
    risen = spans(before=0.5, wanted=0.7, after=0.6, reached=0.5, excess_white=1.0, excess_other=2.0, apart=30.0)
    made = render.RENDERERS["feedback"](
        {"t/a": row | scores | taken | {"detail": 3.0}, "t/before": row | scores, "t/rise 1": risen}
        | {"t/linear share": spans(share=0.3)}
    ).split("\n")
    assert made[2:4] == [
        "| t: before | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] | 10 [5, 15] | 0.90 | 1.00 |  |",
        "| t: a | 0.500 [0.400, 0.600] | 0.250 [0.150, 0.350] | 10 [5, 15] | 0.90 | 1.50 | 200 steps, 1.5 min |",
    ]
    line = "| t: rise 1 | 50.0 [40.0, 60.0] | 70.0 [60.0, 80.0] | 60.0 [50.0, 70.0] | 0.50 [0.40, 0.60] |"
    assert made[-5] == f"{line} 0.30 [0.20, 0.40] |"
    assert made[-1] == "| t: rise 1 | 1 [1, 1] | 2 [2, 2] | 30 [30, 30] |"
    stages = {f"t/s/{n}": row | scores | taken | {"steps": n} for n in (1, 2)}
    assert render.RENDERERS["hyper_sd"](stages).count("| t: s | 10 [5, 15] | 10 [5, 15] | 1.5 min |") == 1
    teacher, before, after = ({**row, "excess": value} for value in (50.0, 10.0, 20.0))
    new = {"t/before": before, "t/teacher": teacher, "t/alone": after | taken}
    assert "| t: alone | 20 [5, 15] | 4 | 0.90 | 25% | 1.5 min |" in render.RENDERERS["new_images"](new)


@pytest.mark.parametrize("table", ["feedback", "new_images"])
def test_the_configs_of_both_teachers_are_alike(table):
    for method, file in recipes("tiny-sd", table).items():
        one, other = (load_config(Run, each, []) for each in (file, recipes("tiny-sd3", table)[method]))
        assert one.method == other.method and one.lora == other.lora
        assert Path(one.train.output_dir).name.replace("tiny_sd_", "tiny_sd3_") == Path(other.train.output_dir).name
