"""Distilled Decoding on a chain that can be enumerated: the production loss and network (D6 to D9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from oracles.planted import Bug, bug_tests
from test_flowmap import CORNERS, NEXT, START, N, V, chain, normal
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from stepdistill.decoding import method
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.method import DistilledDecoding, TokenBatch, TokenContext
from stepdistill.networks.lpips import Lpips

METHOD = DistilledDecoding(keeps=(0, 3), whole=True, ema_decay=None)
WIDTH, PAIRS, STEPS = 48, 20_000, 400
HELD = 2000


def network(seed: int = 0) -> tuple[LlamaModel, Heads]:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    heads = Heads(WIDTH, V, 2, WIDTH)
    heads.codebook.copy_(CORNERS)
    return LlamaModel(config), heads


def prompt(rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of a prompt of one token, after one of padding."""
    text = torch.stack([torch.full((WIDTH,), 9.0), torch.linspace(-1, 1, WIDTH)])
    return text.expand(rows, -1, -1), torch.tensor([[0, 1]]).expand(rows, -1)


def context(net: LlamaModel, heads: Heads, step: int) -> TokenContext:
    def student(batch: TokenBatch, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return heads.one_call(net, *prompt(len(x)), x, kept)

    return TokenContext(student, CORNERS.float(), painted, 0, step, torch.device("cpu"))


def painted(values: Tensor) -> Tensor:
    """Images (B, 3, 8, 8) of vectors (B, n, 2): a place is a column, red and green its vector, blue their product."""
    red, green = values.unbind(-1)
    columns = torch.stack([red, green, red * green], 1)
    return torch.nn.functional.pad(columns, (0, 8 - values.shape[1]))[:, :, None].expand(-1, -1, 8, -1)


def batch_of(rows: Tensor, noise: Tensor, tokens: Tensor) -> TokenBatch:
    empty = torch.zeros(len(rows), 2, dtype=torch.long)
    return TokenBatch(tuple(rows.tolist()), empty, empty, noise[rows].float(), tokens[rows])


def train(tokens_of: str = "own") -> tuple[LlamaModel, Heads]:
    """A student of the chain; with `tokens_of` "next" place i learns token i + 1, as the autoregressive model does."""
    noise = normal(PAIRS, N, 2, seed=3)
    tokens = chain(noise)
    net, heads = network()
    optimizer = torch.optim.AdamW([*net.parameters(), *heads.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    learnt = tokens if tokens_of == "own" else tokens.roll(-1, 1)
    drawn = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        batch = batch_of(torch.randint(PAIRS, (128,), generator=drawn), noise, learnt)
        (update,) = METHOD.updates(context(net, heads, step), batch, step)
        optimizer.zero_grad()
        update.loss.backward()
        optimizer.step()
        schedule.step()
    return net, heads


@cache
def student() -> tuple[LlamaModel, Heads]:
    return train()


@torch.no_grad()
def sampled(keeps: tuple[int, ...], nets: tuple[LlamaModel, Heads]) -> tuple[Tensor, Tensor]:
    noise = normal(HELD, N, 2, seed=9)
    return nets[1].decode(nets[0], *prompt(HELD), noise.float(), keeps)[0], chain(noise)


def log_p(tokens: Tensor) -> float:
    """The mean log-probability of sequences under the chain."""
    value = START[tokens[:, 0]].log()
    for i in range(1, N):
        value = value + NEXT[tokens[:, i - 1], tokens[:, i]].log()
    return value.mean().item()


def test_one_call_learns_the_map_and_two_more_of_it():
    """D7, D8: agreement with the map on noise that was not seen, and log-probability towards the chain's own -4.56."""
    one, own = sampled((0,), student())
    two, _ = sampled((0, 3), student())
    agreed = (one == own).float().mean(0)
    assert agreed[0] > 0.97 and agreed.min() > 0.7 and agreed[:3].min() > agreed[3:].max()
    assert torch.equal(one[:, :3], two[:, :3])
    independent = own[torch.randint(HELD, own.shape, generator=torch.Generator().manual_seed(0)), torch.arange(N)]
    values = [log_p(tokens) for tokens in (independent, one, two, own)]
    assert values == sorted(values) and values[0] < -10
    assert (values[1] - values[0]) / (values[3] - values[0]) > 0.65


def test_targets_of_the_next_place_fail_at_the_first_one():
    """D9: place i must write the token of its own noise."""
    one, own = sampled((0,), train("next"))
    assert (one[:, 0] == own[:, 0]).float().mean() < 0.6


def a_place_sees_no_later_one() -> None:
    net, heads = network()
    x, kept = normal(3, N, 2, seed=1).float(), torch.arange(N).expand(3, N) < torch.tensor([[0], [3], [6]])
    other = x.clone()
    other[:, 4:] += 1
    for before, after in zip(
        heads.one_call(net, *prompt(3), x, kept), heads.one_call(net, *prompt(3), other, kept), strict=True
    ):
        assert torch.equal(before[:, :4], after[:, :4]) and (before[:, 4:] != after[:, 4:]).any()
    text, mask = prompt(3)
    padded = torch.cat([torch.full_like(text[:, :1], 5), text], 1), torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)
    for before, after in zip(
        heads.one_call(net, text, mask, x, kept), heads.one_call(net, *padded, x, kept), strict=True
    ):
        assert torch.allclose(before, after, atol=1e-5)


def test_a_place_sees_no_later_one_and_no_padding():
    a_place_sees_no_later_one()


def tokens_that_are_known_stay() -> None:
    """D6: with all tokens known the student returns them; the noise beyond them is the one that was given."""
    net, heads = network()
    noise, seen = normal(4, N, 2, seed=1).float(), []

    class Seen(Heads):
        def inputs(self, text: Tensor, x: Tensor, kept: Tensor) -> Tensor:
            seen.append((x, kept))
            return Heads.inputs(heads, text, x, kept)

        def outputs(self, states: Tensor, places: int) -> tuple[Tensor, Tensor]:
            return Heads.outputs(heads, states, places)

    told = Seen(WIDTH, V, 2, WIDTH)
    told.codebook.copy_(CORNERS)
    tokens, values = told.decode(net, *prompt(4), noise, (0, 3, N))
    first, second, last = seen
    assert torch.equal(first[0], noise) and not first[1].any()
    assert torch.equal(second[0][:, 3:], noise[:, 3:]) and second[1].tolist() == [[True] * 3 + [False] * 3] * 4
    assert torch.equal(second[0][:, :3], told.codebook[tokens[:, :3]])
    assert last[1].all() and torch.equal(last[0], told.codebook[tokens]) and torch.equal(values, told.codebook[tokens])


def data_is_marked() -> None:
    _, heads = network()
    text, x = prompt(2)[0], normal(2, N, 2, seed=1).float()
    kept = torch.arange(N).expand(2, N) < torch.tensor([[2], [0]])
    made, mark = heads.inputs(text, x, kept), heads.mark.weight
    assert torch.allclose(made[:, :2], text + mark[1])
    plain = x @ heads.read.weight.T + heads.read.bias
    assert torch.allclose(made[:, 2:], torch.where(kept[..., None], plain + mark[1], plain + mark[0]), atol=1e-6)


def test_codes_and_prompts_are_marked_as_data():
    data_is_marked()


def test_tokens_that_are_known_stay_and_the_noise_is_the_same():
    tokens_that_are_known_stay()


def the_loss_by_hand() -> None:
    """The numbers of known tokens are drawn as often as each other, and the places that are known are in no loss."""
    tokens, noise, asked = chain(normal(256, N, 2, seed=5)), normal(256, N, 2, seed=5), []
    logits, values = normal(256, N, V, seed=6).float(), normal(256, N, 2, seed=7).float()

    def answer(batch: TokenBatch, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        asked.append((x, kept))
        return logits, values

    told = TokenContext(answer, CORNERS.float(), painted, 0, 0, torch.device("cpu"))
    batch = batch_of(torch.arange(256), noise, tokens)
    (update,) = DistilledDecoding(keeps=(0, 2, 5), value_weight=0.3).updates(told, batch, 0)
    ((x, kept),) = asked
    counts = torch.bincount(kept.sum(1), minlength=N)
    assert counts[[0, 2, 5]].sum() == 256 and counts[[0, 2, 5]].min() > 60
    total, number = 0.0, 0
    for b in range(256):
        t = int(kept[b].sum())
        assert torch.equal(x[b, :t], CORNERS.float()[tokens[b, :t]]) and torch.equal(x[b, t:], noise[b, t:].float())
        for i in range(t, N):
            total += -torch.log_softmax(logits[b, i], 0)[tokens[b, i]].item()
            total += 0.3 * (values[b, i] - CORNERS[tokens[b, i]]).square().sum().item()
            number += 1
    assert update.loss.item() == pytest.approx(total / number, rel=1e-5) and update.roles == ("student", "heads")


def test_the_loss_is_that_of_the_equation():
    the_loss_by_hand()


def perceptual_term_by_hand() -> None:
    """It compares the image of the codes that are known and the values of the others with that of the codes."""
    tokens, noise = chain(normal(8, N, 2, seed=5)), normal(8, N, 2, seed=5)
    values, seen = normal(8, N, 2, seed=7).float().requires_grad_(), []

    def answer(batch: TokenBatch, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(kept)
        return torch.zeros(8, N, V), values

    def distance(net: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        assert net == "alex"
        return lambda a, b: (a - b).square().sum((1, 2, 3))

    told = TokenContext(answer, CORNERS.float(), painted, 0, 0, torch.device("cpu"))
    batch = batch_of(torch.arange(8), noise, tokens)
    term, plain = Lpips(weight=0.7, net="alex", samples=5), DistilledDecoding(keeps=(0, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "lpips", distance)
        (update,) = replace(plain, lpips=term).updates(told, batch, 0)
    (before,) = plain.updates(told, batch, 0)
    codes, kept = CORNERS.float()[tokens], seen[0]
    assert 0 < kept[:5].any(1).sum() < 5
    made = torch.where(kept[..., None], codes, values)
    expected = distance("alex", torch.device("cpu"))(painted(made[:5]), painted(codes[:5])).mean().item()
    assert (update.loss - before.loss).item() == pytest.approx(0.7 * expected, rel=1e-5)
    (slope,) = torch.autograd.grad(update.loss - before.loss, values)
    assert not slope[kept].any() and not slope[5:].any() and slope[:5][~kept[:5]].abs().sum(-1).min() > 0


def test_the_perceptual_term_is_that_of_the_equation():
    perceptual_term_by_hand()


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ((1, 2), "ascend from 0"),
        ((0, 3, 2), "ascend from 0"),
        ((), "ascend from 0"),
        ((0, 6), "fewer than the 6 tokens"),
    ],
)
def test_numbers_of_known_tokens_that_cannot_be(keeps, message):
    with pytest.raises(ValueError, match=message):
        DistilledDecoding(keeps=keeps).trained_keeps(N)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": 6}, "fewer than the 6 tokens"),
        ({"split": 3, "value_weight": 0}, "no term trains the values"),
        ({"lpips": Lpips(divide=True)}, "divide is true"),
    ],
)
def test_values_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DistilledDecoding(**settings).check(N)


def test_without_numbers_thirds_are_known():
    assert DistilledDecoding().trained_keeps(64) == (0, 21, 42)


BUGS = {
    "one more place is known": Bug(Heads.next_call, ") < keep", ") <= keep", tokens_that_are_known_stay),
    "the marks are exchanged": Bug(Heads.inputs, "kept.long()", "(~kept).long()", data_is_marked),
    "known places in the loss": Bug(
        DistilledDecoding.updates, "(~kept).nonzero", "(kept | ~kept).nonzero", the_loss_by_hand
    ),
    "a value without its weight": Bug(DistilledDecoding.updates, "self.value_weight * off", "off", the_loss_by_hand),
    "values of places that are known": Bug(
        DistilledDecoding.updates,
        "torch.where(kept[..., None], codes, values.float())",
        "values",
        perceptual_term_by_hand,
    ),
    "a perceptual term without its weight": Bug(
        DistilledDecoding.updates, "self.lpips.weight * measured", "measured", perceptual_term_by_hand
    ),
    "the padding is seen": Bug(
        Heads.one_call, "[mask, torch.ones", "[torch.ones_like(mask), torch.ones", a_place_sees_no_later_one
    ),
    "the condition is a later place": Bug(
        Heads.outputs, "states[:, -places - 1, None]", "states[:, -1, None]", a_place_sees_no_later_one
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, RuntimeError, IndexError)
