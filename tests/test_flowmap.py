"""The map from noise to tokens: its law, its order, and what it depends on (D1 to D5 and D10 of Distilled Decoding)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles.planted import Bug, bug_tests
from torch import Tensor

from stepdistill.core.errors import DataError
from stepdistill.decoding import flowmap
from stepdistill.decoding.flowmap import FlowMap, flow, nearest_code, posterior_mean, times

UNIFORM_10 = tuple(i / 10 for i in range(11))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def euler(eps: Tensor, codes: Tensor, log_p: Tensor, steps: int) -> Tensor:
    """An independent map: Euler's steps of `dx/dtau`, even in tau."""
    x = eps
    for k in range(steps):
        tau = k / steps
        far = (x[:, None] - tau * codes).square().sum(-1)
        weight = torch.softmax(log_p - far / (2 * (1 - tau) ** 2), -1)
        x = x + ((weight[..., None] * codes).sum(1) - x) / (1 - tau) / steps
    return (x[:, None] - codes).norm(dim=-1).argmin(1)


def the_quantile_coupling() -> None:
    """D1: in one dimension the map is monotone, so token j is that with F_j-1 < Phi(eps) < F_j in the codes' order."""
    eps = normal(4000, 1)
    for codes, p in (
        ([-1.5, -0.5, 0.5, 1.5], [0.1, 0.2, 0.3, 0.4]),
        ([-0.06, -0.02, 0.02, 0.06], [0.1, 0.2, 0.3, 0.4]),
        ([10.0, -30.0, 30.0, -10.0], [0.3, 0.1, 0.4, 0.2]),
        ([-1.5, -0.5, 0.5, 1.5], [0.001, 0.004, 0.99, 0.005]),
    ):
        c, law = torch.tensor(codes).double()[:, None], torch.tensor(p).double()
        order = c[:, 0].argsort()
        place = torch.searchsorted(law[order].cumsum(0)[:-1].contiguous(), torch.special.ndtr(eps[:, 0]))
        assert (FlowMap(c)(eps, law.log().expand(len(eps), -1)) == order[place]).double().mean() >= 0.999


def test_in_one_dimension_it_is_the_quantile_coupling():
    the_quantile_coupling()


def chi_square(tokens: Tensor, p: Tensor) -> tuple[float, int]:
    """Pearson's statistic over the tokens that five are expected of, and its degrees of freedom."""
    found, expected = torch.bincount(tokens, minlength=len(p)).double(), len(tokens) * p
    kept = expected >= 5
    return ((found - expected).square() / expected)[kept].sum().item(), int(kept.sum()) - 1


def the_law() -> None:
    """D2: tokens have the probabilities, within three standard errors of chi-square; ten Euler steps do not."""
    for d, vocabulary, scale, n in ((2, 16, 1.0, 40_000), (4, 64, 1.0, 40_000), (8, 256, 0.354, 20_000)):
        codes, logits = scale * normal(vocabulary, d, seed=d), 1.5 * normal(vocabulary, seed=d + 50)
        p, eps = torch.softmax(logits, 0), normal(n, d, seed=d + 100)
        value, free = chi_square(FlowMap(codes)(eps, logits.expand(n, -1)), p)
        assert value < free + 3 * math.sqrt(2 * free)
        coarse, free = chi_square(nearest_code(flow(eps, codes, p.log().expand(n, -1), UNIFORM_10), codes, p.log()), p)
        assert coarse > free + 10 * math.sqrt(2 * free)


def test_tokens_have_the_probabilities_of_the_teacher():
    the_law()


def test_it_is_the_limit_of_eulers_steps():
    codes, log_p = normal(12, 3, seed=1), torch.log_softmax(normal(300, 12, seed=2), -1)
    eps = normal(300, 3, seed=3)
    mine = FlowMap(codes)(eps, log_p)
    differing = [(euler(eps, codes, log_p, steps) != mine).double().mean().item() for steps in (10, 100, 1000)]
    assert differing[2] <= 0.01 and differing[0] > 3 * differing[2]


N, V = 6, 4
CORNERS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
START = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
NEXT = torch.softmax(2 * normal(V, V), 1)


def chain(eps: Tensor) -> Tensor:
    """Tokens (B, N) of a Markov chain by the map, from noise (B, N, 2)."""
    draw, logits, tokens = FlowMap(CORNERS), START.log().expand(len(eps), V), []
    for i in range(N):
        tokens.append(draw(eps[:, i], logits))
        logits = NEXT[tokens[-1]].log()
    return torch.stack(tokens, 1)


def exact() -> tuple[Tensor, Tensor]:
    """All sequences (4096, N) of the chain, and their probabilities."""
    sequences = torch.tensor(list(itertools.product(range(V), repeat=N)))
    log_p = START[sequences[:, 0]].log()
    for i in range(1, N):
        log_p = log_p + NEXT[sequences[:, i - 1], sequences[:, i]].log()
    return sequences, log_p.exp()


