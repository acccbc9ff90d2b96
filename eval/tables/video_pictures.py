"""The README's sheet of clips, and the same clips moving, for the documentation."""

from __future__ import annotations

from pathlib import Path

from stepdistill.config.load import load_config
from stepdistill.evaluation.spec import SEED_B
from stepdistill.students.draw.animation import animated_grid, clip_sheet, save_animation
from stepdistill.students.draw.call import generate, student_call, teacher_call
from stepdistill.students.draw.sheet import save_image
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.recipes import recipes, trained

PROMPTS = ("animal mammal moving right", "food fruit growing", "face smiling spinning", "transport ground moving left")
IN_README = 2  # of the prompts
FRAME_RATE = 8


def draw_videos(name: str, folder: Path, method: str = "regression", steps: int = 4) -> None:
    """Write `video.png` and `video.webp`: the teacher at full and at few steps, and a student, with equal seeds."""
    file = recipes(name, "video")[method]
    run, out = load_config(Run, file, []), trained(file)
    pipe, w = run.family.load(), run.teacher_guidance_scale
    full = run.train.teacher_steps
    calls = [teacher_call(run.family, pipe, n, w, f"teacher, {n} steps") for n in (full, steps)]
    own = student_call(run.family, run.method, pipe, steps)
    rows = [(call.name, generate(pipe, call, PROMPTS, SEED_B)[0]) for call in calls]
    load_student(pipe, out)
    rows.append((own.name, generate(pipe, own, PROMPTS, SEED_B)[0]))
    small = [(label, clips[:IN_README]) for label, clips in rows]
    save_image(clip_sheet(small, PROMPTS[:IN_README], columns=5, scale=2), folder / "video.png")
    save_animation(animated_grid(rows, PROMPTS, scale=3), folder / "video.webp", FRAME_RATE)
