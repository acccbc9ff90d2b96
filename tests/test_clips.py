"""Clips: which frames a sample has, how they are cropped, and what each bad file is told."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import CODECS, caption, grey, level, moving, write_animation, write_frames, write_video
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.core import clip_files
from stepdistill.core.clip_files import CLIP_SUFFIXES, VideoFile, open_clip
from stepdistill.core.errors import DataError
from stepdistill.core.random import sample_rng
from stepdistill.data import BadSample, Clips, FixedCrops, Latents, Stream, check_source, loader


def clips(place: Path, num_frames: int = 5, **fields) -> Clips:
    return Clips(**{"train_data_dir": str(place), "resolution": 16, "num_frames": num_frames} | fields)


def pixels(source: Clips | FixedCrops, i: int = 0, position: int = 0) -> Tensor:
    found = source.sample(i, sample_rng(0, position)).pixels
    assert found is not None
    return found


def every_format(place: Path, count: int = 9) -> None:
    """A clip of `grey` frames in each format, and one as a folder of frames."""
    for suffix in CODECS:
        caption(write_video(place / f"{suffix}.{suffix}", grey(count)))
    for suffix in ("gif", "webp", "apng"):
        caption(write_animation(place / f"{suffix}.{suffix}", grey(count)))
    caption(write_frames(place / "frames", grey(count)))


# formats


def test_every_format_gives_all_its_frames_in_order(tmp_path: Path) -> None:
    every_format(tmp_path)
    source = clips(tmp_path, 9)
    assert {Path(source.name(i)).suffix[1:] for i in range(len(source))} == {*CLIP_SUFFIXES, ""}
    for i in range(len(source)):
        found = pixels(source, i)
        assert found.shape == (3, 9, 16, 16) and found.dtype == torch.float32
        assert level(found) == list(range(9)), source.name(i)
        assert source.captions(i) == ("a clip",) and level([source.image(i)]) == [0]
    assert check_source(source, strict=True).startswith("Clips: 8 samples, 8 usable")


def test_frames_are_the_files_content(tmp_path: Path) -> None:
    made = moving(9)
    for path in (write_frames(tmp_path / "frames", made), write_animation(tmp_path / "a.webp", made)):
        for k, image in enumerate(open_clip(path).frames([0, 4, 8])):
            assert np.array_equal(np.asarray(image), made[4 * k]), path


@pytest.mark.parametrize("suffix", CODECS)
def test_a_part_of_a_video_is_what_decoding_all_of_it_gives(tmp_path: Path, suffix: str) -> None:
    clip = VideoFile(write_video(tmp_path / f"a.{suffix}", moving(24)))
    every = [np.asarray(image) for image in clip.frames(range(24))]
    assert len({image.tobytes() for image in every}) == 24
    for numbers in ([0], [7, 8, 9], [20, 20, 22], [23]):
        for number, image in zip(numbers, clip.frames(numbers), strict=True):
            assert np.array_equal(np.asarray(image), every[number]), number


def test_a_seek_that_lands_too_late_is_made_up_for(tmp_path: Path, monkeypatch) -> None:
    clip = VideoFile(write_video(tmp_path / "a.mp4", grey(30)))
    honest, stamps = clip_files._decoded_from, []

    def late(stamp: int, *rest):
        stamps.append(stamp)
        return honest(stamp + 16000 * (stamp > 0), *rest)  # by a second

    monkeypatch.setattr(clip_files, "_decoded_from", late)
    assert level(list(clip.frames([10, 11]))) == [10, 11] and len(stamps) == 2 and stamps[1] == 0


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_frames(tmp_path / "walk", grey(12), "frame{}.png")
    caption(tmp_path / "walk")
    assert level(pixels(clips(tmp_path, 12))) == list(range(12))


def test_the_default_image_of_an_apng_is_no_frame(tmp_path: Path) -> None:
    first, *rest = [Image.fromarray(frame) for frame in grey(5)[::-1]]
    first.save(tmp_path / "a.apng", "PNG", save_all=True, append_images=rest, default_image=True, duration=60)
    caption(tmp_path / "a.apng")
    assert level(pixels(clips(tmp_path, 4))) == [3, 2, 1, 0]


def test_sound_depth_and_transparency(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "deep.mkv", grey(5), pixel_format="yuv420p10le"))
    caption(write_video(tmp_path / "loud.mp4", grey(5), sound=True))
    clear = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)) for _ in range(5)]
    for k, image in enumerate(clear):  # frames that are alike would become one
        image.putpixel((k, 0), (0, 0, 255, 255))
    clear[0].save(tmp_path / "clear.webp", save_all=True, append_images=clear[1:], duration=60, lossless=True)
    caption(tmp_path / "clear.webp")
    source = clips(tmp_path)
    assert (pixels(source, 0)[:, :, 1:] == 1).all(), "white where it was clear"
    assert level(pixels(source, 1)) == level(pixels(source, 2)) == list(range(5))


def test_rotation_and_the_shape_of_pixels(tmp_path: Path) -> None:
    still = np.zeros((16, 16, 3), np.uint8)
    still[:8, :8] = 255  # the corner at the top left
    path = write_video(tmp_path / "a.mp4", [still] * 3, turned=90)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # as a phone held upright writes it: x' = -y, y' = x, clockwise
    content[matrix : matrix + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content)
    image = next(open_clip(path).frames([1]))
    assert np.asarray(image)[4, 12].mean() > 200 and np.asarray(image)[4, 4].mean() < 50, "at the top right"
    wide = open_clip(write_video(tmp_path / "b.mp4", grey(3, 32, 48), aspect=Fraction(4, 3)))
    assert next(wide.frames([0])).size == (64, 32)
    tall = open_clip(write_video(tmp_path / "c.mp4", grey(3, 32, 48), turned=-90))
    assert next(tall.frames([0])).size == (32, 48)


# which frames


def test_starts_and_crops_depend_on_seed_and_position_alone(tmp_path: Path) -> None:
    made = moving(9, 16, 24)
    caption(write_frames(tmp_path / "a", made))
    source = clips(tmp_path)
    whole = torch.from_numpy(np.stack(made)).permute(3, 0, 1, 2) / 127.5 - 1
    windows = {(k, x): whole[:, k : k + 5, :, x : x + 16] for k in range(5) for x in range(9)}
    drawn = [
        next(key for key, window in windows.items() if torch.allclose(pixels(source, 0, p), window, atol=1e-6))
        for p in range(300)
    ]
    assert {start for start, _ in drawn} == set(range(5)) and {x for _, x in drawn} == set(range(9))
    assert torch.equal(pixels(source, 0, 7), pixels(clips(tmp_path), 0, 7))


def test_one_crop_holds_for_all_frames_and_nothing_is_flipped_unasked(tmp_path: Path) -> None:
    still = [moving(1, 16, 24)[0]] * 5
    caption(write_frames(tmp_path / "a", still))
    source, flipping = clips(tmp_path), clips(tmp_path, random_flip=True)
    whole = torch.from_numpy(still[0]).permute(2, 0, 1) / 127.5 - 1
    windows = [whole[:, :, x : x + 16] for x in range(9)]
    mirrored = 0
    for position in range(24):
        found = pixels(source, 0, position)
        assert (found == found[:, :1]).all(), "all frames alike"
        assert any(torch.allclose(found[:, 0], window, atol=1e-6) for window in windows)
        other = pixels(flipping, 0, position)
        assert torch.equal(other, found) or torch.equal(other, found.flip(-1))
        mirrored += not torch.equal(other, found)
    assert 10 < mirrored < 30


@pytest.mark.parametrize(
    ("rate", "count", "expected"),
    [(None, 9, range(9)), (16, 9, range(9)), (8, 5, range(0, 9, 2)), (32, 17, [k // 2 for k in range(17)])],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif"])
def test_frames_are_taken_at_the_frame_rate(tmp_path: Path, suffix: str, rate, count: int, expected) -> None:
    path = tmp_path / f"a.{suffix}"
    # what 62.5 ms are in a gif, whose unit is 10 ms: 60, 60, 70, 60, ...
    cells = [10 * (round(6.25 * (k + 1)) - round(6.25 * k)) for k in range(9)]
    caption(write_animation(path, grey(9), cells) if suffix == "gif" else write_video(path, grey(9)))
    assert level(pixels(clips(tmp_path, count, frame_rate=rate))) == list(expected)


@pytest.mark.parametrize("rate", [24, 30, 60])
def test_rounded_times_neither_repeat_nor_skip_a_frame(tmp_path: Path, rate: int) -> None:
    caption(write_video(tmp_path / "a.mkv", grey(40), rate))  # whose times are in whole milliseconds
    for given in (None, rate, rate / 2):
        source = clips(tmp_path, 9, frame_rate=given)
        gap = 2 if given == rate / 2 else 1
        for position in range(20):
            found = level(pixels(source, 0, position))
            assert found == list(range(found[0], found[0] + 9 * gap, gap)), (given, position)


def test_a_variable_frame_rate_is_read_by_time(tmp_path: Path, caplog) -> None:
    times = np.where(np.arange(33) % 4 == 3, 3, 1).cumsum() / 16
    caption(write_video(tmp_path / "a.mp4", grey(33), times=times - times[0]))
    caption(write_video(tmp_path / "b.mp4", grey(33), times=times - times[0]))
    source = clips(tmp_path, 49, frame_rate=16)
    with caplog.at_level(logging.WARNING):
        found = level(pixels(source, 0))
        pixels(source, 1)
    shown = [found.count(k) for k in range(33)]
    assert shown == [3 if k % 4 == 2 else 1 for k in range(33)], "each as long as it is shown"
    assert caplog.text.count("unevenly spaced") == 1 and "a.mp4" in caplog.text and "b.mp4" not in caplog.text


def test_an_animation_without_durations_is_shown_as_in_a_browser(tmp_path: Path) -> None:
    clip = open_clip(write_animation(tmp_path / "a.gif", grey(4), 0))
    assert clip.times is not None and clip.times.tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    uneven = open_clip(write_animation(tmp_path / "b.webp", grey(4), [40, 80, 120, 500]))
    assert uneven.times is not None and uneven.times.tolist() == pytest.approx([0, 0.04, 0.12, 0.24])


# bad files


def test_a_clip_that_is_too_short_names_both_durations(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "short.mp4", grey(9)))
    caption(write_video(tmp_path / "whole.mp4", grey(20)))
    source = clips(tmp_path, 17, frame_rate=16)
    with pytest.raises(BadSample, match=r"short.mp4: 9 frames, the last at 0.50 s; 17 at 16 a second end at 1.00 s$"):
        pixels(source, 0)
    assert pixels(source, 1).shape == (3, 17, 16, 16)
    with pytest.raises(DataError, match="2 of 2 samples unusable, the first .*short.mp4: 9 frames, the last at 0.50 s"):
        check_source(clips(tmp_path, 33))
    with pytest.raises(DataError, match="2 unusable samples in a row, from .*short.mp4|whole.mp4"):
        next(loader(Stream(clips(tmp_path, 33), 1, 0), 0, [[0]], 0, 0))
    caption(write_frames(tmp_path / "few" / "frames", grey(2)))
    with pytest.raises(BadSample, match="frames: 2 frames, fewer than num_frames 5"):
        pixels(clips(tmp_path / "few"))


def test_files_that_are_cut_short_or_no_videos_are_bad_samples(tmp_path: Path) -> None:
    whole = caption(write_video(tmp_path / "a.mp4", grey(33))).read_bytes()
    caption(tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    film = caption(write_video(tmp_path / "b.mkv", grey(33)))
    film.write_bytes(film.read_bytes()[: film.stat().st_size * 2 // 3])
    caption(tmp_path / "text.webm").write_text("no video")
    caption(tmp_path / "empty.gif").write_bytes(b"")
    caption(write_animation(tmp_path / "still.webp", grey(1)))
    source = clips(tmp_path, 33)
    found = {}
    for i in range(len(source)):
        try:
            pixels(source, i)
        except BadSample as error:
            found[Path(source.name(i)).name] = str(error)
    assert set(found) == {"b.mkv", "cut.mp4", "text.webm", "empty.gif", "still.webp"}
    assert "InvalidDataError" in found["cut.mp4"] and "InvalidDataError" in found["text.webm"]
    assert found["b.mkv"].endswith("a second end at 2.00 s; its header gives 2.06 s: it may be cut short")
    assert "1 frames" in found["still.webp"]


def test_a_frame_that_decodes_with_errors_spoils_what_depends_on_it(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(40, 96, 128))
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place : place + 40] = bytes(255 - byte for byte in content[place : place + 40])
    path.write_bytes(content)
    clip, bad = VideoFile(path), []
    for number in range(40):
        try:
            next(clip.frames([number]))
        except ValueError as error:
            assert "decodes with errors" in str(error)
            bad.append(number)
    assert bad == [20, 21, 22, 23], "up to the next frame that depends on no other"


def test_frames_of_several_sizes_are_a_bad_sample(tmp_path: Path) -> None:
    caption(write_frames(tmp_path / "a", [*grey(3), *grey(2, 16, 16)]))
    with pytest.raises(BadSample, match=r"a: ValueError: frames of several sizes: \[\(16, 16\), \(48, 32\)\]"):
        pixels(clips(tmp_path))


def test_a_bad_clip_is_replaced_and_named(tmp_path: Path, caplog) -> None:
    caption(write_video(tmp_path / "a.mp4", grey(9)))
    caption(tmp_path / "b.mp4").write_text("no video")
    with caplog.at_level(logging.WARNING):
        (batch,) = [next(loader(Stream(clips(tmp_path), 2, 0), 0, [[0, 1]], 0, 0))]
    assert [sample.item for sample in batch] == [0, 0] and "b.mp4: InvalidDataError" in caplog.text
    assert all(sample.pixels is not None and sample.pixels.shape == (3, 5, 16, 16) for sample in batch)


def test_workers_read_the_same_clips(tmp_path: Path) -> None:
    for suffix in CODECS:
        caption(write_video(tmp_path / f"{suffix}.{suffix}", moving(20)))
    stream = Stream(clips(tmp_path), 2, 0)
    here, there = (loader(stream, 0, [[0, 1]], workers, 0) for workers in (0, 2))
    for _ in range(4):
        for a, b in zip(next(here), next(there), strict=True):
            assert a.item == b.item and a.pixels is not None and b.pixels is not None
            assert torch.equal(a.pixels, b.pixels)


def test_without_pyav_videos_are_refused_and_animations_read(tmp_path: Path, monkeypatch) -> None:
    caption(write_animation(tmp_path / "a.gif", grey(9)))
    caption(write_video(tmp_path / "b.mp4", grey(9)))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'stepdistill\[video\]'"):
        len(clips(tmp_path))
    (tmp_path / "b.mp4").unlink()
    assert level(pixels(clips(tmp_path, 9))) == list(range(9))


# folders


def test_what_is_a_clip_and_what_is_left_out(tmp_path: Path, caplog) -> None:
    caption(write_animation(tmp_path / "a.gif", grey(5)))
    caption(write_frames(tmp_path / "deep" / "walk.v2", grey(5)))
    Image.new("RGB", (8, 8)).save(tmp_path / "poster.png")
    caption(write_animation(tmp_path / "more" / "b.webp", grey(5)))
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "b.jpg")
    (tmp_path / "c.avi").write_bytes(b"")
    (tmp_path / "README.md").write_text("words")
    source = clips(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [source.name(i)[len(str(tmp_path)) + 1 :] for i in range(len(source))] == [
            "a.gif",
            "deep/walk.v2",
            "more/b.webp",
        ]
    alone = "an image outside a folder of frames"
    assert source.left_out() == {
        "README.md": "not a clip",
        "c.avi": "a format that is not read",
        "more/b.jpg": alone,
        "poster.png": alone,
    }
    assert "c.avi" in caplog.text and "poster.png" in caplog.text and "README" not in caplog.text
    with pytest.raises(DataError, match="no mp4, mkv, webm, mov, gif, webp, apng file below .*expected clips"):
        len(clips(tmp_path / "deep" / "walk.v2"))


def test_what_folders_of_frames_are_called(tmp_path: Path) -> None:
    caption(write_frames(tmp_path / "walk.v1", grey(5)))
    caption(write_frames(tmp_path / "walk.v2", grey(5)), "another clip")
    caption(write_animation(tmp_path / "more" / "b.webp", grey(5)))
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "b.jpg")
    source = clips(tmp_path)
    assert [source.captions(i)[0] for i in range(len(source))] == ["a clip", "a clip", "another clip"]


def test_a_table_names_clips_and_folders_of_frames(tmp_path: Path) -> None:
    write_animation(tmp_path / "a.gif", grey(5))
    write_frames(tmp_path / "walk", grey(5))
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "walk/", "text": ["on", "off"]}\n{"file_name": "a.gif", "text": "it"}\n')
    source = clips(tmp_path)
    assert [tuple(source.captions(i)) for i in range(2)] == [("on", "off"), ("it",)]
    assert level(pixels(source)) == list(range(5))
    table.write_text('{"file_name": "walk/0.png", "text": "x"}\n')
    with pytest.raises(DataError, match="expected one of the clips below"):
        len(clips(tmp_path))
    table.unlink()
    caption(tmp_path / "a.gif")
    with pytest.raises(DataError, match=r"walk without a caption \(1 of 2 clips\), expected walk.txt beside it"):
        len(clips(tmp_path))


def test_the_digest_changes_with_settings_and_with_any_frame(tmp_path: Path) -> None:
    caption(write_frames(tmp_path / "a", grey(5)))
    found = {clips(tmp_path).digest(), clips(tmp_path, 4).digest(), clips(tmp_path, frame_rate=8).digest()}
    assert len(found) == 3 and clips(tmp_path).digest() in found
    Image.fromarray(moving(1)[0]).save(tmp_path / "a" / "2.png")
    assert clips(tmp_path).digest() not in found


def test_fixed_crops_hold_the_first_frame_too(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "a.mp4", moving(20, 16, 40)))
    moved, fixed = clips(tmp_path), FixedCrops(source=clips(tmp_path))
    for source, most in ((moved, 20), (fixed, 1)):
        kinds = {pixels(source, 0, position).numpy().tobytes() for position in range(20)}
        assert (len(kinds) == 1) == (most == 1)


def test_buckets_follow_the_upright_frames(tmp_path: Path) -> None:
    caption(write_video(tmp_path / "a.mp4", grey(5, 16, 64)))
    caption(write_video(tmp_path / "b.mp4", grey(5, 16, 64), turned=90))
    caption(tmp_path / "c.mp4").write_text("no video")
    source = clips(tmp_path, aspect_buckets=True, bucket_step=8, resolution=16)
    assert pixels(source, 0).shape == (3, 5, 8, 32) and pixels(source, 1).shape == (3, 5, 32, 8)
    assert source.size(1) == (64, 16) and source.size(2) is None


def test_the_check_reports_clips(tmp_path: Path) -> None:
    every_format(tmp_path)
    caption(write_video(tmp_path / "short.mp4", grey(3)))
    report = check_source(clips(tmp_path)).splitlines()
    assert report[0] == "Clips: 9 samples, 8 usable"
    assert report[1] == "  images: shorter side 32 to 32 (median 32) px; 0 smaller than the crop"
    assert report[2] == "  clips: 9 to 9 (median 9) frames, 16 to 16.67 (median 16) a second"
    assert report[3] == "  shapes (3 x F x H x W): 3x5x16x16: 8"
    assert "short.mp4: 3 frames, the last at 0.12 s; 5 at 16 a second end at 0.25 s" in "\n".join(report)


def test_latents_of_videos_are_samples(tmp_path: Path) -> None:
    latents = torch.randn(2, 4, 3, 8, 8)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    found = Latents(folder=str(tmp_path)).sample(1, sample_rng(0, 0)).latents
    assert found is not None and torch.equal(found, latents[1])
    report = check_source(Latents(folder=str(tmp_path)), strict=True)
    assert "shapes (C x F x h x w): 4x3x8x8: 2" in report