def test_a_chain_has_its_joint_law():
    """D3: total variation of the joint at the sampling noise, where independent tokens are far from it."""
    sequences, p = exact()
    single = [torch.zeros(V).double().index_add(0, sequences[:, i], p) for i in range(N)]
    product = torch.stack([single[i][sequences[:, i]] for i in range(N)]).prod(0)
    assert (p * (p / product).log()).sum().item() == pytest.approx(2.106, abs=0.001)  # the total correlation
    count, places = 20_000, V ** torch.arange(N - 1, -1, -1)
    noise = 0.5 * (2 * p * (1 - p) / (math.pi * count)).sqrt().sum()

    def far(tokens: Tensor) -> float:
        share = torch.bincount((tokens * places).sum(1), minlength=V**N).double() / count
        return 0.5 * (share - p).abs().sum().item()

    assert far(chain(normal(count, N, 2, seed=1))) < 1.05 * noise
    torch.manual_seed(0)
    alone = torch.stack([torch.multinomial(law, count, replacement=True) for law in single], 1)
    assert far(alone) > 10 * noise and 0.5 * (p - product).abs().sum() > 0.7


def test_a_token_depends_on_its_noise_and_those_before():
    """D4."""
    eps = normal(2000, N, 2, seed=1)
    other = eps.clone()
    other[:, 3] = normal(2000, 2, seed=2)
    tokens, changed = chain(eps), chain(other)
    assert torch.equal(chain(eps), tokens) and torch.equal(tokens[:, :3], changed[:, :3])
    moved = (tokens != changed).double().mean(0)
    assert (moved[3:] > 0.05).all() and moved[4] > moved[5]


def test_one_by_one_as_in_a_batch_and_in_float32_as_in_float64():
    """D5."""
    codes = torch.nn.functional.normalize(normal(256, 8, seed=3), dim=1)
    logits, eps = 2 * normal(1000, 256, seed=4), normal(1000, 8, seed=5)
    draw = FlowMap(codes)
    tokens = draw(eps, logits)
    assert torch.equal(torch.cat([draw(eps[i : i + 1], logits[i : i + 1]) for i in range(50)]), tokens[:50])
    assert (FlowMap(codes.float())(eps.float(), logits.float()) != tokens).double().mean() < 0.001
    with pytest.raises(DataError, match="noise in torch.bfloat16 for the map to tokens, expected float32"):
        draw(eps.bfloat16(), logits)


@pytest.mark.parametrize("top_k", [1, 5])
def test_only_the_most_probable_tokens_are_drawn(top_k):
    """Top-k is the same as probabilities of 0 for the others, at a fraction of the cost."""
    codes, logits, eps = normal(64, 4, seed=1), normal(500, 64, seed=2), normal(500, 4, seed=3)
    some = FlowMap(codes, top_k=top_k)(eps, logits)
    least = logits.topk(top_k, -1).values[:, -1:]
    cut = logits.masked_fill(logits < least, -math.inf)
    assert torch.equal(some, FlowMap(codes)(eps, cut)) and (cut.gather(1, some[:, None]) > -math.inf).all()
    assert (some != FlowMap(codes)(eps, logits)).any()


def test_a_certain_token_is_drawn_from_every_noise():
    """D10."""
    logits = torch.full((200, 16), -math.inf, dtype=torch.float64)
    logits[:, 7] = 0.0
    codes, eps = normal(16, 4, seed=1), 100 * normal(200, 4, seed=2)
    assert (FlowMap(codes)(eps, logits) == 7).all()
    end = flow(eps, codes, torch.log_softmax(logits, -1), FlowMap(codes).taus)
    assert torch.allclose(end, codes[7].expand_as(end))


@pytest.mark.parametrize(
    ("row", "message"), [(0, "codes 0 and 9 alike, expected different codes"), (3, "code 3 with NaN or infinity")]
)
def test_codes_that_no_noise_tells_apart_are_refused(row, message):
    """D10."""
    codes = normal(16, 4, seed=1)
    codes[row] = codes[9] if row == 0 else math.nan
    with pytest.raises(DataError, match=message):
        FlowMap(codes)


def test_distances_in_parts(monkeypatch):
    codes = normal(50, 3, seed=1)
    whole = flowmap.distances(codes)
    monkeypatch.setattr(flowmap, "PART", 7)
    part = flowmap.distances(codes)
    assert torch.equal(whole[0], part[0]) and whole[1] == part[1]
    apart = torch.cdist(codes, codes)
    assert part[1] == pytest.approx(apart.max().item())
    near = (apart + torch.eye(50) * 1e9).min(1).values
    grid = times(codes, 50)
    ratio = torch.log(grid[1:-1] / (1 - grid[1:-1]))
    assert ratio[0].exp() * apart.max() == pytest.approx(0.2) and grid[[0, -1]].tolist() == [0, 1]
    assert ratio[-1].exp() * near.quantile(0.05) == pytest.approx(10) and len(grid) == 51
    assert torch.allclose(ratio.diff(), ratio.diff()[:1].expand(48), atol=1e-9)


BUGS = {
    "the posterior mean of the noise": Bug(FlowMap._tokens, "flow(eps, codes, log_p, self.taus)", "eps", the_law),
    "tau reversed": Bug(posterior_mean, "/ (1 - tau) ** 2", "/ max(tau, 1e-3) ** 2", the_quantile_coupling),
    "no norm of the codes": Bug(posterior_mean, "- 0.5 * tau**2 * codes.square().sum(-1)", "", the_law),
    "the variance is not squared": Bug(posterior_mean, "(1 - tau) ** 2", "(1 - tau)", the_law),
    "a step of the first order": Bug(flow, "/ 2 * (m - before[1])", "* 0 * (m - before[1])", the_law),
    "the nearest by the product": Bug(nearest_code, "codes.square().sum(-1) - 2 * products", "-2 * products", the_law),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
