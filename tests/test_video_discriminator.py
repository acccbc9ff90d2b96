"""Discriminators of videos: a verdict is on a clip, whose frames stay together."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracles.planted import Bug, bug_tests
from tiny import awake, backbone, batch, context, pipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.gan import Gan, Ladd
from stepdistill.networks import taps
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Lora, Tap
from stepdistill.networks.taps import Head, LaddHead, features_before

CLIPS, FRAMES = 4, 3  # of each, so that axes that are swapped have other sizes
GAN, LADD = Gan(), Ladd(depths=(0.5, 1.0))
TIME = torch.full((CLIPS,), 400.0)


@cache
def scene(which: str) -> tuple[Backbone, Batch, StepContext]:
    """A random Wan with a discriminator."""
    pipe = pipeline("wan")
    bone = backbone("wan", pipe)
    bone.add("fake", Lora())
    awake(bone, "fake")
    bone.add("head", {"gan": GAN, "ladd": LADD}[which].roles()["head"])
    return bone, batch("wan", pipe, CLIPS), context("wan", pipe, bone)


def features(which: str, x_t: Tensor, cond: Condition) -> tuple[Tensor, ...]:
    """Of the network, (B, channels, F, h, w) at each place."""
    _, _, scene_ = scene(which)
    fake, t = scene_.denoiser("fake"), TIME[: len(x_t)]
    with torch.no_grad():
        return (fake.features(x_t, t, cond),) if which == "gan" else fake.features_at(x_t, t, cond, LADD.depths)


def verdicts(which: str, found: tuple[Tensor, ...]) -> Tensor:
    """(B, ...)"""
    with torch.no_grad():
        return scene(which)[0].others["head"](found[0] if which == "gan" else found)


def clips() -> tuple[Tensor, Condition]:
    _, part, _ = scene("gan")
    return part.x0, part.cond


def the_frames_of_a_clip_stay_together(which: str) -> None:
    x_t, cond = clips()
    found = features(which, x_t, cond)
    assert all(part.shape[0] == CLIPS and part.shape[2] == FRAMES for part in found)
    whole, order = verdicts(which, found), torch.tensor([2, 0, 3, 1])
    assert whole.std(0).min() > 1e-4
    again = verdicts(which, tuple(part[order] for part in found))
    torch.testing.assert_close(again, whole[order])
    for i in range(CLIPS):  # a verdict is the clip's own, through the network, too
        alone = features(which, x_t[i : i + 1], {key: value[i : i + 1] for key, value in cond.items()})
        torch.testing.assert_close(verdicts(which, alone), whole[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["gan", "ladd"])
def test_the_frames_of_a_clip_stay_together(which):
    the_frames_of_a_clip_stay_together(which)


def gan() -> None:
    the_frames_of_a_clip_stay_together("gan")


def ladd() -> None:
    the_frames_of_a_clip_stay_together("ladd")


def a_verdict_is_the_mean_over_frames() -> None:
    """Each frame is judged as an image is, and all count alike."""
    head = scene("gan")[0].others["head"]
    (found,) = features("gan", *clips())
    with torch.no_grad():
        by_hand = torch.stack([head(found[:, :, k]) for k in range(FRAMES)]).mean(0)
    assert by_hand.shape == (CLIPS, 1)
    torch.testing.assert_close(verdicts("gan", (found,)), by_hand)


def test_a_verdict_is_the_mean_over_frames():
    a_verdict_is_the_mean_over_frames()


class Tokens(nn.Module):
    """Patches of frames as tokens, as Wan makes them, and a block that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv3d(2, 5, (1, 2, 2), (1, 2, 2)), nn.Identity()

    def forward(self, x_t: Tensor) -> Tensor:
        return self.block(self.patches(x_t).flatten(2).transpose(1, 2))


def tokens_lie_where_their_patches_do() -> None:
    torch.manual_seed(0)
    net, x_t = Tokens(), torch.randn(CLIPS, 2, FRAMES, 8, 4)
    (found,) = features_before(net, [Tap("block", 5, 2, 4)], x_t, lambda: net(x_t))
    assert found.shape == (CLIPS, 5, FRAMES, 4, 2) and torch.equal(found, net.patches(x_t))


def test_tokens_lie_where_their_patches_do():
    tokens_lie_where_their_patches_do()


BUGS = {
    "frames of several clips in a verdict": Bug(
        Head.forward, ".view(frames.shape[:2])", ".view(frames.shape[1::-1]).T", gan
    ),
    "one verdict for all clips": Bug(Head.forward, ".mean(1, keepdim=True)", ".mean().expand(len(frames), 1)", gan),
    "frames among channels": Bug(
        Head.forward,
        "features.transpose(1, 2)",
        "features.reshape(len(features), -1, features.shape[1], *features.shape[3:])",
        a_verdict_is_the_mean_over_frames,
    ),
    "the first frame alone": Bug(Head.forward, ".mean(1, keepdim=True)", "[:, :1]", a_verdict_is_the_mean_over_frames),
    "tokens of several clips in one": Bug(
        LaddHead.forward, "part.flatten(2)", "part.transpose(0, 2).reshape(len(part), part.shape[1], -1)", ladd
    ),
    "time within places": Bug(
        taps._map,
        "reshape(len(features), -1, *sides)",
        "reshape(len(features), -1, *sides[1:], sides[0]).movedim(-1, 2)",
        tokens_lie_where_their_patches_do,
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
