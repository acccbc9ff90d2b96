"""The embedded benchmark: rows of figures about the bundled teachers and the students of `configs/tables/*/`."""

from __future__ import annotations

import fcntl
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stepdistill import config, report, student
from stepdistill.data import Partition
from stepdistill.evaluate import SEED_A, SEED_B, Reference, Row, generate, network_of
from stepdistill.metrics.features import EfficientNetLite0
from stepdistill.metrics.frechet import Stats, diversity, excess, frechet, paired
from stepdistill.multi import Students, generate_each, join
from stepdistill.run import Run, distill
from stepdistill.sampling import Sampler
from stepdistill.schedule import DiscreteVP
from stepdistill.tiny import emoji
from stepdistill.tiny.render import EARLY, STEPS

N = 2048
SHIPPED = 256  # rows of the features that the quickstart compares with
HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs" / "tables"
TEACHERS = {"tiny-sd": "sd.StableDiffusion", "tiny-sd3": "sd3.StableDiffusion3"}


def prompts(n: int = N) -> list[str]:
    """The benchmark's prompts: the subgroups with at least 16 drawings, in turn."""
    pool = emoji.prompts()
    return [pool[i % len(pool)] for i in range(n)]


@cache
def extractor() -> EfficientNetLite0:
    """The benchmark's features, 64 pixels."""
    return EfficientNetLite0()


@cache
def data_features(seed: int) -> Tensor:
    """Features of drawings that belong to each prompt, drawn and augmented at random."""
    rng, source = random.Random(seed), emoji.sheet()
    pool: dict[str, list[emoji.Drawing]] = {}
    for drawing in emoji.subjects():
        pool.setdefault(drawing.subgroup, []).append(drawing)
    made = emoji.pixels([emoji.picture(source, rng.choice(pool[prompt]), rng) for prompt in prompts()])
    return extractor()((made * 127.5 + 127.5).round().to(torch.uint8))


def reference(name: str, run: Run, work: Path) -> Reference:
    """Features of the teacher at full steps, seeds A and B; measured once, a part of them shipped."""
    file = work / f"{name}-reference.safetensors"
    if file.exists():
        return Reference.load(file)
    pipe = run.family.load()
    row = report.teacher_row(run, pipe, run.train.teacher_steps, f"{name}, seeds")
    made = {
        key: extractor()(generate(pipe, row, prompts(), seed, progress=True)[0])
        for key, seed in (("reference", SEED_A), ("floor", SEED_B))
    }
    facts = {
        "teacher": name,
        "teacher_sha256": student.base_hash(pipe, run.family),
        "teacher_steps": str(run.train.teacher_steps),
        "teacher_guidance_scale": str(run.train.teacher_guidance_scale),
        "features": extractor().id,
    }
    found = Reference(made, prompts(), facts)
    work.mkdir(parents=True, exist_ok=True)
    found.save(file)
    Reference({k: v[:SHIPPED] for k, v in made.items()}, prompts(SHIPPED), facts).save(
        HERE / f"{name}-reference.safetensors"
    )
    return Reference.load(file)


def stock_rows(run: Run, pipe: DiffusionPipeline) -> Iterator[tuple[int, Row]]:
    """The teacher's stock few-step samplers: DDIM trailing and DPM-Solver++, or Euler with and without shift."""
    same = {"guidance_scale": run.train.teacher_guidance_scale} | run.family.arguments()
    for steps in STEPS["teachers"]:
        if isinstance(run.family.schedule(pipe.scheduler), DiscreteVP):
            yield steps, report.teacher_row(run, pipe, steps, "DDIM, trailing")
            dpm = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            yield (
                steps,
                Row("DPM-Solver++ 2M, trailing", dpm, {"num_inference_steps": steps} | same),
            )
        else:
            yield steps, report.teacher_row(run, pipe, steps, "Euler, the teacher's shift")
            plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
            call = {"sigmas": [1 - i / steps for i in range(steps)], "num_inference_steps": steps}
            yield steps, Row("Euler, no shift", plain, call | same)


