"""Clips as contact sheets, animations and video files, in the report and in VBench's layout."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.clips import frozen, moving
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError, OutputError
from stepdistill.core.outputs import check_output_file
from stepdistill.evaluation.exports import VBench
from stepdistill.evaluation.report.page import page
from stepdistill.evaluation.report.table import read_evaluation
from stepdistill.students.draw.animation import animated_grid, clip_sheet, images_of_clip, save_animation
from stepdistill.students.draw.sheet import GAP, LEFT, image_grid


def grey(*levels: int, side: int = 8) -> Tensor:
    """One clip (1, F, 3, side, side) of plain frames."""
    return torch.tensor(levels, dtype=torch.uint8).reshape(1, -1, 1, 1, 1).expand(1, -1, 3, side, side)


def shown(file: Path) -> list[tuple[np.ndarray, int]]:
    """Frames of an animation and how many milliseconds each is shown."""
    frames = []
    with Image.open(file) as image:
        for k in range(image.n_frames):
            image.seek(k)
            frames.append((np.asarray(image.convert("RGB")), image.info["duration"]))
    return frames


def test_time_goes_from_left_to_right_and_prompts_below_one_another():
    """Of 9 frames five are shown, the ends among them; rows are in the order teacher, student of each prompt."""
    ramp, still = grey(*range(0, 90, 10), side=32), grey(*[200] * 9, side=32)
    rows = [("teacher", torch.cat([ramp, ramp + 1])), ("student", torch.cat([still, still + 1]))]
    sheet = np.asarray(clip_sheet(rows, ["a", "b"], columns=5))
    across = sheet[:, LEFT + 10 :: 42 + GAP, 0]  # captions of seven letters make a column 42 wide
    levels = [[*dict.fromkeys(column[(column < 250) & (column % 10 < 2)].tolist())] for column in across.T[:5]]
    for k, column in enumerate(levels):
        assert [level for level in column if level in (20 * k, 200, 20 * k + 1, 201)] == [20 * k, 200, 20 * k + 1, 201]
    assert sheet.shape[1] == LEFT + 5 * (42 + GAP)
    assert clip_sheet(rows, ["a", "b"], columns=50).width == LEFT + 9 * (42 + GAP)  # no more than there are
    assert clip_sheet(rows, ["a", "b"], scale=2).height == sheet.shape[0] + 4 * 32


def test_an_animated_grid_is_a_grid_of_each_frame():
    clips = moving(3, 0, frames=4)
    grids = animated_grid([("teacher", clips), ("student", clips.flip(1))], ["a", "b", "c"], 2)
    assert len(grids) == 4
    expected = image_grid([("teacher", clips[:, 1]), ("student", clips[:, 2])], ["a", "b", "c"], 2)
    assert np.array_equal(np.asarray(grids[1]), np.asarray(expected))


def test_webp_is_lossless_and_in_time(tmp_path):
    """12 frames a second are 83 or 84 ms each, and 12 of them one second; equal frames become one."""
    clip = moving(1, 1, frames=12)[0]
    clip[5] = clip[4]
    frames = shown(save_animation(images_of_clip(clip), tmp_path / "of" / "clip.webp", 12))
    ends = np.cumsum([ms for _, ms in frames])
    assert ends[-1] == 1000
    for k, frame in enumerate(clip):
        at = next(image for (image, _), end in zip(frames, ends, strict=True) if 1000 * (k + 0.5) / 12 < end)
        assert np.array_equal(at, frame.permute(1, 2, 0).numpy())
    assert len(shown(save_animation(images_of_clip(frozen(clip[None])[0]), tmp_path / "still.webp", 8))) == 1


def test_gif_counts_hundredths(tmp_path):
    frames = shown(save_animation(images_of_clip(grey(*range(0, 240, 20))[0]), tmp_path / "clip.gif", 12))
    assert {ms for _, ms in frames} == {80, 90} and sum(ms for _, ms in frames) == 1000


def decoded(file: Path) -> tuple[np.ndarray, float]:
    import av

    with av.open(str(file)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def test_mp4_has_every_frame_nearly_as_it_was(tmp_path):
    clip = moving(1, 2, frames=9)[0]
    clip[3] = clip[2]  # a video keeps equal frames apart
    frames, rate = decoded(
        save_animation(images_of_clip(clip.repeat_interleave(2, 2).repeat_interleave(2, 3)), tmp_path / "a.mp4", 8)
    )
    error = (frames[:, ::2, ::2].astype(float) - clip.permute(0, 2, 3, 1).numpy()) ** 2
    assert len(frames) == 9 and rate == 8
    assert 10 * math.log10(255**2 / error.mean()) > 35
    assert decoded(save_animation(images_of_clip(clip), tmp_path / "b.mp4", 29.97))[1] == pytest.approx(29.97, rel=1e-4)


@pytest.mark.parametrize("suffix", ["webp", "gif", "mp4"])
def test_an_own_file_may_be_replaced(tmp_path, suffix):
    file = save_animation(images_of_clip(moving(1, 2)[0]), tmp_path / f"clip.{suffix}")
    check_output_file(file, overwrite=True)
    assert [place.name for place in tmp_path.iterdir()] == [file.name]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    frames = images_of_clip(grey(1, 2, side=7)[0])
    with pytest.raises(OutputError, match="ends in .webp, .gif, .mp4"):
        save_animation(frames, tmp_path / "clip.avi")
    with pytest.raises(OutputError, match="7 x 7 pixels .* expected even sides"):
        save_animation(frames, tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OutputError, match=r"stepdistill\[video\]"):
        save_animation(frames, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_vbench_finds_a_clip_by_its_prompt(tmp_path):
    out, prompt = VBench(tmp_path / "out", 8), 'A 3D model of a 1800s "victorian" house_.'
    clips = moving(2, 3)
    files = [out.add(7, k, {"prompt": prompt}, clip) for k, clip in enumerate(clips)]
    assert [file.name for file in files] == [f"{prompt}-0.mp4", f"{prompt}-1.mp4"]
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    frames, rate = decoded(files[1])
    assert len(frames) == clips.shape[1] and rate == 8
    for bad in ("either/or", "two\nlines", "x" * 240):
        with pytest.raises(DataError, match="whole prompt"):
            out.add(0, 0, {"prompt": bad}, clips[0])
    with pytest.raises(ValueError, match="expected 0 or more"):
        out.add(0, -1, {"prompt": "a"}, clips[0])


def test_a_report_embeds_animations(tmp_path):
    (tmp_path / "grids").mkdir()
    rows = [("teacher", moving(2, 0))]
    save_animation(animated_grid(rows, ["a", "b"]), tmp_path / "grids" / "near.webp", 8)
    clip_sheet(rows, ["a", "b"]).save(tmp_path / "grids" / "near.png")
    contents = {"schema": "stepdistill.eval/1", "teacher": None, "rows": [], "grids": ["near.webp", "near.png"]}
    (tmp_path / "eval.json").write_text(json.dumps(contents))
    html = page([read_evaluation(tmp_path)], "t")
    assert html.count("data:image/webp;base64,") == html.count("data:image/png;base64,") == 1
    assert "time goes from left to right" in html
