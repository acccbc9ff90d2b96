"""LoRAs of lower rank: closest in the weights, or in the outputs; cut and padded without a change of strength."""

from __future__ import annotations

import pytest
import torch
from oracles.planted import Bug, bug_tests
from torch import Tensor, nn

from stepdistill.networks.lora import low_rank as module
from stepdistill.networks.lora.layer import LayerLora
from stepdistill.networks.lora.low_rank import cut, low_rank, padded
from stepdistill.networks.moments import second_moments

SHAPES = [(12, 9), (9, 12), (10, 3, 3, 3), (40, 3, 3, 2)]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random_lora(rank: int, alpha: float, *kernel: int) -> LayerLora:
    return LayerLora(torch.randn(rank, 7, *kernel), torch.randn(11, rank, *[1] * len(kernel)), alpha)


def tail(matrix: Tensor, rank: int) -> float:
    """The norm of what the best matrix of a rank leaves (Eckart and Young)."""
    return torch.linalg.svdvals(matrix.double())[rank:].norm().item()


def convolved(lora: LayerLora, x: Tensor) -> Tensor:
    """What a LoRA on a convolution adds, as PEFT computes it."""
    return lora.scale * nn.functional.conv2d(nn.functional.conv2d(x, lora.down, padding=1), lora.up)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_it_is_the_change(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape)
    full = min(change.flatten(1).shape)
    for rank in (full, full + 5):  # what is more is zeros
        lora = low_rank(change, rank)
        assert lora.down.shape == (rank, *shape[1:]) and lora.up.shape == (shape[0], rank, *[1] * (len(shape) - 2))
        assert lora.scale == 1
        close(lora.product(), change.flatten(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_its_error_falls_with_the_rank_as_the_singular_values_say(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    change = torch.randn(shape)
    errors = [(low_rank(change, rank).product() - change.flatten(1)).norm().item() for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx([tail(change.flatten(1), rank) for rank in (1, 2, 4, 8)], abs=1e-4)


def test_a_convolution_keeps_the_order_of_its_kernel() -> None:
    """Its two convolutions add what the change of the kernel adds."""
    torch.manual_seed(0)
    change, x = torch.randn(8, 4, 3, 3), torch.randn(2, 4, 6, 6)
    close(convolved(low_rank(change, 8), x), nn.functional.conv2d(x, change, padding=1), 1e-4)


def toy(rotated: bool) -> tuple[Tensor, Tensor]:
    """A change of 128 outputs, and the second moment of inputs whose channels have log-normal sizes."""
    torch.manual_seed(0)
    change, sizes = torch.randn(128, 128), (1.2 * torch.randn(128)).exp()
    rotation = torch.linalg.qr(torch.randn(128, 128))[0] if rotated else torch.eye(128)
    return change @ rotation.T, rotation @ sizes.square().diag() @ rotation.T


def outputs_error(change: Tensor, moment: Tensor, lora: LayerLora) -> float:
    """The root of `E|(D - up down) x|^2 / E|D x|^2`."""
    rest = change.flatten(1) - lora.product()
    return ((((rest @ moment) * rest).sum() / ((change @ moment) * change).sum()) ** 0.5).item()


def test_with_a_moment_it_is_the_closest_in_the_outputs() -> None:
    """Whichever root of the moment is taken."""
    change, moment = toy(rotated=True)
    root = torch.linalg.cholesky(moment.double())
    whole = (change.double() @ root).norm().item()
    for rank in (1, 4, 16, 64):
        error = outputs_error(change, moment, low_rank(change, rank, moment))
        assert error == pytest.approx(tail(change @ root.float(), rank) / whole, rel=1e-3)


def test_with_a_moment_a_rotation_of_the_channels_changes_nothing() -> None:
    """Plain, and by the size of each channel alone, the outputs are further off, and depend on the rotation."""
    errors: dict[str, list[float]] = {"plain": [], "sizes": [], "moment": []}
    for rotated in (False, True):
        change, moment = toy(rotated)
        ways = {"plain": None, "sizes": moment.diag().diag(), "moment": moment}
        for way, given in ways.items():
            errors[way].append(outputs_error(change, moment, low_rank(change, 16, given)))
    assert errors["moment"][0] == pytest.approx(errors["moment"][1], rel=1e-3)
    assert errors["sizes"][0] == pytest.approx(errors["moment"][0], rel=1e-3)
    assert errors["sizes"][1] > 1.5 * errors["moment"][1]
    assert min(errors["plain"]) > 1.5 * errors["moment"][0]


def test_inputs_that_miss_directions_do_no_harm() -> None:
    """At full rank it is the change all the same."""
    torch.manual_seed(0)
    rows = torch.randn(3, 9)
    for change in (torch.randn(6, 9), torch.randn(12, 9)):
        close(low_rank(change, 9, rows.T @ rows).product(), change, 1e-4)


def test_both_factors_have_the_same_size() -> None:
    torch.manual_seed(0)
    for moment in (None, toy(True)[1][:9, :9]):
        lora = low_rank(torch.randn(12, 9), 4, moment)
        close(lora.down.norm(dim=1), lora.up.norm(dim=0))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_cut_lora_is_the_closest_one_at_full_strength(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lora = random_lora(6, 15.0, *kernel)
    for rank in (1, 3, 5):
        less = cut(lora, rank)
        assert less.down.shape == (rank, 7, *kernel) and less.scale == 1
        error = (less.product() - lora.product()).norm().item()
        assert error == pytest.approx(tail(lora.product(), rank), rel=1e-4)
    for rank in (6, 9):
        assert cut(lora, rank) is lora


def test_a_cut_of_more_rank_than_the_layer_has_loses_nothing() -> None:
    torch.manual_seed(0)
    lora = random_lora(20, 15.0)
    close(cut(lora, 12).product(), lora.product(), 1e-4)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_padded_lora_adds_the_same_and_all_of_it_can_be_trained(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lora, fresh = random_lora(2, 5.0, *kernel), torch.randn(6, 7, *kernel)
    more = padded(lora, fresh)
    assert len(more.down) == 6 and more.scale == 1
    close(more.product(), lora.product())
    assert torch.equal(more.down[2:], fresh[2:]) and not more.up[:, 2:].any()


def test_the_moment_counts_every_token_of_every_call() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"used": nn.Linear(4, 3), "other": nn.Linear(3, 3), "unused": nn.Linear(5, 5)})
    calls = [torch.randn(2, 6, 4), torch.randn(1, 7, 4)]
    with second_moments(net, ["used", "unused"]) as sums:
        for x in calls:
            net["other"](net["used"](x))
    rows = torch.cat([x.flatten(0, 1) for x in calls])
    assert sums.keys() == {"used"}
    close(sums["used"], rows.T @ rows, 1e-4)
    net["used"](torch.ones(1, 1, 4))
    close(sums["used"], rows.T @ rows, 1e-4)


BUGS = {
    "the least singular values": Bug(low_rank, "up = u[:, :kept]", "up = u[:, -kept:]", lambda: falls((12, 9))),
    "the root transposed": Bug(
        module._root,
        "vectors * values.clamp(min=values[-1] * FLOOR).sqrt()",
        "(vectors * values.sqrt()).T",
        lambda: closest(),
    ),
    "the inverse of the root": Bug(module._root, ".sqrt()", ".rsqrt()", lambda: closest()),
    "no inverse on the way back": Bug(
        low_rank,
        "down = up.T @ matrix",
        "down = up.T @ (matrix if moment is None else matrix @ _root(moment))",
        lambda: closest(),
    ),
    "the sizes of channels alone": Bug(
        module._root, "eigh(moment.double())", "eigh(moment.double().diag().diag())", lambda: closest()
    ),
    "directions without inputs lost": Bug(
        module._root, ".clamp(min=values[-1] * FLOOR)", ".clamp(min=0)", lambda: missed()
    ),
    "kernels in another order": Bug(
        low_rank, "change.double().flatten(1)", "change.double().movedim(1, -1).flatten(1)", lambda: kernel()
    ),
    "one factor has it all": Bug(low_rank, ".norm(dim=1).sqrt()", ".norm(dim=1)", lambda: balanced()),
    "alpha not in the cut": Bug(cut, "lora.scale * r_up", "r_up", lambda: cut_linear()),
    "cut by an orthogonal factor's order": Bug(cut, "r_up @ r_down.T", "r_down @ r_up.T", lambda: cut_linear()),
    "alpha not in the padding": Bug(padded, "lora.up * lora.scale", "lora.up", lambda: padded_linear()),
    "nothing fresh in the padding": Bug(
        padded, "down[len(lora.down) :]", "down[len(lora.down) :] * 0", lambda: padded_linear()
    ),
    "the last call alone": Bug(
        second_moments, "sums[name].addmm_(rows.T, rows) if name in sums else ", "", lambda: moments()
    ),
    "hooks that stay": Bug(second_moments, "hook.remove()", "pass", lambda: moments()),
}


def falls(shape: tuple[int, ...]) -> None:
    test_its_error_falls_with_the_rank_as_the_singular_values_say(shape)


closest = test_with_a_moment_it_is_the_closest_in_the_outputs
missed = test_inputs_that_miss_directions_do_no_harm
kernel = test_a_convolution_keeps_the_order_of_its_kernel
balanced = test_both_factors_have_the_same_size
moments = test_the_moment_counts_every_token_of_every_call


def cut_linear() -> None:
    test_a_cut_lora_is_the_closest_one_at_full_strength(())


def padded_linear() -> None:
    test_a_padded_lora_adds_the_same_and_all_of_it_can_be_trained(())


test_the_tests_pass_without_a_bug, test_each_bug_is_noticed = bug_tests(BUGS)
