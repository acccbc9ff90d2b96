"""Statistics of features: from batches as from all, in files as other tools write them, roots taken once."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import close
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import frechet
from stepdistill.evaluation.metrics.stats import FeatureStats, Stats


def features(n: int, dim: int = 6, offset: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ spread + offset


def streamed(x: Tensor, size: int) -> FeatureStats:
    found = FeatureStats(x.shape[1])
    for part in x.split(size):
        found.update(part)
    return found


@pytest.mark.parametrize("size", [1, 7, 32, 101])
def test_batches_give_what_all_rows_give(size):
    x = features(101)
    got, want = streamed(x, size).stats(), Stats.of(x)
    assert got.n == want.n
    close(got.mean, want.mean, 1e-14)
    close(got.cov, want.cov, 1e-13)


def test_a_far_mean_costs_no_digits():
    """Raw sums of squares would be off by 4e-4 here."""
    x = features(500)
    got = streamed(x + 1e6, 32).stats()
    assert (got.cov - Stats.of(x).cov).abs().max() < 1e-8 * Stats.of(x).cov.abs().max()


def test_a_root_is_taken_once(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(1) or eigh(m))
    ref = Stats.of(features(100))
    values = [frechet(Stats.of(features(100, seed=seed)), ref) for seed in (1, 2, 3)]
    assert len(calls) == 1
    close(ref.root.T @ ref.root, ref.cov, 1e-12)
    other = Stats.of(features(100, seed=1))
    assert frechet(ref, other) == pytest.approx(values[0], rel=1e-12)  # whichever root


def test_an_npz_comes_back_and_another_tool_s_is_read(tmp_path):
    ref, row = Stats.of(features(100)), Stats.of(features(60, seed=1))
    ref.save(tmp_path / "ref.npz", {"features": "pixels@0", "n": 100})
    back, facts = Stats.load(tmp_path / "ref.npz")
    assert facts == {"features": "pixels@0", "n": 100} and back.n == 100
    assert frechet(row, back) == frechet(row, ref)
    with np.load(tmp_path / "ref.npz") as found:  # as pytorch-fid reads it
        assert found["mu"].shape == (6,) and found["sigma"].shape == (6, 6)
        assert json.loads(str(found["meta"])) == facts
    np.savez(tmp_path / "other.npz", mu=ref.mean.numpy().astype(np.float32), sigma=ref.cov.numpy())
    other, facts = Stats.load(tmp_path / "other.npz")
    assert facts == {} and other.n == 0
    assert frechet(row, other) == pytest.approx(frechet(row, ref), rel=1e-5)


def pickled(file: Path) -> None:
    np.savez(file, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b"no archive"), "no reference statistics"),
        (lambda file: file.write_bytes(pickle.dumps({"mu": 0})), "no reference statistics"),
        (lambda file: np.savez(file, mean=np.zeros(2)), "mu is not a file"),
        (pickled, "allow_pickle=False"),
        (lambda file: np.savez(file, mu=np.zeros(2), sigma=np.eye(3)), "expected"),
    ],
)
def test_odd_files_are_refused(tmp_path, make, message):
    make(tmp_path / "ref.npz")
    with pytest.raises(ValueError, match=message):
        Stats.load(tmp_path / "ref.npz")


def test_odd_features_are_refused():
    found = FeatureStats(6)
    with pytest.raises(ValueError, match="got 5 features a row, expected 6"):
        found.update(features(3, 5))
    with pytest.raises(TypeError, match="expected floating point"):
        found.update(torch.zeros(3, 6, dtype=torch.uint8))
    found.update(features(1))
    with pytest.raises(ValueError, match="n=1, expected 2 or more"):
        found.stats()
