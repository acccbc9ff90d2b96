"""Runs with rewards: their scale, what validations log, the end where a held-out reward falls, and what is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from oracles import close
from oracles.fakes import Brightness
from test_sharding import two

from stepdistill.core.errors import ConfigError
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.feedback import Feedback
from stepdistill.methods.reward import RewardTerm
from stepdistill.networks.rewards.base import Score
from stepdistill.networks.rewards.white_border import WhiteBorder
from stepdistill.training import calibrate as calibration
from stepdistill.training.calibrate import SAMPLES, Scales
from stepdistill.training.checks import check_held_out
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run
from stepdistill.training.setup import prepare
from stepdistill.training.watch import measure as watching
from stepdistill.training.watch import rules
from stepdistill.training.watch.doctor import examine
from stepdistill.training.watch.rules import HELD_OUT, SCORE, TRAINED

TUNED = Feedback(rewards=(RewardTerm(reward=WhiteBorder()),), sampling=Sampler((999.0, 499.0), eta=1.0), ema_decay=0.5)
# what is gained in one is lost in the other
OPPOSED = replace(
    TUNED,
    rewards=(RewardTerm(reward=Brightness(), margin=1e3),),
    held_out=Brightness(kappa=-1.0),
    anchor_shift=None,
    ema_decay=None,
)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Without what takes most of the time of such short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "plot_drift", lambda *args: None)
        patch.setattr(watching, "SETS", 2)
        patch.setattr(calibration, "SAMPLES", 8)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return runs.saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def make(teacher: Path, out: Path, method: Feedback | DMD2 = TUNED, **train) -> Run:
    given = {"resolution": 32, "max_train_steps": 2} | train
    run = runs.make(teacher, out.parent / "unused", out, method, **given)
    return replace(run, data=Prompts(prompts=("red apple", "rose", "octopus")))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    return distill(make(teacher, tmp_path_factory.mktemp("whole") / "out"))


class Rounded(Brightness):
    """A reward without a gradient."""

    def build(self, device: torch.device) -> Score:
        return lambda images, prompts: images.detach().flatten(1).mean(1).round(decimals=1)


# --- the scale -------------------------------------------------------------------------------------------------------


def test_the_scale_of_a_linear_reward_on_a_linear_decoder(monkeypatch):
    """r = mean(a . x) + b of latents x of 6 elements: mean, spread and slope are known."""
    latents = torch.randn(SAMPLES, 2, 1, 3, generator=torch.Generator().manual_seed(0))
    asked: list[list[int]] = []

    def sample(session, prompts, ids):
        asked.append(ids)
        return latents[[i - calibration.FIRST for i in ids]]

    monkeypatch.setattr(calibration, "SAMPLES", SAMPLES)
    monkeypatch.setattr(calibration, "sample_teacher", sample)
    data = Prompts(prompts=tuple(map(str, range(1000))))
    session = SimpleNamespace(
        run=SimpleNamespace(data=data, train=SimpleNamespace(train_batch_size=24)),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        decode=lambda x, why: 5 * x,
    )
    scales = Scales(session)  # pyright: ignore[reportArgumentType]
    found = scales.measured(Brightness(kappa=4.0), slope=True)
    scores = 4 * (5 * latents.mean((1, 2, 3)) / 2 + 0.5)
    close(found, (scores.mean(), scores.std(), 4 * 5 / 2), 1e-5)  # 6 elements of slope 4 * 5 / 2 / 6 each
    assert scales.measured(Brightness(kappa=4.0)) is found and len(asked) == 3
    assert scales.prompts[0] == "0" and scales.prompts[-1] == "984"  # of the whole data
    rough = scales.measured(Rounded())
    assert rough.slope is None and 0 < rough.std < 1
    with pytest.raises(ConfigError, match="the score -?0, expected scores that differ"):
        scales.measured(Brightness(kappa=0.0))


def test_the_scale_is_in_the_contract_and_not_in_the_config(whole):
    stored = json.loads((whole / "rewards.json").read_text())
    (scale,) = stored["scales"].values()
    (term,) = json.loads((whole / "distill_config.json").read_text())["method"]["rewards"]
    assert {key: term[key] for key in scale} == scale and scale["std"] > 0 and scale["slope"] > 0
    assert stored["facts"]["steps"] == 2  # the teacher of feedback is the few-step model
    assert "mean: null" in (whole / "config.yaml").read_text()


def test_a_resumed_run_reads_the_scale_and_goes_on_bit_for_bit(whole, teacher, tmp_path, monkeypatch):
    out = distill(make(teacher, tmp_path / "out", max_train_steps=1))
    monkeypatch.delattr(calibration, "sample_teacher")
    distill(make(teacher, out, resume_from_checkpoint="latest"))
    assert torch.equal(runs.weights(out, 2), runs.weights(whole, 2))
    assert (out / "rewards.json").read_text() == (whole / "rewards.json").read_text()


def test_a_new_run_measures_anew(whole, teacher, tmp_path, monkeypatch):
    """What lies in an overwritten folder is of another run."""
    monkeypatch.delattr(calibration, "sample_teacher")
    with pytest.raises(NameError, match="sample_teacher"):
        distill(make(teacher, shutil.copytree(whole, tmp_path / "copy"), overwrite_output_dir=True))


def test_a_method_with_rewards_of_many_steps_is_scaled_by_its_teacher(teacher, tmp_path):
    method = DMD2(num_inference_steps=1, critic_steps=1, rewards=(RewardTerm(reward=WhiteBorder()),))
    out = distill(make(teacher, tmp_path / "out", method, max_train_steps=1))
    facts = json.loads((out / "rewards.json").read_text())["facts"]
    assert facts["steps"] == 5 and facts["guidance_scale"] == 7.5 and "sampler" not in facts
    assert "reward/WhiteBorder" in rules.read_metrics(out / "metrics.jsonl")[0]


def _one_of_two(rank: int, teacher: Path, out: Path, shard: bool) -> None:
    calibration.SAMPLES = 8
    if rank:
        del calibration.sample_teacher
    distill(make(teacher, out, train_batch_size=2, shard_base=shard))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_the_first_of_two_processes_measures_for_both(teacher, whole, tmp_path, shard):
    two(_one_of_two, teacher, tmp_path / "out", shard)
    (ours,), (alone,) = (
        json.loads((folder / "distill_config.json").read_text())["method"]["rewards"]
        for folder in (tmp_path / "out", whole)
    )
    for key in ("mean", "std", "slope"):
        assert ours[key] == pytest.approx(alone[key], rel=1e-4)


def test_memory_is_predicted_before_a_scale_is_known(teacher, tmp_path):
    assert "student" in dry_run(make(teacher, tmp_path / "out"))


def test_checkpointing_spares_the_decoder_s_activations_and_changes_no_gradient(teacher, tmp_path):
    kept, pulls = [], []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[-1] += value.nbytes
        return value

    for number, checkpointing in enumerate((False, True)):
        session = prepare(make(teacher, tmp_path / f"{number}", gradient_checkpointing=checkpointing))
        assert not any(p.requires_grad for p in session.pipe.vae.parameters())
        latents = torch.randn(2, *session.batches.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            images = session.decode(latents, "a test")
        pulls += torch.autograd.grad(WhiteBorder().load(latents.device)(images, ()).sum(), latents)
    assert torch.equal(*pulls) and kept[1] < 0.4 * kept[0]


# --- the guards ------------------------------------------------------------------------------------------------------


def watched(teacher: Path, out: Path, method: Feedback, **train) -> Run:
    given = {"validation_prompts": ("rose",), "validation_steps": 1, "watch_samples": 2, "learning_rate": 3e-3}
    return make(teacher, out, method, **(given | train))


def looks(out: Path) -> list[dict[str, float]]:
    return [row for row in rules.read_metrics(out / "metrics.jsonl") if SCORE in row]


def row(trained: float, held_out: float) -> dict[str, float]:
    return {SCORE: 0.0, f"{TRAINED}A": trained, f"{HELD_OUT}B": held_out}


@pytest.mark.parametrize(
    ("pairs", "fires"),
    [
        ([(0, 3), (1, 2), (2, 1)], False),  # two falls
        ([(0, 3), (1, 2), (2, 1), (3, 0)], True),
        ([(0, 3), (5, 2), (4, 1), (3, 0)], True),  # over the three, it has risen
        ([(0, 3), (0, 2), (0, 1), (0, 0)], False),  # nothing is gained: training fails in another way
        ([(3, 3), (2, 2), (1, 1), (0, 0)], False),
        ([(0, 3), (1, 2), (2, 2), (3, 0)], False),  # a pause
        ([(0, 0), (1, 9), (2, 8), (3, 7), (4, 6)], True),  # the last four count
        ([(0, 3), (1, 2), (2, 1), (3, 0), (4, 1)], False),
    ],
)
def test_three_falls_running(pairs, fires):
    rows = [part for pair in pairs for part in ({"loss": 1.0}, row(*pair))]
    assert rules.deceived(rows) == fires
    assert not rules.deceived([{SCORE: 0.0}] * 5)


def test_a_held_out_reward_that_falls_ends_the_run(teacher, tmp_path, caplog):
    out = distill(watched(teacher, tmp_path / "out", OPPOSED, max_train_steps=6))
    rows = looks(out)
    assert [one["step"] for one in rows] == [0, 1, 2, 3]
    for one in rows:
        close(one[f"{TRAINED}Brightness"], -one[f"{HELD_OUT}Brightness"], 1e-6)
    assert rows[-1][f"{TRAINED}Brightness"] > rows[0][f"{TRAINED}Brightness"]
    assert (out / "checkpoint-3").exists() and not (out / "distill_config.json").exists()
    assert "the run stops at step 3" in caplog.text and "held-out reward Brightness went from" in caplog.text
    best = json.loads((out / "best" / "watch.json").read_text())
    assert best == {"step": 1, "score": -rows[1][f"{HELD_OUT}Brightness"]}  # the highest, never the untrained one
    report, healthy = examine(out)
    assert not healthy and "the held-out reward fell 3 validations in a row" in report


def test_without_a_held_out_reward_it_goes_on_and_both_ends_are_said(teacher, tmp_path, capsys):
    method = replace(OPPOSED, held_out=None)
    run = watched(teacher, tmp_path / "out", method, max_train_steps=4, validation_steps=4)
    out = distill(run)
    assert [one["step"] for one in looks(out)] == [0, 4]
    assert "the trained reward Brightness went from" in capsys.readouterr().out
    report, _ = examine(out)
    assert "the trained reward Brightness went from" in report and "held-out" not in report


def test_a_reward_that_is_never_measured_is_refused(teacher, tmp_path):
    check_held_out(make(teacher, tmp_path / "out"))
    check_held_out(watched(teacher, tmp_path / "out", OPPOSED))
    with pytest.raises(ConfigError, match="held_out without validations"):
        check_held_out(make(teacher, tmp_path / "out", OPPOSED))