def figures(drawer: DiffusionPipeline | Students, row: Row, ref: Reference) -> dict[str, Any]:
    """Excess, paired distance, diversity over the teacher's, and cost of one way to sample."""
    if isinstance(drawer, Students):
        images, cost = generate_each(drawer, ref.prompts, SEED_B, row)
        groups = [len(places) for places in drawer.route(ref.prompts).values()]
    else:
        images, cost = generate(drawer, row, ref.prompts, SEED_B, progress=True)
        groups = [len(images)]
    made, n = extractor()(images), len(images)
    places = torch.tensor([sorted(set(ref.prompts)).index(prompt) for prompt in ref.prompts])
    interval = excess(made, ref.features["reference"], ref.features["floor"])
    batches = sum(-(-group // 64) for group in groups)
    return {
        "n": n,
        "seeds": [SEED_A, SEED_B],
        "excess": interval.value,
        "ci95": [interval.low, interval.high],
        "paired": paired(made, ref.features["floor"]),
        "diversity": diversity(made, places) / diversity(ref.features["floor"], places),
        "calls": cost.calls / batches,
        "nfe": cost.rows / n,
        "seconds_per_image": cost.seconds / n,
    }


class Results:
    """`eval/results/NAME.json`: rows by key, added one by one by any number of processes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield json.loads(self.file.read_text()) if self.file.exists() else {}

    def once(self, key: str, make: Callable[[], Mapping[str, Any]], **facts: object) -> None:
        """Measure a row unless it is there already with the same facts."""
        with self._locked() as rows:
            if key in rows and all(rows[key].get(name) == value for name, value in facts.items()):
                return
        row = {**facts, **make()}
        with self._locked() as rows:
            rows[key] = row
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
            part.replace(self.file)
        print(f"{key}: {json.dumps(row)}", flush=True)


def recipes(name: str, table: str) -> dict[str, Path]:
    """The student configs of one teacher in one table, by method."""
    found = sorted((CONFIGS / table).glob(f"{name.replace('-', '_')}_*.yaml"))
    if not found:
        raise SystemExit(f"no config {CONFIGS / table}/{name.replace('-', '_')}_*.yaml")
    return {file.stem.removeprefix(name.replace("-", "_") + "_"): file for file in found}


def measure_teacher(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Distance to the data, diversity, and every stock sampler of a teacher."""
    run = config.load(Run, next(iter(recipes(name, "consistency").values())), [])
    ref, pipe = reference(name, run, work), run.family.load()
    places = torch.tensor([sorted(set(ref.prompts)).index(prompt) for prompt in ref.prompts])
    facts = {
        "teacher": name,
        "hash": ref.facts["teacher_sha256"][:16],
        "guidance": run.train.teacher_guidance_scale,
    }

    def full() -> dict[str, Any]:
        data, floor = data_features(0), ref.features["floor"]
        return {
            "n": N,
            "steps": run.train.teacher_steps,
            "parameters": sum(p.numel() for p in network_of(pipe).parameters()),
            "training": json.loads((HERE / name / "training.json").read_text()),
            "fd_to_data": frechet(Stats.of(floor), Stats.of(data)),
            "fd_data_to_data": frechet(Stats.of(data_features(1)), Stats.of(data)),
            "floor": frechet(Stats.of(floor), Stats.of(ref.features["reference"])),
            "diversity_of_data": diversity(floor, places) / diversity(data, places),
        }

    results.once(f"{name}/full", full, **facts)
    for steps, row in stock_rows(run, pipe):
        results.once(f"{name}/{row.name}/{steps}", partial(figures, pipe, row, ref), **facts, steps=steps)


def measure_students(table: str, name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """Train each student that is missing, and sample it in few steps through plain Diffusers."""
    for method, file in recipes(name, table).items():
        if rows and method not in rows:
            continue
        run, out = config.load(Run, file, []), trained(file)
        ref, pipe = reference(name, run, work), run.family.load()
        sampled = {str(steps): report.student_row(run, pipe, steps) for steps in STEPS[table]}
        if table in EARLY:
            scheduler, call = run.family.scheduler(pipe, Sampler((EARLY[table],), eta=1.0))
            call |= {"guidance_scale": 1.0} | run.family.arguments()
            sampled[f"1 from {EARLY[table]:g}"] = Row(f"student, from {EARLY[table]:g}", scheduler, call)
        loaded = student.load_student(pipe, out)
        drawer = loaded if isinstance(loaded, Students) else pipe
        if drawer is pipe:
            pipe.fuse_lora()  # the same student in two thirds of the time
        facts = {
            "teacher": name,
            "config": config.digest(run),
            "train_steps": run.train.max_train_steps,
            "train_seconds": round(seconds(out) + (seconds(Path(run.lora.init_from)) if run.lora.init_from else 0)),
        }
        for key, row in sampled.items():
            steps = int(key.split()[0])
            results.once(f"{name}/{method}/{key}", partial(figures, drawer, row, ref), **facts, steps=steps)


def trained(file: Path) -> Path:
    """The student folder of a config, made where it is missing, after the one that it starts from."""
    run = config.load(Run, file, [])
    out = Path(run.train.output_dir)
    if not (out / student.CONTRACT).exists():
        for other in CONFIGS.glob("*/*.yaml"):
            if run.lora.init_from and config.load(Run, other, []).train.output_dir == run.lora.init_from:
                trained(other)
        if not isinstance(run.data, Partition):
            distill(config.load(Run, file, ["train.resume_from_checkpoint=latest"]))
            return out
        parts = [Path(f"{out}-part-{k}") for k in range(run.data.students)]
        for k, part in enumerate(parts):
            own = [f"data.student={k}", f"train.output_dir={part}", "train.resume_from_checkpoint=latest"]
            if not (part / student.CONTRACT).exists():
                distill(config.load(Run, file, own))
        join(out, parts)
    return out


def seconds(folder: Path) -> float:
    """What the steps of a run, or of the runs of several students, took in all."""
    lines = [line for file in folder.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    return sum(json.loads(line).get("seconds", 0.0) for line in lines)


TABLES: dict[str, Callable[[str, Results, Path, Sequence[str]], None]] = {
    "teachers": measure_teacher,
    "consistency": partial(measure_students, "consistency"),
    "distribution": partial(measure_students, "distribution"),
}


def measure(table: str, results: Path, threads: int, only: str | None = None, rows: Sequence[str] = ()) -> None:
    """Measure a table for every bundled teacher, or for one; of students all, or those of some configs."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # a quarter of the time on a CPU
    for name in [only] if only else TEACHERS:
        TABLES[table](name, Results(results / f"{table}.json"), Path("runs/tables"), rows)
