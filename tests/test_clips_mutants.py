"""Bugs planted in the reading of clips, each of which a test must notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_clips as data
from oracles.planted import planted

from stepdistill.core import clip_files
from stepdistill.core.clip_files import AnimationFile, FrameFolder, VideoFile
from stepdistill.core.errors import DataError
from stepdistill.data import Clips, ImageFolder, folder
from stepdistill.data.images import Crop, ImageSource

SHORT = data.test_a_clip_that_is_too_short_names_both_durations
STARTS = data.test_starts_and_crops_depend_on_seed_and_position_alone
ONE_CROP = data.test_one_crop_holds_for_all_frames_and_nothing_is_flipped_unasked
CUT = data.test_files_that_are_cut_short_or_no_videos_are_bad_samples
TURNED = data.test_rotation_and_the_shape_of_pixels
DAMAGED = data.test_a_frame_that_decodes_with_errors_spoils_what_depends_on_it
TABLE = data.test_a_table_names_clips_and_folders_of_frames
BUCKETS = data.test_buckets_follow_the_upright_frames


def rounded(place: Path) -> None:
    data.test_rounded_times_neither_repeat_nor_skip_a_frame(place, 30)


def halved(place: Path) -> None:
    data.test_frames_are_taken_at_the_frame_rate(place, "mp4", 8, 5, range(0, 9, 2))


def late(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        data.test_a_seek_that_lands_too_late_is_made_up_for(place, patch)


def mp4_in_parts(place: Path) -> None:
    data.test_a_part_of_a_video_is_what_decoding_all_of_it_gives(place, "mp4")


BUGS = {  # what cached properties compute is not among them: their code cannot be replaced
    "times taken at their word": (Clips._starts, "/ 4  # a file", "* 0  # a file", rounded),
    "the frame after the time": (Clips._picked, 'side="right") - 1', 'side="right")', halved),
    "the frame rate ignored": (Clips._starts, "self.frame_rate or own", "own", halved),
    "always from the first frame": (Clips._picked, "int(share * len(starts))", "0", STARTS),
    "one start too few": (Clips._starts, "+ (self.num_frames - 1) * apart", "+ self.num_frames * apart", STARTS),
    "a start where the clip ends": (Clips._starts, "(self.num_frames - 1) * apart", "0 * apart", SHORT),
    "no word of the header": (Clips._too_short, "clip.declared > 2 * apart + last", "False", CUT),
    "a crop a frame": (Clips.sample, "crop(image) for", "self.crop(i, rng)(image) for", ONE_CROP),
    "the start drawn first": (
        Clips.sample,
        "self.prompt(i, rng), self.crop(i, rng), rng.random()",
        "self.prompt(i, rng), self.crop(i, random.Random(0)), rng.random()",
        STARTS,
    ),
    "flipped unasked": (ImageSource.crop, "self.random_flip and mirrored", "mirrored", ONE_CROP),
    "flipped upside down": (Crop.__call__, "ImageOps.mirror(part)", "ImageOps.flip(part)", ONE_CROP),
    "frames stacked in front": (Clips.sample, "torch.stack(frames, 1)", "torch.stack(frames)", STARTS),
    "frames of a folder as texts sort": (
        clip_files._natural,
        "digits[0].zfill(20)",
        "digits[0]",
        data.test_frames_of_a_folder_are_in_the_order_of_their_numbers,
    ),
    "frames of any size": (
        FrameFolder.frames,
        "len(sizes) > 1",
        "False",
        data.test_frames_of_several_sizes_are_a_bad_sample,
    ),
    "a folder's frames not in its digest": (
        Clips.stored,
        "clip.files if isinstance(clip, FrameFolder) else ()",
        "()",
        data.test_the_digest_changes_with_settings_and_with_any_frame,
    ),
    "the default image is a frame": (
        AnimationFile._numbers,
        'int(bool(image.info.get("default_image")))',
        "0",
        data.test_the_default_image_of_an_apng_is_no_frame,
    ),
    "damage overlooked": (VideoFile.frames, "if frame.is_corrupt and stamp >= start", "if False", DAMAGED),
    "the frame before": (VideoFile.frames, "stamp == wanted[0]", "stamp >= wanted[0] - 1000", mp4_in_parts),
    "the wrong way round": (clip_files._shown, "image.rotate(frame.rotation", "image.rotate(-frame.rotation", TURNED),
    "a seek that misleads": (
        VideoFile.frames,
        "if first is not None and (first.pts or 0) > wanted[0]:",
        "if False:",
        late,
    ),
    "not turned": (clip_files._shown, "if frame.rotation else image", "if False else image", BUCKETS),
    "pixels taken as squares": (clip_files._shown, "stream.sample_aspect_ratio or 1", "1", TURNED),
    "a caption without the folder's ending": (
        ImageFolder._text_of,
        "stem if suffix.lower() in self.suffixes else name",
        "stem or name",
        data.test_what_folders_of_frames_are_called,
    ),
    "a row of a folder with a slash": (folder._by_table, '.removesuffix("/")', "", TABLE),
    "posters make frames": (
        clip_files.clips_below,
        "not in beside",
        "not in ()",
        data.test_what_folders_of_frames_are_called,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name: str, tmp_path: Path) -> None:
    function, old, new, test = BUGS[name]
    with (
        planted(function, old, new),
        pytest.raises((AssertionError, DataError, RuntimeError, ValueError, pytest.fail.Exception)),
    ):
        test(tmp_path)
