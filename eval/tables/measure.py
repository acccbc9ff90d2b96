"""The README's tables: which rows each has, about the bundled teachers and the students of `configs/tables/*/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.denoise import guided
from stepdistill.core.random import noise_of
from stepdistill.core.solvers import Sampler
from stepdistill.data.bundled import bundled
from stepdistill.evaluation.metrics import straightness
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Copy, LoraSpec
from stepdistill.students.contract import CONTRACT
from stepdistill.students.draw.call import PipelineCall, student_call, student_calls, teacher_call
from stepdistill.students.load import load_student
from stepdistill.students.several import Students
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run
from stepdistill.training.watch import rules
from stepdistill.training.watch.rules import Yardstick
from tables.benchmark import N, Results, data_features, figures, places, prompts, reference
from tables.control import measure_control
from tables.decoding import measure_decoding
from tables.extraction import extracted, folder_of, measure_extraction
from tables.feedback import measure_feedback
from tables.guidance import measure_guidance
from tables.hybrid import measure_hybrid
from tables.hyper_sd import measure_hyper_sd
from tables.lcm_study import measure_lcm
from tables.matrix import measure_families
from tables.memory_at_size import cycle_of, figures_of_cycle, prediction_of_cycle
from tables.multistep import measure_differences
from tables.negative import measure_negative
from tables.new_images import measure_new_images
from tables.recipes import recipes, seconds, step_seconds, trained, warm_start
from tables.render import EARLY, STEPS
from tables.sizes import measure_sizes
from tables.transfer import measure_transfer
from tables.video import measure_video

SEVERAL = "dmd2_several"  # a row of distribution matching, and of several steps
TIMES = {  # steps that take about 2.5, 5, 10, 20 and 40 minutes, with the student that the run starts from
    "tiny-sd": {
        "dmd2": (140, 550, 1350, 3000),
        SEVERAL: (60, 330, 930, 2130),
        "lcm": (180, 360, 720, 1440, 2900),
        "vsd": (85, 320, 800, 1750),
    }
}
WARM = (16, False)  # rank of the extract that a student starts from, and whether it is whitened
WATCHED = {  # runs of DMD2's recipe and of others, and what is wrong with them
    "dmd2": ("dmd2", []),
    "dmd2, critic off": ("dmd2", ["train.optimizers.fake.lr=1e-6"]),
    "dmd2, guidance 20": ("dmd2", ["method.guidance_scale=20"]),
    "dmd2, 30 times the learning rate": ("dmd2", ["train.learning_rate=9e-3"]),
    "lcm": ("lcm", []),
    "vsd": ("vsd", []),
    "vsd, beside the unguided teacher": ("vsd", ["train.teacher_guidance_scale=1"]),  # whose images it tends to
}
WATCHED_STEPS, WATCHED_EVERY = 240, 40
TEACHERS = ("tiny-sd", "tiny-sd3")
VIDEO_TEACHERS = ("tiny-wan",)
TOKEN_TEACHERS = ("tiny-ar",)
OTHERS = {"video": VIDEO_TEACHERS, "decoding": TOKEN_TEACHERS}  # tables that are not of the teachers of images
LARGE = ("sd15", "sdxl", "sd3", "pixart", "wan13b", "flux2_klein")
# of 81 frames and more, or of 1024 x 1024 pixels; predicted alone
LARGER = ("wan13b_480p", "wan5b", "wan14b", "ltx", "flux2_klein_1024", "z_image", "qwen_image", "krea2")


def stock_rows(run: Run, pipe: DiffusionPipeline) -> Iterator[tuple[int, PipelineCall]]:
    """The teacher's stock few-step samplers: DDIM trailing and DPM-Solver++, or Euler with and without shift."""
    w = run.teacher_guidance_scale
    same = run.family.guidance(w) | run.family.arguments()
    for steps in STEPS["teachers"]:
        if not run.family.schedule(pipe.scheduler).straight:
            yield steps, teacher_call(run.family, pipe, steps, w, "DDIM, trailing")
            dpm = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            yield (
                steps,
                PipelineCall("DPM-Solver++ 2M, trailing", dpm, {"num_inference_steps": steps} | same, run.family),
            )
        else:
            yield steps, teacher_call(run.family, pipe, steps, w, "Euler, the teacher's shift")
            plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
            call = {"sigmas": [1 - i / steps for i in range(steps)], "num_inference_steps": steps}
            yield steps, PipelineCall("Euler, no shift", plain, call | same, run.family)


