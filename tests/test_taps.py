"""Features at several depths of a network, and LADD's head on them."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from oracles.planted import Bug, bug_tests
from tiny import FAMILIES, backbone, batch, context, latent_shape, pipeline
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stepdistill.core.cost import count_calls
from stepdistill.methods.gan import Ladd
from stepdistill.networks import taps
from stepdistill.networks.roles import TEACHER, Module, Tap
from stepdistill.networks.taps import LaddHead, SpectralConv, at_depths

X, T = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 300.0)


def blocks(net) -> list[nn.Module]:
    """The blocks of a network, in the order of a pass."""
    if hasattr(net, "mid_block"):
        return [*net.down_blocks, net.mid_block, *net.up_blocks]
    names = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers")
    return [block for name in names for block in getattr(net, name, [])]


def image(out: Tensor | tuple) -> Tensor:
    """What a block makes of the image: of two streams the second, of a UNet's way down the first."""
    return out if isinstance(out, Tensor) else out[0] if isinstance(out[1], tuple) else out[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_after_each_block_and_several_take_one_pass(name):
    """Each map is what a block puts out in a whole pass; and bit for bit what a pass for it alone gives."""
    pipe = pipeline(name)
    bone, part = backbone(name, pipe), batch(name, pipe)
    x, made = torch.randn(2, *latent_shape(name)[:-2], 4, 8), list[Tensor]()  # rows and columns differ
    handles = [block.register_forward_hook(lambda m, a, out: made.append(image(out))) for block in blocks(bone.net)]
    denoiser, n = context(name, pipe, bone).denoiser(TEACHER), len(bone.taps)
    with torch.no_grad():
        denoiser(x, T, part.cond)
        expected = made.copy()
        for handle in handles:
            handle.remove()
        every = tuple((i + 1) / n for i in range(n))
        with count_calls(bone.net) as cost:
            found = denoiser.features_at(x, T, part.cond, every)
        assert cost.calls == 1 and len(found) == n == len(expected)
        alone = [denoiser.features_at(x, T, part.cond, (depth,)) for depth in every]
        half = denoiser.features(x, T, part.cond)
    assert not any(module._forward_pre_hooks for module in bone.net.modules())
    for tap, maps, (single,), whole in zip(bone.taps, found, alone, expected, strict=True):
        assert maps.shape[1:] == (tap.channels, *x.shape[2:-2], 4 // tap.patch, 8 // tap.patch)
        if whole.ndim == 3:  # of one stream, the image's tokens, which lie at an end of it
            count = maps.shape[2:].numel()
            whole = whole[:, :count] if tap.image == "first" else whole[:, -count:]
        rows = whole if whole.ndim == 4 else whole.transpose(1, 2).unflatten(2, maps.shape[2:])
        assert torch.equal(maps, rows) and torch.equal(maps, single)
    assert bone.tap in bone.taps and torch.equal(half, found[bone.taps.index(bone.tap)])


def no_frames() -> None:
    pipe = pipeline("sana")
    bone, part = backbone("sana", pipe), batch("sana", pipe)
    denoiser = context("sana", pipe, bone).denoiser(TEACHER)
    gc.collect()
    gc.disable()
    try:
        denoiser.features_at(part.latents.requires_grad_(), T, part.cond, (0.5, 1.0))
        assert not [o for o in gc.get_objects() if type(o) is taps._Reached]
    finally:
        gc.enable()


def test_a_pass_that_ends_early_frees_its_tensors_at_once():
    """An exception that something keeps would keep the frames that it passed, until Python looks for circles."""
    no_frames()


def paper() -> None:
    """SANA-Sprint's heads are behind blocks 2, 8, 14 and 19, counted from 0, of 20."""
    places = tuple(Tap(f"transformer_blocks.{i}", 1, 1, 1) for i in range(1, 20))
    places = (*places, Tap("norm_out", 1, 1, 1))
    chosen = at_depths(places, Ladd().depths)
    assert [tap.before for tap in chosen] == [*(f"transformer_blocks.{i + 1}" for i in (2, 8, 14)), "norm_out"]


def test_the_paper_s_places_are_the_default():
    paper()


def few() -> None:
    places = tuple(Tap(str(i), 1, 1, 1) for i in range(1, 4))
    assert [tap.before for tap in at_depths(places, (0.01, 0.3, 0.6, 1.0))] == ["1", "2", "3"]


def test_in_a_shallow_network_a_place_counts_once():
    few()


def test_a_network_without_places_is_an_error():
    bone = backbone("sd", pipeline("sd"))
    bone.taps = ()
    with pytest.raises(ValueError, match=r"features at \[0.5\]: this network has no tap"):
        bone.add("head", Module(LaddHead, (0.5,)))
    bone.tap = None
    with pytest.raises(ValueError, match="features halfway: this network has no tap"):
        bone.add("other", Module(taps.Head))


def test_a_place_that_the_pass_does_not_come_by_is_an_error():
    net = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    net.forward = lambda x: net["a"](x)
    with pytest.raises(RuntimeError, match="reached 1 of"):
        taps.features_before(net, [Tap(key, 1, 1, 1) for key in "ba"], X, lambda: net(torch.zeros(2, 1, 1, 1)))


# --- the head ------------------------------------------------------------------------------------------------------


def head(*widths: int) -> LaddHead:
    torch.manual_seed(0)
    return LaddHead(*(Tap("", width, 1, 4) for width in widths))


def maps(width: int, size: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(size, width, 4, 4, generator=torch.Generator().manual_seed(seed))


def samples() -> None:
    judge, x = head(32, 16), (maps(32), maps(16, seed=2)[:, :, :2])
    together = judge(x)
    assert together.shape == (3, 16 + 8)
    alone = torch.cat([judge([part[i : i + 1] for part in x]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together.std() > 0.1


def test_a_logit_for_each_token_of_each_place_depends_on_its_sample_alone():
    samples()


def circle() -> None:
    judge, x = head(32), maps(32)
    rolled = x.flatten(2).roll(5, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(judge([rolled]), judge([x]).roll(5, 1), rtol=0, atol=1e-5)


def test_the_tokens_are_a_circle():
    circle()


def norm() -> None:
    x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(3))
    for outputs, size in ((32, 9), (32, 1), (1, 1)):
        torch.manual_seed(0)
        conv = SpectralConv(32, outputs, size)
        conv.weight.data *= 7
        exact = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert 0.995 < conv.spectral_norm() / exact < 1 + 1e-5
        conv.weight.data = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(4))
        exact = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert 0.9 < conv.spectral_norm() / exact < 1 + 1e-5
        plain = nn.functional.pad(x, (size // 2, size // 2), mode="circular")
        plain = nn.functional.conv1d(plain, conv.weight / exact) + conv.bias[:, None]
        torch.testing.assert_close(conv(x), plain, rtol=0.1, atol=0.1)


def test_a_kernel_has_the_spectral_norm_one():
    norm()


def test_the_gradient_through_the_spectral_norm_is_that_of_torch_s():
    """Where power iteration has converged: the kernel has one large singular value."""
    torch.manual_seed(0)
    ours, theirs = SpectralConv(8, 6, 3), nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        ours.weight += 3 * torch.outer(torch.randn(6), torch.randn(24)).unflatten(1, (8, 3))
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if key != "start"})
    theirs = spectral_norm(theirs, n_power_iterations=50)
    x = torch.randn(2, 8, 10)
    for conv in (ours, theirs):
        conv(x).square().mean().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    pull = theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(ours.weight.grad, pull, rtol=0, atol=1e-5 * pull.abs().max().item() + 1e-7)


def test_a_call_leaves_nothing_behind():
    """So that a step does not depend on the number of its micro-batches; and a copy by its state is the same."""
    judge, x = head(32), [maps(32)]
    before = {key: value.clone() for key, value in judge.state_dict().items()}
    first = judge(x)
    assert torch.equal(judge(x), first)
    assert all(torch.equal(value, before[key]) for key, value in judge.state_dict().items())
    torch.manual_seed(5)
    copy = LaddHead(Tap("", 32, 1, 4))
    assert not torch.equal(copy(x), first)
    copy.load_state_dict(judge.state_dict())
    assert torch.equal(copy(x), first)


def residual() -> None:
    judge = head(32)
    (place,) = judge.heads
    x = maps(32)
    with torch.no_grad():
        place.second[1].weight.zero_()
        place.second[1].bias.zero_()
        first = place.first(x.flatten(2))
        assert first.min() < 0 < first.max() and first.min().abs() < 0.3 * first.max()  # LeakyReLU, slope 0.2
        torch.testing.assert_close(judge([x]), place.last(first / math.sqrt(2))[:, 0])


def test_the_second_block_is_residual():
    residual()


FEATURES = taps.features_before
BUGS = {
    "one block too early": Bug(at_depths, "- 1]", "- 2]", paper),
    "a place twice": Bug(at_depths, "dict.fromkeys", "list", few),
    "before the first block": Bug(at_depths, "max(1, round(share * len(taps)))", "round(share * len(taps))", few),
    "normalised over the batch": Bug(
        taps._norm,
        "nn.GroupNorm(next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0 and width > n), width)",
        "nn.BatchNorm1d(width)",
        samples,
    ),
    "a line with ends": Bug(SpectralConv.forward, 'mode="circular"', 'mode="constant"', circle),
    "no spectral norm": Bug(SpectralConv.forward, " / self.spectral_norm()", "", norm),
    "one iteration": Bug(SpectralConv.spectral_norm, "POWER_ITERATIONS", "1", norm),
    "no residual": Bug(taps._PlaceHead.forward, "x + self.second(x)", "self.second(x)", residual),
    "another scale": Bug(taps._PlaceHead.forward, "math.sqrt(2)", "2", residual),
    "an exception that is kept": Bug(
        taps._ending, "ended.append(reached.inputs)", "ended.extend([reached, reached.inputs])", no_frames
    ),
    "hooks left behind": Bug(
        FEATURES,
        "handle.remove()",
        "pass",
        lambda: test_places_are_after_each_block_and_several_take_one_pass("sana"),
    ),
}


test_without_a_bug_the_oracle_passes, test_the_bug_is_noticed = bug_tests(BUGS, RuntimeError, IndexError, ValueError)
