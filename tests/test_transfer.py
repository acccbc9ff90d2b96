"""A style that was learnt on the teacher moves its student's images as it moves the teacher's, and the other way."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from tables import transfer
from tables.benchmark import prompts

from stepdistill.core.pixels import saturation
from stepdistill.evaluation.metrics.jackknife import mean_interval, ratio_of_means
from stepdistill.families.sd import StableDiffusion
from stepdistill.networks.roles import Lora
from stepdistill.students.draw.call import generate, teacher_call

FAMILY = StableDiffusion(pretrained_teacher_model="tiny-sd")
CAPTIONS = prompts(16)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A stand-in for a student, whose images differ from the teacher's, and grey learnt on either."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("student", "on teacher", "on student")}
    pipe = FAMILY.load()
    bone = tiny.backbone("sd", pipe)
    bone.add("student", Lora())
    tiny.awake(bone, "student", 0.04)
    FAMILY.save_lora(found["student"], bone.state("student"), bone.lora_config("student"))
    pipe, fused = FAMILY.load(), drawer(found)
    fused.fuse_lora()
    fused.unload_lora_weights()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BATCH", 8)
        transfer.learn(FAMILY, pipe, transfer.grey, found["on teacher"], steps=10)
        transfer.learn(FAMILY, fused, transfer.grey, found["on student"], (999.0, 749.0, 499.0, 249.0), steps=10)
    return found


def drawer(places, who: str = "student"):
    pipe = FAMILY.load()
    if who == "student":
        pipe.load_lora_weights(places["student"], adapter_name="student")
    return pipe


def moved(places, who: str, style: str, strength: float = 1.0) -> torch.Tensor:
    pipe = drawer(places, who)
    row = teacher_call(FAMILY, pipe, 2, 1.0, who)
    return transfer.effect(pipe, row, places[style], strength, saturation, CAPTIONS)


@pytest.mark.parametrize("style", ["on teacher", "on student"])
def test_a_style_crosses_over(places, style):
    there, back = moved(places, "teacher", style), moved(places, "student", style)
    assert there.mean() < -0.05 and back.mean() < -0.05
    share = ratio_of_means(back, there, 8)
    assert 0.5 < share.low < share.high < 2


def test_the_student_is_another_drawer(places):
    pipe = drawer(places)
    row = teacher_call(FAMILY, pipe, 2, 1.0, "")
    own, theirs = (generate(each, row, CAPTIONS[:4], 2)[0] / 255 for each in (pipe, FAMILY.load()))
    assert (own - theirs).abs().mean() > 0.02


def test_an_effect_grows_with_the_strength_and_is_the_style_s_alone(places):
    effects = [moved(places, "student", "on teacher", strength).mean() for strength in (0.0, 0.5, 1.0)]
    assert effects[0] == 0 and effects[2] < effects[1] < 0
    # by hand, both as adapters
    pipe = drawer(places)
    row = teacher_call(FAMILY, pipe, 2, 1.0, "")
    draw = partial(generate, call=row, prompts=CAPTIONS, seed=2)
    before = draw(pipe)[0]
    pipe.load_lora_weights(places["on teacher"], adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 0.5])
    change = (saturation(draw(pipe)[0] / 255) - saturation(before / 255)).mean()
    assert effects[1] == pytest.approx(change.item(), abs=1e-6)


def test_styles_move_the_statistic_that_they_are_measured_by():
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert saturation(transfer.grey(pixels) / 2 + 0.5).max() == 0
    tinted, plain = (transfer.redness(each / 2 + 0.5) for each in (transfer.red(pixels), pixels))
    torch.testing.assert_close(tinted - plain, (pixels[:, 1:] / 2 + 0.5).mean((1, 2, 3)) / 2)
    assert transfer.redness(torch.tensor([1.0, 0.2, 0.4]).reshape(3, 1, 1)).item() == pytest.approx(0.7)


def test_the_interval_of_a_ratio():
    generator = torch.Generator().manual_seed(0)
    b = 2 + torch.rand(400, generator=generator, dtype=torch.float64)
    exact = ratio_of_means(3 * b, b)
    assert exact.value == pytest.approx(3) and exact.high - exact.low < 1e-9
    a = b + torch.randn(400, generator=generator, dtype=torch.float64)
    found, by_mean = ratio_of_means(a, b), mean_interval((a - a.mean() / b.mean() * b) / b.mean())
    assert found.value == pytest.approx((a.mean() / b.mean()).item())
    # the delta method: the ratio varies as its residual over the denominator's mean
    assert found.high - found.low == pytest.approx(by_mean.high - by_mean.low, rel=0.02)
    with pytest.raises(ValueError, match="ratio_of_means got"):
        ratio_of_means(a, b[:-1])
