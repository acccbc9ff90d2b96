"""The table of videos: excess of frames, of motion, and within each motion, of stock samplers and of students."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.core.pixels import to_uint8
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import teacher_sampler
from stepdistill.data.bundled.first_frames import first_frames, write_first_frames
from stepdistill.data.bundled.moving import MOTIONS, motion_prompts
from stepdistill.evaluation.measure import Reference, Sampled, measured
from stepdistill.evaluation.metrics.jackknife import mean_interval
from stepdistill.evaluation.metrics.motion import frame_features, image_distance, motion, motion_features
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.base import Family
from stepdistill.families.flow import shift_of
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.base_model import base_hash
from stepdistill.students.draw.call import PipelineCall, generate, student_calls, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, extractor, spans
from tables.recipes import recipes, seconds, trained
from tables.render_video import DISTANCES
from tables.video_pictures import draw_videos
from tables.windows import UNSEEN, measure_windows

N = 512
STEPS = (1, 2, 4)
BEGUN = Path("runs/tables/first-frames")  # of the configs


def measure_video(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """From text, and from a first frame: the teacher's full and few steps, and students, trained where missing."""
    if not BEGUN.exists():
        write_first_frames(BEGUN)
    for table in ("video", "image_to_video"):
        for method, file in recipes(name, table).items():
            if rows and method not in rows:
                continue
            run = load_config(Run, file, [])
            ref, pipe = video_reference(f"{name}-{table}", run, work), run.family.load()
            facts: dict[str, Any] = {"teacher": name, "hash": ref.facts["teacher_sha256"][:16]}
            for call in stock_calls(run, pipe):
                steps = call.arguments["num_inference_steps"]
                once = partial(results.once, f"{name}, {table}/{call.name}/{steps}")
                once(partial(video_figures, pipe, call, ref), **facts, steps=steps)
            facts |= {"config": config_digest(run), "train_steps": run.train.max_train_steps}
            out = trained(file)
            calls = student_calls(run.family, run.method, pipe, STEPS)
            load_student(pipe, out)
            facts["train_seconds"] = round(seconds(out))
            for steps, call in calls.items():
                once = partial(results.once, f"{name}, {table}/{method}/{steps}")
                once(partial(video_figures, pipe, call, ref), **facts, steps=steps)
    if not rows or "windows" in rows:
        measure_windows(name, results)
    if not rows or "pictures" in rows:
        draw_videos(name, results.file.parent)


def stock_calls(run: Run, pipe: DiffusionPipeline) -> Iterator[PipelineCall]:
    """Few steps of the teacher: Euler at its shift and at 1, and UniPC of order 2, the scheduler of Wan's folders."""
    w, shift = run.teacher_guidance_scale, shift_of(pipe.scheduler)
    same = run.family.guidance(w) | run.family.arguments()
    for steps in STEPS:
        yield teacher_call(run.family, pipe, steps, w, "Euler, the teacher's shift")
        if steps == 1:
            continue  # one step is the same for all of them
        scheduler, call = run.family.scheduler(pipe, teacher_sampler(Rectified(1.0), steps))
        yield PipelineCall("Euler, shift 1", scheduler, call | same, run.family)
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        yield PipelineCall("UniPC, the teacher's shift", unipc, {"num_inference_steps": steps} | same, run.family)


def prompts_and_motions(n: int = N) -> tuple[list[str], list[str]]:
    """The table's prompts in turn, and the motion that each asks for."""
    pool = motion_prompts()
    prompts = [pool[i % len(pool)] for i in range(n)]
    return prompts, [next(name for name in MOTIONS if prompt.endswith(name)) for prompt in prompts]


def video_reference(name: str, run: Run, work: Path, n: int = N) -> StoredFeatures:
    """What is measured of the teacher's clips at full steps, seeds A and B; measured once."""
    file = work / f"{name}-video.safetensors"
    if not file.exists():
        pipe, prompts = run.family.load(), prompts_and_motions(n)[0]
        call = teacher_call(run.family, pipe, run.train.teacher_steps, run.teacher_guidance_scale, f"{name}, seeds")
        features = {}
        for key, seed in (("reference", SEED_A), ("floor", SEED_B)):
            clips = generate(pipe, call, prompts, seed, progress=True, images=begun(run.family, n))[0]
            features |= {f"{key}_{what}": value for what, value in seen_in(clips).items()}
        facts = {"teacher_sha256": base_hash(pipe, run.family), "features": extractor().identity.id}
        work.mkdir(parents=True, exist_ok=True)
        StoredFeatures(features, prompts, facts).save(file)
    return StoredFeatures.load(file)


def begun(family: Family, n: int) -> Tensor | None:
    """The images (n, 3, H, W) in [0, 1] that clips begin with, for a family that continues an image."""
    return first_frames(n, UNSEEN)[0] / 255 if isinstance(family, ImageToVideo) else None


def seen_in(clips: Tensor) -> dict[str, Tensor]:
    """Features of frames and of motion, (N, D), and how much clips move, (N, 1)."""
    frames = frame_features(extractor(), clips, range(len(clips)))
    return {"frames": frames, "motion": motion_features(extractor(), clips), "moves": motion(clips)[:, None].float()}


def video_figures(pipe: DiffusionPipeline, call: PipelineCall, ref: StoredFeatures) -> dict[str, Any]:
    """What the table says of one way to sample."""
    images = begun(call.family, len(ref.prompts))
    clips, cost = generate(pipe, call, ref.prompts, SEED_B, progress=True, images=images)
    row = judged_clips(seen_in(clips), cost, ref)
    if images is not None:
        row |= spans(image_distance=mean_interval(image_distance(clips, to_uint8(images))))
    return row


def judged_clips(seen: Mapping[str, Tensor], cost: Cost, ref: StoredFeatures) -> dict[str, Any]:
    """Excess and motion ratio of clips with these features, in the order of the reference."""
    stored, n = ref.features, len(seen["frames"])
    floor = {name: stored[f"floor_{name}"] for name in seen}
    rows = [
        Sampled(name=role, role=role, features=x["frames"], motion=x["motion"], scores={"motion": x["moves"][:, 0]})
        for role, x in (("teacher", floor), ("student", seen))
    ]
    frames, moved = stored["reference_frames"], stored["reference_motion"]
    against = Reference(stats=Stats.of(frames), features=frames, motion=moved, paired=True, facts={})
    teacher, student = (
        row["metrics"] for row in measured(rows, against, "fd_frames", ("paired",), None, prompts_and_motions(n)[1])
    )
    row: dict[str, Any] = {"n": n, "seeds": [SEED_A, SEED_B]}
    for name, key in DISTANCES.items():
        excess = student["delta_vs_teacher"][key]
        row |= {name: excess["value"], f"{name}_ci95": excess["ci95"], f"{name}_floor": teacher[key]["value"]}
    row |= {"ratio": student["motion_ratio"]["value"], "ratio_ci95": student["motion_ratio"]["ci95"]}
    row |= {"paired": student["paired"]["features"], "calls": cost.calls / cost.batches, "nfe": cost.rows / n}
    return row | {"seconds_per_clip": cost.seconds / n}