def measure_teacher(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Distance to the data, diversity, and every stock sampler of a teacher."""
    run = load_config(Run, next(iter(recipes(name, "consistency").values())), [])
    ref, pipe = reference(name, run, work), run.family.load()
    facts = {
        "teacher": name,
        "hash": ref.facts["teacher_sha256"][:16],
        "guidance": run.teacher_guidance_scale,
    }

    def full() -> dict[str, Any]:
        data, floor = data_features(0), ref.features["floor"]
        return {
            "n": N,
            "steps": run.train.teacher_steps,
            "parameters": sum(p.numel() for p in run.family.network(pipe).parameters()),
            "training": json.loads((bundled(name) / "training.json").read_text()),
            "fd_to_data": frechet(Stats.of(floor), Stats.of(data)),
            "fd_data_to_data": frechet(Stats.of(data_features(1)), Stats.of(data)),
            "floor": frechet(Stats.of(floor), Stats.of(ref.features["reference"])),
            "diversity_of_data": feature_diversity(floor, places(ref)) / feature_diversity(data, places(ref)),
        }

    results.once(f"{name}/full", full, **facts)
    for steps, row in stock_rows(run, pipe):
        results.once(f"{name}/{row.name}/{steps}", partial(figures, pipe, row, ref), **facts, steps=steps)


def measure_students(table: str, name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Train each student that is missing, and sample it in few steps through plain Diffusers."""
    if table == "distribution" and not rows:
        measure_unguided(name, results, work)
    files = recipes(name, table)
    if table == "multistep":
        files[SEVERAL] = recipes(name, "distribution")[SEVERAL]
    for method, file in files.items():
        if rows and method not in rows:
            continue
        run, out = load_config(Run, file, []), trained(file)
        ref, pipe = reference(name, run, work), run.family.load()
        calls = student_calls(run.family, run.method, pipe, STEPS[table])
        sampled = {str(steps): call for steps, call in calls.items()}
        if table in EARLY:
            sampled[f"1 from {EARLY[table]:g}"] = early_row(run, pipe, EARLY[table])
        loaded = load_student(pipe, out)
        drawer = loaded if isinstance(loaded, Students) else pipe
        if drawer is pipe and not isinstance(run.method.roles()["student"], Copy):
            pipe.fuse_lora()  # the same student in two thirds of the time
        facts = {
            "teacher": name,
            "config": config_digest(run),
            "train_steps": run.train.max_train_steps,
            "train_seconds": round(seconds(out) + (seconds(Path(run.lora.init_from)) if run.lora.init_from else 0)),
        }
        for key, row in sampled.items():
            steps = int(key.split()[0])
            results.once(f"{name}/{method}/{key}", partial(figures, drawer, row, ref), **facts, steps=steps)
        if table == "reflow":
            results.once(f"{name}/{method}/paths", partial(bends, run, pipe), **facts)


def measure_multistep(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """The students of several steps, and what options change."""
    wanted = name == "tiny-sd" and (not rows or "warm" in rows)
    if wanted and not (folder_of(work, *WARM) / CONTRACT).exists():
        extracted(work, *WARM)  # the start of one of them
    measure_students("multistep", name, results, work, rows)
    measure_differences(name, results, work, rows)


def bends(run: Run, pipe: DiffusionPipeline) -> dict[str, Any]:
    """How straight the paths are of the teacher that was followed, and of its student in `pipe`."""
    before, count = run.family.load(), 128
    data: Any = run.data
    scale: Any = run.method.guidance_scale or data.guidance_scale
    row: dict[str, Any] = {"n": count, "steps": 32, "guidance_scale": scale, "seeds": [SEED_B]}
    schedule, kind = run.family.schedule(before.scheduler), run.family.kind(before)
    shape = run.family.latent_shape(before, *run.family.native_size(before))
    noise = torch.stack([noise_of(SEED_B, i, shape) for i in range(count)])
    cond, null = run.family.condition(before, prompts(count)), run.family.unconditional(before)
    for label, each, w in (("teacher", before, scale), ("student", pipe, 1.0)):
        net = run.family.network(each)
        alone = Denoiser(Backbone(net, LoraSpec(), ()), TEACHER, schedule, kind, run.family.call)
        way = straightness.paths(guided(alone, null, w), schedule, noise, cond, row["steps"])
        row[label] = {"share": way.share.tolist(), "deviation": way.deviation.tolist(), "cost": way.cost}
        size = sum(p.numel() for key, p in net.named_parameters() if "lora_" not in key)  # they merge into the rest
        row[label] |= {"straightness": way.straightness, "parameters": size}
    return row


def measure_unguided(name: str, results: Results, work: Path) -> None:
    """The teacher without guidance: the distribution that variational score distillation tends to."""
    run = load_config(Run, next(iter(recipes(name, "distribution").values())), [])
    ref, pipe = reference(name, run, work), run.family.load()
    row = teacher_call(run.family, pipe, run.train.teacher_steps, 1.0, "teacher, unguided")
    results.once(f"{name}/unguided/{run.train.teacher_steps}", partial(figures, pipe, row, ref), teacher=name)


def early_row(run: Run, pipe: DiffusionPipeline, start: float) -> PipelineCall:
    """One step of the loaded student from an earlier time than the noisiest, whatever its contract says."""
    scheduler, call = run.family.scheduler(pipe, Sampler((start,), eta=1.0))
    call |= run.family.guidance(1.0) | run.family.arguments()
    return PipelineCall(f"student, from {start:g}", scheduler, call, run.family)


def measure_time(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Excess as a student trains on: one run a method, at a constant rate, measured on its way."""
    for method, counts in TIMES.get(name, {}).items():
        if rows and method not in rows:
            continue
        file = recipes(name, "distribution")[method]
        for count in counts:
            out = work / "time" / file.stem
            overrides = [f"train.output_dir={out}", f"train.max_train_steps={count}", "train.lr_scheduler=constant"]
            run = load_config(Run, file, [*overrides, "train.resume_from_checkpoint=latest"])
            measure = partial(measure_later, run, reference(name, run, work))
            results.once(f"{name}/{method}/{count}", measure, teacher=name, config=config_digest(run))
        results.once(f"{name}/{method}/pace", partial(pace, file), teacher=name)


def measure_later(run: Run, ref: StoredFeatures) -> dict[str, Any]:
    """Train a run on to its last step, and draw in one, as its contract says.

    Then once more: a student of several numbers of steps in the largest, any other from an earlier time.
    """
    warm_start(run)
    out = distill(run)
    pipe = run.family.load()
    load_student(pipe, out)
    pipe.fuse_lora()
    row = figures(pipe, student_call(run.family, run.method, pipe, 1), ref)
    if (most := max(run.method.trained_steps, default=1)) > 1:
        return row | {"several": {most: figures(pipe, student_call(run.family, run.method, pipe, most), ref)}}
    early = figures(pipe, early_row(run, pipe, EARLY["distribution"]), ref)
    return row | {"early": early["excess"], "early_ci95": early["ci95"]}


def pace(file: Path) -> dict[str, float]:
    """Seconds of a step of a config's student in the table of students, and of all training before it."""
    start, out = load_config(Run, file, []).lora.init_from, trained(file)
    return {"step_seconds": mean(step_seconds(out)), "start_seconds": seconds(Path(start)) if start else 0.0}


def measure_watch(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Whether the watch warns of runs that are wrong, when, and whether it is quiet otherwise."""
    for label, (method, wrong) in WATCHED.items():
        if name != "tiny-sd" or (rows and label not in rows):
            continue
        out = work / "watch" / label.replace(", ", "-").replace(" ", "_")
        overrides = [
            f"train.output_dir={out}",
            f"train.max_train_steps={WATCHED_STEPS}",
            "train.overwrite_output_dir=true",
        ]
        overrides += [f"train.validation_steps={WATCHED_EVERY}", f"train.validation_prompts={json.dumps(prompts(8))}"]
        run = load_config(Run, recipes(name, "distribution")[method], [*overrides, *wrong])
        results.once(f"{name}/{label}", partial(watched, run), teacher=name, config=config_digest(run))


def watched(run: Run) -> dict[str, Any]:
    """Train, and find in the run's own files the first step at which the watch warned, and of what."""
    warm_start(run)
    out = distill(run)
    stored = Yardstick.read(out / "watch.json")
    assert stored is not None
    spread = stored.spread
    past = rules.history(rules.read_metrics(out / "metrics.jsonl"), spread)
    looks = 1 + WATCHED_STEPS // WATCHED_EVERY
    alarms = {k: [rules.title(n) for n in past if rules.alarming(n, past[n][: k + 1], spread[n])] for k in range(looks)}
    fired = next((k for k, names in alarms.items() if names), None)
    row = {} if fired is None else {"fired": fired * WATCHED_EVERY, "signs": alarms[fired]}
    return {"steps": WATCHED_STEPS, "every": WATCHED_EVERY, "samples": run.train.watch_samples} | row


def measure_memory(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """A cycle of DMD2 at each network's real size: its memory, predicted and measured, SDXL's with 13 GB."""
    figures = dict.fromkeys(LARGE, figures_of_cycle) | dict.fromkeys(LARGER, prediction_of_cycle)
    for label, of in figures.items() if name == TEACHERS[0] else ():
        if not rows or label in rows:
            results.once(label, partial(of, label), config=config_digest(cycle_of(label).run))


TABLES: dict[str, Callable[[str, Results, Path, Sequence[str]], None]] = {
    "teachers": measure_teacher,
    "consistency": partial(measure_students, "consistency"),
    "distribution": partial(measure_students, "distribution"),
    "multistep": measure_multistep,
    "reflow": partial(measure_students, "reflow"),
    "extraction": measure_extraction,
    "guidance": measure_guidance,
    "negative": measure_negative,
    "control": measure_control,
    "decoding": measure_decoding,
    "feedback": measure_feedback,
    "hyper_sd": measure_hyper_sd,
    "new_images": measure_new_images,
    "hybrid": measure_hybrid,
    "lcm_study": measure_lcm,
    "sizes": measure_sizes,
    "time": measure_time,
    "transfer": measure_transfer,
    "video": measure_video,
    "watch": measure_watch,
    "families": measure_families,
    "memory": measure_memory,
}


def measure(table: str, results: Path, threads: int, only: str | None = None, rows: Sequence[str] = ()) -> None:
    """Measure a table for every bundled teacher, or for one; of students all, or those of some configs."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # a quarter of the time on a CPU
    for name in [only] if only else OTHERS.get(table, TEACHERS):
        TABLES[table](name, Results(results / f"{table}.json"), Path("runs/tables"), rows)
