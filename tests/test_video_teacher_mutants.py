"""Bugs planted in the moving drawings and the video teacher's training: for each a test must fail."""

from __future__ import annotations

import test_moving as moving_oracles
import test_video_teacher as teacher_oracles
from oracles.planted import Bug, bug_tests

from stepdistill.data.bundled import moving, video_autoencoder, video_teacher


def left() -> None:
    moving_oracles.test_a_clip_moves_where_its_caption_says_also_mirrored("moving left")


def right() -> None:
    moving_oracles.test_a_clip_moves_where_its_caption_says_also_mirrored("moving right")


def goes_on() -> None:
    moving_oracles.test_a_motion_goes_on_beyond_its_clip("moving right")


def held() -> None:
    teacher_oracles.test_held_frames_are_clean_at_time_0_and_out_of_the_loss(1)


INSIDE = moving_oracles.test_a_clip_from_the_start_stays_on_the_canvas
OTHERS = moving_oracles.test_drawings_grow_shrink_spin_and_stay
TEXT = teacher_oracles.test_text_is_told_as_the_pipeline_tells_it
START = teacher_oracles.test_an_autoencoder_starts_frame_by_frame
LOSS, CLIP, FRAME = video_teacher.video_loss, moving.moving_clip, moving.frame

BUGS = {
    "a whole clip is mirrored": Bug(
        CLIP,
        "return torch.from_numpy(np.stack(rows))",
        "return torch.from_numpy(np.stack(rows)[:, :, ::-1].copy())",
        left,
    ),
    "a clip begins where it cannot go on": Bug(moving.course, "if heading > 0", "if heading < 0", INSIDE),
    "one speed": Bug(moving.course, "(0.5, 1.0)", "(1.0, 1.0)", left),
    "a later start is ignored": Bug(CLIP, "(start + f)", "f", goes_on),
    "the canvas ends": Bug(FRAME, "int(left // 1)", "min(int(left // 1), 12)", right),
    "it grows on": Bug(moving.Course.at, "min(time, 1.0)", "min(time, 0.5)", OTHERS),
    "it shrinks as it grows": Bug(moving.Course.at, "max(1 - time, 0.0)", "min(time, 1.0)", OTHERS),
    "what stays spins": Bug(moving.Course.at, 'if self.motion == "spinning"', 'if self.motion != "a"', OTHERS),
    "a colour of the edges": Bug(FRAME, "1 - layer[..., 3:] / 255", "1", left),
    "held frames are noised": Bug(LOSS, "sigma[:, :held] = 0", "pass", held),
    "held frames are in the loss": Bug(LOSS, "[:, :, held:]", "[:, :, 0:]", held),
    "the loss is on the noise": Bug(LOSS, "(eps - x0)", "eps", held),
    "no shift": Bug(LOSS, "(shift * u / (1 + (shift - 1) * u))", "u", held),
    "times are not those of frames": Bug(
        video_teacher.token_times, "sigma.repeat_interleave(tokens, 1)", "sigma.repeat(1, tokens)", held
    ),
    "padding is told": Bug(video_teacher.text_states, " * tokens.attention_mask[..., None]", "", TEXT),
    "layers look back": Bug(video_autoencoder.inflate, "module.weight[:, :, :-1] = 0", "pass", START),
    "two frames are added": Bug(video_autoencoder.inflate, "= 0.5", "= 1.0", START),
    "one frame of two": Bug(video_autoencoder.inflate, "o % into", "o // into", START),
}

test_the_oracles_pass, test_a_planted_bug_is_noticed = bug_tests(BUGS, ValueError, IndexError)
