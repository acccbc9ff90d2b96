"""Long videos of image-to-video students: how windows are joined, and how colours drift from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.data.bundled.first_frames import first_frames
from stepdistill.evaluation.metrics.jackknife import ratio_of_means
from stepdistill.evaluation.metrics.motion import seam_bend
from stepdistill.evaluation.spec import SEED_B
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.draw.windows import long_video
from stepdistill.training.recipe import Run
from tables.benchmark import Results
from tables.cells import span_cell
from tables.recipes import recipes, trained

WINDOWS = 4
OVERLAPS = (1, 5)  # frames: one latent frame, and two
VIDEOS = 64
UNSEEN = 1  # seed of the first frames; students are trained with those of seed 0


def measure_windows(name: str, results: Results) -> None:
    """Rows of each student, by overlap."""
    for method, file in recipes(name, "image_to_video").items():
        run, out = load_config(Run, file, []), trained(file)
        student = StudentPipeline.of(run.family, out)
        for overlap in OVERLAPS:
            measure = partial(joined, student, overlap)
            facts = {"config": config_digest(run), "windows": WINDOWS, "overlap": overlap}
            results.once(f"{name}, windows/{method}/{overlap}", measure, **facts)


def joined(student: StudentPipeline, overlap: int) -> dict[str, Any]:
    """The bend at the seams over that elsewhere, and the mean and spread of each window, over all videos."""
    images, captions = first_frames(VIDEOS, UNSEEN)
    call, videos = student.call(), []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        begun = call.plus(image=image[None] / 255)
        videos.append(long_video(student, [caption], begun, WINDOWS, overlap, SEED_B + i).frames)
    video = 255 * torch.stack(videos).double()  # (N, T, 3, H, W)
    window = call.arguments["num_frames"]
    bend = seam_bend(video, window, overlap)
    ratio = ratio_of_means(bend.seam, bend.inside)
    parts = [video[:, k * (window - overlap) :][:, :window] for k in range(WINDOWS)]
    drift = {"means": [part.mean().item() for part in parts], "spreads": [part.std().item() for part in parts]}
    return {"n": VIDEOS, "ratio": ratio.value, "ratio_ci95": [ratio.low, ratio.high]} | drift


def windows_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each student and overlap."""
    lines = [
        "| student | overlap | bend at a seam over inside [95 %] | mean of windows 1 to 4 | spread |",
        "| --- " * 5 + "|",
    ]
    for key, row in rows.items():
        means, spreads = (", ".join(f"{value:.0f}" for value in row[name]) for name in ("means", "spreads"))
        lines.append(f"| {key.split('/')[1]} | {row['overlap']} | {span_cell(row, 'ratio', 2)} | {means} | {spreads} |")
    return "\n".join(lines)
