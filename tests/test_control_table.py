"""The table of control: its ControlNet fits the teacher and never saw the controls; distances are of one noise."""

from __future__ import annotations

import torch
from tables import control, render

from stepdistill.data.bundled import emoji
from stepdistill.families.sd import StableDiffusion
from stepdistill.students.draw.call import teacher_call

FAMILY = StableDiffusion(pretrained_teacher_model="tiny-sd")


def test_its_control_net_fits_the_teacher_and_controls_only_where_it_is_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "BATCH", 2)
    monkeypatch.setattr(control, "POOL", 4)
    control.train_controlnet(FAMILY, tmp_path / "net", steps=2)
    pipe, controls = FAMILY.load(), FAMILY.controls
    assert controls is not None
    net = controls.read(str(tmp_path / "net"))
    controls.check(pipe, FAMILY.network(pipe), net)
    call = teacher_call(FAMILY, pipe, 1, 1.0, "teacher")
    plain = control.distances(pipe, call, False, 3, batch=2)
    beside = controls.pipeline_of(pipe, net)
    assert torch.equal(control.distances(pipe, call, False, 3, batch=3), plain)
    off = control.distances(beside, call.plus(controlnet_conditioning_scale=0.0), True, 3, batch=2)
    assert torch.allclose(off, plain, atol=1e-3)
    assert not torch.allclose(control.distances(beside, call, True, 3, batch=2), plain, atol=1e-4)


def test_controls_are_drawings_that_were_left_out():
    prompts, images = control.controls(5)
    held = [drawing for drawing in emoji.subjects() if control.held_out(drawing)]
    assert prompts == tuple(drawing.subgroup for drawing in held[:5])
    assert 20 < len(held) < len(emoji.subjects()) / 4
    assert images.shape == (5, 3, 32, 32) and images.min() == 0 and 0.5 < images.max() <= 1


def test_the_page_shows_each_row_once():
    row = {
        f"{key}{end}": value
        for key in ("teacher", "teacher_without", "student", "student_without", "share")
        for end, value in (("", 0.1), ("_ci95", [0.05, 0.2]))
    }
    made = render.RENDERERS["control"]({"tiny-sd/lcm/1": row, "tiny-sd/lcm/4": row}).split("\n")
    assert made[2:] == [
        "| tiny-sd | 100.0 [50.0, 200.0] | 100.0 [50.0, 200.0] |  |",
        "| tiny-sd: lcm, 1 step | 100.0 [50.0, 200.0] | 100.0 [50.0, 200.0] | 0.10 [0.05, 0.20] |",
        "| tiny-sd: lcm, 4 steps | 100.0 [50.0, 200.0] | 100.0 [50.0, 200.0] | 0.10 [0.05, 0.20] |",
    ]
